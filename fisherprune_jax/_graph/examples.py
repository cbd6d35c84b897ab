"""The example axis of each argument."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fisherprune_jax._errors import describe, require
from fisherprune_jax._graph.variables import abstract
from fisherprune_jax._types import BatchAxes, PyTree, Shape, Size


def map_with_axes(function: Callable[[Any, int | None], Any], args: PyTree, batch_axes: BatchAxes) -> PyTree:
  """Maps ``function(array, axis)``; the axes are like vmap's in_axes."""
  axes = tuple(batch_axes) if isinstance(batch_axes, list) else batch_axes
  try:
    full = jax.tree.broadcast(axes, args, is_leaf=_is_axis)
  except ValueError as error:
    raise ValueError(
      f"batch_axes must fit the arguments like jax.vmap's in_axes, got {batch_axes!r} for {len(args)} of them. "
      "Give one integer (or None) for all, or one for each."
    ) from error
  require(all(map(_is_axis, jax.tree.leaves(full))), "batch_axes must hold integers or None", batch_axes)
  return jax.tree.map(lambda axis, x: function(x, _from_front(axis, x)), full, args, is_leaf=_is_axis)


def example_axes(args: Sequence[PyTree], batch_axes: BatchAxes) -> list[int | None]:
  found: list[int | None] = []

  def note(x: Any, axis: int | None) -> None:
    found.append(axis if axis is not None and axis < len(getattr(x, "shape", ())) else None)

  map_with_axes(note, tuple(args), batch_axes)
  return found


def _is_axis(x: Any) -> bool:
  return x is None or isinstance(x, int)


def _from_front(axis: int | None, x: Any) -> int | None:
  return axis + len(x.shape) if axis is not None and -len(x.shape) <= axis < 0 else axis


def batch_size(args: Sequence[PyTree], batch_axes: BatchAxes) -> int:
  """The number of examples, by the first argument with an example axis; 1 without any."""
  found: list[tuple[Size, int]] = []

  def note(x: Any, axis: int | None) -> None:
    if axis is not None:
      found.append((x, axis))

  map_with_axes(note, abstract(args), batch_axes)
  if not found and not jax.tree.leaves(batch_axes):
    return 1
  if not found or not 0 <= found[0][1] < len(found[0][0].shape):
    what = f"axis {found[0][1]} of {describe(found[0][0])}" if found else "no argument with one"
    raise ValueError(
      f"The first array of `args` must lead with the example axis, got {what}. Pass a batch, such as x[None], or say "
      "where examples lie: batch_axes=(None, 0) for a key before the batch, 1 for time-major input, None where no "
      "axis is one of examples (FLOPs are then per call)."
    )
  sizes = [x.shape[axis] for x, axis in found if 0 <= axis < len(x.shape)]
  _check(found[0][0], sizes, batch_axes)
  return sizes[0]


def _check(first: Any, sizes: Shape, batch_axes: BatchAxes) -> None:
  """Raises if the first array visibly has no example axis."""
  require(sizes[0] != 0, "The batch must hold at least one example", 0)
  if len(set(sizes)) > 1 and not _is_axis(batch_axes):
    raise ValueError(
      f"Example axes must have one length, got {sizes} with batch_axes={batch_axes!r}. Say None for arguments "
      "without examples."
    )
  if first.dtype == np.uint32 and first.shape in ((2,), (4,)) and len(set(sizes)) > 1:
    raise ValueError(
      f"The first array of `args` must lead with the example axis, got {describe(first)}, a random key by its looks, "
      f"beside {sizes[1:]} examples. Say batch_axes=(None, 0)."
    )
