"""What ``fisher_prune`` and ``compact`` require of their arguments."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._errors import describe, is_known, is_number, is_traced, require, require_same_tree
from fisherprune_jax._graph.compat import unaccounted_axes, varying_axes
from fisherprune_jax._graph.variables import Path, VariableTree, keystr

METHODS = ("fisher",)


def check_options(
  cost: Any,
  prune_every: Any,
  burn_in: Any,
  decay: Any,
  flops_weight: Any,
  flops_target: Any,
  method: Any,
  features_per_prune: Any,
  min_features: Any,
) -> None:
  """Raises unless the arguments of ``fisher_prune`` are in their ranges; tracers and schedules pass."""
  if not isinstance(cost, CostModel):
    raise TypeError(
      f"cost must be a CostModel, got {describe(cost)}. Build one with fp.cost_model or CostModel.from_functions. "
      "Under optax.inject_hyperparams name it in static_args, or use fp.inject_hyperparams."
    )
  for name, value, least in (
    ("prune_every", prune_every, 1),
    ("burn_in", burn_in, 0),
    ("features_per_prune", features_per_prune, 1),
    ("min_features", min_features, 0),
  ):
    _check_integer(name, value, least)
  _check_number("decay", decay)
  _check_number("flops_target", flops_target)
  if isinstance(flops_weight, str):
    require(flops_weight == "auto", "flops_weight must be 'auto', a number or a schedule", flops_weight)
  else:
    _check_number("flops_weight", flops_weight)
  require(method in METHODS, f"method must be one of {METHODS}", method)
  require(bool(jax.tree.leaves(cost.masks)), "cost must be a cost of at least one mask", cost.masks)
  narrowest = min(leaf.shape[-1] for leaf in jax.tree.leaves(cost.masks))
  require(
    min_features <= narrowest,
    f"min_features must be at most {narrowest}, the size of the smallest mask",
    min_features,
    "Lower it.",
  )


def _check_integer(name: str, value: Any, least: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int):
    raise TypeError(
      f"{name} must be a Python int, got {describe(value)}. Under optax.inject_hyperparams name it in "
      "static_args (and pass hyperparam_dtype=jnp.float32), or use fp.inject_hyperparams."
    )
  require(value >= least, f"{name} must be at least {least}", value)


RANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
  "decay": (lambda d: (d >= 0) & (d < 1), "in [0, 1)"),
  "flops_target": (lambda t: t >= 0, "a number of FLOPs, at least 0"),
  "flops_weight": (lambda w: w == w, "'auto', a number or a schedule"),
}
"""Of the numbers that may be schedules: whether one is in its range, which holds of arrays too, and how to say so."""


def _check_number(name: str, value: Any) -> None:
  if getattr(value, "dtype", None) in (jnp.float16, jnp.bfloat16):
    raise TypeError(
      f"{name} must have at least the precision of float32, got {describe(value)}. Under optax.inject_hyperparams "
      "pass hyperparam_dtype=jnp.float32 (beside static_args), or use fp.inject_hyperparams."
    )
  if callable(value):
    check_scheduled(name, value(jnp.ones([], jnp.int32)), "step 1")
  elif not is_traced(value):
    requirement = RANGES[name][1]
    if not is_number(value):
      raise TypeError(f"{name} must be {requirement}, or a schedule of the step, got {describe(value)}.")
    require(in_range(name, value), f"{name} must be {requirement}", value)


def in_range(name: str, value: Any) -> Any:
  """Whether a number, which may be traced, is in the range of an option."""
  return RANGES[name][0](value)


def check_scheduled(name: str, value: Any, when: str) -> None:
  """Raises unless what a schedule gave is a number in the range of its option; values of tracers pass."""
  what = f"{name} as a schedule must be {RANGES[name][1]} at every step"
  if jnp.shape(value) != ():
    raise ValueError(f"{what}, got {describe(value)} at {when}.")
  if not is_traced(value):
    require(bool(in_range(name, value)), what, float(value), f"That was at {when}.")


def check_state(state: Any, expected: Any) -> None:
  """Raises unless a pruning state is one of the masks that the cost model was built for, whole on every device."""
  how = "Make the state with tx.init, or restore one that was saved for this model and these widths."
  require_same_tree(state.masks, expected, "the masks of the optimizer state", "the cost model's masks", how)
  for mask, ours in zip(jax.tree.leaves(state.masks), jax.tree.leaves(expected), strict=True):
    if mask.shape != ours.shape:
      raise ValueError(
        f"A mask of the optimizer state must have the shape {ours.shape} that the cost model was built for, got "
        f"{mask.shape}. {how} Under shard_map the pruning state must be replicated (in_specs P()): the choice of "
        "a feature compares all of them."
      )
    if splits_features(mask):
      raise ValueError(
        f"The masks of the optimizer state must be replicated, got a mask of shape {mask.shape} that is split "
        f"over devices: {mask.sharding if not is_traced(mask) else jax.typeof(mask).sharding}. Put the pruning "
        "state on the mesh with NamedSharding(mesh, PartitionSpec()): the choice of a feature compares all of them."
      )
  for name in ("scores", "pruned_at", "shares"):
    _check_beside(name, getattr(state, name), expected, "To put in other masks, use fp.set_masks. " + how)


def _check_beside(name: str, tree: Any, masks: Any, how: str) -> None:
  """Raises unless what a state holds beside its masks fits them: one entry per feature, or one per mask."""
  require_same_tree(tree, masks, f"{name} of the optimizer state", "its masks", how)
  for leaf, mask in zip(jax.tree.leaves(tree), jax.tree.leaves(masks), strict=True):
    shape = mask.shape[:-1] if name == "shares" else mask.shape
    if jnp.shape(leaf) != shape:
      raise ValueError(
        f"{name} of the optimizer state must have shape {shape} beside a mask of shape {mask.shape}, got "
        f"{jnp.shape(leaf)}. {how}"
      )


def check_masks(masks: Any, expected: Any, whose: str) -> None:
  """Raises unless ``masks`` are 0/1 masks in the tree and shapes of ``expected``; values of tracers pass."""
  how = "Pass a tree like what fp.get_masks returns."
  require_same_tree(masks, expected, "masks", f"the masks of {whose}", how)
  leaves = jax.tree_util.tree_leaves_with_path(masks)
  for (path, mask), ours in zip(leaves, jax.tree.leaves(expected), strict=True):
    if jnp.shape(mask) != ours.shape:
      raise ValueError(
        f"masks must have the shapes of the masks of {whose}, {ours.shape} at {keystr(path) or 'the root'}, got "
        f"{jnp.shape(mask)}. {how}"
      )
    check_switches(path, mask)


def check_same_masks(masks: Any, started: Any) -> None:
  """Raises if a model's masks are seen to differ from those that its optimizer starts from."""
  pairs = [masks, started]
  if jax.tree.structure(masks) != jax.tree.structure(started) or not all(
    map(is_known, jax.tree.leaves(pairs))
  ):
    return
  for (path, ours), theirs in zip(
    jax.tree_util.tree_leaves_with_path(masks), jax.tree.leaves(started), strict=True
  ):
    if not np.array_equal(ours, theirs):
      raise ValueError(
        f"The masks of the model must be those that its optimizer starts from, got others at {keystr(path)}: "
        f"{int(np.sum(np.asarray(ours) > 0))} alive in the model, {int(np.sum(np.asarray(theirs) > 0))} in the "
        "optimizer state. Start from the model's masks: fp.fisher_prune(..., masks=...)."
      )


