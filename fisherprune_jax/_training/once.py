"""Pruning once, without training: signals over some batches, then masks at the target."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.flat import Limit
from fisherprune_jax._errors import is_traced, require, require_same_tree, require_shapes, warn
from fisherprune_jax._masks import flatten, unflatten
from fisherprune_jax._training.criteria import criterion_of
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.gradients import Reduction, examples_of, value_and_grads
from fisherprune_jax._training.options import Options
from fisherprune_jax._training.selection import tamed
from fisherprune_jax._types import Masks, PyTree


def prune(cost: CostModel, signals: Masks, target: float, **options: Any) -> Masks:
  """Masks at a target, chosen at once: as :func:`fisher_prune` chooses, one feature after the other, with these signals.

  Args:
    cost: what the network costs.
    signals: how much each feature matters, a tree like the masks: from :func:`estimate_signals`, or any numbers.
    target: what the network may cost, in the unit of the cost.
    **options: those of :func:`fisher_prune` that say what goes: ``flops_weight``, ``min_features``, ``exclude``,
      ``multiple_of``, ``uniform``, ``recost``, and ``masks`` to start from.

  Returns:
    0/1 masks, float32. If nothing is left that may go before the target is met, a warning says so.

  Raises:
    ValueError, TypeError: for a target that is not positive, signals of another tree, options out of their range.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(4)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> fp.prune(cost, {"m": jnp.array([3.0, 1.0, 4.0, 2.0])}, target=2.0)["m"]
  Array([1., 0., 1., 0.], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """
  allowed = ("flops_weight", "min_features", "exclude", "multiple_of", "uniform", "recost", "masks")
  if unknown := sorted(options.keys() - {*allowed}):
    raise TypeError(f"fp.prune takes the options {', '.join(allowed)}, got {', '.join(unknown)}.")
  chosen = Options(
    cost, target=target, prune_every=1, debias=False, features_per_prune=flatten(cost.masks).size, **options
  )
  require(not callable(target) and target > 0, "target must be a positive number", target)
  how = "Pass what fp.estimate_signals returns, or a tree of one number per feature."
  require_same_tree(signals, cost.masks, "signals", "the cost model's masks", how)
  require_shapes(
    signals, cost.masks, lambda shape, path: f"signals must have the shape {shape} of a mask", how
  )
  masks = cost.masks if chosen.masks is None else chosen.masks
  weight = chosen.at("flops_weight", jnp.int32(1))
  run = _program(chosen, weight)
  left, exhausted = run(masks, signals, cost.flat.limit(target), None if isinstance(weight, str) else weight)
  left = unflatten(left, masks)
  if not is_traced(exhausted) and bool(exhausted):
    warn(
      f"The target of {target:,g} {cost.unit} was not met: nothing is left that may go at {float(cost(left)):,g}. Lower "
      "min_features, exclude less, or raise the target."
    )
  return left


def _program(options: Options, weight: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """What prunes at once, compiled once for a cost and what is chosen; targets, weights and signals are its arguments."""
  flat, word = options.cost.flat, weight if isinstance(weight, str) else None
  key = (word, options.at_once, *options.rows.key)

  def run(masks: Masks, signals: Masks, limit: Limit, weight: Any) -> tuple[jax.Array, jax.Array]:
    select = options.selection(lambda alive: flat.price(alive, limit), weight if word is None else word)
    vector = tamed(flatten(signals).astype(jnp.float32))
    left = select.run(flatten(masks) > 0, vector, jnp.bool_(True), jnp.bool_(False))
    return left.alive.astype(jnp.float32), left.exhausted

  if key not in flat.programs:
    flat.programs[key] = jax.jit(run)
  return flat.programs[key]


def estimate_signals(
  loss_fn: Callable[..., Any],
  params: PyTree,
  masks: Masks,
  batches: Iterable[PyTree],
  *,
  method: str | Criterion = "fisher",
  cost: CostModel | None = None,
  has_aux: bool = False,
  reduction: Reduction = "mean",
) -> Masks:
  r"""The mean signal of a trained network over some batches, for :func:`prune`; by default, Fisher's.

  .. math:: signal_k = \tfrac12 \, \mathrm{mean}_n \, g_{nk}^2

  Args:
    loss_fn: ``loss_fn(params, masks, batch)``, as of :func:`value_and_grads`.
    params: the parameters.
    masks: the masks as they are, such as ``cost.masks``.
    batches: any iterable of batches; each example counts as much, so batches may be of several sizes. None are looked at
      for a criterion that needs no gradients.
    method: as of :func:`fisher_prune`: ``"fisher"``, ``"taylor"``, ``"magnitude"``, ``"fisher_magnitude"``, ``"random"``, or
      a :class:`Criterion` that needs nothing but ``"mask_grads"``, ``"params"`` and ``"masks"``.
    cost: what the network costs, for the magnitudes: it knows which parameters go with each feature.
    has_aux: as of :func:`value_and_grads`.
    reduction: likewise.

  Returns:
    A float32 tree like the masks, in the unit of the criterion: nats.

  Raises:
    ValueError: without batches.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> loss_fn = lambda w, masks, x: jnp.mean(jnp.sum(w * masks["m"] * x, axis=1))
  >>> batches = [jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[5.0, 6.0]])]
  >>> fp.estimate_signals(loss_fn, jnp.ones(2), {"m": jnp.ones(2)}, batches)["m"]
  Array([5.8333335, 9.333334 ], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """
  criterion = criterion_of(method, cost=cost)
  own = {"masks": masks, "params": params, "step": jnp.int32(1), "axis_name": None}
  if "mask_grads" not in criterion.asks_for:
    return jax.tree.map(jnp.float32, criterion.signal_of(own))
  grads_of = value_and_grads(loss_fn, has_aux=has_aux, reduction=reduction)

  @jax.jit
  def add(total: Masks, own: dict[str, Any], batch: PyTree) -> Masks:
    _, (_, mask_grads) = grads_of(own["params"], own["masks"], batch)
    signal = criterion.signal_of({**own, "axis_name": None, "mask_grads": mask_grads})
    return jax.tree.map(lambda t, s: t + examples_of(batch) * s, total, signal)

  total, examples = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks), 0
  for batch in batches:
    total, examples = add(total, own, batch), examples + examples_of(batch)
  require(examples > 0, "batches must hold at least one example", examples, "Iterators may be used up.")
  return jax.tree.map(lambda t: t / examples, total)
