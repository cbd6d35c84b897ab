"""Outputs that replace variables (batch statistics): they demand nothing, and return what others demand.

They need their variables' kept shapes, without channels that nothing else demands. So along each axis, producers are
followed back to the nearest with other demands, and that is returned.
"""

from collections.abc import Callable, Sequence

from fisherprune_jax._graph import liveness, sets
from fisherprune_jax._graph.boxes import Where, hull, join, whole
from fisherprune_jax._graph.control.fixpoint import EXACT_PASSES, MOST_PASSES
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.liveness import Liveness, Rules
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.sets import Set

Sources = dict[Value, list[tuple[Node, int]]]
"""The nodes that compute a value, and as which result."""
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
) -> tuple[Liveness, dict[int, Where]]:
  """What is live if outputs that replace variables demand nothing, and others ``demanded_of``.

  Also, per such output, the returned entries: what is stored of its input. If they keep growing, they are all entries; in a
  diagnosis, those found so far.
  """

  def run(replacing: dict[int, Where | None]) -> Liveness:
    demanded = [
      replacing[at] if at in replacing else demanded_of(value) for at, value in enumerate(program.outputs)
    ]
    return liveness.analyse(program, infos, demanded, rules, keep_masks, subs)

  live = run(dict.fromkeys(updates))
  if not updates:
    return live, {}
  sources = _sources(program)
  returned = {at: _demanded_of_producers(program.outputs[at], live, sources) for at in updates}
  for iteration in range(MOST_PASSES):
    live = run(dict(returned))
    grown = {
      at: _grown(where, live, program.inputs[updates[at]], iteration < EXACT_PASSES)
      for at, where in returned.items()
    }
    if grown == returned or (
      is_diagnosis and iteration == EXACT_PASSES
    ):  # sets are interned, so equal ones are the same object
      return live, returned
    returned = grown
  everything = {at: whole(program.outputs[at].shape) for at in updates}
  return run(dict(everything)), everything


def _grown(where: Where, live: Liveness, value: Value, is_exact: bool) -> Where:
  """What is returned, and what is stored of the variable; in later passes without conditions, so that it settles."""
  if value not in live.demanded:
    return where
  stored = live.stored(value)
  return join(where, stored) if is_exact else Where(hull(where.box, stored.box))


def _sources(program: Program) -> Sources:
  found: Sources = {}
  for node in program.nodes:
    for at, out in enumerate(node.outs):
      found.setdefault(out, []).append((node, at))
  return found


def _demanded_of_producers(value: Value, live: Liveness, sources: Sources) -> Where:
  return Where(tuple(_follow(value, axis, live, sources) for axis in range(len(value.shape))))


def _follow(value: Value, axis: int, live: Liveness, sources: Sources) -> Set:
  """The demand along one axis, at the nearest demanded producers."""
  pending, seen, found = [(value, axis)], set(), []
  while pending:
    here = pending.pop()
    if here in seen:
      continue
    seen.add(here)
    if here[0] in live.demanded:
      stored = live.stored(here[0])
      found.append(sets.gated(stored.box[here[1]], stored.when))
    else:
      pending += _back(*here, live, sources)
  return sets.union(*found) if found else sets.everything(value.shape[axis])


def _back(value: Value, axis: int, live: Liveness, sources: Sources) -> list[tuple[Value, int]]:
  """Where an axis comes from unchanged."""
  out = []
  for node, at in sources.get(value, []):
    spec = live.specs.get(node)
    if spec is None:  # it runs a program: its axes are unknown
      continue
    factor = spec.outs[at][axis]
    out += [
      (operand, place)
      for operand, axes in zip(node.ins, spec.ins, strict=True)
      for place, other in enumerate(axes)
      if isinstance(factor, str) and other == factor and operand.literal is None
    ]
  return out
