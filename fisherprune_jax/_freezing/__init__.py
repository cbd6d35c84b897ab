"""The serving form of a network: arrays that depend on variables alone are computed once, affine maps are folded."""
