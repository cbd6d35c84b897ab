"""What one node costs: a meter says it in terms of what is live, for one unit.

A meter is called on every node that runs no program and depends on the arguments; loops, branches and calls add up what
it says of the nodes inside.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fisherprune_jax._graph.facts import box_of
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.spec import Axes, Flops
from fisherprune_jax._graph.terms import Term, sized, term


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
    if not _is_named(node.name, self.primitives):
      return ()
    counts = _counts(node, live, self.pad_taps)
    return None if counts is None else [term(flops, live.factors[node]) for flops in counts]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """What a primitive costs on one number, which the compact program has beside those that were traced."""
    return [Term(1, ())] if _is_named(primitive, self.primitives) else []


class MacsMeter(NamedTuple):
  """Multiply-accumulates: the terms of inner products; everything else is free. Attributes as of ``FlopsMeter``."""

  primitives: frozenset[str] | None = None
  pad_taps: bool = True

  @property
  def unit(self) -> str:
    """What it counts, for tables."""
    return "MACs"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term] | None:
    """``K`` for each inner product of ``K`` terms; None where no rule says what there is."""
    if not _is_named(node.name, self.primitives):
      return ()
    counts = _counts(node, live, self.pad_taps)
    return (
      None if counts is None else [_macs(flops, node, live) for flops in counts if flops.inner is not None]
    )

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

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term]:
    """What a node reads and writes."""
    spec = live.specs[node]
    leaves_out = spec.same_as is not None and not live.policy.multiplies
    if leaves_out or node.name in SHAPES_ALONE or not _is_named(node.name, self.primitives):
      return ()
    read = [pair for pair in zip(node.ins, spec.ins, strict=True) if pair[0].literal is None]
    written = zip(node.outs, spec.outs, strict=True)
    return [_bytes(value, axes, node, live) for value, axes in (*read, *written)]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """Nothing that would be worth counting."""
    return ()


SHAPES_ALONE = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim"})
"""Primitives that move nothing: readers see the same bytes under another shape, or the same ones several times."""


def _is_named(primitive: str, names: frozenset[str] | None) -> bool:
  return names is None or primitive in names


def _counts(node: Node, live: Liveness, pad_taps: bool) -> Iterator[Flops] | None:
  spec = live.specs[node]
  return (flops for flops in spec.flops if flops.pads in (None, pad_taps)) if spec.counted else None


def _macs(flops: Flops, node: Node, live: Liveness) -> Term:
  factors = live.factors[node]
  return sized(flops.scale * flops.taps, [factors[f] for f in (*flops.outer, *(flops.inner or ()))])


def _bytes(value: Value, axes: Axes, node: Node, live: Liveness) -> Term:
  return sized(value.aval.dtype.itemsize, box_of(axes, live.factors[node], value.shape))
