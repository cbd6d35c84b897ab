"""The cost of a masked network, and the marginal cost of each feature."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._cost.counted import Counted, Row
from fisherprune_jax._cost.flat import FlatCost
from fisherprune_jax._cost.owned import Owned, Ownership
from fisherprune_jax._errors import (
  as_written,
  is_known,
  is_number,
  require,
  require_same_tree,
  require_shapes,
)
from fisherprune_jax._masks import flatten, named_rows, unflatten
from fisherprune_jax._tables import Shown, Table, as_number, shortened
from fisherprune_jax._types import Array, Masks, Shape


class CostModel(Shown):
  """The cost of a network as a function of its masks.

  Made by :func:`cost_model`, or by :meth:`from_functions` for a user-defined cost (energy, a lookup table). For cost
  models of the same masks, ``a + b``, ``sum([a, b])`` and ``2.0 * a`` are cost models.

  Attributes:
    masks: the tree of all-ones masks.
    dense: the cost per example without masked features.
    unit: the unit, such as ``"FLOPs"``.
    flat: the cost of the features of all masks, concatenated.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> apply = lambda v, x: (x @ v["a"]) * v["masks"] @ v["b"]
  >>> variables = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "masks": jnp.ones(4)}
  >>> flops, params = (fp.cost_model(apply, variables, jnp.ones((5, 3)), measure=m) for m in ("flops", "params"))
  >>> both = flops + 0.5 * params
  >>> flops.dense, params.dense, both.dense
  (34.0, 20.0, 44.0)
  >>> both.per_feature(both.masks)
  Array([11.5, 11.5, 11.5, 11.5], dtype=float32)
  """

  def __init__(
    self,
    masks: Masks,
    flat: FlatCost,
    unit: str = "",
    counted: Counted | None = None,
    rows: Callable[[Masks], list[Row]] | None = None,
    examples: int = 1,
    owned: Sequence[Owned] | None = None,
  ) -> None:
    with jax.ensure_compile_time_eval():  # also inside of a traced function
      self.masks = jax.tree.map(lambda m: jnp.ones(m.shape, jnp.float32), masks)
      self.dense = float(flat.total(flatten(self.masks))) if counted is None else counted.worth(counted.dense)
    self.unit = unit
    self.flat = flat
    self._total = jax.jit(lambda masks: flat.total(flatten(masks)))
    self._drops = jax.jit(lambda masks: flat.drops(flatten(masks)))
    self._counted = counted
    self._examples = examples
    self._owned = owned
    self._rows = rows if counted is None else counted.breakdown

  @classmethod
  def of(cls, counted: Counted, unit: str, owned: Sequence[Owned] | None = None) -> "CostModel":
    flat = FlatCost(counted.total, counted.drops, counted.exact_cost)
    return cls(counted.masks, flat, unit, counted, owned=owned)

  @functools.cached_property
  def ownership(self) -> Ownership | None:
    """The parameters of each feature; None for user-defined costs."""
    return None if self._owned is None else Ownership(self._owned, self.masks)

  @classmethod
  def from_functions(
    cls,
    masks: Masks,
    total: Callable[[Masks], Masks],
    per_feature: Callable[[Masks], Masks],
    unit: str = "",
  ) -> "CostModel":
    """A user-defined cost model, from jit-able functions.

    Args:
      masks: a tree of masks; only shapes matter.
      total: ``total(masks)``, the cost per example, a scalar.
      per_feature: ``per_feature(masks)``, the marginal cost of each feature, a tree like ``masks``.
      unit: the unit, for tables.

    Returns:
      A cost model without breakdown, whose ``exact`` is ``total``.

    >>> import jax, jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> masks = {"a": jnp.ones(3)}
    >>> cost = fp.CostModel.from_functions(
    ...   masks, total=lambda m: 7.0 * jnp.sum(m["a"]), per_feature=lambda m: jax.tree.map(lambda x: 7.0 * x, m))
    >>> cost.dense
    21.0
    """

    def drops(features: jax.Array) -> jax.Array:
      found = per_feature(unflatten(jnp.float32(features), masks))
      return flatten(jax.tree.map(lambda m, d: jnp.broadcast_to(jnp.float32(d), m.shape), masks, found))

    def of_features(features: jax.Array) -> jax.Array:
      return jnp.asarray(total(unflatten(jnp.float32(features), masks)), jnp.float32)

    return cls(masks, FlatCost(of_features, drops), unit)

  def __add__(self, other: Any) -> "CostModel":
    """The sum of two costs on the same masks, exact if both are."""
    if not isinstance(other, CostModel):
      return NotImplemented
    _check_same(self.masks, other.masks)
    unit = self.unit if self.unit == other.unit else f"{self.unit or 'cost'} + {other.unit or 'cost'}"
    owned = other._owned if self._owned is None else self._owned
    if self._counted is not None and other._counted is not None:
      return CostModel.of(self._counted.plus(other._counted), unit, owned)

    a, b = self.flat, other.flat

    def rows(masks: Masks) -> list[Row]:
      return [*self.breakdown(masks), *other.breakdown(masks)]

    return CostModel(
      self.masks,
      FlatCost(lambda on: a.total(on) + b.total(on), lambda on: a.drops(on) + b.drops(on)),
      unit,
      rows=rows,
      examples=self._examples if self._examples == other._examples else 1,
      owned=owned,
    )

  def __radd__(self, other: Any) -> "CostModel":
    """The same cost for ``0 + cost``, with which ``sum`` begins."""
    return self if is_number(other) and is_known(other) and other == 0 else NotImplemented

  def __mul__(self, factor: Any) -> "CostModel":
    """A multiple of the cost, for sums of costs in different units."""
    if not is_number(factor):
      return NotImplemented
    require(0 < factor < math.inf, "A cost model can be multiplied by a positive number", factor)
    number = as_written(factor)  # 0.1 is exactly a tenth
    unit = f"{float(factor):g} {self.unit or 'cost'}"
    if self._counted is not None:
      return CostModel.of(self._counted.times(number), unit, self._owned)

    flat = self.flat

    def rows(masks: Masks) -> list[Row]:
      found = self.breakdown(masks)
      return [row._replace(dense=factor * row.dense, now=factor * row.now, unit=unit) for row in found]

    return CostModel(
      self.masks,
      FlatCost(lambda on: factor * flat.total(on), lambda on: factor * flat.drops(on)),
      unit,
      rows=rows,
      examples=self._examples,
      owned=self._owned,
    )

  __rmul__ = __mul__

  def __call__(self, masks: Masks) -> jax.Array:
    """The cost per example under ``masks``, a float32 scalar; jit-able."""
    self._check(masks)
    return self._total(masks)

  def per_feature(self, masks: Masks) -> Masks:
    """The marginal cost of each feature per example: a float32 tree like ``masks``; jit-able."""
    self._check(masks)
    return unflatten(self._drops(masks), masks)

  def exact(self, masks: Masks) -> int | float:
    """The cost of one traced batch, computed on the host: an integer, except for divided units (seconds)."""
    self._check(masks)
    if self._counted is not None:
      return self._counted.exact(masks)
    total = float(self._total(masks)) * self._examples
    return int(total) if total.is_integer() else total

  def exceeds(self, masks: Masks, target: float | Array) -> jax.Array:
    """Whether the cost is above a target per example, a boolean scalar; jit-able.

    The comparison is exact, in whole FLOPs of the traced batch. ``cost(masks) > target`` is not: float32 is off by 3 at
    50 million. User-defined costs are compared in float32.

    Args:
      masks: a tree of masks.
      target: a number. A Python float also admits the quotient that it rounds; an array is exact.

    >>> import jax, jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> apply = lambda v, x: (x @ v["w"]) * v["masks"]
    >>> variables = {"w": jax.ShapeDtypeStruct((500_001, 50), jnp.float32), "masks": jnp.ones(50)}
    >>> cost = fp.cost_model(apply, variables, jax.ShapeDtypeStruct((1, 500_001), jnp.float32))
    >>> cost.dense, float(cost(cost.masks))
    (50000050.0, 50000048.0)
    >>> bool(cost.exceeds(cost.masks, 50_000_049)), bool(cost.exceeds(cost.masks, 50_000_050))
    (True, False)
    """
    self._check(masks)
    return self.flat.exceeds(flatten(masks), self.flat.limit(target))

  def breakdown(self, masks: Masks) -> list[Row]:
    """One row per source line and primitive (or per parameter), with the dense cost and the cost under ``masks``."""
    self._check(masks)
    return [] if self._rows is None else self._rows(masks)

  def tables(self) -> list[Table | str]:
    """The cost, the masks, and the most expensive source lines."""
    marginal = named_rows(jax.tree.map(np.asarray, self.per_feature(self.masks)))
    rows = [(name, str(row.size), as_number(float(np.mean(row)))) for name, row in marginal]
    lines = sorted(self.breakdown(self.masks), key=lambda row: -row.dense)
    found = [(row.where, row.primitive, f"{as_number(row.dense)} {row.unit}") for row in lines]
    where = Table(("source line", "primitive", "cost"), found, left=(0, 1))
    return [
      repr(self),
      Table(("mask", "features", f"{self.unit or 'cost'} of one feature (mean)"), rows),
      *shortened(where, "cost.breakdown(cost.masks)"),
    ]

  def __repr__(self) -> str:
    features = sum(leaf.size for leaf in jax.tree.leaves(self.masks))
    rows = len(named_rows(self.masks))
    unit = f" {self.unit}" if self.unit else ""
    return f"CostModel({as_number(self.dense)}{unit} per example, masks: {rows}, features: {features:,})"

  def _check(self, masks: Masks) -> None:
    if isinstance(masks, int | np.integer) or (hasattr(masks, "ndim") and masks.ndim == 0):
      raise TypeError(
        "A cost model takes a tree of masks, got a scalar. If this came from optax.inject_hyperparams, which "
        "calls every callable argument with the step: use fp.inject_hyperparams, or pass "
        "static_args=('cost', 'prune_every', 'burn_in', 'features_per_prune', 'min_features') and "
        "hyperparam_dtype=jnp.float32."
      )
    how = "Build the cost model for this model."
    require_same_tree(masks, self.masks, "masks", "the cost model's masks", how)
    require_shapes(masks, self.masks, _shape_of_a_mask, how)


def _shape_of_a_mask(shape: Shape, path: str) -> str:
  return f"A mask must have the shape {shape} that the cost model was built for"


def _check_same(a: Masks, b: Masks) -> None:
  how = "Build both for the same model and variables."
  require_same_tree(b, a, "The masks of a cost to add", "the masks of the other", how)
  require_shapes(b, a, lambda shape, path: f"Costs to add must have masks of one shape, {shape}", how)
