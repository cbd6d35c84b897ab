"""The built-in importance criteria."""

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.owned import Keys, Ownership
from fisherprune_jax._errors import require
from fisherprune_jax._graph.variables import sizes_of
from fisherprune_jax._masks import flatten, named_rows, unflatten
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.parameters import variables_among
from fisherprune_jax._types import AxisNames, MaskGrads, Masks, PyTree


def fisher_importance(
  mask_grads: MaskGrads, example_weights: jax.Array | None = None, axis_name: AxisNames = None
) -> PyTree:
  r"""The Fisher estimate, in nats, of the loss without each feature (Theis et al. 2018, eq. 9).

  .. math:: importance_k = \tfrac12 \, \mathrm{mean}_n \, g_{nk}^2

  Args:
    mask_grads: a tree of per-example gradients ``(..., B, C)``.
    example_weights: weights of the mean, ``(B,)``; rows of weight 0 may hold anything.
    axis_name: a mapped axis, or a tuple of axes, to average over as well.

  Returns:
    A float32 tree with leaves ``(..., C)``; NaN for weights that are negative, not finite, or all zero.

  >>> import jax.numpy as jnp
  >>> fisher_importance(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
  Array([2.5, 5. ], dtype=float32)
  """
  return jax.tree.map(lambda m: 0.5 * m, _mean(jnp.square, mask_grads, example_weights, axis_name))


def taylor_importance(
  mask_grads: MaskGrads, example_weights: jax.Array | None = None, axis_name: AxisNames = None
) -> PyTree:
  r"""The first-order estimate, in nats, of the loss without each feature (Molchanov et al. 2017).

  .. math:: importance_k = \mathrm{mean}_n \, |g_{nk}|

  Arguments and result: see :func:`fisher_importance`.

  >>> import jax.numpy as jnp
  >>> taylor_importance(jnp.array([[1.0, -2.0], [-3.0, 4.0]]))
  Array([2., 3.], dtype=float32)
  """
  return _mean(jnp.abs, mask_grads, example_weights, axis_name)


def _mean(
  of: Callable[[jax.Array], jax.Array],
  mask_grads: MaskGrads,
  example_weights: jax.Array | None,
  axis_name: AxisNames,
) -> PyTree:
  """The weighted mean over examples of a function of their gradients, in float32."""
  examples = jax.tree.leaves(mask_grads)[0].shape[-2]
  weights = _weights(example_weights, examples)
  require(weights.shape == (examples,), f"example_weights must have shape ({examples},)", weights.shape)
  # A negative weight makes the count NaN: the batch is skipped.
  count = jnp.sum(jnp.where(weights >= 0, weights, jnp.nan))

  def total(g: jax.Array) -> jax.Array:
    values = of(g.astype(jnp.float32))
    if example_weights is None:
      return jnp.sum(values, axis=-2)
    return jnp.sum(jnp.where(weights[:, None] > 0, weights[:, None] * values, 0), axis=-2)

  totals = jax.tree.map(total, mask_grads)
  totals, count = _sum_over((totals, count), axis_name)
  return jax.tree.map(lambda t: t / count, totals)


def _weights(example_weights: jax.Array | None, examples: int) -> jax.Array:
  if example_weights is None:
    return jnp.ones(examples, jnp.float32)
  return jnp.asarray(example_weights, jnp.float32)


def _sum_over(tree: PyTree, axis_name: AxisNames) -> PyTree:
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def random_importance(masks: Masks) -> PyTree:
  """A fixed random number in [0, 1) for each feature."""
  return unflatten(jax.random.uniform(jax.random.key(0), flatten(masks).shape), masks)


def magnitude(cost: CostModel | None) -> Criterion:
  r"""The norm of all parameters of a feature, over the mean of the live features of its mask.

  .. math:: importance_k = \frac{\|w_k\|_2}{\mathrm{mean}_{j \, alive} \|w_j\|_2}

  ``w_k`` are the parameters that compaction removes if feature k is masked too.

  References:
    Li et al., `Pruning filters for efficient convnets <https://arxiv.org/abs/1608.08710>`_, 2017

    Fang et al., `DepGraph: towards any structural pruning <https://arxiv.org/abs/2301.12900>`_, 2023, for the norm of a
    group
  """
  norms = _norms(_ownership(cost, "magnitude"), "magnitude")

  def importance(params: PyTree, masks: Masks, name: str | None = None) -> Masks:
    return unflatten(norms(params, masks, name), masks)

  return Criterion(importance, "magnitude", averaged=False, unit="of the mean")


