"""Pruning while training: gradients, importance, choices, the transformation and its state."""
