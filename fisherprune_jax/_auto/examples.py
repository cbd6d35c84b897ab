"""The example that each row of every array in a program belongs to, by one forward pass over the specs.

This is separate from what shrinks together: constants and data tie no features, but rows are followed through them. If
operands that depend on variables have an index, a result takes theirs; other data is assumed to be aligned.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fisherprune_jax._auto import indexing
from fisherprune_jax._auto.rows import FIRST, LARGEST, Rows, lost, mixed, ordered, together
from fisherprune_jax._graph.control.custom import Custom
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.spec import Axes, Axis, Factor, Pick, Prod, Spec, Sum, factors_of
from fisherprune_jax._graph.structured import STRUCTURED, Link, links

IN_PLACE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "ragged_dot_general")
"""Primitives with an indivisible axis that leave its rows in place."""
MOST_ITERATIONS = 20


class State(NamedTuple):
  """The examples of an array, and whether it depends on a variable."""

  rows: tuple[Rows, ...] = ()
  made: bool = False


class Examples:
  """The examples of every array of a program, from its forward analysis ``live`` and the number of examples."""

  def __init__(self, live: Liveness, count: int) -> None:
    self.live, self.count = live, count
    self._states: dict[Value, State] = {}
    self._makers: dict[Value, Node] = {}

  def start(self, variables: Iterable[Value], args: Iterable[Value], axes: Iterable[int | None]) -> None:
    """Set the inputs: variables, and arguments with their example axes."""
    self._states.update((value, State(made=True)) for value in variables)
    rows = np.arange(self.count)
    for value, axis in zip(args, axes, strict=True):
      self._states[value] = State(() if axis is None else (Rows((axis,), rows),))

  def of(self, value: Value) -> State:
    return self._states.get(value, State())

  def walk(self, program: Program) -> None:
    """Follow examples through a program and its sub-programs."""
    for node in program.nodes:
      self._makers.update((out, node) for out in node.outs)
      found = links(node, self.live)
      if found:
        self._links(node, found)
      elif node in self.live.specs:
        self._node(node, self.live.specs[node])

  def _node(self, node: Node, spec: Spec) -> None:
    states = [self.of(value) for value in node.ins]
    made = any(state.made for state in states)
    for out, axes in zip(node.outs, spec.outs, strict=True):
      rows = self._result(node, spec, axes, states, made) if any(state.rows for state in states) else ()
      self._states[out] = State(rows, made)

  def _result(
    self, node: Node, spec: Spec, axes: Axes, states: Sequence[State], made: bool
  ) -> tuple[Rows, ...]:
    shown = list(dict.fromkeys(f for axis in axes for f in factors_of(axis)))
    each = [
      [one for rows in state.rows for one in self._by_factors(node, spec, operand, rows, shown, states)]
      for operand, state in enumerate(states)
    ]
    total = next((axis for axis in axes if isinstance(axis, Sum)), None)
    if total and any({*total.parts} & {*rows.keys} for found in each for rows in found):
      return (_laid(_end_to_end(node, spec, total, each), axes, spec),)
    ours = [rows for state, found in zip(states, each, strict=True) if state.made for rows in found]
    data = [rows for state, found in zip(states, each, strict=True) if not state.made for rows in found]
    if not made:
      return tuple(ordered(_laid(rows, axes, spec), self.count) for rows in mixed(data, node, self.count))
    if ours:
      return tuple(_laid(rows, axes, spec) for rows in together(ours, node))
    first = [_laid(rows, axes, spec) for rows in mixed(data, node, self.count)]
    return tuple(sorted(first, key=_leading)[:1])  # the first example of each pair

  def _by_factors(
    self, node: Node, spec: Spec, operand: int, rows: Rows, shown: Sequence[Factor], states: Sequence[State]
  ) -> list[Rows]:
    """Rows of an operand along factors of the result."""
    if not any(isinstance(key, int) for key in rows.keys):
      return [rows]
    if rows.index is None:
      keys = [f for key in rows.keys for f in _parts(spec.ins[operand], key)]
      keys = [f for f in keys if isinstance(f, Node) or f in shown]
      return [rows._replace(keys=tuple(keys))] if keys else []
    known = indexing.followed(node, spec, operand, rows, states[operand].made, self.live, self._makers)
    if known is not None:
      return [known]
    found = _taken_apart(rows, spec.ins[operand], spec, shown)
    gone = [f for f in found.keys if not isinstance(f, Node) and f not in shown]
    in_place = node.name in IN_PLACE or (operand == 0 and node.name in indexing.WRITES)
    stirred = [f for f in found.keys if f in shown and f in spec.unordered and not in_place]
    if not gone and not stirred:
      return [found]
    others = {f for at, state in enumerate(states) for f in _beside(state, spec.ins[at])}
    places = [f for f in shown if f not in others]
    hidden = bool(stirred) or any(f in spec.unordered or f not in spec.sizes for f in gone)
    if not states[operand].made and (anew := self._anew(node, spec, found, places)):
      return [anew]
    return [lost(places, node, found.base)] if hidden and places else []

  def _anew(self, node: Node, spec: Spec, rows: Rows, places: Sequence[Factor]) -> Rows | None:
    """Rows of reordered data as new examples, if their number fits."""
    assert rows.index is not None
    around = [at for at, key in enumerate(rows.keys) if isinstance(key, Node)]
    iterations = [rows.index.shape[at] for at in around]
    for chosen in (list(places), *([f] for f in places)):
      sizes = [*iterations, *(spec.sizes[f] for f in chosen)]
      if chosen and math.prod(sizes) == self.count:
        keys = (*(rows.keys[at] for at in around), *chosen)
        cause = indexing.cause(node, self._makers)
        return Rows(keys, np.arange(self.count).reshape(sizes), frozenset({cause}))
    return None

  def _links(self, node: Node, found: Sequence[Link]) -> None:
    found = [link for link in found if link.outs or not _is_ruled(node)]
    for link in found:
      for outer, inner in link.ins:
        if inner.literal is None:
          self._states[inner] = _entered(self.of(outer), node, len(outer.shape) - len(inner.shape))
    for again in range(MOST_ITERATIONS):
      for link in found:
        self.walk(link.program)
      pairs = [pair for link in found for pair in link.iterations]
      if not sum(self._iteration(node, *pair, give_up=again > MOST_ITERATIONS // 2) for pair in pairs):
        break
    results: dict[Value, State] = {}
    for outer, inner in (pair for link in found for pair in link.outs):
      left = self._left(self.of(inner), node, len(outer.shape) - len(inner.shape))
      results[outer] = self._either(results[outer], left, node) if outer in results else left
    self._states.update(results)

  def _iteration(self, node: Node, inner: Value, out: Value, give_up: bool) -> bool:
    """Carry a loop value to the next iteration; returns whether its state changed."""
    before = self.of(inner)
    after = self._either(before, self._left(self.of(out), node, 0), node)
    if give_up and after.rows:
      after = State((lost(range(len(inner.shape)), node),), after.made)
    same = len(before.rows) == len(after.rows) and all(map(Rows.same, before.rows, after.rows))
    if inner.literal is None:
      self._states[inner] = after
    return not (same and before.made == after.made)

  def _left(self, state: State, node: Node, more: int) -> State:
    """The state of a result, from that of an iteration; carried values do not follow the examples of one iteration."""
    found, given = [], {rows.via for value in node.ins for rows in self.of(value).rows}
    for rows in state.rows:
      keys = [key + more if isinstance(key, int) else 0 if key is node and more else key for key in rows.keys]
      hidden = node in keys or (rows.via and not (_is_ruled(node) and rows.via in given))
      keys = [key for key in keys if key is not node]
      found.append(lost(keys, rows.why or node, rows.base) if hidden else rows._replace(keys=tuple(keys)))
    return state._replace(rows=tuple(found))

  def _either(self, one: State, other: State, node: Node) -> State:
    """The state of an array that is one of two."""
    made = one.made or other.made
    if one.made != other.made and one.rows and other.rows:
      return State(one.rows if one.made else other.rows, True)
    found = (*one.rows, *other.rows)
    return State(together(found, node) if made else mixed(found, node, self.count), made)


def _parts(axes: Axes, key: object) -> tuple[object, ...]:
  return factors_of(axes[key]) if isinstance(key, int) else (key,)


def _beside(state: State, axes: Axes) -> set[Factor]:
  """The factors of other axes of an operand with examples."""
  held = {key for rows in state.rows for key in rows.keys}
  return {f for at, axis in enumerate(axes) if held and at not in held for f in factors_of(axis)}


def _leading(rows: Rows) -> int:
  return min((key for key in rows.keys if isinstance(key, int)), default=-1)


def _taken_apart(rows: Rows, axes: Axes, spec: Spec, shown: Sequence[Factor]) -> Rows:
  """Rows along axes as rows along their factors; of concatenated parts, the one in the result."""
  assert rows.index is not None
  if rows.via:
    (only,) = rows.keys
    whole = axes[only]
    return rows._replace(keys=(whole if isinstance(whole, str) else ("unlinked", only),))
  index, keys = rows.index, list[object]()
  for key in rows.keys:
    axis: Axis = axes[key] if isinstance(key, int) else None
    at = len(keys)
    if not isinstance(key, int):
      keys.append(key)
    elif isinstance(axis, Prod):
      index = index.reshape(*index.shape[:at], *(spec.sizes[f] for f in axis.parts), *index.shape[at + 1 :])
      keys += axis.parts
    elif isinstance(axis, Sum) and (part := next((f for f in axis.parts if f in shown), None)):
      start = sum(spec.sizes[f] for f in axis.parts[: axis.parts.index(part)])
      index = index.take(range(start, start + spec.sizes[part]), at)
      keys.append(part)
    elif axis is None and index.shape[at] == 1:
      index = index.take(0, at)
    else:
      keys.append(factors_of(axis)[0] if axis is not None else ("unlinked", key))
  return rows._replace(keys=tuple(keys), index=index).simple()


def _laid(rows: Rows, axes: Axes, spec: Spec) -> Rows:
  """Rows along factors as rows along the axes of a result."""
  iterations = [key for key in rows.keys if isinstance(key, Node)]
  held = [
    at for at, axis in enumerate(axes) if axis in rows.keys or any(f in rows.keys for f in factors_of(axis))
  ]
  parts = [(axes[at],) if axes[at] in rows.keys else factors_of(axes[at]) for at in held]
  result = rows._replace(keys=(*iterations, *held))
  if rows.index is None or not rows.keys:
    return result
  if rows.via:
    return result if all(isinstance(axes[at], str) for at in held) else result._replace(index=None)
  size = dict(zip(rows.keys, rows.index.shape, strict=True))
  flat = [*iterations, *(f for some in parts for f in some)]
  sizes = [size[f] if f in size else spec.sizes[str(f)] for f in flat]
  if math.prod(sizes) > LARGEST:
    return result._replace(index=None)
  index = rows.along(flat, sizes).index
  assert index is not None
  index = index.reshape(
    [size[iteration] for iteration in iterations]
    + [math.prod(size[f] if f in size else spec.sizes[str(f)] for f in some) for some in parts]
  )
  for place, at in enumerate(held, len(iterations)):
    axis = axes[at]
    if isinstance(axis, Pick):
      empty = np.expand_dims(axis.index < 0, [i for i in range(index.ndim) if i != place])
      index = np.where(empty, -1, index.take(axis.index, place))
  return result._replace(index=index).simple()


def _end_to_end(node: Node, spec: Spec, total: Sum, each: Sequence[Sequence[Rows]]) -> Rows:
  """Rows along the factors of a concatenation; operands without rows belong to no example."""
  every = [rows for found in each for rows in found]
  base = frozenset[object]().union(*(rows.base for rows in every))
  size = {
    key: n
    for rows in every
    if rows.index is not None
    for key, n in zip(rows.keys, rows.index.shape, strict=True)
  }
  shared = [
    key for key in dict.fromkeys(key for rows in every for key in rows.keys) if key not in total.parts
  ]
  if any(len(found) > 1 for found in each) or any(rows.index is None or rows.via for rows in every):
    return lost((*shared, total), next((rows.why for rows in every if rows.why), node), base)
  pieces = []
  for part, found in zip(total.parts, each, strict=True):
    sizes = [*(size[key] for key in shared), spec.sizes[part]]
    index = found[0].along((*shared, part), sizes).index if found else None
    pieces.append(np.full(sizes, -1) if index is None else index)
  orders = {rows.order for rows in every}
  return Rows(
    (*shared, total), np.concatenate(pieces, -1), base or FIRST, orders.pop() if len(orders) == 1 else None
  )


def _entered(state: State, node: Node, more: int) -> State:
  """The state of an array in a program that gets one entry of it per iteration, or all of it."""

  def entered(rows: Rows) -> Rows:
    keys = (key if not isinstance(key, int) else node if key < more else key - more for key in rows.keys)
    rows = rows._replace(keys=tuple(keys))
    return rows if not rows.via or _is_ruled(node) else lost(rows.keys, node, rows.base)

  return state._replace(rows=tuple(map(entered, state.rows)))


def _is_ruled(node: Node) -> bool:
  """Whether a function has a derivative rule, so that no mask is inside."""
  return isinstance(STRUCTURED[node.name], Custom)
