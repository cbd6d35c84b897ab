"""Which axis of each argument leads over examples."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fisherprune_jax.errors import describe
from fisherprune_jax.model import abstract


def map_with_axes(function: Callable[[Any, int | None], Any], args: Any, batch_axes: Any) -> Any:
  """Maps ``function(array, axis)`` over ``args``, with ``batch_axes`` like ``jax.vmap``'s ``in_axes``."""
  axes = batch_axes if _is_axis(batch_axes) else tuple(batch_axes)
  full = jax.tree.broadcast(axes, args, is_leaf=_is_axis)
  return jax.tree.map(lambda axis, x: function(x, axis), full, args, is_leaf=_is_axis)


def _is_axis(x: Any) -> bool:
  return x is None or isinstance(x, int)


def batch_size(args: Sequence[Any], batch_axes: Any) -> int:
  """The number of examples, by the first argument that has an example axis."""
  found: list[tuple[Any, int]] = []

  def note(x: Any, axis: int | None) -> None:
    if axis is not None:
      found.append((x, axis))

  map_with_axes(note, abstract(args), batch_axes)
  if not found or len(found[0][0].shape) <= found[0][1]:
    what = f"axis {found[0][1]} of {describe(found[0][0])}" if found else "no argument with one"
    raise ValueError(
      f"The first array of `args` must lead with the example axis (compact takes batch_axes), got {what}. "
      "Pass a batch, such as x[None]."
    )
  example, axis = found[0]
  return example.shape[axis]
