"""Where dead entries have to stay, and why."""

import warnings
from typing import NamedTuple

from fisherprune_jax.graph import sets
from fisherprune_jax.graph.facts import Box
from fisherprune_jax.graph.liveness import Liveness
from fisherprune_jax.graph.program import Node
from fisherprune_jax.graph.rules import unknown
from fisherprune_jax.graph.spec import Axes, compose
from fisherprune_jax.model import Model

_announced: set[str] = set()


class Blocker(NamedTuple):
  """A use of a masked axis that keeps dead entries alive."""

  primitive: str
  reason: str
  where: str


def blockers(model: Model) -> list[Blocker]:
  """Every node that works on entries which masks had switched off, in program order."""
  live = model.live
  found = [
    Blocker(node.name, live.specs[node].opaque, node.source)
    for node in reversed(live.factors)
    if live.specs[node].opaque and _works_on_dead(node, live)
  ]
  return list(dict.fromkeys(found))


def check(model: Model, strict: bool) -> None:
  """Says once per primitive that it is unknown; raises on any blocker if ``strict``."""
  found = blockers(model)
  if strict and found:
    lines = "\n".join(f"  {b.reason} ({b.where})" for b in found)
    raise ValueError(
      f"With strict=True every dead feature must be removable, got uses that keep them:\n{lines}\n"
      "Move the mask, teach the engine the primitive with fp.register_rule, or drop strict=True."
    )
  for blocker in found:
    if blocker.reason == unknown(blocker.primitive) and blocker.primitive not in _announced:
      _announced.add(blocker.primitive)
      warnings.warn(
        f"fisherprune_jax has no rule for the primitive `{blocker.primitive}` ({blocker.where}): arrays that "
        "it reads or writes are kept whole. fp.register_rule can teach it.",
        stacklevel=4,
      )


def _works_on_dead(node: Node, live: Liveness) -> bool:
  spec, factors = live.specs[node], live.factors[node]

  def worked_on(axes: Axes, shape: tuple[int, ...]) -> Box:
    return tuple(compose(axis, factors, n) for axis, n in zip(axes, shape, strict=True))

  operands = [
    (used, offered)
    for value, axes in zip(node.ins, spec.ins, strict=True)
    for used, offered in zip(worked_on(axes, value.shape), live.info(value).box, strict=True)
  ]
  results = [
    (used, wanted)
    for value, axes in zip(node.outs, spec.outs, strict=True)
    if value in live.asked
    for used, wanted in zip(worked_on(axes, value.shape), live.asked[value], strict=True)
  ]
  return any(bound.leaves and not sets.contains(bound, used) for used, bound in operands + results)
