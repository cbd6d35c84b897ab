"""Pruning during training: mask gradients, importance, selection, the Optax transformation and its state."""
