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
"""Digits behind the point of a target that is an array: its last one is 2 ** -32 FLOPs."""


class ExactCost(NamedTuple):
  """A cost in whole numbers.

  Attributes:
    digits: ``digits(masks)``, the cost of a traced batch, in as many digits as ``dense`` needs.
    dense: that of all-ones masks, the largest there is.
    examples: how many examples the batch has.
  """

  digits: Callable[[Masks], exact.Digits]
  dense: int
  examples: int

  def exceeds(self, masks: Masks, target: float | Array) -> jax.Array:
    """Whether the count of a batch is above ``target`` times its examples."""
    if isinstance(target, jax.Array):
      return self._exceeds_array(masks, target)
    limit = limit_of(target, self.examples)
    if limit >= self.dense:
      return jnp.bool_(False)
    return exact.above(self.digits(masks), exact.constant(limit, exact.digits_for(self.dense)))

  def _exceeds_array(self, masks: Masks, target: jax.Array) -> jax.Array:
    digits = exact.digits_for(self.dense)
    near = target <= 1.5 * self.dense / self.examples  # or it is above any cost, and might have more digits
    limit = exact.of_array(jnp.where(near, target, 0), digits, BEHIND)
    limit = exact.times(limit, exact.constant(self.examples, digits))
    return near & exact.above(self.digits(masks), limit[BEHIND:])


def limit_of(target: float | Array, examples: int) -> int:
  """The largest count of a batch of examples that is not above a target per example.

  A float is taken with its rounding: a quotient of whole numbers that it is the nearest float to is not above it.

  >>> limit_of(100 / 7, 7), limit_of(50_000_001, 2)
  (100, 100000002)
  """
  number = np.asarray(target).item()
  if isinstance(number, float):
    number = math.nextafter(number, math.inf)
    if not math.isfinite(number):
      return 1 << 4096  # above anything
  return math.floor(Fraction(number) * examples)
