"""Features below several factors of a product, as with one mask on both sides of a layer.

To first order, ``a b`` loses ``a db + da b`` with a feature; exactly, it loses ``a db + da b - da db``. The excess ``da
db`` comes from the factors' drops, without cancellation. With a further factor ``c`` it is ``excess c + drop dc``. It
is less than the number of factors times the exact drop, so subtracting it loses little precision.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.circuit import Circuit
from fisherprune_jax._graph.sets import Set

Scalar: TypeAlias = np.floating | jax.Array
"""A number, or a vector of numbers."""


class Monomial(NamedTuple):
  """A term of a sum: a scale times the sizes of factors."""

  sum: int
  scale: int
  factors: tuple[Set, ...]


class Lanes:
  """Lanes of weights that a circuit propagates side by side; shared if masks differ."""

  def __init__(self) -> None:
    self._supports: list[int] = []

  @property
  def count(self) -> int:
    return len(self._supports)

  def new(self, support: int) -> int:
    lane = next((lane for lane, taken in enumerate(self._supports) if not taken & support), self.count)
    if lane == self.count:
      self._supports.append(0)
    self._supports[lane] |= support
    return lane


class Overlaps:
  """Entry ``i``: feature ``feature[i]`` is below several factors of ``monomial[i]``.

  ``lanes`` are those of factors whose drops are needed.
  """

  def __init__(self, monomials: Sequence[Monomial], circuit: Circuit, lanes: Lanes) -> None:
    self.lanes: dict[Set, int] = {}
    width = max((len(m.factors) for m in monomials), default=0)
    found = [(np.zeros(0, int), np.zeros(0, int), np.zeros((0, width), int))]
    for at, m in enumerate(monomials):
      if twice := _in_several(m.factors):
        features = circuit.features_of(twice)
        places = np.full((features.size, width), -1)
        for column, s in enumerate(m.factors):
          if s.support & twice:
            lane = self.lanes[s] if s in self.lanes else self.lanes.setdefault(s, lanes.new(s.support))
            below = np.isin(features, circuit.features_of(s.support))
            places[:, column] = np.where(below, lane * circuit.features + features, -1)
        found.append((np.full(features.size, at), features, places))
    self.monomial, self.feature, self._places = map(np.concatenate, zip(*found, strict=True))
    self._scale = np.array([m.scale for m in monomials], np.float32)[self.monomial]

  def excess(self, drops: jax.Array, values: jax.Array) -> jax.Array:
    """The excess of first-order ``drops``, ``(lanes, features)``, per entry.

    ``values`` are sizes of factors, ``(monomials, factors)``.
    """
    flat = jnp.concatenate([drops.reshape(-1), jnp.zeros(1, drops.dtype)])  # the last for place -1
    factors = zip(values[self.monomial].T, (flat[place] for place in self._places.T), strict=True)
    return self._scale * product_drop(factors).excess


class ProductDrop(NamedTuple):
  """A product whose factors all drop.

  Attributes:
    value: the product before.
    drop: its drop.
    excess: its drops by single factors, minus the drop.
  """

  value: Scalar
  drop: Scalar
  excess: Scalar


def product_drop(factors: Iterable[tuple[Scalar, Scalar]]) -> ProductDrop:
  """The drop of a product of values that drop (at most by all), without cancellation."""
  value: Scalar = np.float32(1)
  drop: Scalar = np.float32(0)
  excess: Scalar = np.float32(0)
  for v, d in factors:
    excess = excess * v + drop * d
    drop = drop * v + (value - drop) * d
    value = value * v
  return ProductDrop(value, drop, excess)


def _in_several(factors: Iterable[Set]) -> int:
  once = twice = 0
  for s in factors:
    twice |= once & s.support
    once |= s.support
  return twice
