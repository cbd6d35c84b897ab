"""What one node costs: a meter says it in terms of what is live, for one unit.

A meter is called on every node that runs no program and depends on the arguments; loops, branches and calls add up what
it says of the nodes inside.
"""

from collections.abc import Iterable
from typing import NamedTuple

from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.terms import Term, term


class FlopsMeter(NamedTuple):
  """Floating-point operations, as the rules count them (``Spec.flops``).

  Attributes:
    primitives: names of the primitives to count; None counts all.
    pad_taps: whether the taps of windows that fall on padding count.
  """

  primitives: frozenset[str] | None = None
  pad_taps: bool = True

  @property
  def unit(self) -> str:
    """What it counts, for tables."""
    return "FLOPs"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term] | None:
    """What a node costs; None where no rule says so."""
    if not self._names(node.name):
      return ()
    spec, factors = live.specs[node], live.factors[node]
    if not spec.counted:
      return None
    return [term(flops, factors) for flops in spec.flops if flops.pads in (None, self.pad_taps)]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """What a primitive costs on one number, which the compact program has beside those that were traced."""
    return [Term(1, ())] if self._names(primitive) else []

  def _names(self, primitive: str) -> bool:
    return self.primitives is None or primitive in self.primitives
