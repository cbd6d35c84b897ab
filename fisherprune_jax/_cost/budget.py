"""Exact comparison of a cost with a target, in whole numbers."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import exact
from fisherprune_jax._types import Array

BEHIND = 2
"""Digits after the point of a target in an array: its last one is 2 ** -32 FLOPs; more for smaller units."""


class ExactCost(NamedTuple):
  """A cost in whole numbers.

  Attributes:
    digits: ``digits(features)``, the cost in units of ``per``, in as many digits as ``dense`` has; features are those
      of all masks, concatenated.
    dense: the cost of all-ones masks, the largest.
    per: the size of a unit per example, such as a third of a FLOP for three traced examples.
  """

  digits: Callable[[jax.Array], exact.Digits]
  dense: int
  per: Fraction

  def exceeds(self, features: jax.Array, limit: exact.Digits) -> jax.Array:
    return exact.above(self.digits(features), limit)

  def limit(self, target: float | Array) -> exact.Digits:
    """The largest cost up to ``target`` per example, at most ``dense``."""
    if isinstance(target, jax.Array):
      return self._limit_of_array(target)
    return exact.constant(min(limit_of(target, 1 / self.per), self.dense), exact.digits_for(self.dense))

  def _limit_of_array(self, target: jax.Array) -> exact.Digits:
    digits = exact.digits_for(self.dense)
    near = target <= 1.5 * float(
      self.dense * self.per
    )  # larger targets exceed any cost, and may have more digits
    target = jnp.where(near, target, 0)
    units = 1 / self.per
    if units.denominator == 1:
      # Larger units need more digits after the point.
      behind = max(BEHIND, exact.digits_for(int(units)) + 1)
      limit = exact.times(exact.of_array(target, digits, behind), exact.constant(int(units), behind + digits))
    else:  # seconds, for example: the array is multiplied by a number, with rounding
      behind, limit = BEHIND, exact.of_array(target * float(units), digits, BEHIND)
    dense = exact.constant(self.dense, digits)
    return [jnp.where(near, x, y) for x, y in zip(limit[behind:], dense, strict=True)]


def limit_of(target: float | Array, units: Fraction | int) -> int:
  """The largest number of units that is not above a target.

  A float is read with its rounding: it admits a quotient of whole numbers whose nearest float it is.

  >>> limit_of(100 / 7, 7), limit_of(50_000_001, 2)
  (100, 100000002)
  """
  number = np.asarray(target).item()
  if isinstance(number, float):
    number = math.nextafter(number, math.inf)
    if not math.isfinite(number):
      return 1 << 4096  # above any cost
  return math.floor(Fraction(number) * units)
