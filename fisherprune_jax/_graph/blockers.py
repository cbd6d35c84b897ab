"""Which uses keep dead entries, why, and what that costs."""

import functools
import threading
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np

from fisherprune_jax._errors import Path, path_name, warn
from fisherprune_jax._graph.causes import Causes
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.ideal import ideals, without
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.rules import unknown
from fisherprune_jax._graph.structured import Counter, costs_of
from fisherprune_jax._graph.terms import total
from fisherprune_jax._graph.traced import Analysis
from fisherprune_jax._graph.variables import VariableTree, vectors_of
from fisherprune_jax._types import Array

_announced: set[str] = set()
_lock = threading.Lock()
OUTPUTS = "the outputs of the function"


class Held(NamedTuple):
  """An axis of a variable that keeps more entries than its masks need.

  Attributes:
    path: the variable, as ``params/Dense_0/kernel``.
    axis: the axis.
    kept: the kept entries.
    allowed: the entries that masks allow.
  """

  path: str
  axis: int
  kept: int
  allowed: int


class Blocker(NamedTuple):
  """A use that keeps dead entries of variables.

  Attributes:
    primitive: its name; ``output`` for outputs of the function.
    reason: what it does.
    where: the source line.
    flops: FLOPs per example saved if nothing on this line kept entries (0 if others still would).
    layer: its scope: ``Net/LayerNorm_0``.
    holds: the axes that it keeps, as the nearest cause.
    parameters: the entries of variables that it keeps.
  """

  primitive: str
  reason: str
  where: str
  flops: float
  layer: str
  holds: tuple[Held, ...]
  parameters: int = 0


class Stays(NamedTuple):
  """All that is kept although masks would remove it.

  Attributes:
    blockers: the uses that keep it.
    flops: FLOPs per example saved without them.
  """

  blockers: list[Blocker]
  flops: float


def what_stays(
  analysis: Analysis, tree: VariableTree, ev: Evaluation, examples: int, counter: Counter
) -> Stays:
  """The uses that keep entries of variables, or FLOPs, that masks would remove."""
  found = _causes(analysis, tree, ev)
  lines = {cause[2] for cause in found}
  left = {where: _left_by(analysis, {where}, ev, examples, counter) for where in lines}
  all_of_them = [
    Blocker(*cause[:3], left[cause[2]], cause[3], tuple(one.held for one in kept), _parameters(kept))
    for cause, kept in found.items()
  ]
  chosen = [blocker for blocker in all_of_them if blocker.holds or blocker.flops]
  told = {blocker.where for blocker in chosen}
  if len(told) > 1:
    return Stays(chosen, _left_by(analysis, told, ev, examples, counter))
  return Stays(chosen, sum(left[where] for where in told))


def _left_by(
  analysis: Analysis, lines: AbstractSet[str], ev: Evaluation, examples: int, counter: Counter
) -> float:
  free = without(analysis, lambda node: node.source in lines, OUTPUTS in lines)
  return max(_cost(analysis, analysis.live, ev, counter) - _cost(analysis, free, ev, counter), 0) / examples


class _Kept(NamedTuple):
  """An axis that keeps too much, and its variable's number of entries."""

  held: Held
  entries: int


def _parameters(kept: Sequence[_Kept]) -> int:
  """The entries saved if all axes were as small as masks allow."""
  left: dict[str, float] = {}
  for (path, _, stays, allowed), entries in kept:
    left[path] = left.get(path, entries) * allowed / stays
  return sum({one.held.path: one.entries for one in kept}.values()) - round(sum(left.values()))


def _causes(
  analysis: Analysis, tree: VariableTree, ev: Evaluation
) -> dict[tuple[str, str, str, str], list[_Kept]]:
  """Uses that work on dead entries or are their nearest cause, with the axes that they keep."""
  found_in = [Causes(analysis.program, analysis.live, free, ev) for free in ideals(analysis)]
  working = [node for node in analysis.live.specs if found_in[0].works_on_dead(node)]
  found: dict[tuple[str, str, str, str], list[_Kept]] = {_describe(analysis, node): [] for node in working}
  for (path, _), value in zip(tree.paths, analysis.variables, strict=True):
    for axis in range(0 if tree.is_mask(path) else len(value.shape)):
      if stay := next(filter(None, (causes.of(value, axis) for causes in found_in)), None):
        held = Held(path_name(path), axis, stay.kept, stay.allowed)
        kept = _Kept(held, found_in[0].entries(value))
        found.setdefault(_describe(analysis, stay.cause), []).append(kept)
  return found


def _describe(analysis: Analysis, node: Node | None) -> tuple[str, str, str, str]:
  """Primitive, reason, where, layer."""
  if node is None:
    return "output", "an output is made of it, or several uses together keep it", OUTPUTS, ""
  spec = analysis.live.specs[node]
  default = f"{node.name} shows the sign of zeros" if spec.sees else f"{node.name} along the masked axis"
  if not any(analysis.live.info(value).varies for value in node.ins):
    default += ", of variables alone"
  reason = spec.opaque or default
  return node.name, reason, node.source, node.scope


