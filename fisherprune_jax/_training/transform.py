"""Fisher pruning as an Optax gradient transformation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.flat import Priced
from fisherprune_jax._masks import flatten, redate, unflatten, unflatten_all
from fisherprune_jax._training.bundles import Multiple
from fisherprune_jax._training.criteria import DEFAULT
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.floors import MinFeatures, Widths
from fisherprune_jax._training.gradients import own_gradients
from fisherprune_jax._training.options import COST_WEIGHT, DECAY, TARGET, Options
from fisherprune_jax._training.selection import rescaled
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
  cost_weight: str | optax.ScalarOrSchedule = "auto",
  target: optax.ScalarOrSchedule = 0.0,
  method: str | Criterion = DEFAULT,
  debias: bool = True,
  features_per_prune: int = 1,
  min_features: MinFeatures = 1,
  exclude: Sequence[str] = (),
  multiple_of: Multiple | None = None,
  tie: Sequence[str] = (),
  widths: Widths | None = None,
  depth: int | optax.Schedule | None = None,
  recost_every: int | None = None,
  axis_name: AxisNames = None,
  masks: Masks | None = None,
  name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Prune features while the network trains, until it costs no more than ``target``.

  Updates pass through unchanged. Each call of ``update`` first updates the running mean of the importance. For Fisher
  importance,

  .. math:: s \leftarrow decay \cdot s + (1 - decay) \cdot \tfrac12 \mathrm{mean}_n g_n^2

  Every ``prune_every`` steps past ``burn_in``, while the cost is above the target, the feature with the lowest score is
  masked. The score is importance over marginal cost (``"auto"``), or importance minus ``cost_weight`` times marginal
  cost.

  Args:
    cost: the cost model, from :func:`cost_model` or ``CostModel.from_functions``.
    prune_every: steps between two pruning steps.
    burn_in: no pruning up to and including this step. Pruning steps are multiples of ``prune_every``.
    decay: of the running mean, in [0, 1); a number or a schedule of the step.
    cost_weight: ``"auto"``, or importance per unit of cost, such as nats per FLOP: a number or a schedule. 0 ranks by
      importance alone.
    target: the cost per example to come down to, in the unit of the cost; a number or a schedule. 0 means no target.
    method: the importance criterion, or a :class:`Criterion`. ``"fisher"``: half the mean squared gradient of the mask.
      ``"fisher_magnitude"``: Fisher importance, reassigned within each mask by combined Fisher and magnitude rank; it
      is ``"fisher"`` without ``params`` in ``update``, or with a cost of ``CostModel.from_functions``. ``"taylor"``: the
      mean absolute gradient. ``"magnitude"``: the norm of all parameters of a feature, over its mask's mean; it needs
      ``params``, but no ``mask_grads``. ``"random"``.
    debias: correct the running mean for its start at zero.
    features_per_prune: features masked per pruning step; the cost is recomputed after each (see ``recost_every``).
    min_features: features that each mask keeps: a number, or a fraction below 1 of its size; a mapping from glob
      patterns of mask names (as in :func:`summary`; the first match counts) to either; or a tree like the masks. 0
      allows whole masks to be pruned. Blocks (masks named ``*.block``, see :func:`auto_mask`) default to 0.
    exclude: glob patterns of masks that are not pruned.
    multiple_of: keep widths at multiples of this number, or at the floor, from the first pruning on; or a mapping from
      glob patterns to numbers. Features masked together are scored by their summed importance and cost. None is 1.
    tie: glob patterns. All masks, and rows of a stack ``(L, C)``, that match one pattern keep equal widths. They lose
      features together, and their largest floor holds for all.
    widths: a mapping from glob patterns to exact numbers of features. Matching masks are pruned first, down to that
      width. Under a scheduled target they wait until it stops falling. Without a target only they are pruned.
    depth: the number of residual blocks to keep, exactly; a number or a schedule. It needs masks of blocks (``*.block``, see
      :func:`auto_mask`). While there are more, blocks go first, those of the lowest importance; then no block goes. Tied
      blocks go together. Without a target only blocks and ``widths`` are pruned. None treats blocks like other masks.
    recost_every: features masked before the cost is recomputed; larger is faster, and the target is met as exactly.
      None is 1, or ``features_per_prune / 2048`` where that is larger.
    axis_name: a mapped axis (``pmap``, ``shard_map``), or a tuple of axes, to average the importance over; ``()`` if
      each network along a named axis prunes on its own.
    masks: the 0/1 masks to start from, a tree like ``cost.masks``; None for all ones.
    name: the name of this pruning, if one optimizer holds several. Its state lies under the name (see
      :func:`get_state`), and ``mask_grads`` is a mapping from names.

  Returns:
    A transformation; call ``update(updates, state, params, mask_grads=..., example_weights=None)``. ``mask_grads`` are
    those of :func:`value_and_mask_grads`, with leaves ``(..., B, C)``. ``example_weights``, ``(B,)``, weights the
    examples (0 for padding); under a ``name`` it may be a mapping too.

  Raises:
    ValueError, TypeError: for an argument out of range; in ``update``, for ``mask_grads`` of wrong shapes.

  >>> import jax, jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(3)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = optax.chain(optax.sgd(0.1), fp.fisher_prune(cost, prune_every=1, target=2.0))
  >>> state = tx.init(jnp.zeros(2))
  >>> g = {"m": jnp.array([[3.0, 1.0, 2.0]])}
  >>> _, state = tx.update(jnp.ones(2), state, mask_grads=g)
  >>> fp.get_masks(state)["m"]
  Array([1., 0., 1.], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """
  # The only locals so far are the arguments: the options by name.
  options = Options(**locals())

  def init_fn(params: PyTree) -> FisherPruneState:
    del params  # may be a placeholder: Optax maps over states that way
    return start(options.cost, options.masks)

  def update_fn(
    updates: PyTree, state: FisherPruneState, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, FisherPruneState]:
    check_types(state)
    step = optax.safe_increment(state.step)
    if not jax.tree.leaves(state.masks):  # a compacted network: nothing left to prune
      return updates, state._replace(step=step)
    check_state(state, options.cost.masks)
    state = state._replace(masks=jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), state.masks))
    own = {"masks": state.masks, "step": step, "axis_name": options.axis_name, "name": options.name}
    given = {**extra_args, "updates": updates, "params": params, **own}
    importance = options.criterion.importance_of(given)
    state, batch = _accumulate(state._replace(step=step), flatten(importance), options)
    return updates, _prune_if_due(state, batch, options, given)

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return tx if options.name is None else _under_name(tx, options.name, options.criterion)


