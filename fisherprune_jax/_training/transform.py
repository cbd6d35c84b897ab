"""Fisher pruning as an Optax gradient transformation with a purely functional state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._training.checks import (
  check_axes,
  check_gradients,
  check_masks,
  check_name,
  check_options,
  check_scheduled,
  check_state,
  check_weights,
  in_range,
  own_gradients,
)
from fisherprune_jax._training.gradients import fisher_signal
from fisherprune_jax._training.selection import prune_one, rank, repeat_while
from fisherprune_jax._training.state import FisherPruneState as FisherPruneState
from fisherprune_jax._training.state import corrected, differ, follow_edits, shares_of, start

Schedule = Callable[[jax.Array], Any]


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

  def at(self, name: str, step: jax.Array) -> Any:
    """The value of an option that may be a schedule."""
    value = getattr(self, name)
    if callable(value):
      value = value(step)
      check_scheduled(name, value, f"step {step}")
    return value


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
  masks: Any = None,
  name: str | None = None,
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
    axis_name: a mapped axis (``pmap``, ``shard_map``), or a tuple of axes, to average the signals over; ``()`` where
      an axis has a name and the networks along it prune each on its own.
    masks: the 0/1 masks to start from, a tree like ``cost.masks``; None for all ones.
    name: what this pruning is called where one optimizer holds several: the state then lies under it (see
      :func:`get_state`), and ``mask_grads`` is a mapping from names.

  Returns:
    A transformation; call ``update(updates, state, params, mask_grads=..., example_weights=None)`` with the
    ``mask_grads`` of :func:`value_and_grads`, leaves ``(..., B, C)``. ``example_weights``, ``(B,)``, are the weights
    of the rows (0 for padding; under a ``name`` maybe a mapping too).

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
  check_name(name)
  if masks is not None:
    check_masks(masks, cost.masks, "the cost model")
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
    return start(cost, masks)

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
    check_state(state, cost.masks)
    check_gradients(mask_grads, state.masks)
    check_axes(mask_grads, axis_name)
    check_weights(example_weights)
    signal = fisher_signal(mask_grads, example_weights, axis_name)
    state, edited = follow_edits(state)
    state, counts = _accumulate(state, signal, options)
    return updates, _prune(state, cost, counts, edited, options)

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return tx if name is None else _under_name(tx, name)


def _under_name(
  tx: optax.GradientTransformationExtraArgs, name: str
) -> optax.GradientTransformationExtraArgs:
  """The same transformation with its state, and what it takes, under a name."""

  def init_fn(params: Any) -> dict[str, Any]:
    return {name: tx.init(params)}

  def update_fn(
    updates: Any, state: dict[str, Any], params: Any = None, *, example_weights: Any = None, **extra_args: Any
  ) -> tuple[Any, dict[str, Any]]:
    if isinstance(example_weights, Mapping):
      example_weights = example_weights.get(name)
    grads = own_gradients(extra_args.pop("mask_grads", None), state[name].masks, name)
    updates, own = tx.update(
      updates, state[name], params, mask_grads=grads, example_weights=example_weights, **extra_args
    )
    return updates, {name: own}

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _accumulate(
  state: FisherPruneState, signal: Any, options: _Options
) -> tuple[FisherPruneState, jax.Array]:
  """Counts the step, and the batch if all of its signal is finite and the decay is one."""
  step = optax.safe_increment(state.step)
  decay = jnp.asarray(options.at("decay", step), jnp.float32)
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(s)) for s in jax.tree.leaves(signal)]))
  counts = finite & in_range("decay", decay)

  def mean(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(counts, decay * old + (1 - decay) * new, old).astype(old.dtype)

  state = state._replace(
    step=step,
    scores=jax.tree.map(mean, state.scores, signal),
    decay_product=jnp.where(counts, decay * state.decay_product, state.decay_product),
    counted=state.counted + counts.astype(jnp.int32),
    skipped=state.skipped + (~counts).astype(jnp.int32),
  )
  return state, counts


def _prune(
  state: FisherPruneState, cost: CostModel, counts: jax.Array, edited: jax.Array, options: _Options
) -> FisherPruneState:
  """Switches features off if this is a step to do so; takes the cost anew then, and when masks were edited."""
  target = options.at("flops_target", state.step)
  weight = options.flops_weight
  weight = weight if isinstance(weight, str) else options.at("flops_weight", state.step)
  current = corrected(state) if options.debias else state.scores
  due = counts & (state.step > options.burn_in) & (state.step % options.prune_every == 0)
  due &= in_range("flops_target", target) & in_range("flops_weight", weight)

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

  def act(before: FisherPruneState) -> FisherPruneState:
    # The state's own cost is not trusted: whoever edits masks and history by hand may leave it as it was.
    state = before._replace(cost=jnp.asarray(cost(before.masks), jnp.float32))
    tries = due & above(state)
    state = state._replace(exhausted=state.exhausted & ~(edited | tries))
    state = repeat_while(lambda s: due & above(s) & ~s.exhausted, one, state, options.features_per_prune)
    moved = edited | (state.cost != before.cost) | differ(state.masks, before.masks)
    shares = jax.lax.cond(moved, lambda s: shares_of(cost, s.masks, s.cost), lambda s: s.shares, state)
    return state._replace(shares=shares)

  return jax.lax.cond(due | edited, act, lambda s: s, state)
