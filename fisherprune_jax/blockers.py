"""Where dead entries have to stay, why, and what that costs."""

import functools
import threading
import warnings
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fisherprune_jax.graph import flops, sets
from fisherprune_jax.graph.evaluate import Evaluation
from fisherprune_jax.graph.facts import Box, Info
from fisherprune_jax.graph.liveness import Liveness
from fisherprune_jax.graph.program import Node
from fisherprune_jax.graph.rules import spec_of, unknown
from fisherprune_jax.graph.spec import Axes, Spec, compose, names_of
from fisherprune_jax.model import Model, rows_of

_announced: set[str] = set()
_lock = threading.Lock()


class Blocker(NamedTuple):
  """A use of a masked axis that keeps dead entries alive.

  Attributes:
    primitive: the primitive's name.
    reason: what it does with the masked axis.
    where: the user's source line.
    flops: FLOPs per example that would go too if no use on this line kept anything (0 where others would still
      keep it); None where it was not worked out.
  """

  primitive: str
  reason: str
  where: str
  flops: float | None = None


def blockers(model: Model) -> list[Blocker]:
  """Every node that works on entries which masks had switched off, in program order."""
  live = model.live
  found = [
    Blocker(node.name, live.specs[node].opaque, node.source)
    for node in reversed(live.factors)
    if live.specs[node].opaque and _works_on_dead(node, live)
  ]
  return list(dict.fromkeys(found))


def with_flops(model: Model, found: Sequence[Blocker], ev: Evaluation, examples: int) -> list[Blocker]:
  """The blockers with the FLOPs that the uses on their line keep under given masks."""
  left = {where: left_by_lines(model, {where}, ev, examples) for where in {b.where for b in found}}
  return [blocker._replace(flops=left[blocker.where]) for blocker in found]


def left_by_lines(model: Model, lines: Set[str], ev: Evaluation, examples: int) -> float:
  """FLOPs per example that would go too if no use on these source lines kept anything."""
  return _left(model, lambda node: node.source in lines, ev, examples) if lines else 0.0


def _left(model: Model, chosen: Callable[[Node], bool], ev: Evaluation, examples: int) -> float:
  def rules(node: Node, infos: Sequence[Info]) -> Spec:
    spec = spec_of(node, infos)
    return _transparent(node, spec) if spec.opaque and chosen(node) else spec

  now, then = (_cost(model, live, ev) for live in (model.live, model.with_rules(rules)))
  return max(now - then, 0) / examples


def check(model: Model, strict: bool, masks: Sequence[Any], examples: int) -> None:
  """Says once per primitive that it is unknown; raises on any blocker if ``strict``."""
  found = blockers(model)
  if strict and found:
    lines = "\n".join(f"  {b.reason} ({b.where})" for b in found)
    raise ValueError(
      f"With strict=True every dead feature must be removable, got uses that keep them:\n{lines}\n"
      "Move the mask, teach the engine the primitive with fp.register_rule, or drop strict=True."
    )
  for blocker in found:
    if blocker.reason == unknown(blocker.primitive) and _is_news(blocker.primitive):
      name = blocker.primitive
      left = _left(model, functools.partial(_is_called, name), _first_features(masks), examples)
      warnings.warn(
        f"fisherprune_jax has no rule for the primitive `{blocker.primitive}` ({blocker.where}): arrays that "
        f"it reads or writes are kept whole, and with them up to {left:,.0f} FLOPs per example. "
        "fp.register_rule can teach it.",
        stacklevel=4,
      )


def _is_news(primitive: str) -> bool:
  """Whether nobody was told of a primitive so far; two threads may ask at once."""
  with _lock:
    told = primitive in _announced
    _announced.add(primitive)
  return not told


def _is_called(name: str, node: Node) -> bool:
  return node.name == name


def _first_features(masks: Sequence[Any]) -> Evaluation:
  """Masks that keep one feature each: as small as a network gets."""
  return Evaluation(rows_of([np.ones(m.shape) * (np.arange(m.shape[-1]) == 0) for m in masks], np))


def _cost(model: Model, live: Liveness, ev: Evaluation) -> int:
  return flops.total([cost.term for cost in live.costs(model.program)], ev)


def _transparent(node: Node, spec: Spec) -> Spec:
  """The same use, if it could do without the dead entries."""
  shape = node.outs[0].shape if node.outs else ()
  if spec.opaque == unknown(node.name) and node.ins and node.ins[0].shape == shape:
    linked = dict(zip([*spec.ins[0], *spec.outs[0]], 2 * names_of(shape), strict=True))
    ins, outs = (
      tuple(tuple(linked.get(axis, axis) for axis in axes) for axes in group)
      for group in (spec.ins, spec.outs)
    )
    sizes = {linked.get(factor, factor): n for factor, n in spec.sizes.items()}
    spec = replace(spec, ins=ins, outs=outs, sizes=sizes)
  return replace(spec, alive=frozenset(), whole=frozenset(), opaque="")


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
