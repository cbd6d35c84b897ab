"""Names for types that Python has no words for."""

from collections.abc import Hashable
from typing import Any, TypeAlias

PyTree: TypeAlias = Any
"""A JAX pytree: arrays in dictionaries, lists, tuples and what else is registered, however deep."""

Masks: TypeAlias = PyTree
"""A tree whose leaves have one entry per feature, ``(..., C)``; leading axes are stacks. 0/1 float32 if it is the masks."""

MaskGrads: TypeAlias = PyTree
"""A tree like the masks with an example axis, ``(..., B, C)``."""

AxisNames: TypeAlias = Hashable
"""A mapped axis (``pmap``, ``vmap``, ``shard_map``), a tuple of them, or None."""