def fisher_magnitude(cost: CostModel | None) -> Criterion:
  r"""Fisher importance, reassigned within each mask by combined Fisher and magnitude rank.

  .. math:: score_k = fisher_{(r_k)}, \qquad r_k = rank of \bigl(rank_{fisher}(k) + (1 - \rho)^2 rank_{\|w\|}(k)\bigr)

  .. math:: \rho = \frac{N\bigl(w_n \sum_k g_{nk}^2\bigr) - 1}{N(w_n) - 1}, \qquad
    N(x_n) = \frac{\bigl(\sum_n x_n\bigr)^2}{\sum_n x_n^2}

  Ranks count the live features of one mask; the Fisher rank breaks ties. Importance in nats is comparable between masks
  and with costs, so Fisher importance decides how many features each mask loses. But memorised examples have next to no
  gradients, so it underestimates the features that they need. The share ``rho`` of a batch with weights ``w`` is 1 if
  all examples have equal gradients, and 0 if one of several has them all.

  The running mean is that of Fisher importance. Scores are reassigned at pruning steps only, with the parameters and
  the share ``rho`` of that step.

  The order is Fisher's without ``params`` in ``update``, without a cost, or with one of ``CostModel.from_functions``.

  References:
    Dwork et al., `Rank aggregation methods for the web <https://dl.acm.org/doi/10.1145/371920.372165>`_, 2001, for the
    sum of ranks (Borda's count)

    Kish, *Survey sampling*, 1965, for the effective sample size
  """
  if cost is None or cost.ownership is None:
    return Criterion(fisher_importance, "fisher_magnitude", unit="nats")
  norms = _norms(cost.ownership, "fisher_magnitude")

  def rank(
    scores: Masks,
    mask_grads: MaskGrads,
    masks: Masks,
    params: PyTree = None,
    example_weights: jax.Array | None = None,
    axis_name: AxisNames = None,
    name: str | None = None,
  ) -> Masks:
    if params is None:
      return scores
    shares, row = _shares(mask_grads, masks, example_weights, axis_name), _rows(masks)
    found = _by_both(flatten(scores), norms(params, masks, name), shares[row], flatten(masks), row)
    return unflatten(found, masks)

  return Criterion(fisher_importance, "fisher_magnitude", unit="nats", rank=rank)


def _shares(
  mask_grads: MaskGrads, masks: Masks, weights: jax.Array | None, axis_name: AxisNames
) -> jax.Array:
  """Per row of the masks, the share of examples with gradients; 1 for a single example."""

  def squares(grads: jax.Array, mask: jax.Array) -> jax.Array:
    found = jnp.sum(jnp.where(mask[..., None, :] != 0, jnp.square(grads.astype(jnp.float32)), 0), -1)
    return found.reshape(-1, found.shape[-1])

  found = jnp.concatenate(jax.tree.leaves(jax.tree.map(squares, mask_grads, masks)))
  weights = _weights(weights, found.shape[-1])
  some, most = (_size(x, axis_name) for x in (jnp.where(weights > 0, weights * found, 0), weights))
  return jnp.where(most > 1, jnp.clip((some - 1) / jnp.where(most > 1, most - 1, 1), 0, 1), 1)[:, 0]


def _size(weights: jax.Array, axis_name: AxisNames) -> jax.Array:
  """The effective size of weighted samples, ``(..., B)`` to ``(..., 1)``."""
  total = _sum_over(jnp.sum(weights, -1, keepdims=True), axis_name)
  parts = weights / jnp.where(total > 0, total, 1)  # raw squares could overflow
  squares = _sum_over(jnp.sum(jnp.square(parts), -1, keepdims=True), axis_name)
  return 1 / jnp.where(total > 0, squares, 1)


def _by_both(
  losses: jax.Array, norms: jax.Array, share: jax.Array, mask: jax.Array, row: np.ndarray
) -> jax.Array:
  """The losses of live features, reordered by both ranks within each row; masked features keep theirs.

  One program sorts all rows, concatenated; ``row`` is the row of each feature.
  """
  alive = mask != 0
  rising, order, by_loss = _ranked(jnp.where(alive, losses, -jnp.inf), row)  # masked features first
  _, _, by_norm = _ranked(jnp.where(alive, norms, -jnp.inf), row)
  sums = jnp.where(alive, by_loss + jnp.square(1 - share) * by_norm, -1)  # here too
  # The sort is stable: Fisher's order breaks ties.
  both = jnp.lexsort((sums[order], row))
  handed_out = jnp.zeros_like(rising).at[order[both]].set(rising)
  # NaN scores prevent pruning.
  return jnp.where(jnp.isfinite(norms), jnp.where(alive, handed_out, losses), jnp.nan)


