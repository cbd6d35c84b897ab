"""``fp.Pruner``: pruning that leaves the model, the loss function and the training script as they are."""
