"""Fisher pruning as an Optax gradient transformation with a purely functional state."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.flat import Priced
from fisherprune_jax._masks import flatten, redate, unflatten, unflatten_all
from fisherprune_jax._training.bundles import Multiple
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.floors import MinFeatures
from fisherprune_jax._training.gradients import own_gradients
from fisherprune_jax._training.options import DECAY, FLOPS_TARGET, FLOPS_WEIGHT, Options
from fisherprune_jax._training.selection import tamed
from fisherprune_jax._training.state import (
  FisherPruneState,
  check_state,
  check_types,
  corrected,
  share_of,
  start,
  was_edited,
)
from fisherprune_jax._types import AxisNames, Masks, PyTree


def fisher_prune(
  cost: CostModel,
  *,
  prune_every: int = 100,
  burn_in: int = 0,
  decay: optax.ScalarOrSchedule = 0.96,
  flops_weight: str | optax.ScalarOrSchedule = "auto",
  flops_target: optax.ScalarOrSchedule = 0.0,
  target: optax.ScalarOrSchedule | None = None,
  method: str | Criterion = "fisher",
  debias: bool = True,
  features_per_prune: int = 1,
  min_features: MinFeatures = 1,
  exclude: Sequence[str] = (),
  multiple_of: Multiple | None = None,
  uniform: Sequence[str] = (),
  recost: int | None = None,
  axis_name: AxisNames = None,
  masks: Masks | None = None,
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
    target: the same under a name that fits any measure: in the unit of the cost.
    method: what says how much a feature matters. ``"fisher"``; ``"taylor"``, the mean absolute gradient of its mask;
      ``"magnitude"``, the norm of all parameters that go with it over the mean of its mask's, for which ``update`` needs
      ``params`` and no ``mask_grads``; ``"fisher_magnitude"``, Fisher's signals handed out in each mask in the order of
      both, of magnitude as far as few examples have gradients; ``"random"``; or a :class:`Criterion` of your own, for
      which it takes what that needs. To rank by the signal alone, not by what is lost for what is saved:
      ``flops_weight=0``.
    debias: divide the running mean by one minus the product of the decays applied so far.
    features_per_prune: how many features go at once, the cost being taken anew after each (see ``recost``).
    min_features: how many features every mask keeps: a number, or a fraction below 1 of its size; a mapping from glob
      patterns of mask names (those of :func:`summary`; the first that fits counts) to either; or a tree like the masks.
      0 allows whole masks to go. Blocks (masks named ``*.block``, see :func:`auto_mask`) may go unless a pattern says
      otherwise.
    exclude: glob patterns of masks that are left alone.
    multiple_of: features of a mask go in such numbers that its width is a multiple of this (or at the floor) from the first
      time on; a number, or a mapping from glob patterns to numbers. Those that matter least for what they cost
      go, signals and costs of what goes together being added up. None for one by one.
    uniform: glob patterns. All masks that one pattern fits, rows of a stack ``(L, C)`` and separate masks alike, keep equal
      widths: each loses one feature (or one multiple) at a time. Of different floors the largest holds for all of them.
    recost: after how many features of one prune the cost is taken anew: more is faster where a network has very many. The
      target is met as exactly: where so many would be too many, fewer go, and the last one alone. None for each.
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
  # The arguments are the options, name by name, with nothing else among the locals yet.
  options = Options(**locals())

  def init_fn(params: PyTree) -> FisherPruneState:
    del params  # may be a placeholder: Optax maps over states that way
    return start(options.cost, options.masks)

  def update_fn(
    updates: PyTree, state: FisherPruneState, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, FisherPruneState]:
    check_types(state)
    step = optax.safe_increment(state.step)
    if not jax.tree.leaves(state.masks):  # the network was compacted: nothing left to prune
      return updates, state._replace(step=step)
    check_state(state, options.cost.masks)
    state = state._replace(masks=jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), state.masks))
    own = {"masks": state.masks, "step": step, "axis_name": options.axis_name, "name": options.name}
    given = {**extra_args, "updates": updates, "params": params, **own}
    signal = options.criterion.signal_of(given)
    state, batch = _accumulate(state._replace(step=step), flatten(signal), options)
    return updates, _prune_if_due(state, batch, options, given)

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return tx if options.name is None else _under_name(tx, options.name, options.criterion)


def _under_name(
  tx: optax.GradientTransformationExtraArgs, name: str, criterion: Criterion
) -> optax.GradientTransformationExtraArgs:
  """The same transformation with its state, and what it takes, under a name."""

  def init_fn(params: PyTree) -> dict[str, FisherPruneState]:
    return {name: tx.init(params)}

  def update_fn(
    updates: PyTree, state: dict[str, FisherPruneState], params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, dict[str, FisherPruneState]]:
    weights = extra_args.get("example_weights")
    if isinstance(weights, Mapping):
      extra_args["example_weights"] = weights.get(name)
    if "mask_grads" in criterion.asks_for:
      mask_grads = extra_args.get("mask_grads")
      extra_args["mask_grads"] = own_gradients(mask_grads, state[name].masks, name)
    updates, own = tx.update(updates, state[name], params, **extra_args)
    return updates, {name: own}

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Batch(NamedTuple):
  """What a batch has changed.

  Attributes:
    scores: those of the state, end to end.
    counts: whether it did.
  """

  scores: jax.Array
  counts: jax.Array


def _accumulate(
  state: FisherPruneState, signal: jax.Array, options: Options
) -> tuple[FisherPruneState, _Batch]:
  """Takes the signal of a batch into the scores if all of it is finite and the decay is one."""
  decay = jnp.asarray(options.at("decay", state.step) if options.criterion.averaged else 0.0, jnp.float32)
  finite = jnp.all(jnp.isfinite(signal))
  counts = finite & DECAY.allows(decay)
  old = flatten(state.scores)
  scores = jnp.where(counts, decay * old + (1 - decay) * signal, old).astype(old.dtype)
  state = state._replace(
    scores=unflatten(scores, state.masks),
    decay_product=jnp.where(counts, decay * state.decay_product, state.decay_product),
    counted=jnp.where(counts, optax.safe_increment(state.counted), state.counted),
    skipped=jnp.where(counts, state.skipped, optax.safe_increment(state.skipped)),
  )
  return state, _Batch(scores, counts)


def _prune_if_due(
  state: FisherPruneState, batch: _Batch, options: Options, given: Mapping[str, Any]
) -> FisherPruneState:
  """Switches features off if this is a step to do so; takes the cost anew then, and when masks were edited."""
  target, weight = options.at(options.goal, state.step), options.at("flops_weight", state.step)
  # Vectors are made here, where each is one kernel: in a conditional they would be part of all that reads them.
  # Whatever enters or leaves a conditional is compiled several times: vectors do, not one array for each mask.
  masks, pruned_at, shares = map(flatten, (state.masks, state.pruned_at, state.shares))
  flat = _Flat(masks, pruned_at, shares, state.cost, state.exhausted)
  edited = was_edited(flat.pruned_at, flat.masks, state.cost)
  due = batch.counts & _is_due(state.step, options)
  due &= FLOPS_TARGET.allows(target) & FLOPS_WEIGHT.allows(weight)

  def act() -> _Flat:
    cost, alive = options.cost.flat, flat.masks > 0
    current, valid = _ranked(state, batch.scores, options, given)

    def price(alive: jax.Array) -> Priced:
      found = cost.price(alive, cost.limit(target))
      return found._replace(too_much=(target <= 0) | found.too_much)

    select = options.selection(price, weight)
    left = select.run(alive, tamed(current), due & valid, state.exhausted & ~edited)
    # Masks that were put in by hand since the last step went with that.
    at = redate(redate(flat.pruned_at, flat.masks, state.step - 1), left.alive, state.step)
    # The state's own cost is not trusted: whoever edits masks and history by hand may leave it as it was.
    total, _, drops = left.cost
    shares = share_of(options.rows.sums(drops), total)
    return _Flat(left.alive.astype(jnp.float32), at, shares, total, left.exhausted)

  new = jax.lax.cond(due | edited, act, lambda: flat)
  masks, pruned_at = unflatten_all((new.masks, new.pruned_at), state.masks)
  shares = unflatten(new.shares, state.shares)
  return state._replace(
    masks=masks, pruned_at=pruned_at, shares=shares, cost=new.cost, exhausted=new.exhausted
  )


def _ranked(
  state: FisherPruneState, scores: jax.Array, options: Options, given: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
  """The scores to prune by, end to end, and whether they are valid; ``scores`` are those of the state, end to end."""
  if options.criterion.rank is None:
    return corrected(state._replace(scores=scores)) if options.debias else scores, jnp.bool_(True)
  found = flatten(options.criterion.ranked(corrected(state) if options.debias else state.scores, given))
  return found, jnp.all(jnp.isfinite(found))


class _Flat(NamedTuple):
  """What pruning changes in a state: of all features, end to end, of all rows, and of the network."""

  masks: jax.Array
  pruned_at: jax.Array
  shares: jax.Array
  cost: jax.Array
  exhausted: jax.Array


def _is_due(step: jax.Array, options: Options) -> jax.Array:
  """Whether a step is one to prune at; numbers beyond those that a step comes to are never reached."""
  last = jnp.iinfo(step.dtype).max
  if max(options.prune_every, options.burn_in) >= last:
    return jnp.bool_(False)
  return (step > options.burn_in) & (step % options.prune_every == 0)
