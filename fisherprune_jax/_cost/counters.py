"""Cost counters: what one node costs in terms of live entries, in one unit.

A counter is called for nodes that run no program and depend on the arguments. Loops, branches and calls add up the
nodes inside.
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
from fisherprune_jax._graph.terms import MostExpensive, Term, collect, sized, term


@dataclass(frozen=True)
class FlopsCounter:
  """Counts floating-point operations by the rules (``Spec.flops``).

  Attributes:
    primitives: names of the primitives to count; None for all.
  """

  primitives: frozenset[str] | None = None

  @property
  def unit(self) -> str:
    return "FLOPs"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term] | None:
    """The cost of a node; None without a rule for it."""
    if not _is_named(node.name, self.primitives):
      return ()
    spec, factors = live.specs[node], live.factors[node]
    if not spec.counted:
      return None
    return [found for flops in spec.flops for found in self.terms(flops, factors)]

  def terms(self, flops: Flops, factors: Factors) -> list[Term]:
    return [term(flops, factors)]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """The cost of a primitive on scalars, which the compact program adds."""
    return [Term(1, ())] if _is_named(primitive, self.primitives) else []


class MacsCounter(FlopsCounter):
  """Counts multiply-accumulates: ``K`` for each inner product of ``K`` terms, nothing else."""

  @property
  def unit(self) -> str:
    return "MACs"

  def terms(self, flops: Flops, factors: Factors) -> list[Term]:
    if flops.inner is None:
      return []
    return [sized(flops.scale * flops.taps, [factors[f] for f in (*flops.outer, *flops.inner)])]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """Nothing: scalars have no inner product."""
    return ()


class BytesCounter(NamedTuple):
  """Counts the bytes of all operands and results of nodes, as if none were fused.

  Nodes that the compact program lacks are free, such as products with masks. So are constants in the program, and nodes
  that only change shapes.

  Attributes:
    primitives: names of the primitives to count; None for all.
  """

  primitives: frozenset[str] | None = None

  @property
  def unit(self) -> str:
    return "bytes"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term] | None:
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
    """Nothing: negligible."""
    return ()


@dataclass(frozen=True)
class Roofline:
  r"""Estimates time by the two limits of a machine: each node takes the larger of its arithmetic and its memory time.

  .. math:: seconds = \sum_{nodes} \max(FLOPs / rate_{arithmetic}, bytes / rate_{memory})

  With ``fp.cost_model(..., measure=fp.Roofline(...))``, parts bound by memory, as in a language model that decodes one
  token at a time, are pruned to save bytes; parts bound by arithmetic, to save FLOPs.

  Attributes:
    flops_per_second: the arithmetic rate that products reach.
    bytes_per_second: the memory rate.

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
    """The weights of a FLOP and a byte, as whole numbers."""
    ratio = Fraction(repr(float(self.flops_per_second))) / Fraction(repr(float(self.bytes_per_second)))
    return ratio.denominator, ratio.numerator

  @property
  def seconds(self) -> Fraction:
    """The seconds of one unit of weight."""
    return 1 / (Fraction(repr(float(self.flops_per_second))) * self.weights[0])


class RooflineCounter(NamedTuple):
  """Counts for each node the larger of weighted FLOPs and weighted bytes.

  Attributes:
    flops: counts FLOPs.
    moved: counts bytes.
    weights: of a FLOP and of a byte.
  """

  flops: FlopsCounter
  moved: BytesCounter
  weights: tuple[int, int]

  @property
  def unit(self) -> str:
    return "seconds"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term | MostExpensive] | None:
    """One term; None without a rule for the node."""
    found = [self.flops(node, live), self.moved(node, live)]
    if found[0] is None:
      return None
    sums: list[tuple[Term | MostExpensive, ...]] = [
      tuple(t._replace(scale=t.scale * weight) for t in collect(terms or ()))
      for terms, weight in zip(found, self.weights, strict=True)
    ]
    if any(t.sets for terms in sums for t in terms):
      return [MostExpensive(tuple(sums))]
    return [Term(max(sum(t.scale for t in terms) for terms in sums), ())]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """Nothing: negligible."""
    return ()


SHAPES_ALONE = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim"})
"""Primitives that move nothing: readers see the same bytes in another shape, or repeatedly."""


def _is_named(primitive: str, names: frozenset[str] | None) -> bool:
  return names is None or primitive in names
