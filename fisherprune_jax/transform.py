"""Fisher pruning as an Optax gradient transformation with a purely functional state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherprune_jax.cost import CostModel
from fisherprune_jax.fisher import fisher_signal
from fisherprune_jax.selection import prune_one, rank, repeat_while
from fisherprune_jax.validation import check_axes, check_gradients, check_options, check_state

Schedule = Callable[[jax.Array], Any]


class FisherPruneState(NamedTuple):
  """State of :func:`fisher_prune`.

  Attributes:
    step: how many updates there were, int32.
    scores: running mean of the signals, in nats, not bias-corrected (``fp.signals`` is), float32.
    masks: the masks, float32 0/1.
    pruned_at: the step at which each feature went, -1 while alive, int32.
    cost: the cost of the masks, float32.
    shares: for every mask, what its live features cost if each were the only one to go, over ``cost``; float32.
    decay_product: product of the decays applied so far, float32; 1 before the first counted batch.
    counted: how many batches changed the scores, int32.
    skipped: how many batches did not, because a gradient was not finite, int32.
    exhausted: whether the last attempt to prune found nothing left that may go.
  """

  step: jax.Array
  scores: Any
  masks: Any
  pruned_at: Any
  cost: jax.Array
  shares: Any
  decay_product: jax.Array
  counted: jax.Array
  skipped: jax.Array
  exhausted: jax.Array


class _Options(NamedTuple):
  prune_every: int
  burn_in: int
  decay: Any
  flops_weight: Any
  flops_target: Any
  debias: bool
  features_per_prune: int
  min_features: int
  axis_name: Any


def fisher_prune(
  cost: CostModel,
  *,
  prune_every: int = 100,
  burn_in: int = 0,
  decay: float | Schedule = 0.96,
  flops_weight: str | float | Schedule = "auto",
  flops_target: float | Schedule = 0.0,
  method: str = "fisher",
  debias: bool = True,
  features_per_prune: int = 1,
  min_features: int = 1,
  axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Prunes features while the network trains, until it costs no more than ``flops_target``.

  Updates pass through unchanged. Each call of ``update`` first accumulates the Fisher signal of the batch,

  .. math:: s \leftarrow decay \cdot s + (1 - decay) \cdot \tfrac12 \mathrm{mean}_n g_n^2

  Every ``prune_every`` steps past ``burn_in``, while the cost is above the target, the feature with the smallest
  score goes: the signal over its cost (``"auto"``), or the signal minus ``flops_weight`` times its cost.

  Args:
    cost: what the network costs, from :func:`cost_model` or ``CostModel.from_functions``.
    prune_every: steps between prunes.
    burn_in: steps before pruning may begin; the first prune is at the next multiple of ``prune_every``.
    decay: of the running mean, in [0, 1); a number or a schedule of the step.
    flops_weight: ``"auto"``, or nats per FLOP: a number or a schedule.
    flops_target: FLOPs per example to come down to; a number or a schedule. 0 means no target.
    method: ``"fisher"``.
    debias: divide the running mean by one minus the product of the decays applied so far.
    features_per_prune: how many features go at once, the cost being taken anew after each.
    min_features: how many features every mask keeps; 0 allows whole masks to go.
    axis_name: a mapped axis (``pmap``, ``shard_map``) to average the signals over.

  Returns:
    A transformation; call ``update(updates, state, params, mask_grads=..., example_weights=None)`` with the
    ``mask_grads`` of :func:`value_and_grads`, leaves ``(..., B, C)``. ``example_weights``, ``(B,)``, are the weights
    of the rows (0 for padding).

  Raises:
    ValueError, TypeError: for an argument out of its range; by ``update``, for ``mask_grads`` that do not fit.

  >>> import jax, jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(3)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = optax.chain(optax.sgd(0.1), fp.fisher_prune(cost, prune_every=1, flops_target=2.0))
  >>> state = tx.init(jnp.zeros(2))
  >>> g = {"m": jnp.array([[3.0, 1.0, 2.0]])}
  >>> _, state = tx.update(jnp.ones(2), state, mask_grads=g)
  >>> fp.get_masks(state)["m"]
  Array([1., 0., 1.], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """
  check_options(
    cost, prune_every, burn_in, decay, flops_weight, flops_target, method, features_per_prune, min_features
  )
  options = _Options(
    prune_every,
    burn_in,
    decay,
    flops_weight,
    flops_target,
    debias,
    features_per_prune,
    min_features,
    axis_name,
  )

  def init_fn(params: Any) -> FisherPruneState:
    del params  # may be a placeholder: Optax maps over states that way
    masks = jax.tree.map(jnp.ones_like, cost.masks)
    return FisherPruneState(
      step=jnp.zeros([], jnp.int32),
      scores=jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks),
      masks=masks,
      pruned_at=jax.tree.map(lambda m: jnp.full(m.shape, -1, jnp.int32), masks),
      cost=jnp.asarray(cost.dense, jnp.float32),
      shares=_shares(cost, masks, cost.dense),
      decay_product=jnp.ones([], jnp.float32),
      counted=jnp.zeros([], jnp.int32),
      skipped=jnp.zeros([], jnp.int32),
      exhausted=jnp.zeros([], bool),
    )

  def update_fn(
    updates: Any,
    state: FisherPruneState,
    params: Any = None,
    *,
    mask_grads: Any = None,
    example_weights: jax.Array | None = None,
    **extra_args: Any,
  ) -> tuple[Any, FisherPruneState]:
    del params, extra_args
    if not jax.tree.leaves(state.masks):  # the network was compacted: nothing left to prune
      return updates, state._replace(step=optax.safe_increment(state.step))
    check_state(state.masks, cost.masks)
    check_gradients(mask_grads, state.masks)
    check_axes(mask_grads, axis_name)
    signal = fisher_signal(mask_grads, example_weights, axis_name)
    state, finite = _accumulate(state, signal, options)
    return updates, _prune(state, cost, finite, options)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def corrected(state: FisherPruneState) -> Any:
  """The running mean over what its weights add up to; zero before the first counted batch."""
  weight = 1 - state.decay_product
  return jax.tree.map(lambda s: s / jnp.where(weight > 0, weight, 1), state.scores)


