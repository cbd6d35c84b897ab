"""Costs that are sums of terms, in whole numbers of some unit: evaluated, priced, multiplied and added up."""

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
from fisherprune_jax._graph.terms import Dearest, Term, collect, total
from fisherprune_jax._graph.variables import sizes_of, vectors_of
from fisherprune_jax._types import Masks


class NotCounted(float):
  """What nobody knows the cost of: nothing in a sum, and shown as ``not counted``, not as a zero."""

  def __repr__(self) -> str:
    return "not counted"

  def __format__(self, spec: str) -> str:
    return "not counted"

  __str__ = __repr__


class Row(NamedTuple):
  """One line of a cost breakdown, per example.

  Attributes:
    where: the user's source line; of parameters, their path.
    primitive: its name; with ``(not counted)`` behind it if no rule says what it costs.
    dense: with every feature alive.
    now: under the masks; as ``dense``, zero in a sum and shown as ``not counted`` if that is so.
    unit: of both, such as ``"FLOPs"``.
  """

  where: str
  primitive: str
  dense: float
  now: float
  unit: str = "FLOPs"


class Entry(NamedTuple):
  """A part of a cost, with what a breakdown says of it."""

  where: str
  label: str
  unit: str
  term: Term | Dearest
  counted: bool = True


@dataclass(frozen=True, eq=False)
class Counted:
  """A cost as a sum of terms.

  Attributes:
    entries: its parts.
    masks: the masks, of which shapes alone matter.
    per: what one unit of the terms is per example.
    batch: how many examples ``exact`` is of.
  """

  entries: tuple[Entry, ...]
  masks: Masks
  per: Fraction
  batch: int

  @functools.cached_property
  def terms(self) -> list[Term | Dearest]:
    """All of them, those that are alike added up."""
    return collect(entry.term for entry in self.entries)

  @functools.cached_property
  def dense(self) -> int:
    """The sum with every feature alive, the largest that there is."""
    return total(self.terms, self._ones)

  @functools.cached_property
  def prices(self) -> Prices:
    """The same on the device; made when asked for: who wants the sum under given masks alone can do without."""
    return Prices(self.terms, sizes_of(jax.tree.leaves(self.masks)))

  @property
  def exact_cost(self) -> ExactCost:
    """For comparisons without rounding."""
    return ExactCost(jax.jit(self._digits), self.dense, self.per)

  def worth(self, number: int) -> float:
    """What a sum of terms is per example."""
    return float(number * self.per)

  def total(self, features: jax.Array) -> jax.Array:
    """The cost per example, in float32, from which features of all masks, end to end, are alive; jit-able."""
    return self.prices.total(features != 0) / self._divisor

  def drops(self, features: jax.Array) -> jax.Array:
    """What it drops by with each feature; jit-able."""
    return self.prices.drops(features != 0) / self._divisor

  def exact(self, masks: Masks) -> int | float:
    """The cost of a batch on the host: an integer, unless the cost of one is none."""
    found = total(self.terms, _evaluation(masks)) * self.per * self.batch
    return int(found) if found.denominator == 1 else float(found)

  def breakdown(self, masks: Masks) -> list[Row]:
    """Dense and under masks, summed over the parts of one name."""
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
    """The same cost, multiplied."""
    return replace(self, per=self.per * factor)

  def plus(self, other: "Counted") -> "Counted":
    """The sum of two costs under the same masks, in the largest unit that both are whole numbers of."""
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
