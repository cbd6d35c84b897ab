"""The pruning state, edits of its masks, and its checks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._errors import is_traced, path_name, require_same_tree
from fisherprune_jax._masks import redate
from fisherprune_jax._types import Masks, PyTree


class FisherPruneState(NamedTuple):
  """State of :func:`fisher_prune`.

  Attributes:
    step: number of updates, int32.
    scores: running mean of the importance, float32, in nats or the criterion's unit; not bias-corrected
      (``fp.get_importance`` is).
    masks: the masks, float32 0/1.
    pruned_at: the step at which each feature was pruned, int32; -1 if live, 0 if masked from the start.
    cost: the cost of the masks, float32; NaN between ``fp.set_masks`` and the next update.
    shares: for every mask, the summed marginal costs of its live features over ``cost``; float32.
    decay_product: product of the decays applied so far, float32; 1 before the first counted batch.
    counted: number of batches that changed the scores, int32.
    skipped: number of batches with a gradient that was not finite, or a weight or decay out of range, int32.
    exhausted: whether the last pruning step found no feature that may be masked.
  """

  step: jax.Array
  scores: Masks
  masks: Masks
  pruned_at: Masks
  cost: jax.Array
  shares: PyTree
  decay_product: jax.Array
  counted: jax.Array
  skipped: jax.Array
  exhausted: jax.Array


def start(cost: CostModel, masks: Masks | None) -> FisherPruneState:
  """The state before the first step."""
  total = cost.dense if masks is None else cost(masks)
  masks = jax.tree.map(lambda m: jnp.array(m, jnp.float32), cost.masks if masks is None else masks)
  alive = jax.tree.map(lambda m: jnp.full(m.shape, -1, jnp.int32), masks)
  return FisherPruneState(
    step=jnp.zeros([], jnp.int32),
    scores=jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks),
    masks=masks,
    pruned_at=redate(alive, masks, 0),
    cost=jnp.asarray(total, jnp.float32),
    shares=shares_of(cost.per_feature(masks), total),
    decay_product=jnp.ones([], jnp.float32),
    counted=jnp.zeros([], jnp.int32),
    skipped=jnp.zeros([], jnp.int32),
    exhausted=jnp.zeros([], bool),
  )


def corrected(state: FisherPruneState) -> Masks:
  """The bias-corrected running mean; zero before the first counted batch."""
  weight = 1 - state.decay_product
  return jax.tree.map(lambda s: s / jnp.where(weight > 0, weight, 1), state.scores)


def was_edited(pruned_at: jax.Array, masks: jax.Array, cost: jax.Array) -> jax.Array:
  """Whether masks were edited, so that the history does not match."""
  changed = jnp.any((pruned_at < 0) != (masks > 0))
  return changed | jnp.isnan(cost)  # set by fp.set_masks


def with_masks(state: FisherPruneState, masks: Masks, cost: CostModel | None) -> FisherPruneState:
  """The state with other masks; without ``cost``, their cost is NaN until the next update."""
  masks = jax.tree.map(lambda m: jnp.array(m, jnp.float32), masks)
  total = jnp.float32(jnp.nan) if cost is None else jnp.asarray(cost(masks), jnp.float32)
  unknown = jax.tree.map(lambda s: jnp.full_like(s, jnp.nan), state.shares)
  return state._replace(
    masks=masks,
    pruned_at=redate(state.pruned_at, masks, state.step),
    cost=total,
    shares=unknown if cost is None else shares_of(cost.per_feature(masks), total),
    exhausted=jnp.zeros([], bool),
  )


def make_inert(state: FisherPruneState, path: Any = ()) -> FisherPruneState:
  """The state of a network without masks."""
  return state._replace(scores={}, masks={}, pruned_at={}, shares={})


def shares_of(drops: Masks, total: float | jax.Array) -> PyTree:
  """For every mask, the summed marginal costs of its features, over the total."""
  return jax.tree.map(lambda drop: share_of(jnp.sum(drop, axis=-1), total), drops)


def share_of(cost: jax.Array, total: float | jax.Array) -> jax.Array:
  """Costs over the total; 0 if that is 0."""
  return cost * jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def check_types(opt_state: optax.OptState) -> None:
  """Raise if an Optax state holds dictionaries in place of the pruning state, as in a raw checkpoint."""
  leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=lambda x: isinstance(x, FisherPruneState))
  if any("decay_product" in path_name(path) for path, _ in leaves):
    raise ValueError(
      "An optimizer state must have the types that tx.init gives it, got one that was restored without them, dictionaries in "
      "place of FisherPruneState. Restore it into a fresh state: flax.serialization.from_bytes(tx.init(params), data), or "
      "with Orbax StandardRestore(jax.eval_shape(tx.init, params))."
    )


def check_state(state: FisherPruneState, expected: Masks) -> None:
  """Raise unless a pruning state fits the cost model and is replicated."""
  how = "Make the state with tx.init, or restore one that was saved for this model and these widths."
  require_same_tree(state.masks, expected, "the masks of the optimizer state", "the cost model's masks", how)
  for mask, ours in zip(jax.tree.leaves(state.masks), jax.tree.leaves(expected), strict=True):
    if mask.shape != ours.shape:
      raise ValueError(
        f"A mask of the optimizer state must have the shape {ours.shape} that the cost model was built for, got "
        f"{mask.shape}. {how} Under shard_map the pruning state must be replicated (in_specs P()): the choice of "
        "a feature compares all of them."
      )
    if _splits_features(mask):
      raise ValueError(
        f"The masks of the optimizer state must be replicated, got a mask of shape {mask.shape} that is split "
        f"over devices: {mask.sharding if not is_traced(mask) else jax.typeof(mask).sharding}. Put the pruning "
        "state on the mesh with NamedSharding(mesh, PartitionSpec()): the choice of a feature compares all of them."
      )
  for name in ("scores", "pruned_at", "shares"):
    _check_beside(name, getattr(state, name), expected, "To put in other masks, use fp.set_masks. " + how)


def _check_beside(name: str, tree: PyTree, masks: Masks, how: str) -> None:
  """Raise unless a field has one entry per feature, or per mask."""
  require_same_tree(tree, masks, f"{name} of the optimizer state", "its masks", how)
  for leaf, mask in zip(jax.tree.leaves(tree), jax.tree.leaves(masks), strict=True):
    shape = mask.shape[:-1] if name == "shares" else mask.shape
    if jnp.shape(leaf) != shape:
      raise ValueError(
        f"{name} of the optimizer state must have shape {shape} beside a mask of shape {mask.shape}, got "
        f"{jnp.shape(leaf)}. {how}"
      )


def _splits_features(mask: Any) -> bool:
  """Whether an array is known to be sharded; under ``jit`` only explicit meshes show it."""
  if not is_traced(mask):
    sharding = getattr(mask, "sharding", None)
    return sharding is not None and sharding.shard_shape(mask.shape) != mask.shape
  sharding = jax.typeof(mask).sharding
  names = [name for axis in sharding.spec if axis for name in ([axis] if isinstance(axis, str) else axis)]
  return any(sharding.mesh.shape[name] > 1 for name in names)