def check_switches(path: Path, mask: Any) -> None:
  """Raises unless all entries of a mask are 0 or 1; values of tracers pass."""
  if not is_known(mask):
    return
  values = np.asarray(mask)
  wrong = values[~np.isin(values, (0, 1))]
  if wrong.size:
    raise ValueError(f"Masks must be 0 or 1, got {wrong[0]} at {keystr(path) or 'the root'}.")


def check_weights(weights: Any) -> None:
  """Raises if a weight of an example is negative or not finite; values of tracers pass."""
  if weights is None or not is_known(weights):
    return
  values = np.asarray(weights, np.float32)
  wrong = values[~((values >= 0) & np.isfinite(values))]
  if wrong.size:
    raise ValueError(
      f"example_weights must be finite and at least 0, got {wrong[0]}. Give a row that does not count the weight 0."
    )


def splits_features(mask: Any) -> bool:
  """Whether an array is known to be split over devices; under ``jit`` only explicit meshes tell."""
  if not is_traced(mask):
    sharding = getattr(mask, "sharding", None)
    return sharding is not None and sharding.shard_shape(mask.shape) != mask.shape
  sharding = jax.typeof(mask).sharding
  names = [name for axis in sharding.spec if axis for name in ([axis] if isinstance(axis, str) else axis)]
  return any(sharding.mesh.shape[name] > 1 for name in names)


