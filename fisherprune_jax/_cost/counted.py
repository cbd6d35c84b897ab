"""Costs that are sums of terms, in whole numbers of a unit."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np

from fisherprune_jax._cost.budget import ExactCost
from fisherprune_jax._graph import exact as whole_numbers
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.prices import Prices
from fisherprune_jax._graph.terms import MostExpensive, Term, collect, total
from fisherprune_jax._graph.variables import sizes_of, vectors_of
from fisherprune_jax._types import Masks


class NotCounted(float):
  """An unknown cost: zero in sums, shown as ``not counted``."""

  def __repr__(self) -> str:
    return "not counted"

  def __format__(self, spec: str) -> str:
    return "not counted"

  __str__ = __repr__


class Row(NamedTuple):
  """One line of a cost breakdown, per example.

  Attributes:
    where: the source line; for parameters, the path.
    primitive: its name; followed by ``(not counted)`` if no rule gives its cost.
    dense: the cost without masked features.
    now: the cost under the masks. Unknown costs are zero in sums, and shown as ``not counted``.
    unit: the unit of both, such as ``"FLOPs"``.
  """

  where: str
  primitive: str
  dense: float
  now: float
  unit: str = "FLOPs"


class Entry(NamedTuple):
  """A part of a cost, with its labels in a breakdown."""

  where: str
  label: str
  unit: str
  term: Term | MostExpensive
  counted: bool = True


@dataclass(frozen=True, eq=False)
class Counted:
  """A cost as a sum of terms.

  Attributes:
    entries: its parts.
    masks: the masks; only shapes matter.
    per: the size of one unit per example.
    batch: the number of examples of ``exact``.
  """

  entries: tuple[Entry, ...]
  masks: Masks
  per: Fraction
  batch: int

  @functools.cached_property
  def terms(self) -> list[Term | MostExpensive]:
    """All terms, with equal ones added up."""
    return collect(entry.term for entry in self.entries)

  @functools.cached_property
  def dense(self) -> int:
    """The cost without masked features, the largest."""
    return total(self.terms, self._ones)

  @functools.cached_property
  def prices(self) -> Prices:
    """The cost on the device; lazy, as costs of given masks do not need it."""
    return Prices(self.terms, sizes_of(jax.tree.leaves(self.masks)))

  @property
  def exact_cost(self) -> ExactCost:
    return ExactCost(jax.jit(self._digits), self.dense, self.per)

  def worth(self, number: int) -> float:
    return float(number * self.per)

  def total(self, features: jax.Array) -> jax.Array:
    """The cost per example, in float32, for the features of all masks, concatenated; jit-able."""
    return self.prices.total(features != 0) / self._divisor

  def drops(self, features: jax.Array) -> jax.Array:
    """The marginal cost of each feature; jit-able."""
    return self.prices.drops(features != 0) / self._divisor

  def exact(self, masks: Masks) -> int | float:
    """The cost of a batch on the host: an integer if it is whole."""
    found = total(self.terms, _evaluation(masks)) * self.per * self.batch
    return int(found) if found.denominator == 1 else float(found)

  def breakdown(self, masks: Masks) -> list[Row]:
    """Dense and masked cost, summed over entries of equal labels."""
    states = [self._ones, _evaluation(masks)]
    sums: dict[tuple[str, str, str], list[float]] = {}
    for entry in self.entries:
      if not entry.counted:
        sums[entry.where, f"{entry.label} (not counted)", entry.unit] = [NotCounted()] * 2
        continue
      row = sums.setdefault((entry.where, entry.label, entry.unit), [0.0, 0.0])
      for at, ev in enumerate(states):
        row[at] += self.worth(total([entry.term], ev))
    return [Row(where, label, dense, now, unit) for (where, label, unit), (dense, now) in sums.items()]

  def times(self, factor: Fraction) -> "Counted":
    return replace(self, per=self.per * factor)

  def plus(self, other: "Counted") -> "Counted":
    """The sum of two costs of the same masks, in the largest common unit."""
    a, b = self.per, other.per
    bottom = a.denominator * b.denominator
    per = Fraction(math.gcd(a.numerator * b.denominator, b.numerator * a.denominator), bottom)
    entries = (*_scaled(self.entries, int(a / per)), *_scaled(other.entries, int(b / per)))
    return replace(self, entries=entries, per=per, batch=self.batch if self.batch == other.batch else 1)

  @property
  def _ones(self) -> Evaluation:
    return _evaluation(jax.tree.map(lambda m: np.ones(m.shape), self.masks))

  @property
  def _divisor(self) -> float:
    return float(1 / self.per)

  def _digits(self, features: jax.Array) -> whole_numbers.Digits:
    sizes = functools.partial(self.prices.sizes, features != 0)
    return whole_numbers.total(self.terms, sizes, whole_numbers.digits_for(self.dense))


def _scaled(entries: Iterable[Entry], factor: int) -> Iterable[Entry]:
  return (entry._replace(term=entry.term._replace(scale=entry.term.scale * factor)) for entry in entries)


def _evaluation(masks: Masks) -> Evaluation:
  return Evaluation(vectors_of(jax.tree.leaves(masks)))
