"""Outputs that replace variables (batch statistics): they ask for nothing, and take what the rest is asked.

Such an output must come back in the shape that its variable keeps, and it must not keep channels alive that
nobody else asks for. Along each of its axes, its producers are followed back to the first arrays that
somebody else asks for; what is asked there is what the output gets.
"""

from collections.abc import Callable, Sequence

from fisherprune_jax._graph import liveness, sets
from fisherprune_jax._graph.boxes import Where, join, whole
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.liveness import Liveness, Rules
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.sets import Set

Sources = dict[Value, list[tuple[Node, int]]]
"""For each value the nodes that compute it, and as which of their results."""
Updates = dict[int, int]
"""Which output (by position) replaces which input."""


def analyse(
  program: Program,
  infos: Sequence[Info],
  updates: Updates,
  rules: Rules,
  keep_masks: bool,
  asked_of: Callable[[Value], Where] = lambda value: whole(value.shape),
  subs: dict[Node, list[Program]] | None = None,
) -> tuple[Liveness, dict[int, Where]]:
  """Finds what is live if outputs that replace variables ask for nothing of their own, and others for what ``asked_of`` says.

  Returns:
    The liveness, and for every such output the entries that come back: what is stored of its input.
  """

  def run(replacing: dict[int, Where | None]) -> Liveness:
    asked = [
      replacing[at] if at in replacing else asked_of(value) for at, value in enumerate(program.outputs)
    ]
    return liveness.analyse(program, infos, asked, rules, keep_masks, subs)

  live = run(dict.fromkeys(updates))
  if not updates:
    return live, {}
  sources = _sources(program)
  returned = {at: _asked_of_producers(program.outputs[at], live, sources) for at in updates}
  while True:
    live = run(dict(returned))
    grown = {at: _join(where, live, program.inputs[updates[at]]) for at, where in returned.items()}
    if grown == returned:  # sets are interned, so equal ones are the same object
      return live, returned
    returned = grown


def _join(where: Where, live: Liveness, value: Value) -> Where:
  return join(where, live.stored(value)) if value in live.asked else where


def _sources(program: Program) -> Sources:
  """For each value the node that computes it, and as which of its results."""
  found: Sources = {}
  for node in program.nodes:
    for at, out in enumerate(node.outs):
      found.setdefault(out, []).append((node, at))
  return found


def _asked_of_producers(value: Value, live: Liveness, sources: Sources) -> Where:
  return Where(tuple(_follow(value, axis, live, sources) for axis in range(len(value.shape))))


def _follow(value: Value, axis: int, live: Liveness, sources: Sources) -> Set:
  """What is asked, along one axis of a value, of the nearest producers that somebody asks for."""
  pending, seen, found = [(value, axis)], set(), []
  while pending:
    here = pending.pop()
    if here in seen:
      continue
    seen.add(here)
    if here[0] in live.asked:
      stored = live.stored(here[0])
      found.append(sets.gated(stored.box[here[1]], stored.when))
    else:
      pending += _back(*here, live, sources)
  return sets.union(*found) if found else sets.everything(value.shape[axis])


def _back(value: Value, axis: int, live: Liveness, sources: Sources) -> list[tuple[Value, int]]:
  """The operands' axes that an axis of a value comes from unchanged."""
  out = []
  for node, at in sources.get(value, []):
    spec = live.specs.get(node)
    if spec is None:  # it runs a program: nothing is known of its axes
      continue
    factor = spec.outs[at][axis]
    out += [
      (operand, place)
      for operand, axes in zip(node.ins, spec.ins, strict=True)
      for place, other in enumerate(axes)
      if isinstance(factor, str) and other == factor and operand.literal is None
    ]
  return out
