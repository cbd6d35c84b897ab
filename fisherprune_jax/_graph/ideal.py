"""What would be live in a function if nothing were in the way: what masks allow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from fisherprune_jax._graph.boxes import Box, Where, meet, weak_box, whole_box
from fisherprune_jax._graph.causes import in_nobodys_way, is_in_the_way
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.rules import spec_of
from fisherprune_jax._graph.spec import Spec
from fisherprune_jax._graph.traced import Analysis

MOST_ROUNDS = 4
"""Of finding it: of a chain of variables that only other variables meet, each round finds one more."""


def ideals(analysis: Analysis) -> Iterator[Liveness]:
  """What would be live if nothing were in the way; then, where variables meet variables, what follows from that.

  A variable that is only multiplied with others, as a learned query's projection is, may be as small as these may be.
  So in each further round variables are zero where the last one found no need of them.
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
  """Whether a node sums over variables alone, or needs them whole."""
  return bool(spec.roles.summed or spec.whole) and not any(live.info(value).varies for value in node.ins)


def _needed_of_variables(analysis: Analysis, found: Liveness) -> dict[Value, Box]:
  """Where the variables that are no masks are needed."""
  return {
    value: meet(found.info(value).possible, found.asked[value].box)
    for value in analysis.variables
    if value in found.asked and not analysis.live.info(value).is_masked
  }


def without(
  analysis: Analysis,
  chosen: Callable[[Node], bool],
  outputs: bool,
  known: Mapping[Value, Box] = MappingProxyType({}),
) -> Liveness:
  """What would be live if these nodes, and outputs if so said, were in nobody's way.

  Args:
    analysis: what is live.
    chosen: whether a node is meant.
    outputs: whether outputs are meant, too.
    known: where some variables can be non-zero.
  """

  def rules(node: Node, infos: Sequence[Info]) -> Spec:
    spec = spec_of(node, infos)
    free = is_in_the_way(spec, infos) and chosen(node)
    return in_nobodys_way(node, spec, analysis.live) if free else spec

  box = weak_box if outputs else whole_box
  return analysis.by_rules(rules, lambda value: Where(box(value.shape)), known)
