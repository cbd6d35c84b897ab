"""Per-example gradients of the masks, and checks of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from fisherprune_jax._errors import (
  describe,
  is_known,
  is_number,
  path_name,
  require,
  require_same_tree,
  warn,
)
from fisherprune_jax._graph.compat import unaccounted_axes, varying_axes
from fisherprune_jax._masks import per_example
from fisherprune_jax._types import AxisNames, MaskGrads, Masks, PyTree

Reduction = str | float | Callable[[PyTree], Any]


def value_and_mask_grads(
  loss_fn: Callable[..., Any], *, has_aux: bool = False, reduction: Reduction = "mean"
) -> Callable[..., Any]:
  r"""Gradients of the parameters and per-example gradients of the masks, in one backward pass.

  Masks enter the loss broadcast over the batch, so there is no ``vmap`` over examples. If a mask is applied several
  times, its gradients are summed before they are squared. The loss is the *summed* one:

  .. math:: g_{nk} = scale \cdot \partial loss / \partial mask_{nk}

  Args:
    loss_fn: ``loss_fn(params, masks, batch, *rest)``, called with per-example masks ``(..., B, C)``.
    has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
    reduction: how ``loss_fn`` reduces over examples: ``"mean"`` (scale B), ``"sum"`` (scale 1). A number or a
      function of ``batch`` is the scale itself (padded batches, dynamic loss scales).

  Returns:
    ``f(params, masks, batch, *rest) -> (value, (grads, mask_grads))``, like ``jax.value_and_grad``. Every array of
    ``batch`` must lead with the example axis.

  Raises:
    ValueError: for an unknown ``reduction``; when called, for a batch without an example axis.

  Warns:
    UserWarning: if no gradient can reach a mask; its features would be pruned first, by index. The check is free.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> def loss_fn(w, masks, x):
  ...   return jnp.mean(jnp.sum(w * masks["m"] * x, axis=1))
  >>> step = fp.value_and_mask_grads(loss_fn)
  >>> _, (_, g) = step(jnp.ones(2), {"m": jnp.ones(2)}, jnp.array([[1.0, 2.0], [3.0, 4.0]]))
  >>> g["m"]
  Array([[1., 2.],
         [3., 4.]], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """
  if not (
    reduction in ("mean", "sum")
    if isinstance(reduction, str)
    else callable(reduction) or is_number(reduction)
  ):
    raise ValueError(
      f"reduction must be 'mean', 'sum', a number or a function of the batch, got {reduction!r}."
    )

  warned: set[str] = set()

  def value_and_both(params: PyTree, masks: Masks, batch: PyTree, *rest: Any) -> Any:
    examples = examples_of(batch)
    reached: set[int] = set()

    def tapped(params: PyTree, masks: MaskGrads, *rest: Any) -> Any:
      return loss_fn(params, _tapped(masks, reached), *rest)

    differentiate = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=has_aux)
    own_masks = _vary(per_example(masks, examples), batch)
    value, (grads, mask_grads) = differentiate(params, own_masks, batch, *rest)
    _warn_of_unreached(masks, reached, warned)
    scale = _scale(reduction, batch, examples)
    return value, (grads, jax.tree.map(lambda g: g.astype(_wide(g)) * scale, mask_grads))

  return value_and_both


def _tapped(masks: MaskGrads, reached: set[int]) -> MaskGrads:
  """The masks unchanged; differentiation adds those with gradients, other than symbolic zeros, to ``reached``."""
  leaves, tree = jax.tree.flatten(masks)
  tap = jax.custom_vjp(lambda *leaves: leaves)

  def backward(_: None, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    found = tuple(None if isinstance(g, SymbolicZero) else g for g in gradients)
    reached.update(at for at, g in enumerate(found) if g is not None)
    return found

  tap.defvjp(lambda *leaves: (tuple(leaf.value for leaf in leaves), None), backward, symbolic_zeros=True)
  return jax.tree.unflatten(tree, tap(*leaves))


def _warn_of_unreached(masks: Masks, reached: set[int], warned: set[str]) -> None:
  """Warn of masks that no gradient can reach, once each: outside ``jit`` every call gets here."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(masks)]
  names = [path_name(path).removesuffix("/mask") for at, path in enumerate(paths) if at not in reached]
  if names := [name for name in names if name not in warned]:
    warned.update(names)
    warn(
      f"The loss must depend on every mask, got a loss whose gradient cannot reach {', '.join(names)}. Features of such "
      "a mask have the importance 0 and are pruned first, in the order of their index. Pass the masks that loss_fn is "
      "given on to the network, and check that it applies all of them. To leave a mask alone, use "
      "fisher_prune(..., exclude=[...])."
    )


def examples_of(batch: PyTree) -> int:
  leaves = jax.tree.leaves(batch)
  sizes = {leaf.shape[0] for leaf in leaves if jnp.ndim(leaf)}
  if len(sizes) != 1 or not all(map(jnp.ndim, leaves)):
    raise ValueError(
      "Every array of `batch` must lead with the same example axis, got "
      f"{', '.join(map(describe, leaves)) or 'no array'}. Pass what is not per example after the batch."
    )
  return sizes.pop()


def _vary(masks: MaskGrads, batch: PyTree) -> MaskGrads:
  """Under ``shard_map``, masks that vary over devices: the gradients of others would be summed over devices."""
  axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(batch)))

  def vary(mask: jax.Array) -> jax.Array:
    missing = tuple(sorted(axes - varying_axes(mask)))
    return jax.lax.pcast(mask, missing, to="varying") if missing else mask

  return jax.tree.map(vary, masks)


