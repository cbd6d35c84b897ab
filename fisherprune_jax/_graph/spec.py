"""One fact per primitive: how the axes of its operands relate to the axes of its results.

A ``Spec`` names the *factors* of one application, as in ``b m k, b k n -> b m n``. An axis is one factor, or

- ``None``: unlinked to any other axis (a size-1 axis that broadcasts);
- ``Prod(("h", "w", "c"))``: several factors merged, row-major (reshape, grouped convolution);
- ``Sum(("a", "b"))``: several factors end to end (concatenate, split);
- ``Pick("a", index)``: a static selection of a factor's entries (slice, pad, reverse).

From it liveness, cost and execution follow; no rule states any of them itself.
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
  """Entry ``index[i]`` of a factor at position ``i``; -1 is a zero of the primitive's own making, or operand 1 if ``filled``."""

  factor: Factor
  index: np.ndarray
  filled: bool = False


Axis = Factor | Prod | Sum | Pick | None
Axes = tuple[Axis, ...]
Sizes = dict[Factor, Size]
Bind = Callable[[Node, Sequence[jax.Array], Sizes], Sequence[jax.Array]]
"""``bind(node, arrays, sizes)``: the results of a primitive, of live entries; ``sizes`` are those of its factors."""


class Flops(NamedTuple):
  """``scale * prod(outer) * max(2 K - 1, 0)``, ``K = taps * prod(inner)``; without ``inner`` no last factor."""

  outer: tuple[Factor, ...]
  inner: tuple[Factor, ...] | None = None
  scale: int = 1
  taps: int = 1


@dataclass(frozen=True)
class Spec:
  """How one application of a primitive relates axes.

  Attributes:
    ins: per operand, its axes.
    outs: per result, its axes.
    sizes: the full size of every factor.
    kills: operands of which a zero alone makes the result zero, as in a product.
    neutral: operands whose zeros say nothing about the result (constants, predicates).
    alive: factors along which the result is non-zero whatever the operands are.
    whole: factors of which every entry must be there for the primitive to be right.
    flops: what one application costs.
    counted: whether ``flops`` says so; False where nobody knows what it costs.
    moves: whether the result holds the values of operand 0, moved or cast but never computed with.
    opaque: why a dead entry has to stay, for the report; empty where nothing has to.
    same_as: the operand that the result equals on live entries (the other one is a mask of ones there).
    sees: operands of which the sign of a zero shows in the result, in more than the sign of a zero.
    blind: operands of which the sign of a zero does not show at all; of the others it becomes that of a zero.
    weak: summed factors of which the node could do without (for a diagnosis alone; no rule says so).
    lasts: whether results are there even if operands are not (likewise).
    windows: how windows slide from factors of operands to factors of results, both of them whole.
    bind: ``bind(node, arrays, sizes)`` applies the primitive to live entries; None applies it as traced.
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
  windows: tuple[Window, ...] = ()
  bind: Bind | None = field(default=None, compare=False)

  @functools.cached_property
  def roles(self) -> "Roles":
    """What follows from it for zeros; found once for all that are alike."""
    picks = any(isinstance(axis, Pick) for axes in self.outs for axis in axes)
    find = _roles.__wrapped__ if picks else _roles  # an index is of one application, and may be long
    factors = tuple(self.sizes)
    return find(self.ins, self.outs, factors, self.kills, self.neutral, self.alive, self.whole, self.lasts)


class Roles(NamedTuple):
  """What follows from a ``Spec`` for arrays that are zero along some factor, or altogether.

  Attributes:
    givers: of every factor that operands have, which do, without those whose zeros say nothing.
    keeping: the factors at a position of which results are zero where all operands that have them are.
    summed: the factors that no result has, of which entries may be left out.
    told: per result, the factors that are not empty where its axes are not: these have no positions of others.
    deciding: per result, the operands of which each alone makes all of it zero where all of that operand is.
    adding: the operands that decide nothing alone: results are like sums of them.
    vanishing: per result, whether all of it is zero where all operands are that are added.
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
    frozenset(f for axis in axes if not _has_others(axis) for f in factors_of(axis)) for axes in outs
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


def _has_others(axis: Axis) -> bool:
  """Whether an axis has positions that are none of one factor's."""
  return isinstance(axis, Sum) or (isinstance(axis, Pick) and axis.filled)


def names_of(shape: Sequence[Size]) -> tuple[Factor, ...]:
  """A factor for each axis of a shape: ``d0 d1 ...``.

  >>> import fisherprune_jax as fp
  >>> fp.rules.names_of((5, 4))
  ('d0', 'd1')
  """
  return tuple(f"d{i}" for i in range(len(shape)))


def factors_of(axis: Axis) -> tuple[Factor, ...]:
  """The factors that an axis is made of."""
  if axis is None:
    return ()
  if isinstance(axis, Pick):
    return (axis.factor,)
  return (axis,) if isinstance(axis, str) else axis.parts


def compose(axis: Axis, factors: dict[Factor, Set], size: Size) -> Set:
  """The set of an axis from the sets of its factors."""
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
  """The smallest set of one factor of an axis that the axis's set allows."""
  if isinstance(axis, str):
    return whole
  if isinstance(axis, Pick):
    return sets.any_of(whole, axis.index, sizes[factor])  # what any position shows
  assert axis is not None
  at = axis.parts.index(factor)
  if isinstance(axis, Prod):
    return sets.split(whole, [sizes[part] for part in axis.parts])[at]
  start = sum(sizes[part] for part in axis.parts[:at])
  return sets.take(whole, np.arange(start, start + sizes[factor]))
