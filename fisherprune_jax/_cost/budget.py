"""Whether a cost is above a target, decided on whole numbers."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import exact
from fisherprune_jax._types import Array, Masks

BEHIND = 2
"""Digits behind the point of a target that is an array: its last one is 2 ** -32 FLOPs; more of smaller units."""


class ExactCost(NamedTuple):
  """A cost in whole numbers.

  Attributes:
    digits: ``digits(masks)``, the cost in units of ``per``, in as many digits as ``dense`` needs.
    dense: that of all-ones masks, the largest there is.
    per: what one unit is per example, as a third of a FLOP where three examples were traced.
  """

  digits: Callable[[Masks], exact.Digits]
  dense: int
  per: Fraction

  def exceeds(self, masks: Masks, target: float | Array) -> jax.Array:
    """Whether the cost per example is above ``target``."""
    if isinstance(target, jax.Array):
      return self._exceeds_array(masks, target)
    limit = limit_of(target, 1 / self.per)
    if limit >= self.dense:
      return jnp.bool_(False)
    return exact.above(self.digits(masks), exact.constant(limit, exact.digits_for(self.dense)))

  def _exceeds_array(self, masks: Masks, target: jax.Array) -> jax.Array:
    digits = exact.digits_for(self.dense)
    near = target <= 1.5 * float(self.dense * self.per)  # or it is above any cost, and might have more digits
    target = jnp.where(near, target, 0)
    units = 1 / self.per
    if units.denominator == 1:
      # The more units there are in one, the more of what is behind the point matters.
      behind = max(BEHIND, exact.digits_for(int(units)) + 1)
      limit = exact.times(exact.of_array(target, digits, behind), exact.constant(int(units), behind + digits))
    else:  # of seconds, say: then an array is as exact as its product with a number is
      behind, limit = BEHIND, exact.of_array(target * float(units), digits, BEHIND)
    return near & exact.above(self.digits(masks), limit[behind:])


def limit_of(target: float | Array, units: Fraction | int) -> int:
  """The largest number of units that is not above a target, of which one is so many.

  A float is taken with its rounding: a quotient of whole numbers that it is the nearest float to is not above it.

  >>> limit_of(100 / 7, 7), limit_of(50_000_001, 2)
  (100, 100000002)
  """
  number = np.asarray(target).item()
  if isinstance(number, float):
    number = math.nextafter(number, math.inf)
    if not math.isfinite(number):
      return 1 << 4096  # above anything
  return math.floor(Fraction(number) * units)
