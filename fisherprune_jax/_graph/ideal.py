"""What masks would allow, if no use kept dead entries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from fisherprune_jax._graph.boxes import Box, Where, exact_conditions, meet, weak_box, whole_box
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.rules import spec_of
from fisherprune_jax._graph.spec import Axis, Factor, Spec, factors_of, names_of
from fisherprune_jax._graph.traced import Analysis

A = TypeVar("A", Axis, Factor)

MOST_ROUNDS = 4
"""In a chain of variables that only meet variables, each round finds one more."""


def ideals(analysis: Analysis) -> Iterator[Liveness]:
  """The liveness if no use kept dead entries; then with fewer variables, round by round.

  A variable that is only multiplied with others, such as a learned query's projection, may be as small as these. So in
  further rounds, variables are zero where the last one did not need them.
  """
  known: dict[Value, Box] = {}
  meet_alone = any(_is_of_variables(spec, node, analysis.live) for node, spec in analysis.live.specs.items())
  for _ in range(MOST_ROUNDS if meet_alone else 1):
    found = without(analysis, lambda node: True, True, known)
    yield found
    before, known = known, _needed_of_variables(analysis, found)
    if known == before:
      return


def _is_of_variables(spec: Spec, node: Node, live: Liveness) -> bool:
  return bool(spec.roles.summed or spec.whole) and not any(live.info(value).varies for value in node.ins)


def _needed_of_variables(analysis: Analysis, found: Liveness) -> dict[Value, Box]:
  return {
    value: meet(found.info(value).possible, found.demanded[value].box)
    for value in analysis.variables
    if value in found.demanded and not analysis.live.info(value).is_masked
  }


def without(
  analysis: Analysis,
  chosen: Callable[[Node], bool],
  outputs: bool,
  known: Mapping[Value, Box] = MappingProxyType({}),
) -> Liveness:
  """The liveness if chosen nodes, and outputs, kept no dead entries.

  ``known`` tells where some variables may be non-zero.
  """

  def rules(node: Node, infos: Sequence[Info]) -> Spec:
    spec = spec_of(node, infos)
    free = is_in_the_way(spec, infos) and chosen(node)
    return in_nobodys_way(node, spec, analysis.live, infos) if free else spec

  box = weak_box if outputs else whole_box
  with exact_conditions():
    return analysis.by_rules(rules, lambda value: Where(box(value.shape)), known)


def is_in_the_way(spec: Spec, infos: Sequence[Info]) -> bool:
  """Whether a node keeps entries that others could do without."""
  return bool(spec.opaque or spec.sees or _own_sums(spec, infos))


def _own_sums(spec: Spec, infos: Sequence[Info]) -> frozenset[Factor]:
  """The factors that a node sums over by itself.

  A layer's product with something that depends on arguments does not count. A product of variables alone, as in a
  spectral norm, is a statistic and does.
  """
  if len(spec.kills) > 1 and any(info.varies for info in infos):
    return frozenset()
  return frozenset(spec.sizes) - {f for axes in spec.outs for axis in axes for f in factors_of(axis)}


def in_nobodys_way(node: Node, spec: Spec, live: Liveness, now: Sequence[Info]) -> Spec:
  """The spec of a node, if it could do without dead entries.

  Where a later mask decides the demand, it may densify what that mask keeps. What it makes of empty arrays stays, such
  as a bias behind an emptied mask. ``live`` is the actual liveness; ``now`` describes operands in this one.
  """
  written = _written(spec, now)
  shape = node.outs[0].shape if node.outs else None
  if node.ins and node.ins[0].shape == shape and not {*spec.ins[0]} & {*spec.outs[0]}:
    spec = _entry_by_entry(spec, shape)  # nothing is known of it
  decided = {
    f
    for out, axes in zip(node.outs, spec.outs, strict=True)
    for axis, demanded in zip(axes, live.demanded[out].box if out in live.demanded else (), strict=False)
    for f in factors_of(axis)
    if demanded.support
  }
  infos = [live.info(value) for value in node.ins]
  variables = frozenset(i for i, info in enumerate(infos) if not info.varies and not info.is_masked)
  others = spec.neutral | variables
  lasts = not all(spec.roles.deciding) and not (
    all(spec.roles.vanishing) and variables.isdisjoint(spec.roles.adding)
  )
  shifted = {f for i in variables for axis in spec.ins[i] for f in factors_of(axis)}
  return replace(
    spec,
    alive=((spec.alive | shifted) & decided) | written,
    neutral=others if len(others) < len(node.ins) else variables,
    whole=frozenset(),
    sees=frozenset(),
    weak=_own_sums(spec, infos),
    lasts=lasts,
    opaque="",
  )


def _written(spec: Spec, now: Sequence[Info]) -> frozenset[Factor]:
  """The factors along which only writes to unknown positions exist, as into an empty cache."""
  empty = {i for i, info in enumerate(now) if info.where.some.is_empty}
  others = [i for i, info in enumerate(now) if i not in empty and i not in spec.neutral and info.varies]
  inside = {f for i in others for axis in spec.ins[i] for f in factors_of(axis)}
  lacking = {f for i in empty for axis in spec.ins[i] for f in factors_of(axis)} - inside
  return frozenset(lacking & spec.whole) if others else frozenset()


def _entry_by_entry(spec: Spec, shape: Sequence[int]) -> Spec:
  linked = dict(zip([*spec.ins[0], *spec.outs[0]], 2 * names_of(shape), strict=True))

  def renamed(axes: Sequence[A]) -> tuple[A | Factor, ...]:
    return tuple(linked.get(axis, axis) for axis in axes)

  counts = (
    count._replace(outer=renamed(count.outer), inner=None if count.inner is None else renamed(count.inner))
    for count in spec.flops
  )
  return replace(
    spec,
    ins=tuple(map(renamed, spec.ins)),
    outs=tuple(map(renamed, spec.outs)),
    sizes={linked.get(f, f): n for f, n in spec.sizes.items()},
    windows=(),
    flops=tuple(counts),
  )
