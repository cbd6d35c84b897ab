"""The cost of masked networks."""
