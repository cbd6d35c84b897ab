"""Rows that are read and written at known positions: ``h[jnp.arange(B), last]``."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fisherprune_jax._auto.rows import Rows
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.spec import Factor, Spec

WRITES = (
  "dynamic_update_slice",
  "scatter",
  *(f"scatter-{name}" for name in ("add", "sub", "mul", "min", "max")),
)
"""Primitives that keep the rows of what they write into."""

Makers = Mapping[Value, Node]


def followed(
  node: Node, spec: Spec, operand: int, rows: Rows, made: bool, live: Liveness, makers: Makers
) -> Rows | None:
  """Rows that are read or written at known positions, along factors of the result; None for other rows."""
  axes = [key for key in rows.keys if isinstance(key, int)]
  if len(axes) != 1 or not spec.outs[0]:
    return None
  if node.name == "gather" and operand == 0 and spec.ins[0][axes[0]] in spec.unordered:
    known = None if rows.via else _read(node, spec, rows, axes[0], live, makers)
    return _picked(node, spec, rows, axes[0], live, makers) if known is None and made else known
  if node.name.startswith("scatter") and operand == 2 and spec.ins[2][axes[0]] in spec.whole:
    return _written(node, spec, rows, axes[0], live, makers)
  return None


def _read(node: Node, spec: Spec, rows: Rows, axis: int, live: Liveness, makers: Makers) -> Rows | None:
  numbers = node.params["dimension_numbers"]
  if axis not in numbers.collapsed_slice_dims:
    return None
  column = _column(node.ins[1], numbers.start_index_map.index(axis), live, makers)
  if column is None or not _is_inside(column, node.ins[0].shape[axis]):
    return None
  assert rows.index is not None
  at = rows.keys.index(axis)
  places = tuple(f for i, f in enumerate(spec.outs[0]) if i not in numbers.offset_dims)
  keys = (*rows.keys[:at], *places, *rows.keys[at + 1 :])
  return rows._replace(keys=keys, index=rows.index.take(column, at)).simple()


def _picked(node: Node, spec: Spec, rows: Rows, axis: int, live: Liveness, makers: Makers) -> Rows | None:
  """Rows picked by a list of positions that is known at run time only."""
  numbers = node.params["dimension_numbers"]
  places = [f for i, f in enumerate(spec.outs[0]) if i not in numbers.offset_dims]
  order = cause(node, makers)
  single = numbers.start_index_map == (axis,) == numbers.collapsed_slice_dims and rows.keys == (axis,)
  if (
    not single
    or len(places) != 1
    or not isinstance(order, Value)
    or math.prod(order.shape) != spec.sizes[str(places[0])]
  ):
    return None
  undone = bool(rows.via) and _is_inverse(order, rows.via[-1], live, makers)
  via = rows.via[:-1] if undone else (*rows.via, order)
  return rows._replace(keys=(places[0],), via=via)


def _is_inverse(one: Value, other: Value, live: Liveness, makers: Makers) -> bool:
  """Whether one order is the inverse of another: the argsort of an argsort."""
  keys = _sorted_keys(one, live, makers)
  return keys is not None and _origin(keys, makers) is other and _sorted_keys(other, live, makers) is not None


def _sorted_keys(order: Value, live: Liveness, makers: Makers) -> Value | None:
  """The keys of ``order = argsort(keys)``."""
  node = makers.get(order)
  if node is None or node.name != "sort" or len(node.ins) != 2 or order is not node.outs[1]:
    return None
  known = live.info(node.ins[1]).known
  return node.ins[0] if known is not None and np.array_equal(known, np.arange(known.size)) else None


def _written(node: Node, spec: Spec, rows: Rows, axis: int, live: Liveness, makers: Makers) -> Rows | None:
  numbers = node.params["dimension_numbers"]
  batch = [at for at in range(len(node.ins[2].shape)) if at not in numbers.update_window_dims]
  if axis not in batch:
    return None
  if rows.via:
    return _put_back(node, spec, rows, makers)
  place = batch.index(axis)
  if place in numbers.scatter_indices_batching_dims:
    target = numbers.operand_batching_dims[numbers.scatter_indices_batching_dims.index(place)]
    return rows._replace(keys=tuple(_axis(spec, target) if key == axis else key for key in rows.keys))
  for at, target in enumerate(numbers.scatter_dims_to_operand_dims):
    column = _column(node.ins[1], at, live, makers) if target in numbers.inserted_window_dims else None
    if column is None or rows.keys != (axis,) or not _is_inside(column, node.ins[0].shape[target]):
      continue
    assert rows.index is not None
    shape = [1] * column.ndim
    shape[place] = -1
    given = np.broadcast_to(rows.index.reshape(shape), column.shape)
    index = np.full(node.ins[0].shape[target], -1)
    index[column] = given
    if (index[column] == given).all():
      return rows._replace(keys=(_axis(spec, target),), index=index)
  return None


def _put_back(node: Node, spec: Spec, rows: Rows, makers: Makers) -> Rows | None:
  """Rows that are written to where they were picked from, at any positions."""
  numbers = node.params["dimension_numbers"]
  assert rows.index is not None
  if len(numbers.scatter_dims_to_operand_dims) != 1 or cause(node, makers) is not rows.via[-1]:
    return None
  (target,) = numbers.scatter_dims_to_operand_dims
  alone = len(rows.via) == 1 and rows.index.size == node.ins[0].shape[target]
  inserted = numbers.inserted_window_dims == (target,) and not numbers.operand_batching_dims
  return rows._replace(keys=(_axis(spec, target),), via=()) if alone and inserted else None


def _axis(spec: Spec, at: int) -> Any:
  return spec.outs[0][at]


def _is_inside(column: np.ndarray, size: int) -> bool:
  return bool(((column >= 0) & (column < size)).all())


def _column(indices: Value, at: int, live: Liveness, makers: Makers) -> np.ndarray | None:
  """One coordinate of every index, if it is known; others may not be."""
  known = live.info(indices).known
  if known is not None:
    return known[..., at]
  node = makers.get(indices)
  if node is None or node.name != "concatenate" or node.params["dimension"] != len(indices.shape) - 1:
    return None
  if any(value.shape[-1] != 1 for value in node.ins):
    return None
  known = live.info(node.ins[at]).known
  return None if known is None else known[..., 0]


def cause(node: Node, makers: Makers) -> object:
  """What decides the order of reordered data: for reads and writes by one index, that index."""
  if node.name != "gather" and not node.name.startswith("scatter"):
    return node
  return _origin(node.ins[1], makers)


def _origin(value: Value, makers: Makers) -> Value:
  """The list of positions that an index is made of."""
  while (maker := makers.get(value)) is not None and maker.name in MOVES:
    value = maker.ins[1] if maker.name == "select_n" else maker.ins[0]
  return value


MOVES: frozenset[Factor] = frozenset(
  ("select_n", "broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "transpose")
)
"""Operations on an index before its use; ``select_n`` makes negative ones count from the end."""
