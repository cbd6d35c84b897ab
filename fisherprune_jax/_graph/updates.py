"""Outputs that replace variables (batch statistics, caches): they demand nothing, and return what others demand.

They need their variables' kept shapes, without channels that nothing else demands. So along each axis, producers are
followed back to the nearest with other demands, and that is returned. A stack whose layers are demanded by themselves is
returned layer by layer.
"""

from collections.abc import Callable, Sequence

from fisherprune_jax._graph import liveness, sets
from fisherprune_jax._graph.boxes import Entries, Where, hull, join, whole
from fisherprune_jax._graph.control import stacks
from fisherprune_jax._graph.control.fixpoint import EXACT_PASSES, MOST_PASSES
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.liveness import Liveness, Rules
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.structured import links

Updates = dict[int, int]
"""Which output replaces which input, by position."""


def analyse(
  program: Program,
  infos: Sequence[Info],
  updates: Updates,
  rules: Rules,
  keep_masks: bool,
  demanded_of: Callable[[Value], Where] = lambda value: whole(value.shape),
  subs: dict[Node, list[Program]] | None = None,
  is_diagnosis: bool = False,
) -> tuple[Liveness, dict[int, Entries]]:
  """What is live if outputs that replace variables demand nothing, and others ``demanded_of``.

  Also, per such output, the returned entries: what is stored of its input. If they keep growing, they are all entries; in a
  diagnosis, those found so far.
  """

  def run(replacing: dict[int, Entries | None]) -> Liveness:
    demanded = [
      replacing[at] if at in replacing else demanded_of(value) for at, value in enumerate(program.outputs)
    ]
    return liveness.analyse(program, infos, demanded, rules, keep_masks, subs)

  live = run(dict.fromkeys(updates))
  if not updates:
    return live, {}
  sources = _Sources(program, live)
  returned = {at: sources.demanded(program.outputs[at]) for at in updates}
  for iteration in range(MOST_PASSES):
    live = run({**returned})
    grown = {
      at: _grown(where, live, program.inputs[updates[at]], iteration < EXACT_PASSES)
      for at, where in returned.items()
    }
    if grown == returned or (is_diagnosis and iteration == EXACT_PASSES):
      return live, returned  # sets are interned, so equal ones are the same object
    returned = grown
  everything: dict[int, Entries] = {at: whole(program.outputs[at].shape) for at in updates}
  return run({**everything}), everything


def _grown(returned: Entries, live: Liveness, value: Value, is_exact: bool) -> Entries:
  """What is returned, and what is stored of the variable; in later passes without conditions, so that it settles."""
  if value not in live.demanded:
    return returned
  layers = live.layers(value)
  if isinstance(returned, list) and layers is not None:
    return [_both(*pair, is_exact) for pair in zip(returned, layers, strict=True)]
  if isinstance(returned, list):
    returned = Where(hull(*(one.in_all_iterations(value.shape).box for one in returned)))
  return _both(returned, live.stored(value), is_exact)


def _both(a: Where, b: Where, is_exact: bool) -> Where:
  return join(a, b) if is_exact else Where(hull(a.box, b.box))


class _Sources:
  """The nodes that compute each value of a program and its sub-programs, and the values that it is across their borders."""

  def __init__(self, program: Program, live: Liveness) -> None:
    self._live = live
    self._makers: dict[Value, Node] = {}
    self._others: dict[Value, list[Value]] = {}
    self._add(program)

  def _add(self, program: Program) -> None:
    for node in program.nodes:
      self._makers.update(dict.fromkeys(node.outs, node))
      for link in links(node, self._live):
        for outer, inner in (*((b, a) for a, b in link.ins), *link.outs, *link.iterations):
          self._others.setdefault(outer, []).append(inner)
        self._add(link.program)

  def demanded(self, value: Value) -> Entries:
    """What is demanded of an output at its nearest demanded producers; per layer, if a loop over a stack writes it."""
    node = self._makers.get(value)
    written = None if node is None else stacks.written(node, self._live, value)
    return self._demanded(value) if written is None else [self._demanded(one) for one in written]

  def _demanded(self, value: Value) -> Where:
    return Where(tuple(self._follow(value, axis) for axis in range(len(value.shape))))

  def _follow(self, value: Value, axis: int) -> Set:
    """The demand along one axis."""
    pending, seen, found = [(value, axis)], set(), []
    while pending:
      here = pending.pop()
      if here in seen:
        continue
      seen.add(here)
      if here[0] in self._live.demanded:
        stored = self._live.stored(here[0])
        found.append(sets.gated(stored.box[here[1]], stored.when))
      else:
        pending += self._back(*here)
    return sets.union(*found) if found else sets.everything(value.shape[axis])

  def _back(self, value: Value, axis: int) -> list[tuple[Value, int]]:
    """Where an axis comes from unchanged."""
    found = [
      (other, axis + len(other.shape) - len(value.shape))
      for other in self._others.get(value, [])
      if axis + len(other.shape) >= len(value.shape)
    ]
    node = self._makers.get(value)
    spec = None if node is None else self._live.specs.get(node)
    if node is None or spec is None:
      return found
    factor = spec.outs[node.outs.index(value)][axis]
    for operand, axes in zip(node.ins, spec.ins, strict=True):
      if isinstance(factor, str) and operand.literal is None:
        found += [(operand, place) for place, one in enumerate(axes) if one == factor]
    return found