def _accumulate(
  state: FisherPruneState, signal: Any, options: _Options
) -> tuple[FisherPruneState, jax.Array]:
  """Counts the step, and the batch if all of its signal is finite."""
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(s)) for s in jax.tree.leaves(signal)]))
  step = optax.safe_increment(state.step)
  decay = jnp.asarray(_at(options.decay, step), jnp.float32)

  def mean(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(finite, decay * old + (1 - decay) * new, old).astype(old.dtype)

  state = state._replace(
    step=step,
    scores=jax.tree.map(mean, state.scores, signal),
    decay_product=jnp.where(finite, decay * state.decay_product, state.decay_product),
    counted=state.counted + finite.astype(jnp.int32),
    skipped=state.skipped + (~finite).astype(jnp.int32),
  )
  return state, finite


def _prune(
  state: FisherPruneState, cost: CostModel, finite: jax.Array, options: _Options
) -> FisherPruneState:
  """Switches features off if this is a step to do so."""
  target = _at(options.flops_target, state.step)
  weight = (
    options.flops_weight if isinstance(options.flops_weight, str) else _at(options.flops_weight, state.step)
  )
  current = corrected(state) if options.debias else state.scores
  due = (state.step > options.burn_in) & (state.step % options.prune_every == 0)

  def above(state: FisherPruneState) -> jax.Array:
    return (target <= 0) | cost.exceeds(state.masks, target)

  def one(state: FisherPruneState) -> FisherPruneState:
    scores = rank(current, cost.per_feature(state.masks), weight)
    masks, chosen, found = prune_one(state.masks, scores, options.min_features)
    return state._replace(
      masks=masks,
      pruned_at=jax.tree.map(lambda at, c: jnp.where(c, state.step, at), state.pruned_at, chosen),
      cost=jnp.asarray(cost(masks), jnp.float32),
      exhausted=~found,
    )

  def several(state: FisherPruneState) -> FisherPruneState:
    state = one(state)
    if options.features_per_prune > 1:
      state = repeat_while(lambda s: above(s) & ~s.exhausted, one, state, options.features_per_prune - 1)
    return state._replace(shares=_shares(cost, state.masks, state.cost))

  def if_above(state: FisherPruneState) -> FisherPruneState:
    return jax.lax.cond(above(state), several, lambda s: s, state)

  return jax.lax.cond(due & finite, if_above, lambda s: s, state)


def _shares(cost: CostModel, masks: Any, total: Any) -> Any:
  """For every mask, the drops in cost of its features, over the cost; 0 where there is no cost."""
  drops = jax.tree.map(lambda drop: jnp.sum(drop, axis=-1), cost.per_feature(masks))
  return jax.tree.map(lambda drop: jnp.where(total > 0, drop / jnp.where(total > 0, total, 1), 0.0), drops)


def _at(value: Any, step: jax.Array) -> Any:
  return value(step) if callable(value) else value