def _under_name(
  tx: optax.GradientTransformationExtraArgs, name: str, criterion: Criterion
) -> optax.GradientTransformationExtraArgs:
  """The same transformation with its state and arguments under a name."""

  def init_fn(params: PyTree) -> dict[str, FisherPruneState]:
    return {name: tx.init(params)}

  def update_fn(
    updates: PyTree, state: dict[str, FisherPruneState], params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, dict[str, FisherPruneState]]:
    weights = extra_args.get("example_weights")
    if isinstance(weights, Mapping):
      extra_args["example_weights"] = weights.get(name)
    if "mask_grads" in criterion.uses:
      mask_grads = extra_args.get("mask_grads")
      extra_args["mask_grads"] = own_gradients(mask_grads, state[name].masks, name)
    updates, own = tx.update(updates, state[name], params, **extra_args)
    return updates, {name: own}

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Batch(NamedTuple):
  """The scores of the state, concatenated, and whether the batch changed them."""

  scores: jax.Array
  counts: jax.Array


def _accumulate(
  state: FisherPruneState, importance: jax.Array, options: Options
) -> tuple[FisherPruneState, _Batch]:
  """Update the scores with the importance of a batch, if importance and decay are valid."""
  decay = jnp.asarray(options.at("decay", state.step) if options.criterion.averaged else 0.0, jnp.float32)
  finite = jnp.all(jnp.isfinite(importance))
  counts = finite & DECAY.allows(decay)
  old = flatten(state.scores)
  scores = jnp.where(counts, decay * old + (1 - decay) * importance, old).astype(old.dtype)
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
  """Mask features at pruning steps; recompute the cost then, and after masks were edited."""
  target, weight = options.at("target", state.step), options.at("cost_weight", state.step)
  # Concatenate outside of the conditional, where each vector is one kernel: inside, every reader would repeat the work.
  # Inputs and outputs of a conditional are compiled several times, so it gets few vectors, not an array per mask.
  masks, pruned_at, shares = map(flatten, (state.masks, state.pruned_at, state.shares))
  flat = _Flat(masks, pruned_at, shares, state.cost, state.exhausted)
  edited = was_edited(flat.pruned_at, flat.masks, state.cost)
  due = batch.counts & _is_due(state.step, options)
  due &= TARGET.allows(target) & COST_WEIGHT.allows(weight)
  settled, depth = options.is_settled(target, state.step), options.depth_at(state.step)

  def act() -> _Flat:
    cost, alive = options.cost.flat, flat.masks > 0
    current, valid = _ranked(state, batch.scores, options, given)

    def price(alive: jax.Array) -> Priced:
      found = cost.price(alive, cost.limit(target))
      return found._replace(too_much=options.must_go_on(alive, found.too_much, target > 0, settled, depth))

    select = options.selection(price, weight, depth)
    left = select.run(alive, rescaled(current), due & valid, state.exhausted & ~edited)
    # Edits since the last step date from that step.
    at = redate(redate(flat.pruned_at, flat.masks, state.step - 1), left.alive, state.step)
    # Recompute the cost: manual edits of masks and history may leave a wrong one in the state.
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
  """The scores to prune by, concatenated, and whether all are finite; ``scores`` are the state's, concatenated."""
  scores = corrected(state._replace(scores=scores)) if options.debias else scores
  if options.criterion.rank is None:
    return scores, jnp.bool_(True)
  found = flatten(options.criterion.ranked(unflatten(scores, state.masks), given))
  return found, jnp.all(jnp.isfinite(found))


class _Flat(NamedTuple):
  """The fields of a state that pruning changes, concatenated."""

  masks: jax.Array
  pruned_at: jax.Array
  shares: jax.Array
  cost: jax.Array
  exhausted: jax.Array


def _is_due(step: jax.Array, options: Options) -> jax.Array:
  """Whether a step is a pruning step; values beyond the largest step are never reached."""
  last = jnp.iinfo(step.dtype).max
  if max(options.prune_every, options.burn_in) >= last:
    return jnp.bool_(False)
  return (step > options.burn_in) & (step % options.prune_every == 0)