def _scale(reduction: Reduction, batch: PyTree, examples: int) -> Any:
  if isinstance(reduction, str):
    return examples if reduction == "mean" else 1
  return reduction(batch) if callable(reduction) else reduction


def _wide(g: jax.Array) -> jax.typing.DTypeLike:
  return jnp.promote_types(g.dtype, jnp.float32)


def check_gradients(mask_grads: MaskGrads, masks: Masks, axis_name: AxisNames) -> None:
  """Raise unless ``mask_grads`` has one row per example for every mask, and is not reduced over mapped axes."""
  how = (
    "Pass mask_grads from fp.value_and_mask_grads: tx.update(grads, state, params, mask_grads=mask_grads)."
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
  _check_axes(mask_grads, axis_name)


def _check_axes(mask_grads: MaskGrads, axis_name: AxisNames) -> None:
  """Raise unless ``axis_name`` covers the axes over which gradients vary, where ``shard_map`` tracks them."""
  names = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
  varying = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(mask_grads)))
  unaccounted = unaccounted_axes() if axis_name is None else []
  if unaccounted:
    given = [name for name in unaccounted if not str(name).startswith("_")]  # JAX's own name for pmap's axis
    raise ValueError(
      "Where a mapped axis has a name (pmap, vmap, shard_map), fisher_prune must be told of it, got axis_name=None "
      f"under {', '.join(map(repr, given)) or 'pmap'}: replicas of one network would prune different features. Pass "
      f"fisher_prune(..., axis_name={given[-1] if given else 'batch'!r}) to average the importance over it (and pmap "
      "the same axis_name), or axis_name=() if nothing differs over it, or each network is to prune on its own."
    )
  if varying - set(names):
    raise ValueError(
      f"Under shard_map axis_name must name the axes that mask_grads differ over, {sorted(varying)}, got "
      f"axis_name={axis_name!r}. Pass fisher_prune(..., axis_name={'/'.join(sorted(varying))!r}): without it every "
      "device would prune other features."
    )
  if not varying and any(varying_axes(jax.lax.axis_index(name)) for name in names):
    raise ValueError(
      f"mask_grads must be each device's own, one row per example, got gradients that are equal over {axis_name!r}: "
      "they were reduced already. Reduce the gradients of the parameters alone; fisher_prune averages the importance."
    )


def check_weights(weights: jax.typing.ArrayLike | None) -> None:
  """Raise if an example weight is negative or not finite; tracers pass."""
  if weights is None or not is_known(weights):
    return
  values = np.asarray(weights, np.float32)
  wrong = values[~((values >= 0) & np.isfinite(values))]
  if wrong.size:
    raise ValueError(
      f"example_weights must be finite and at least 0, got {wrong[0]}. Give a row that does not count the weight 0."
    )


def own_gradients(mask_grads: Any, masks: Masks, name: str) -> MaskGrads | None:
  """The gradients of one of several prunings, from a mapping by name."""
  if mask_grads is None or not jax.tree.leaves(masks):  # reported later, or nothing left to prune
    return None
  if not isinstance(mask_grads, Mapping) or name not in mask_grads:
    keys = list(mask_grads) if isinstance(mask_grads, Mapping) else describe(mask_grads)
    raise ValueError(
      f"For fisher_prune(..., name={name!r}) mask_grads must be a mapping from names with {name!r} among them, got "
      f"{keys}. Pass tx.update(..., mask_grads={{{name!r}: mask_grads, ...}})."
    )
  return mask_grads[name]
