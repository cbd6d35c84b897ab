"""Rewrites reads and writes at known positions as simpler primitives.

A gather by a table becomes a gather by a list, and a reshape. An array with replaced entries becomes a concatenation:
what is before, the new entries, and what is behind. So the rules of simpler primitives apply, also to joint axes.
"""

import threading
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.facts import Info, constant, fold
from fisherprune_jax._graph.program import Node, Program, nodes_of, pick_first
from fisherprune_jax._graph.registry import is_taught
from fisherprune_jax._graph.sizes import are_static

Known = Sequence[np.ndarray | None]
"""The values of operands, if known."""
Plain = Callable[..., jax.Array]
"""Computes a node's result."""
_lock = threading.Lock()


def spell_out(program: Program, inputs: Sequence[Info]) -> None:
  """Rewrites a program once."""
  with _lock:
    if program.is_spelled:
      return
    if any(node.name in SPELLED for node in program.nodes):
      program.nodes = _spelled(program, inputs)
      pick_first(program)
    program.is_spelled = True


def _spelled(program: Program, inputs: Sequence[Info]) -> list[Node]:
  infos = dict(zip(program.inputs, inputs, strict=True))
  infos |= {value: constant(const, value.shape) for value, const in program.consts}
  nodes: list[Node] = []
  for node in program.nodes:
    known = [
      constant(v.literal, v.shape).known if v.literal is not None else infos[v].known if v in infos else None
      for v in node.ins
    ]
    folded = fold(node, known)
    infos |= {out: Info((), known=folded) for out in node.outs}
    nodes += [node] if folded is not None else _simpler(program, node, known)
  return nodes


def _simpler(program: Program, node: Node, known: Known) -> list[Node]:
  """The nodes that replace one; itself if positions are unknown."""
  if node.name not in SPELLED or is_taught(node.name):
    return [node]
  arrays, find = SPELLED[node.name]
  plain = find(node, known)
  if plain is None:
    return [node]
  with compat.located(node.eqn):
    return nodes_of(program, plain, [node.ins[at] for at in arrays], node)


def _sliced(node: Node, known: Known) -> Plain | None:
  """One window, moved inside if it reaches beyond the end."""
  windows = _windows(node.ins[0].shape, node.outs[0].shape, known[1:], moves_back=True)
  return None if windows is None else lambda x: _window(x, windows)


def _gathered(node: Node, known: Known) -> Plain | None:
  """One window, or single entries along some axes; its rule covers a list along one axis."""
  numbers, shape, indices = node.params["dimension_numbers"], node.ins[0].shape, known[1]
  axes, slices = numbers.start_index_map, node.params["slice_sizes"]
  others = [at for at in range(len(shape)) if at not in axes]
  if indices is None or numbers.operand_batching_dims:
    return None
  gone = numbers.collapsed_slice_dims
  if indices.ndim == 1:
    starts = _starts(indices, axes, len(shape))
    windows = _windows(shape, slices, starts, node.params["mode"] == lax.GatherScatterMode.CLIP)
    return None if windows is None else lambda x: lax.squeeze(_window(x, windows), gone)
  if {*gone} != {*axes}:
    return None
  if (len(axes) == 1 and indices.ndim == 2) or any(slices[at] != shape[at] for at in others):
    return None
  places = _along(indices, [shape[axis] for axis in axes])
  if places is None:
    return None
  offsets = numbers.offset_dims
  out = [at for at in range(len(node.outs[0].shape)) if at not in offsets]
  in_place = len(axes) == 1
  front = axes[0] if in_place else 0
  came = [*offsets[:front], *out, *offsets[front:]]  # the new places of the axes that are made below

  def plain(x: jax.Array) -> jax.Array:
    if not in_place:
      x = x.transpose(*axes, *others)
      x = x.reshape(-1, *x.shape[len(axes) :])
    x = _taken(x, places.reshape(-1), front)
    x = x.reshape(*x.shape[:front], *places.shape, *x.shape[front + 1 :])
    return x.transpose(np.argsort(came)) if came != sorted(came) else x

  return plain


def _along(indices: np.ndarray, sizes: Sequence[int]) -> np.ndarray | None:
  """Positions along merged axes; None if any is outside."""
  if not are_static(sizes) or not ((indices >= 0) & (indices < np.array(sizes))).all():
    return None
  return np.asarray(np.ravel_multi_index(tuple(np.moveaxis(indices, -1, 0)), tuple(sizes)))