def _cost(analysis: Analysis, live: Liveness, ev: Evaluation, counter: Counter) -> int:
  return total([cost.term for cost in costs_of(analysis.program, live, counter)], ev)


def check(
  analysis: Analysis, tree: VariableTree, examples: int, counter: Counter, strict: Sequence[Evaluation] = ()
) -> None:
  """Warns of unknown primitives; raises if a mask is not read, or strict masks leave dead entries."""
  _check_read(analysis, tree)
  _warn_of_unknown(analysis, tree.mask_leaves, examples, counter)
  _check_strict(analysis, tree, strict, examples, counter)


def _check_strict(
  analysis: Analysis, tree: VariableTree, states: Sequence[Evaluation], examples: int, counter: Counter
) -> None:
  found = next(
    filter(None, (what_stays(analysis, tree, ev, examples, counter).blockers for ev in states)), None
  )
  if found:
    text = "\n".join(line for blocker in found for line in lines(blocker))
    raise ValueError(
      f"With strict=True every dead feature must be removable, got uses that keep them:\n{text}\n"
      "Move the mask, teach the engine the primitive with fp.register_rule, or drop strict=True."
    )


def _check_read(analysis: Analysis, tree: VariableTree) -> None:
  """Raises if nothing reads a mask: it was made for another function."""
  read = {value for node in analysis.program.nodes for value in node.ins} | {*analysis.program.outputs}
  unread = [
    path_name(path)
    for (path, _), value in zip(tree.paths, analysis.variables, strict=True)
    if tree.is_mask(path) and value not in read and 0 not in value.shape  # possible in a compact network
  ]
  if unread:
    raise ValueError(
      f"Every mask must be read by apply_fn, got masks that nothing reads: {', '.join(unread)}. Pass the function that "
      "they were made for (under the same interceptor, with the same method and options), or leave them out."
    )


def lines(blocker: Blocker) -> list[str]:
  """A blocker as text."""
  layer = f", in {blocker.layer}" if blocker.layer else ""
  cost = f": {blocker.flops:,.0f} FLOPs per example" if blocker.flops else ""
  if blocker.parameters and not blocker.flops:
    cost = f": {blocker.parameters:,} parameters"
  axes = [f"    {h.path} axis {h.axis}: {h.kept} stay where masks allow {h.allowed}" for h in blocker.holds]
  return [f"  {blocker.reason}{layer} ({blocker.where}){cost}", *axes]


def _warn_of_unknown(analysis: Analysis, masks: Sequence[Array], examples: int, counter: Counter) -> None:
  """Warns once per primitive without a rule: it is not counted, and may keep entries."""
  live = analysis.live
  for node in live.factors:
    name = node.name
    if live.specs[node].opaque != unknown(name) or name in _announced:
      continue
    free, ev = without(analysis, functools.partial(_is_called, name), False), sample_masks(masks)[0]
    left = (_cost(analysis, live, ev, counter) - _cost(analysis, free, ev, counter)) / examples
    if left <= 0 and not any(live.info(out).varies for out in node.outs):
      continue  # it keeps nothing, and costs nothing
    if not _is_news(name):
      continue
    own = (
      "its own cost is what its cost_estimate says"
      if live.specs[node].counted
      else "its own cost is not counted"
    )
    warn(
      f"fisherprune_jax has no rule for the primitive `{name}` ({node.source}): arrays that "
      f"it reads or writes are kept whole, and with them up to {max(left, 0):,.0f} FLOPs per example; {own}. "
      "fp.register_rule can teach it."
    )


def not_covered(path: Path, analysis: Analysis, first: Analysis) -> str:
  """The error if other arguments need more of a variable."""
  need = (
    "A compact network must need no more of its variables for these arguments than for those it was built with, got "
    f"a use of removed entries of {path_name(path)}."
  )
  if strange := _without_rule(analysis) - _without_rule(first):
    return (
      f"{need} The function traces to other primitives here, {', '.join(sorted(strange))}, which have no rule: "
      "another tool has put its own in the place of functions that it calls, as jax2onnx does while it converts. Trace "
      "it before, jax.eval_shape(small, small.variables, spec), and hand that very jax.ShapeDtypeStruct to the tool, with "
      "a symbol of your own (jax.export.symbolic_shape) for a size that is to be free."
    )
  return f"{need} Compact it with these arguments."


def _without_rule(analysis: Analysis) -> frozenset[str]:
  specs = analysis.live.specs.items()
  return frozenset(node.name for node, spec in specs if spec.opaque == unknown(node.name))


def _is_news(primitive: str) -> bool:
  with _lock:
    told = primitive in _announced
    _announced.add(primitive)
  return not told


def _is_called(name: str, node: Node) -> bool:
  return node.name == name


def sample_masks(masks: Sequence[Array]) -> list[Evaluation]:
  """Masks of one feature each (the smallest network), of all others, and two at random."""
  rng = np.random.default_rng(0)
  first = [np.ones(m.shape) * (np.arange(m.shape[-1]) == 0) for m in masks]
  states = [first, [1 - m for m in first], *([rng.random(m.shape) < 0.5 for m in masks] for _ in range(2))]
  return [Evaluation(vectors_of([np.asarray(m, np.float32) for m in state])) for state in states]
