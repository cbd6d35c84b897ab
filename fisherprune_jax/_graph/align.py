"""Brings an array from the entries that it holds to those wanted."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fisherprune_jax._graph import compat, sets
from fisherprune_jax._graph.boxes import Box
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.sizes import runs
from fisherprune_jax._types import Size


def align(array: jax.Array, held: Box, wanted: Box, ev: Evaluation) -> jax.Array:
  """Selects wanted entries axis by axis; missing ones become zeros."""
  for axis, (have, want) in enumerate(zip(held, wanted, strict=True)):
    if have is not want:
      array = _along(array, axis, have, want, ev)
  return array


def _along(array: jax.Array, axis: int, have: Set, want: Set, ev: Evaluation) -> jax.Array:
  if compat.is_static_size(have.size):
    source = sources(ev.index(have), ev.index(want), have.size)
    return array if source is None else select(array, axis, source)
  # Positions along a symbolic axis cannot be listed, but those of its factors can.
  pairs = _factors(have, want)
  outer, inner = array.shape[:axis], array.shape[axis + 1 :]
  array = array.reshape(*outer, *(ev.width(a) for a, _ in pairs), *inner)
  for at, (a, b) in enumerate(pairs):
    if not (a.is_all and b.is_all):
      array = _along(array, axis + at, a, b, ev)
  return array.reshape(*outer, ev.width(want), *inner)


def _factors(have: Set, want: Set) -> list[tuple[Set, Set]]:
  """The factors of two sets of one symbolic size, in pairs."""
  found = runs([f.size for f in have.factors], [f.size for f in want.factors])
  if len(found) > 1:
    return [(sets.outer(have.factors[i]), sets.outer(want.factors[j])) for i, j in found]
  finest = [f.size for f in max(have.factors, want.factors, key=len)]
  pairs = list(zip(sets.split(have, finest), sets.split(want, finest), strict=True))
  if any(sets.outer(side) is not s for side, s in zip(zip(*pairs, strict=True), (have, want), strict=True)):
    raise compat.UndecidedSize(
      f"Entries of an axis of size {have.size} are grouped in two ways that do not fit."
    )
  return pairs


def sources(have: np.ndarray | None, want: np.ndarray | None, size: Size) -> np.ndarray | None:
  """Where wanted positions lie among held ones, or -1; None if both are the same."""
  if have is None and want is None:
    return None
  have = np.arange(size) if have is None else have
  want = np.arange(size) if want is None else want
  if np.array_equal(have, want):
    return None
  place = np.full(size, -1)
  place[have] = np.arange(have.size)
  return place[want]


def select(array: jax.Array, axis: int, source: np.ndarray, fill: jax.Array | None = None) -> jax.Array:
  """The entries at ``source``, where -1 gives ``fill`` (zero): a slice or pad if even, else a gather.

  XLA merges a pad on both sides of one entry with a later cumulative sum, and gets it wrong. So one entry is gathered,
  not padded. It is sliced in two steps, whose gradients pad one side at a time.
  """
  there = np.flatnonzero(source >= 0)
  if there.size == source.size and (stride := _even(source)):
    if source.size == 1 and 0 < source[0] < array.shape[axis] - 1:
      pair = lax.slice_in_dim(array, int(source[0]), int(source[0]) + 2, axis=axis)
      return lax.slice_in_dim(pair, 0, 1, axis=axis)
    return lax.slice_in_dim(array, int(source[0]), int(source[-1]) + 1, stride, axis)
  in_order = there.size == array.shape[axis] > 1 and np.array_equal(source[there], np.arange(there.size))
  if in_order and (stride := _even(there)):
    config = [(0, 0, 0)] * array.ndim
    config[axis] = (int(there[0]), int(source.size - 1 - there[-1]), stride - 1)
    return lax.pad(array, jnp.zeros((), array.dtype) if fill is None else fill, config)
  if not there.size:
    return jnp.full(
      (*array.shape[:axis], source.size, *array.shape[axis + 1 :]), 0 if fill is None else fill, array.dtype
    )
  last = array.shape[axis]
  if fill is not None:  # one more entry, for missing ones
    array = lax.pad(array, fill, [(0, int(at == axis), 0) for at in range(array.ndim)])
  return _gather(array, axis, np.where(source >= 0, source, last))


def _gather(array: jax.Array, axis: int, index: np.ndarray) -> jax.Array:
  """Entries at static positions; zero beyond the end."""
  others = tuple(at for at in range(array.ndim) if at != axis)
  return lax.gather(
    array,
    jnp.asarray(index[:, None], jnp.int32),
    lax.GatherDimensionNumbers(others, (axis,), (axis,)),
    tuple(1 if at == axis else n for at, n in enumerate(array.shape)),
    mode="fill",
    fill_value=0,
  )


def _even(positions: np.ndarray) -> int:
  """The step of even, ascending positions; else 0."""
  steps = np.diff(positions)
  if not positions.size or (steps.size and (steps[0] <= 0 or (steps != steps[0]).any())):
    return 0
  return int(steps[0]) if steps.size else 1
