"""What ``fisher_prune`` and ``compact`` require of their arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax.cost import CostModel
from fisherprune_jax.errors import describe, is_number, is_traced, require, require_same_tree
from fisherprune_jax.graph.compat import varying_axes
from fisherprune_jax.model import VariableTree, keystr

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
  _check_number("decay", decay, lambda d: 0 <= d < 1, "in [0, 1)")
  _check_number("flops_target", flops_target, lambda t: t >= 0, "a number of FLOPs, at least 0")
  if isinstance(flops_weight, str):
    require(flops_weight == "auto", "flops_weight must be 'auto', a number or a schedule", flops_weight)
  else:
    _check_number("flops_weight", flops_weight, lambda w: w == w, "'auto', a number or a schedule")
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


def _check_number(name: str, value: Any, holds: Callable[[Any], bool], requirement: str) -> None:
  if getattr(value, "dtype", None) in (jnp.float16, jnp.bfloat16):
    raise TypeError(
      f"{name} must have at least the precision of float32, got {describe(value)}. Under optax.inject_hyperparams "
      "pass hyperparam_dtype=jnp.float32 (beside static_args), or use fp.inject_hyperparams."
    )
  if callable(value) or is_traced(value):
    return
  if not is_number(value):
    raise TypeError(f"{name} must be {requirement}, or a schedule of the step, got {describe(value)}.")
  require(bool(holds(float(value))), f"{name} must be {requirement}", value)


def check_state(masks: Any, expected: Any) -> None:
  """Raises unless the masks of a state are those that the cost model was built for, whole on every device."""
  how = "Make the state with tx.init, or restore one that was saved for this model and these widths."
  require_same_tree(masks, expected, "the masks of the optimizer state", "the cost model's masks", how)
  for mask, ours in zip(jax.tree.leaves(masks), jax.tree.leaves(expected), strict=True):
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


def check_axes(mask_grads: Any, axis_name: Any) -> None:
  """Raises, where ``shard_map`` keeps account of what differs between devices, unless ``axis_name`` averages it."""
  names = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
  varying = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(mask_grads)))
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
      values = np.asarray(leaf)
      if not np.isin(values, (0, 1)).all():
        raise ValueError(
          f"Masks must be 0 or 1, got {values[~np.isin(values, (0, 1))][0]} at {keystr(path)}."
        )
