"""One-shot pruning: parameters refitted by least squares, and the importance that comes of it."""