def check_gradients(mask_grads: Any, masks: Any) -> None:
  """Raises unless ``mask_grads`` has one row per example for every mask."""
  how = "Pass mask_grads from fp.value_and_grads: tx.update(grads, state, params, mask_grads=mask_grads)."
  if mask_grads is None:
    raise ValueError(
      f"fisher_prune needs the per-example gradients of the masks, got mask_grads=None. {how} If they were passed, a "
      "wrapper around it drops extra arguments, as optax.lookahead, optax.contrib.sam and MultiSteps' "
      "gradient_transformation() do: wrap the optimizer alone, optax.chain(wrapped, fp.fisher_prune(...))."
    )
  require_same_tree(mask_grads, masks, "mask_grads", "the masks", how)
  for g, mask in zip(jax.tree.leaves(mask_grads), jax.tree.leaves(masks), strict=True):
    *stack, features = mask.shape
    examples = g.shape[-2:-1] if g.ndim == mask.ndim + 1 else ("B",)
    expected = (*stack, *examples, features)
    if g.shape != expected:
      raise ValueError(
        f"mask_grads for a mask of shape {mask.shape} must have shape {(*stack, 'B', features)}, "
        f"one row per example, got {g.shape}. {how}"
      )
  counts = {g.shape[-2] for g in jax.tree.leaves(mask_grads)}
  require(len(counts) == 1, "mask_grads must have the same number B of examples in every mask", counts, how)


def check_name(name: Any) -> None:
  """Raises unless a pruning has a name that can stand in a path, or none."""
  if name is not None and (not isinstance(name, str) or not name or "/" in name):
    raise ValueError(f"name must be a string without '/', such as 'generator', or None, got {name!r}.")


def own_gradients(mask_grads: Any, masks: Any, name: str) -> Any:
  """The gradients of one of several prunings, out of a mapping from their names."""
  if mask_grads is None or not jax.tree.leaves(masks):  # there, or else nothing left to prune
    return None
  if not isinstance(mask_grads, Mapping) or name not in mask_grads:
    keys = list(mask_grads) if isinstance(mask_grads, Mapping) else describe(mask_grads)
    raise ValueError(
      f"For fisher_prune(..., name={name!r}) mask_grads must be a mapping from names with {name!r} among them, got "
      f"{keys}. Pass tx.update(..., mask_grads={{{name!r}: mask_grads, ...}})."
    )
  return mask_grads[name]


def check_axes(mask_grads: Any, axis_name: Any) -> None:
  """Raises, where ``shard_map`` keeps account of what differs between devices, unless ``axis_name`` averages it."""
  names = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
  varying = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(mask_grads)))
  unaccounted = unaccounted_axes() if axis_name is None else []
  if unaccounted:
    given = [name for name in unaccounted if not str(name).startswith("_")]  # JAX names pmap's axis by itself
    raise ValueError(
      "Where a mapped axis has a name (pmap, vmap, shard_map), fisher_prune must be told of it, got axis_name=None "
      f"under {', '.join(map(repr, given)) or 'pmap'}: replicas of one network would prune different features. Pass "
      f"fisher_prune(..., axis_name={given[-1] if given else 'batch'!r}) to average the signals over it (and pmap "
      "the same axis_name), or axis_name=() if nothing differs over it, or each network is to prune on its own."
    )
  if varying - set(names):
    raise ValueError(
      f"Under shard_map axis_name must name the axes that mask_grads differ over, {sorted(varying)}, got "
      f"axis_name={axis_name!r}. Pass fisher_prune(..., axis_name={'/'.join(sorted(varying))!r}): without it every "
      "device would prune features of its own."
    )
  if not varying and any(varying_axes(jax.lax.axis_index(name)) for name in names):
    raise ValueError(
      f"mask_grads must be each device's own, one row per example, got gradients that are equal over {axis_name!r}: "
      "they were reduced already. Reduce the gradients of the parameters alone; fisher_prune averages the signals."
    )


def check_compact(tree: VariableTree, round_to: int) -> None:
  """Raises unless the masks are arrays of 0 and 1, and widths can be rounded so."""
  if round_to < 1:
    raise ValueError(f"round_to must be at least 1, got {round_to}. 8 suits most hardware; 1 rounds nothing.")
  for path, leaf in tree.paths:
    if tree.is_mask(path):
      if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
        raise TypeError(
          f"compact needs concrete masks, got {describe(leaf)} at {keystr(path)}. Call it outside jit: shapes "
          "depend on the masks."
        )
      check_switches(path, leaf)
