"""Primitives that run programs. Importing this registers them."""

from fisherprune_jax._graph.control import branches as branches
from fisherprune_jax._graph.control import calls as calls
from fisherprune_jax._graph.control import custom as custom
from fisherprune_jax._graph.control import loops as loops
from fisherprune_jax._graph.control import solves as solves
