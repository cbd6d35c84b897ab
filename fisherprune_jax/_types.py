"""Type aliases."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

PyTree: TypeAlias = Any
"""A JAX pytree."""

Masks: TypeAlias = PyTree
"""A tree with one entry per feature, ``(..., C)``; leading axes are stacks. Masks themselves are 0/1, float32."""

MaskGrads: TypeAlias = PyTree
"""A tree like the masks with an example axis, ``(..., B, C)``."""

AxisNames: TypeAlias = Hashable
"""A mapped axis (``pmap``, ``vmap``, ``shard_map``), a tuple of them, or None."""

ApplyFn: TypeAlias = Callable[..., PyTree]
"""``apply_fn(variables, *args)``, such as ``model.apply``."""

Picker: TypeAlias = Callable[[PyTree], PyTree]
"""Picks a part of a tree: ``lambda out: out[1]``."""

Progress: TypeAlias = Callable[[Sequence[Any]], Iterable[Any]]
"""Shows progress, like ``rich.progress.track`` and ``tqdm.tqdm``: takes a sequence, and yields its items."""

BatchAxes: TypeAlias = PyTree
"""Example axes, like ``jax.vmap``'s ``in_axes``: an integer or None for all arguments, or one for each."""

Array: TypeAlias = jax.Array | np.ndarray
"""An array on a device or on the host."""

Size: TypeAlias = Any
"""An integer, or an expression of symbols (``jax.export.symbolic_shape``)."""

Shape: TypeAlias = Sequence[Size]
"""The sizes of an array's axes."""
