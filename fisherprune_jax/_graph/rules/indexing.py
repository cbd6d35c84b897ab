"""Gathers and slices, at positions known when traced, or later."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.rules.movement import picked
from fisherprune_jax._graph.rules.naming import mixed_of, side, sized
from fisherprune_jax._graph.spec import Bind, Factor, Sizes, Spec


def gather(node: Node, infos: Sequence[Info]) -> Spec:
  """``v c, i -> i c``: axes that slices span are elementwise; a single indexed one is summed over, several are indivisible."""
  numbers, slices = node.params["dimension_numbers"], node.params["slice_sizes"]
  if (picks := _known_picks(node, infos[1].known)) is not None:
    return picked(node, picks)
  (operand, indices), out = (value.shape for value in node.ins), node.outs[0].shape
  outs: list[Factor] = [f"o{i}" for i in range(len(out))]
  batch = [at for at in range(len(out)) if at not in numbers.offset_dims]
  of_indices: list[Factor] = [outs[at] for at in batch]
  ins: list[Factor] = [f"s{i}" for i in range(len(operand))]
  gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
  kept = [axis for axis in range(len(operand)) if axis not in gone]
  for axis, at in zip(kept, numbers.offset_dims, strict=True):
    if slices[axis] == operand[axis]:  # an index there can only be 0
      ins[axis] = outs[at]
  for axis, index_axis in zip(
    numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
  ):
    ins[axis] = of_indices[index_axis]
  fill = node.params["fill_value"]
  indexed = _indexed(node, ins)
  return Spec(
    ins=(tuple(ins), (*of_indices, None) if len(indices) else ()),
    outs=(tuple(outs),),
    sizes=sized((tuple(ins), operand), (tuple(outs), out)),
    kills=frozenset({0}) if indexed and fill in (None, 0) else frozenset(),
    neutral=frozenset({1}),
    indexed=indexed,
    alive=frozenset(outs) if fill not in (None, 0) else frozenset(),
    whole=frozenset(f for f in ins if f not in outs and f != indexed)
    | frozenset(
      outs[at] for axis, at in zip(kept, numbers.offset_dims, strict=True) if ins[axis] != outs[at]
    ),
    opaque="a gather along the masked axis",
    bind=_bind_gather(tuple(ins), indexed),
  )


def _indexed(node: Node, ins: Sequence[Factor]) -> Factor | None:
  """The factor of the only axis that is indexed, if single entries of it are picked."""
  numbers = node.params["dimension_numbers"]
  single = len(numbers.start_index_map) == 1 and numbers.collapsed_slice_dims == numbers.start_index_map
  return ins[numbers.start_index_map[0]] if single else None


def _known_picks(node: Node, indices: np.ndarray | None) -> list[np.ndarray | None] | None:
  """What a gather along one axis selects, if its indices are known: ``x[:, i]``."""
  numbers, slices, shape = node.params["dimension_numbers"], node.params["slice_sizes"], node.ins[0].shape
  if indices is None or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
    return None
  (axis,) = numbers.start_index_map
  others = tuple(at for at in range(len(shape)) if at != axis)
  if any(slices[at] != shape[at] for at in others):
    return None
  if numbers.collapsed_slice_dims != (axis,) or indices.ndim != 2 or numbers.offset_dims != others:
    return None
  chosen = indices[:, 0]
  if not ((chosen >= 0) & (chosen < shape[axis])).all():
    return None
  return [chosen if at == axis else None for at in range(len(shape))]


def renumbered(node: Node, indices: jax.Array, places: np.ndarray, count: int) -> tuple[jax.Array, jax.Array]:
  """Indices into the live entries of an axis, and which of them point to none; both are only looked up.

  Args:
    node: the gather.
    indices: indices into all entries, with a last axis of one.
    places: for each entry its place among the live ones; -1 for none.
    count: how many are live: an index out of range stays so.
  """

  def look_up(table: np.ndarray, outside: Any) -> jax.Array:
    numbers = lax.GatherDimensionNumbers((), (0,), (0,))
    mode = node.params["mode"]
    return lax.gather(jnp.asarray(table), indices, numbers, (1,), mode=mode, fill_value=outside)

  found = look_up(np.maximum(places, 0).astype(indices.dtype), count)
  return found[..., None], look_up(places < 0, False)


def without(node: Node, out: jax.Array, dead: jax.Array) -> jax.Array:
  """The result of a gather, with zeros where an index points to no entry."""
  offsets = node.params["dimension_numbers"].offset_dims
  return jnp.where(jnp.expand_dims(dead, offsets), jnp.zeros((), out.dtype), out)


def _bind_gather(ins: tuple[Factor, ...], indexed: Factor | None) -> Bind:
  def bind(node: Node, arrays: Sequence[jax.Array], sizes: Sizes) -> list[jax.Array]:
    operand, indices = arrays
    is_whole = indexed is None or operand.shape[ins.index(indexed)] == node.ins[0].shape[ins.index(indexed)]
    pairs = zip(ins, node.params["slice_sizes"], node.ins[0].shape, operand.shape, strict=True)
    slices = tuple(live if size == full else size for _, size, full, live in pairs)
    return [
      lax.gather(
        operand,
        indices,
        node.params["dimension_numbers"],
        slices,
        unique_indices=node.params["unique_indices"] and is_whole,
        indices_are_sorted=node.params["indices_are_sorted"] and is_whole,
        mode=node.params["mode"],
        fill_value=node.params["fill_value"],
      )
    ]

  return bind


def dynamic_slice(node: Node, infos: Sequence[Info]) -> Spec:
  """``a b -> a b'``: axes that it does not span are indivisible."""
  shape, out = node.ins[0].shape, node.outs[0].shape
  cut = [n != m for n, m in zip(shape, out, strict=True)]
  ins, outs = side("s", cut), side("t", cut)
  return Spec(
    ins=(ins, *((),) * (len(node.ins) - 1)),
    outs=(outs,),
    sizes=sized((ins, shape), (outs, out)),
    neutral=frozenset(range(1, len(node.ins))),
    whole=mixed_of((*ins, *outs)),
    opaque="a dynamic slice along the masked axis",
    bind=lambda node, arrays, sizes: compat.bind(
      node.eqn, arrays, {**node.params, "slice_sizes": tuple(sizes[f] for f in outs)}
    ),
  )


built_in("gather", gather)
built_in("dynamic_slice", dynamic_slice)
