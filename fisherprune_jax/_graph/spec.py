"""How a primitive relates the axes of operands and results: one ``Spec`` per application.

A spec names *factors*, as in ``b m k, b k n -> b m n``. An axis is one factor, or

- ``None``: not linked to other axes (a size-1 axis that broadcasts);
- ``Prod(("h", "w", "c"))``: factors merged, row-major (reshape, grouped convolution);
- ``Sum(("a", "b"))``: factors end to end (concatenate, split);
- ``Pick("a", index)``: a static selection of entries (slice, pad, reverse).

Liveness, cost and execution follow from it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.windows import Window
from fisherprune_jax._types import Size

Factor = str


@dataclass(frozen=True)
class Prod:
  """Factors merged into one axis, row-major."""

  parts: tuple[Factor, ...]


@dataclass(frozen=True)
class Sum:
  """Factors laid end to end along one axis."""

  parts: tuple[Factor, ...]


@dataclass(frozen=True, eq=False)
class Pick:
  """Entry ``index[i]`` of a factor at position ``i``; -1 puts in a zero, or operand 1 if ``filled``."""

  factor: Factor
  index: np.ndarray
  filled: bool = False


Axis = Factor | Prod | Sum | Pick | None
Axes = tuple[Axis, ...]
Sizes = dict[Factor, Size]
Bind = Callable[[Node, Sequence[jax.Array], Sizes], Sequence[jax.Array]]
"""``bind(node, arrays, sizes)`` applies a primitive to live entries; ``sizes`` are the live sizes of its factors."""


class Flops(NamedTuple):
  """A count ``scale * prod(outer) * max(2 K - 1, 0)``, ``K = taps * prod(inner)``; without ``inner``, the max is 1."""

  outer: tuple[Factor, ...]
  inner: tuple[Factor, ...] | None = None
  scale: int = 1
  taps: int = 1


@dataclass(frozen=True)
class Spec:
  """How one application of a primitive relates axes.

  Attributes:
    ins: axes per operand.
    outs: axes per result.
    sizes: full size per factor.
    kills: absorbing operands: a zero in one makes the result zero, as in a product.
    neutral: operands whose zeros do not matter (constants, predicates).
    alive: factors along which it densifies: zeros may become non-zero.
    whole: indivisible factors: every entry is needed.
    flops: the cost of one application.
    counted: False if the cost is unknown.
    moves: whether the result is operand 0, moved or cast but not computed with.
    opaque: why dead entries must be kept, for the report; empty if none must.
    same_as: the operand that the result equals on live entries, where the other is a mask of ones.
    sees: sign-sensitive operands: the sign of a zero changes more than the sign of a zero.
    blind: sign-insensitive operands: the sign of a zero never shows. (Otherwise it becomes that of a zero.)
    weak: summed factors that it could do without; for diagnosis only.
    lasts: whether results remain if operands are empty; for diagnosis only.
    indexed: the summed factor of operand 0 from which operand 1 picks entries by number, as in an embedding: a zero there is
      read as zero.
    windows: windows from factors of operands to factors of results, both indivisible.
    bind: applies the primitive to live entries; None applies it as traced.
  """

  ins: tuple[Axes, ...]
  outs: tuple[Axes, ...]
  sizes: Sizes
  kills: frozenset[int] = frozenset()
  neutral: frozenset[int] = frozenset()
  alive: frozenset[Factor] = frozenset()
  whole: frozenset[Factor] = frozenset()
  flops: tuple[Flops, ...] = ()
  counted: bool = True
  moves: bool = False
  opaque: str = ""
  same_as: int | None = None
  sees: frozenset[int] = frozenset()
  blind: frozenset[int] = frozenset()
  weak: frozenset[Factor] = frozenset()
  lasts: bool = False
  indexed: Factor | None = None
  windows: tuple[Window, ...] = ()
  bind: Bind | None = field(default=None, compare=False)

  @property
  def unordered(self) -> frozenset[Factor]:
    """Factors whose entries may end up anywhere: indivisible ones, and the one that an index picks from."""
    return self.whole if self.indexed is None else self.whole | {self.indexed}

  @functools.cached_property
  def roles(self) -> "Roles":
    """What it implies for zeros; cached."""
    picks = any(isinstance(axis, Pick) for axes in self.outs for axis in axes)
    find = _roles.__wrapped__ if picks else _roles  # an index belongs to one application, and may be long
    factors = tuple(self.sizes)
    return find(self.ins, self.outs, factors, self.kills, self.neutral, self.alive, self.whole, self.lasts)


class Roles(NamedTuple):
  """What a spec implies for arrays that are zero along a factor, or everywhere.

  Attributes:
    givers: per factor, the operands that have it, without neutral ones.
    keeping: factors along which results are zero where all givers are.
    summed: factors that no result has, and that may lose entries.
    told: per result, factors that are not empty if its axes are not, as they are alone on these.
    deciding: per result, operands that make all of it zero if one of them is all zero.
    adding: the other operands: results are like sums of them.
    vanishing: per result, whether it is all zero if all added operands are.
  """

  givers: dict[Factor, tuple[int, ...]]
  keeping: frozenset[Factor]
  summed: frozenset[Factor]
  told: tuple[frozenset[Factor], ...]
  deciding: tuple[frozenset[int], ...]
  adding: frozenset[int]
  vanishing: tuple[bool, ...]


@functools.lru_cache(maxsize=1024)
def _roles(
  ins: tuple[Axes, ...],
  outs: tuple[Axes, ...],
  factors: tuple[Factor, ...],
  kills: frozenset[int],
  neutral: frozenset[int],
  alive: frozenset[Factor],
  whole: frozenset[Factor],
  lasts: bool,
) -> Roles:
  givers: dict[Factor, tuple[int, ...]] = {}
  for operand, axes in enumerate(ins):
    for f in (f for axis in axes for f in factors_of(axis)) if operand not in neutral else ():
      if (found := givers.get(f, ()))[-1:] != (operand,):
        givers[f] = (*found, operand)
  keeping = frozenset(givers) - alive - whole
  shown = {f for axes in outs for axis in axes for f in factors_of(axis)}
  told = tuple(
    frozenset(f for axis in axes if not has_others(axis) for f in factors_of(axis)) for axes in outs
  )
  alone = [{givers[f][0] for f in by & keeping if len(givers[f]) == 1} for by in told]
  deciding = tuple(frozenset() if lasts else kills | found for found in alone)
  adding = frozenset(i for found in givers.values() for i in found).difference(*deciding)
  follow = {f for f in keeping if adding.issuperset(givers[f]) and not lasts}
  vanishing = tuple(
    not follow.isdisjoint(by) or any(isinstance(axis, Sum) and follow.issuperset(axis.parts) for axis in axes)
    for axes, by in zip(outs, told, strict=True)
  )
  return Roles(givers, keeping, frozenset(factors) - shown - whole, told, deciding, adding, vanishing)


def has_others(axis: Axis) -> bool:
  """Whether an axis has positions outside of one factor."""
  return isinstance(axis, Sum) or (isinstance(axis, Pick) and axis.filled)


def names_of(shape: Sequence[Size]) -> tuple[Factor, ...]:
  """One factor per axis of a shape: ``d0 d1 ...``.

  >>> import fisherprune_jax as fp
  >>> fp.rules.names_of((5, 4))
  ('d0', 'd1')
  """
  return tuple(f"d{i}" for i in range(len(shape)))


def factors_of(axis: Axis) -> tuple[Factor, ...]:
  if axis is None:
    return ()
  if isinstance(axis, Pick):
    return (axis.factor,)
  return (axis,) if isinstance(axis, str) else axis.parts


def compose(axis: Axis, factors: dict[Factor, Set], size: Size) -> Set:
  """The set of an axis from those of its factors."""
  if axis is None:
    return sets.everything(size)
  if isinstance(axis, str):
    return factors[axis]
  if isinstance(axis, Pick):
    picked = sets.take(factors[axis.factor], axis.index)
    return sets.union(picked, sets.fixed(axis.index < 0)) if axis.filled else picked
  combine = sets.outer if isinstance(axis, Prod) else sets.concat
  return combine([factors[part] for part in axis.parts])


def project(axis: Axis, whole: Set, factor: Factor, sizes: Sizes) -> Set:
  """The smallest set of one factor that the axis's set allows."""
  if isinstance(axis, str):
    return whole
  if isinstance(axis, Pick):
    return sets.any_of(whole, axis.index, sizes[factor])  # shown at any position
  assert axis is not None
  at = axis.parts.index(factor)
  if isinstance(axis, Prod):
    return sets.split(whole, [sizes[part] for part in axis.parts])[at]
  start = sum(sizes[part] for part in axis.parts[:at])
  return sets.take(whole, np.arange(start, start + sizes[factor]))
