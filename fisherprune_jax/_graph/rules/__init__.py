"""The rules, by family: one spec per primitive. Importing this registers them."""

from fisherprune_jax._graph.rules import contraction as contraction
from fisherprune_jax._graph.rules import elementwise as elementwise
from fisherprune_jax._graph.rules import indexing as indexing
from fisherprune_jax._graph.rules import linalg as linalg
from fisherprune_jax._graph.rules import movement as movement
from fisherprune_jax._graph.rules import reduction as reduction
from fisherprune_jax._graph.rules import reshaping as reshaping
from fisherprune_jax._graph.rules import stacking as stacking
from fisherprune_jax._graph.rules import updating as updating
from fisherprune_jax._graph.rules.opaque import spec_of as spec_of
from fisherprune_jax._graph.rules.opaque import unknown as unknown
