"""Pruning while training: gradients, signals, choices, the transformation and its state."""