def _taken(x: jax.Array, places: np.ndarray, axis: int) -> jax.Array:
  others = tuple(at for at in range(x.ndim) if at != axis)
  return lax.gather(
    x,
    jnp.asarray(places[:, None], jnp.int32),
    lax.GatherDimensionNumbers(others, (axis,), (axis,)),
    tuple(1 if at == axis else n for at, n in enumerate(x.shape)),
    mode="promise_in_bounds",
  )


def _updated(node: Node, known: Known) -> Plain | None:
  """One window, moved inside likewise."""
  sizes, lengths, starts = node.ins[0].shape, node.ins[1].shape, known[2:]
  windows = _windows(sizes, lengths, starts, moves_back=True)
  return None if windows is None else lambda x, update: _with_window(x, update, windows)


def _scattered(node: Node, known: Known) -> Plain | None:
  """One window, or single positions along one axis, are replaced."""
  numbers, indices = node.params["dimension_numbers"], known[1]
  (sizes, _, update), axes = (value.shape for value in node.ins), numbers.scatter_dims_to_operand_dims
  if indices is None or numbers.operand_batching_dims:
    return None
  gone = numbers.inserted_window_dims
  if indices.ndim == 1:
    inside = iter(update)
    lengths = [1 if at in gone else next(inside) for at in range(len(sizes))]
    starts = _starts(indices, axes, len(sizes))
    windows = _windows(sizes, lengths, starts)
    if windows is None:
      return None
    return lambda x, new: _with_window(x, lax.expand_dims(new, gone), windows)
  if len(axes) != 1 or gone != axes:
    return None
  (axis,) = axes
  spans = [update[at] == n for at, n in zip(numbers.update_window_dims, _but(sizes, axis), strict=True)]
  places = _along(indices, [sizes[axis]])
  if not all(spans) or places is None or np.unique(places).size < places.size:
    return None
  batch = [at for at in range(len(update)) if at not in numbers.update_window_dims]
  order = [*numbers.update_window_dims[:axis], *batch, *numbers.update_window_dims[axis:]]
  index = np.arange(sizes[axis])
  index[places.reshape(-1)] = sizes[axis] + np.arange(places.size)

  def plain(x: jax.Array, new: jax.Array) -> jax.Array:
    new = new.transpose(order) if order != sorted(order) else new
    new = new.reshape(*new.shape[:axis], -1, *new.shape[axis + len(batch) :])
    return _taken(lax.concatenate([x, new], axis), index, axis)

  return plain


def _but(sizes: Sequence[int], axis: int) -> list[int]:
  return [n for at, n in enumerate(sizes) if at != axis]


def _starts(indices: np.ndarray, axes: Sequence[int], rank: int) -> list[np.ndarray]:
  return [indices[axes.index(at)] if at in axes else np.zeros((), int) for at in range(rank)]


def _windows(
  sizes: Sequence[int], lengths: Sequence[int], starts: Known, moves_back: bool = False
) -> dict[int, tuple[int, int]] | None:
  """Where a window starts and ends, along axes that it does not span; None if unknown or outside."""
  found = {}
  for axis, (n, length, start) in enumerate(zip(sizes, lengths, starts, strict=True)):
    if n == length and (moves_back or start == 0):
      continue
    if start is None or not are_static([n, length]):
      return None
    first = int(np.clip(start, 0, n - length)) if moves_back else int(start)
    if not 0 <= first <= n - length:
      return None
    found[axis] = first, first + length
  return found


def _window(x: jax.Array, windows: dict[int, tuple[int, int]]) -> jax.Array:
  for axis, (first, end) in windows.items():
    x = lax.slice_in_dim(x, first, end, axis=axis)
  return x


def _with_window(x: jax.Array, update: jax.Array, windows: dict[int, tuple[int, int]]) -> jax.Array:
  if not windows:
    return update
  (axis, (first, end)), *rest = windows.items()
  inside = _with_window(lax.slice_in_dim(x, first, end, axis=axis), update, dict(rest)) if rest else update
  before, behind = ((0, first), (end, x.shape[axis]))
  kept = [lax.slice_in_dim(x, *span, axis=axis) if span[0] < span[1] else None for span in (before, behind)]
  parts = [part for part in (kept[0], inside, kept[1]) if part is not None]
  return lax.concatenate(parts, axis) if len(parts) > 1 else inside


SPELLED: dict[str, tuple[tuple[int, ...], Callable[[Node, Known], Plain | None]]] = {
  "dynamic_slice": ((0,), _sliced),
  "gather": ((0,), _gathered),
  "scatter": ((0, 2), _scattered),
  "dynamic_update_slice": ((0, 1), _updated),
}
"""Primitives, their operands that are not positions, and what rewrites them."""
