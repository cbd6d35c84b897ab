"""Costs of the features of all masks, concatenated: one vector keeps programs small for any number of masks."""

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
  """The total cost, whether it is above a limit, and the marginal cost of each feature."""

  total: jax.Array
  too_much: jax.Array
  drops: jax.Array


class FlatCost:
  """The cost of a vector of features that is non-zero where they are live; every method is jit-able.

  Args:
    total: the cost per example, a float32 scalar.
    drops: the marginal costs, a float32 vector.
    exact: the cost in whole numbers, for exact comparisons; None for user-defined costs.

  Attributes:
    total: compiled.
    drops: compiled.
    programs: compiled programs of callers, by their options.
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
    if self._exact is None:
      return jnp.asarray(self.total(features) > limit)
    return self._exact.exceeds(features, limit)

  def price(self, features: jax.Array, limit: Limit | None) -> Priced:
    """All costs of some features; any cost is above a limit of None."""
    above = jnp.bool_(True) if limit is None else self.exceeds(features, limit)
    return Priced(self.total(features), above, self.drops(features))
