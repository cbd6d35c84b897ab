"""Importance of features over some batches, without training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._errors import describe, is_traced, require, warn
from fisherprune_jax._masks import flatten
from fisherprune_jax._training.criteria import DEFAULT, criterion_of
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.gradients import Reduction, examples_of, value_and_mask_grads
from fisherprune_jax._training.once import require_finite
from fisherprune_jax._types import Masks, PyTree

OUTPUTS = "outputs"
"""The ``method`` that needs no loss."""


def estimate_importance(
  loss_fn: Callable[..., Any],
  params: PyTree,
  masks: Masks,
  batches: Iterable[PyTree],
  *,
  method: str | Criterion = DEFAULT,
  cost: CostModel | None = None,
  has_aux: bool = False,
  reduction: Reduction = "mean",
  key: jax.Array | None = None,
) -> Masks:
  r"""Estimate the mean importance of every feature over some batches, for :func:`select_masks`.

  Fisher importance is

  .. math:: importance_k = \tfrac12 \, \mathrm{mean}_n \, g_{nk}^2

  For a network that has learnt its labels the loss has almost no gradients. ``method="outputs"`` needs no labels: g is
  the gradient of a random projection of the outputs (Gauss-Newton), and the importance estimates half their squared
  change.

  Args:
    loss_fn: as in :func:`value_and_mask_grads`; with ``method="outputs"``, a function that returns the outputs, one row
      per example.
    params: the parameters.
    masks: the current masks, such as ``cost.masks``.
    batches: an iterable of batches of any sizes; every example has the same weight. Batches that are empty or have
      gradients that are not finite are skipped. Criteria without gradients ignore the batches.
    method: ``"outputs"``, or as in :func:`fisher_prune`. A :class:`Criterion` may use ``mask_grads``, ``params`` and
      ``masks``.
    cost: the cost model, for magnitudes: it knows the parameters of each feature. Without it, ``"fisher_magnitude"`` is
      ``"fisher"``.
    has_aux: as in :func:`value_and_mask_grads`.
    reduction: likewise.
    key: for the projections; None for ``jax.random.key(0)``.

  Returns:
    A float32 tree like the masks, in nats or the criterion's unit; for ``"outputs"``, their unit squared.

  Raises:
    ValueError: without batches, if all were skipped, or for magnitudes that are not finite.
    TypeError: if ``batches`` is one batch.

  Warns:
    UserWarning: if batches were skipped, or no gradient can reach a mask (see :func:`value_and_mask_grads`).

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> loss_fn = lambda w, masks, x: jnp.mean(jnp.sum(w * masks["m"] * x, axis=1))
  >>> batches = [jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[5.0, 6.0]])]
  >>> fp.estimate_importance(loss_fn, jnp.ones(2), {"m": jnp.ones(2)}, batches)["m"]
  Array([5.8333335, 9.333334 ], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """
  projects = method == OUTPUTS
  if projects:
    loss_fn, method, reduction = _projected(loss_fn, key, has_aux), "fisher", "sum"
  criterion = criterion_of(method, cost=cost)
  own = {"masks": masks, "params": params, "step": jnp.int32(1), "axis_name": None, "name": None}
  if "mask_grads" not in criterion.uses:
    importance = jax.tree.map(jnp.float32, criterion.ranked(criterion.importance_of(own), own))
    require_finite(importance, f"The importance of method={criterion.name!r}")
    return importance

  def loss_of_masks(_: tuple[()], masks: Masks, batch: PyTree, params: PyTree, *rest: Any) -> Any:
    return loss_fn(params, masks, batch, *rest)

  # Parameters come last and are not differentiated, so they may be integers.
  grads_of = value_and_mask_grads(loss_of_masks, has_aux=has_aux, reduction=reduction)

  @jax.jit
  def add(sums: _Sums, own: dict[str, Any], batch: PyTree) -> _Sums:
    number = (own["step"],) if projects else ()  # a new direction for each batch
    _, (_, mask_grads) = grads_of((), own["masks"], batch, own["params"], *number)
    given = {**own, "axis_name": None, "mask_grads": mask_grads}
    importance = criterion.ranked(criterion.importance_of(given), given)
    finite = jnp.all(jnp.isfinite(flatten(importance)))
    total = jax.tree.map(
      lambda t, s: jnp.where(finite, t + examples_of(batch) * s, t), sums.total, importance
    )
    return _Sums(
      total, sums.examples + jnp.where(finite, examples_of(batch), 0), sums.bad + jnp.where(finite, 0, 1)
    )

  total = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks)
  sums, empty, given = _Sums(total, jnp.int32(0), jnp.int32(0)), 0, 0
  for batch in iterated(batches):
    given += 1
    if examples_of(batch):
      sums = add(sums, {**own, "step": jnp.int32(given)}, batch)
    else:
      empty += 1
  require(given > empty, "batches must hold at least one example", 0, "Iterators may be used up.")
  _check_skipped(sums, empty, given)
  return jax.tree.map(lambda t: t / sums.examples, sums.total)


def _projected(outputs_fn: Callable[..., Any], key: jax.Array | None, has_aux: bool) -> Callable[..., Any]:
  """The projection of the outputs on a random direction per batch, as a loss with the reduction "sum"."""
  start = jax.random.key(0) if key is None else key

  def loss(params: PyTree, masks: Masks, batch: PyTree, number: jax.Array) -> Any:
    found = outputs_fn(params, masks, batch)
    outputs, aux = found if has_aux else (found, None)
    leaves = floating(outputs)
    require(bool(leaves), "outputs must hold floating-point numbers", outputs)
    total = random_projection(leaves, jax.random.fold_in(start, number))
    return (total, aux) if has_aux else total

  return loss


def floating(outputs: PyTree) -> list[jax.Array]:
  return [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]


def random_projection(outputs: Sequence[jax.Array], key: jax.Array) -> jax.Array:
  """The inner product of arrays with random signs, in float32 or wider."""
  keys = jax.random.split(key, len(outputs))
  wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in outputs]
  signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, wide, strict=True)]
  return sum((jnp.sum(x * s) for x, s in zip(wide, signs, strict=True)), start=jnp.float32(0))


class _Sums(NamedTuple):
  """Sums over the examples of finite batches, their number, and the number of other batches."""

  total: Masks
  examples: jax.Array
  bad: jax.Array


def iterated(batches: Iterable[PyTree]) -> Iterable[PyTree]:
  """The batches; raises for what looks like one batch: a mapping, an array, a named tuple, arrays of several ranks."""
  is_one = isinstance(batches, Mapping | str) or hasattr(batches, "dtype")
  if isinstance(batches, list | tuple):
    is_one |= type(batches) not in (list, tuple)  # a named tuple
    is_one |= len({jnp.ndim(batch) for batch in batches if hasattr(batch, "dtype")}) > 1
  if is_one or not isinstance(batches, Iterable):
    raise TypeError(
      f"batches must be a list or another iterable of batches, got {describe(batches)}. For a single batch pass [batch]."
    )
  return batches


def _check_skipped(sums: _Sums, empty: int, given: int) -> None:
  """Warn of skipped batches, and raise if none is left; under ``jit`` the numbers are unknown."""
  if is_traced(sums.bad):
    return
  bad = int(sums.bad)
  reasons = [f"the gradients of {bad} are not finite"] * bool(bad) + [f"{empty} are empty"] * bool(empty)
  if bad + empty == given:
    raise ValueError(
      f"batches must hold one with examples and finite gradients, got {given}: {' and '.join(reasons)}. Look for NaN in the "
      "parameters, the data and the loss."
    )
  if reasons:
    warn(f"{bad + empty} of {given} batches were skipped: {' and '.join(reasons)}. The others were averaged.")