def _rows(masks: Masks) -> np.ndarray:
  """The row of each feature, of all masks concatenated."""
  shapes = [mask.shape for mask in jax.tree.leaves(masks)]
  widths = np.repeat([shape[-1] for shape in shapes], [math.prod(shape[:-1]) for shape in shapes])
  return np.repeat(np.arange(widths.size), widths)


def _ranked(x: jax.Array, row: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Row by row: sorted values, their positions, and each feature's rank; equal values share one."""
  order = jnp.lexsort((x, row))
  rising = x[order]
  begins = np.diff(row, prepend=-1) != 0
  first = begins | jnp.concatenate([jnp.ones(1, bool), rising[1:] != rising[:-1]])
  smaller = jax.lax.cummax(jnp.where(first, jnp.arange(x.size), 0)) - np.flatnonzero(begins)[row]
  return rising, order, jnp.zeros_like(smaller).at[order].set(smaller)


def _ownership(cost: CostModel | None, method: str) -> Ownership | None:
  """The parameters of each feature; None without a cost, for a criterion that is only inspected."""
  if cost is not None and cost.ownership is None:
    raise ValueError(
      f"method={method!r} needs a cost that knows which variables go with each feature, got one of "
      "CostModel.from_functions. Use fp.cost_model or fp.measure_latency, or add one of these."
    )
  return None if cost is None else cost.ownership


def _norms(ownership: Ownership | None, method: str) -> Callable[..., jax.Array]:
  """A function of parameters and masks: the relative norm of every feature, concatenated."""

  def norms(params: PyTree, masks: Masks, name: str | None = None) -> jax.Array:
    if ownership is None:
      raise ValueError(
        f"method={method!r} needs the cost model of the network, got cost=None. Pass cost=cost."
      )
    found = variables_among(params, ownership.shapes, method, name)
    _check_owners(ownership, found, masks, method)
    squares = {path: jnp.square(jnp.abs(leaf).astype(jnp.float32)) for path, leaf in found.items()}
    alive = flatten(masks) != 0
    return _over_mean(ownership.add_up(squares, alive), alive, _rows(masks))

  return norms


def _check_owners(ownership: Ownership, found: Collection[Keys], masks: Masks, method: str) -> None:
  """Raise if features of a mask have parameters in the network, but none among ``found``."""
  if missing := ownership.owners(ownership.shapes) - ownership.owners(found):
    names = [
      row
      for row, key in zip(named_rows(masks), sizes_of(jax.tree.leaves(masks)), strict=True)
      if key in missing
    ]
    raise ValueError(
      f"method={method!r} needs parameters that go with the features of every mask, got none for "
      f"{', '.join(name for name, _ in names)}. Pass all parameters of the network, build the cost with masks for the part that "
      "is trained, or use method='fisher', which needs none."
    )


def _over_mean(squares: jax.Array, alive: jax.Array, row: np.ndarray) -> jax.Array:
  """Norms over the mean norm of the live features in their row."""
  rows, norms = int(row[-1]) + 1, jnp.sqrt(squares)
  total, count = (
    jax.ops.segment_sum(x, row, rows, indices_are_sorted=True)
    for x in (jnp.where(alive, norms, 0), alive.astype(jnp.float32))
  )
  mean = total / jnp.maximum(count, 1)
  return norms / jnp.where(mean == 0, 1, mean)[row]  # NaN stays NaN: the batch is skipped


DEFAULT = "fisher_magnitude"
"""The default of ``method``, chosen by the tables in the guide on criteria."""
FISHER = Criterion(fisher_importance, "fisher", unit="nats")
TAYLOR = Criterion(taylor_importance, "taylor", unit="nats")
RANDOM = Criterion(random_importance, "random", averaged=False, unit="at random")
CRITERIA: dict[str, Callable[[CostModel | None], Criterion]] = {
  "fisher": lambda cost: FISHER,
  "taylor": lambda cost: TAYLOR,
  "magnitude": magnitude,
  "fisher_magnitude": fisher_magnitude,
  "random": lambda cost: RANDOM,
}
"""The criteria that ``method`` may name, as functions of the cost; without one they can only be inspected."""


def criterion_of(method: Any, name: str = "method", cost: CostModel | None = None) -> Criterion:
  """The criterion that ``method`` names or is.

  >>> criterion_of("fisher").unit
  'nats'
  """
  if isinstance(method, Criterion):
    return method
  known = tuple(CRITERIA)
  require(
    isinstance(method, str) and method in known, f"{name} must be one of {known}, or an fp.Criterion", method
  )
  return CRITERIA[method](cost)
