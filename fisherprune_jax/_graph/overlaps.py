"""Features that lie below several factors of one product, such as one mask on both sides of a layer.

To the first order the product ``a b`` loses ``a db + da b`` with a feature; in truth ``a db + da b - da db``. The
excess ``da db`` is computed from the drops of each factor alone, for the features in question, and without
cancellation: with one factor more, ``c``, it is ``excess c + drop dc``. It is less than the number of factors
times what remains when it is taken off, so that little is lost to rounding there.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.circuit import Circuit
from fisherprune_jax._graph.sets import Set


class Monomial(NamedTuple):
  """``scale`` times the sizes of ``factors``, in a sum."""

  sum: int
  scale: int
  factors: tuple[Set, ...]


class Rows:
  """Rows of weights that a circuit hands down; what hangs on different masks can share one."""

  def __init__(self) -> None:
    self._supports: list[int] = []

  @property
  def count(self) -> int:
    """How many there are."""
    return len(self._supports)

  def new(self, support: int) -> int:
    """A row for something that hangs on the masks of ``support``."""
    row = next((row for row, taken in enumerate(self._supports) if not taken & support), self.count)
    if row == self.count:
      self._supports.append(0)
    self._supports[row] |= support
    return row


class Overlaps:
  """The features in question: of entry ``i``, feature ``feature[i]`` is below several factors of ``monomial[i]``.

  Attributes:
    rows: the factors whose own drops are needed, and in which row of weights each one's are found.
  """

  def __init__(self, monomials: Sequence[Monomial], circuit: Circuit, rows: Rows) -> None:
    self.rows: dict[Set, int] = {}
    width = max((len(m.factors) for m in monomials), default=0)
    found = [(np.zeros(0, int), np.zeros(0, int), np.zeros((0, width), int))]
    for at, m in enumerate(monomials):
      if twice := _in_several(m.factors):
        features = circuit.features_of(twice)
        places = np.full((features.size, width), -1)
        for column, s in enumerate(m.factors):
          if s.support & twice:
            row = self.rows[s] if s in self.rows else self.rows.setdefault(s, rows.new(s.support))
            below = np.isin(features, circuit.features_of(s.support))
            places[:, column] = np.where(below, row * circuit.features + features, -1)
        found.append((np.full(features.size, at), features, places))
    self.monomial, self.feature, self._places = map(np.concatenate, zip(*found, strict=True))
    self._scale = np.array([m.scale for m in monomials], np.float32)[self.monomial]

  def excess(self, drops: jax.Array, values: jax.Array) -> jax.Array:
    """What first-order drops have too much, per entry.

    Args:
      drops: ``(rows, features)``.
      values: ``(monomials, factors)``, the sizes of the factors.
    """
    flat = jnp.concatenate([drops.reshape(-1), jnp.zeros(1, drops.dtype)])  # the last for place -1
    value, drop, excess = jnp.float32(1), jnp.float32(0), jnp.float32(0)
    for v, place in zip(values[self.monomial].T, self._places.T, strict=True):
      d = flat[place]
      excess = excess * v + drop * d
      drop = drop * v + (value - drop) * d
      value = value * v
    return self._scale * excess


def _in_several(factors: Iterable[Set]) -> int:
  once = twice = 0
  for s in factors:
    twice |= once & s.support
    once |= s.support
  return twice
