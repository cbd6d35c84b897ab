"""A cost of the features of all masks, end to end: what is computed on many masks is then as small a program as on one."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._cost.budget import ExactCost
from fisherprune_jax._types import Array

Limit: TypeAlias = Any
"""A target as arrays."""


class Priced(NamedTuple):
  """What features cost.

  Attributes:
    total: the cost.
    too_much: whether it is above a limit.
    drops: the drop in cost with each feature.
  """

  total: jax.Array
  too_much: jax.Array
  drops: jax.Array


class FlatCost:
  """What features cost, given as a vector that is not zero where they are alive; every method is jit-able.

  Args:
    total: the cost per example, a float32 scalar.
    drops: the drop in cost if one feature also went, a float32 vector.
    exact: the cost in whole numbers, for comparisons without rounding; None for a cost of your own.

  Attributes:
    total: as given, compiled.
    drops: likewise.
    programs: what callers have compiled for this cost, by what they chose; kept as long as the cost is.
  """

  def __init__(
    self,
    total: Callable[[jax.Array], jax.Array],
    drops: Callable[[jax.Array], jax.Array],
    exact: ExactCost | None = None,
  ) -> None:
    self.total, self.drops = jax.jit(total), jax.jit(drops)
    self.programs: dict[Any, Callable[..., Any]] = {}
    self._exact = exact

  def limit(self, target: float | Array) -> Limit:
    """A target as arrays, so that one program serves all targets."""
    if self._exact is not None:
      return self._exact.limit(target)
    return target if isinstance(target, jax.Array) else np.float32(min(target, np.finfo(np.float32).max))

  def exceeds(self, features: jax.Array, limit: Limit) -> jax.Array:
    """Whether the cost is above a limit."""
    if self._exact is None:
      return jnp.asarray(self.total(features) > limit)
    return self._exact.exceeds(features, limit)

  def price(self, features: jax.Array, limit: Limit | None) -> Priced:
    """All of it; None for no limit, which any cost is above."""
    above = jnp.bool_(True) if limit is None else self.exceeds(features, limit)
    return Priced(self.total(features), above, self.drops(features))
