"""What one node costs: a meter says it in terms of what is live, for one unit.

A meter is called on every node that runs no program and depends on the arguments; loops, branches and calls add up what
it says of the nodes inside.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import NamedTuple

from fisherprune_jax._errors import is_number, require
from fisherprune_jax._graph.facts import Factors, box_of
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.spec import Flops
from fisherprune_jax._graph.terms import Dearest, Term, collect, sized, term


@dataclass(frozen=True)
class FlopsMeter:
  """Floating-point operations, as the rules count them (``Spec.flops``).

  Attributes:
    primitives: names of the primitives to count; None counts all.
  """

  primitives: frozenset[str] | None = None

  @property
  def unit(self) -> str:
    """What it counts, for tables."""
    return "FLOPs"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term] | None:
    """What a node costs; None where no rule says so."""
    if not _is_named(node.name, self.primitives):
      return ()
    spec, factors = live.specs[node], live.factors[node]
    if not spec.counted:
      return None
    return [found for flops in spec.flops for found in self.terms(flops, factors)]

  def terms(self, flops: Flops, factors: Factors) -> list[Term]:
    """Of a rule's count, what is counted."""
    return [term(flops, factors)]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """What a primitive costs on one number, which the compact program has beside those that were traced."""
    return [Term(1, ())] if _is_named(primitive, self.primitives) else []


class MacsMeter(FlopsMeter):
  """Multiply-accumulates: ``K`` for each inner product of ``K`` terms; everything else is free."""

  @property
  def unit(self) -> str:
    """What it counts, for tables."""
    return "MACs"

  def terms(self, flops: Flops, factors: Factors) -> list[Term]:
    """Of a rule's count, what is counted."""
    if flops.inner is None:
      return []
    return [sized(flops.scale * flops.taps, [factors[f] for f in (*flops.outer, *flops.inner)])]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """Nothing: a number has no inner product."""
    return ()


class BytesMeter(NamedTuple):
  """Bytes that nodes read and write, each its operands and its results, as if none were fused.

  What a node is in the compact program alone counts: a product with a mask is none there. Constants that are written
  into the program are free, and so is what merely gives an array another shape.

  Attributes:
    primitives: names of the primitives to count; None counts all.
  """

  primitives: frozenset[str] | None = None

  @property
  def unit(self) -> str:
    """What it counts, for tables."""
    return "bytes"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term] | None:
    """What a node reads and writes."""
    spec, factors = live.specs[node], live.factors[node]
    leaves_out = spec.same_as is not None and not live.keep_masks
    if leaves_out or node.name in SHAPES_ALONE or not _is_named(node.name, self.primitives):
      return ()
    read = [pair for pair in zip(node.ins, spec.ins, strict=True) if pair[0].literal is None]
    written = zip(node.outs, spec.outs, strict=True)
    return [
      sized(value.aval.dtype.itemsize, box_of(axes, factors, value.shape))
      for value, axes in (*read, *written)
    ]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """Nothing that would be worth counting."""
    return ()


@dataclass(frozen=True)
class Roofline:
  r"""Time as a machine's two limits have it: of each node the larger of what its arithmetic and its bytes take.

  .. math:: seconds = \sum_{nodes} \max(FLOPs / rate_{arithmetic}, bytes / rate_{memory})

  For ``fp.cost_model(..., measure=fp.Roofline(...))``: what is bound by memory, as a language model that decodes one token
  at a time, is pruned where bytes go; what is bound by arithmetic, where FLOPs do.

  Attributes:
    flops_per_second: of the machine, as it is reached in products.
    bytes_per_second: of its memory.

  Raises:
    ValueError: for rates that are not positive.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> apply = lambda v, x: (x @ v["w"]) * v["masks"]
  >>> variables = {"w": jnp.ones((100, 50)), "masks": jnp.ones(50)}
  >>> machine = fp.Roofline(flops_per_second=1e9, bytes_per_second=1e8)
  >>> for examples in (1, 1000):  # 4 (5,000 + 150) bytes, then 50 (2 * 100 - 1) FLOPs
  ...   print(fp.cost_model(apply, variables, jnp.ones((examples, 100)), measure=machine).dense)
  0.000206
  9.95e-06

  References:
    Williams et al., `Roofline: an insightful visual performance model
    <https://doi.org/10.1145/1498765.1498785>`_, 2009
  """

  flops_per_second: float
  bytes_per_second: float

  def __post_init__(self) -> None:
    for field in fields(self):
      rate = getattr(self, field.name)
      valid = is_number(rate) and 0 < rate < math.inf
      require(
        valid, f"{field.name} of a Roofline must be a positive number", rate, "It is in units per second."
      )

  @property
  def weights(self) -> tuple[int, int]:
    """What a FLOP and a byte weigh, as whole numbers."""
    ratio = Fraction(repr(float(self.flops_per_second))) / Fraction(repr(float(self.bytes_per_second)))
    return ratio.denominator, ratio.numerator

  @property
  def seconds(self) -> Fraction:
    """What one such unit takes."""
    return 1 / (Fraction(repr(float(self.flops_per_second))) * self.weights[0])


class RooflineMeter(NamedTuple):
  """Of each node the larger of weighted FLOPs and weighted bytes.

  Attributes:
    flops: counts FLOPs.
    moved: counts bytes.
    weights: of a FLOP and of a byte.
  """

  flops: FlopsMeter
  moved: BytesMeter
  weights: tuple[int, int]

  @property
  def unit(self) -> str:
    """What it counts, for tables."""
    return "seconds"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term | Dearest] | None:
    """One term; None where no rule says what a node computes."""
    found = [self.flops(node, live), self.moved(node, live)]
    if found[0] is None:
      return None
    sums: list[tuple[Term | Dearest, ...]] = [
      tuple(t._replace(scale=t.scale * weight) for t in collect(terms or ()))
      for terms, weight in zip(found, self.weights, strict=True)
    ]
    if any(t.sets for terms in sums for t in terms):
      return [Dearest(tuple(sums))]
    return [Term(max(sum(t.scale for t in terms) for terms in sums), ())]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """Nothing that would be worth counting."""
    return ()


SHAPES_ALONE = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim"})
"""Primitives that move nothing: readers see the same bytes under another shape, or the same ones several times."""


def _is_named(primitive: str, names: frozenset[str] | None) -> bool:
  return names is None or primitive in names
