"""Kernels to time: products and convolutions, at any widths of the axes that masks can cut."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.sets import Set, beyond
from fisherprune_jax._graph.spec import Axis, Factor, Pick, Prod, Sizes, Spec, Sum
from fisherprune_jax._graph.terms import Term, sized
from fisherprune_jax._types import Shape

PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
Widths = tuple[int, ...]
"""The sizes of a kernel's free axes, in order."""


@dataclass(frozen=True)
class Kernel:
  """One product or convolution, with axes that may be cut.

  Attributes:
    primitive: its name.
    text: its parameters, shapes and types; equal texts take equal times.
    free: the factors that may be cut; factors of one entry have equal sizes, as both sides of a square.
    full: the full size of each entry.
    node: a node that computes it.
    spec: the spec of the node.
  """

  primitive: str
  text: str
  free: tuple[tuple[Factor, ...], ...]
  full: Widths
  node: Node = field(compare=False, repr=False)
  spec: Spec = field(compare=False, repr=False)

  def sizes(self, widths: Widths) -> Sizes:
    cut = {f: n for factors, n in zip(self.free, widths, strict=True) for f in factors}
    return {**self.spec.sizes, **cut}

  def shapes(self, widths: Widths) -> list[Shape]:
    sizes = self.sizes(widths)
    return [
      tuple(_size(axis, n, sizes) for axis, n in zip(axes, value.shape, strict=True))
      for axes, value in zip(self.spec.ins, self.node.ins, strict=True)
    ]

  def name(self, widths: Widths) -> str:
    """The name of a time: all that it depends on beside the machine."""
    return f"{self.primitive} {self.text} at {' '.join(map(str, self.shapes(widths)))}"

  def run(self, widths: Widths, arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
    if self.spec.bind is None:
      return compat.bind(self.node.eqn, arrays)
    return self.spec.bind(self.node, arrays, self.sizes(widths))


def _size(axis: Axis, whole: int, sizes: Sizes) -> int:
  if axis is None:
    return whole
  if isinstance(axis, Pick):
    return len(axis.index)
  if isinstance(axis, Prod | Sum):
    parts = [sizes[f] for f in axis.parts]
    return math.prod(parts) if isinstance(axis, Prod) else sum(parts)
  return sizes[axis]


class Timed(NamedTuple):
  """The time of a kernel at the sizes of live sets: a term, like those of ``terms.py``.

  Attributes:
    kernel: the kernel.
    widths: the sizes of its free axes.
    outer: sets; it runs once for each of their positions. Mostly conditions.
    scale: a factor.
  """

  kernel: Kernel
  widths: tuple[Term, ...]
  outer: tuple[Set, ...] = ()
  scale: int = 1

  @property
  def key(self) -> object:
    """Equal for terms that differ by their scale alone."""
    return self[:3]

  @property
  def sets(self) -> tuple[Set, ...]:
    """All sets of its sizes; it takes no time if one is empty."""
    return (*(s for width in self.widths for s in width.sets), *self.outer)

  def under(self, when: Set) -> "Timed":
    """The same under a condition; zero if that fails."""
    when = beyond(when, self.sets)
    return self if when.is_all else self._replace(outer=(*self.outer, when))


class ProductsCounter(NamedTuple):
  """Returns products and convolutions as kernels to time; other nodes are free."""

  unit: str = "seconds"

  def __call__(self, node: Node, live: Liveness) -> list[Timed]:
    if node.name not in PRODUCTS:
      return []
    spec, factors = live.specs[node], live.factors[node]
    tied: dict[Term, list[Factor]] = {}
    for f in spec.sizes:
      if not factors[f].is_all:
        tied.setdefault(sized(1, [factors[f]]), []).append(f)
    free = tuple(map(tuple, tied.values()))
    full = tuple(spec.sizes[f] for f, *_ in free)
    shapes = [f"{value.aval.dtype}{list(value.shape)}" for value in node.ins]
    params = ", ".join(f"{key}={value}" for key, value in sorted(node.params.items()) if value is not None)
    return [Timed(Kernel(node.name, f"{shapes} {params}", free, full, node, spec), tuple(tied))]

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """Nothing: negligible."""
    return ()
