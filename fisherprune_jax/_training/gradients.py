"""Per-example gradients of the masks, and the Fisher signal that they give."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherprune_jax._errors import describe, is_number, require
from fisherprune_jax._graph.compat import varying_axes
from fisherprune_jax._masks import per_example

Reduction = str | float | Callable[[Any], Any]


def value_and_grads(
  loss_fn: Callable[..., Any], *, has_aux: bool = False, reduction: Reduction = "mean"
) -> Callable[..., Any]:
  r"""Gradients of the parameters, and of every example's own mask, in one backward pass.

  Masks enter the loss broadcast over the batch, so its gradient with respect to them is per example; there is
  no second backward pass and no ``vmap`` over examples. A mask that is applied several times sums before
  anyone squares. The gradient is that of the *summed* loss:

  .. math:: g_{nk} = scale \cdot \partial loss / \partial mask_{nk}

  Args:
    loss_fn: ``loss_fn(params, masks, batch, *rest)``, called on per-example masks ``(..., B, C)``.
    has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
    reduction: how ``loss_fn`` adds up examples: ``"mean"`` is undone, ``"sum"`` left alone; a number or a
      function of ``batch`` is the factor to multiply by (padded batches, a dynamic loss scale).

  Returns:
    ``f(params, masks, batch, *rest) -> (value, (grads, mask_grads))``, as
    ``jax.value_and_grad(..., argnums=(0, 1))``. ``batch`` is a tree whose leaves lead with the example axis.

  Raises:
    ValueError: for an unknown ``reduction``; when called, for a batch without an example axis.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> def loss_fn(w, masks, x):
  ...   return jnp.mean(jnp.sum(w * masks["m"] * x, axis=1))
  >>> step = fp.value_and_grads(loss_fn)
  >>> _, (_, g) = step(jnp.ones(2), {"m": jnp.ones(2)}, jnp.array([[1.0, 2.0], [3.0, 4.0]]))
  >>> g["m"]
  Array([[1., 2.],
         [3., 4.]], dtype=float32)
  """
  if not (
    reduction in ("mean", "sum")
    if isinstance(reduction, str)
    else callable(reduction) or is_number(reduction)
  ):
    raise ValueError(
      f"reduction must be 'mean', 'sum', a number or a function of the batch, got {reduction!r}."
    )

  def value_and_both(params: Any, masks: Any, batch: Any, *rest: Any) -> Any:
    examples = _examples(batch)
    differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=has_aux)
    own_masks = _vary(per_example(masks, examples), batch)
    value, (grads, mask_grads) = differentiate(params, own_masks, batch, *rest)
    scale = _scale(reduction, batch, examples)
    return value, (grads, jax.tree.map(lambda g: g.astype(_wide(g)) * scale, mask_grads))

  return value_and_both


def _examples(batch: Any) -> int:
  leaves = jax.tree.leaves(batch)
  sizes = {leaf.shape[0] for leaf in leaves if jnp.ndim(leaf)}
  if len(sizes) != 1 or not all(map(jnp.ndim, leaves)):
    raise ValueError(
      "Every array of `batch` must lead with the same example axis, got "
      f"{', '.join(map(describe, leaves)) or 'no array'}. Pass what is not per example after the batch."
    )
  return sizes.pop()


def _vary(masks: Any, batch: Any) -> Any:
  """Under ``shard_map``: masks that belong to each device's examples, so that nothing adds up their gradients."""
  axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(batch)))

  def vary(mask: jax.Array) -> jax.Array:
    missing = tuple(sorted(axes - varying_axes(mask)))
    return jax.lax.pcast(mask, missing, to="varying") if missing else mask

  return jax.tree.map(vary, masks)


def _scale(reduction: Reduction, batch: Any, examples: int) -> Any:
  if isinstance(reduction, str):
    return examples if reduction == "mean" else 1
  return reduction(batch) if callable(reduction) else reduction


def _wide(g: jax.Array) -> Any:
  return jnp.promote_types(g.dtype, jnp.float32)


def fisher_signal(mask_grads: Any, example_weights: jax.Array | None = None, axis_name: Any = None) -> Any:
  r"""The Fisher estimate, in nats, of what removing each feature costs (Theis et al. 2018, eq. 9).

  .. math:: signal_k = \tfrac12 \, \mathrm{mean}_n \, g_{nk}^2

  Args:
    mask_grads: a tree of per-example gradients ``(..., B, C)``.
    example_weights: ``(B,)``, the weight of each row in the mean; a row of weight 0 may hold anything.
    axis_name: a mapped axis, or a tuple of axes, to average over as well.

  Returns:
    A float32 tree with leaves ``(..., C)``; NaN where weights are negative, not finite, or all zero.

  >>> import jax.numpy as jnp
  >>> fisher_signal(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
  Array([2.5, 5. ], dtype=float32)
  """
  examples = jax.tree.leaves(mask_grads)[0].shape[-2]
  weights = jnp.ones(examples) if example_weights is None else jnp.asarray(example_weights, jnp.float32)
  require(weights.shape == (examples,), f"example_weights must have shape ({examples},)", weights.shape)
  # With a negative weight among them it would be no mean: NaN, so that the batch is left out.
  count = jnp.sum(jnp.where(weights >= 0, weights, jnp.nan))

  def total(g: jax.Array) -> jax.Array:
    squares = jnp.square(g.astype(jnp.float32))
    if example_weights is None:
      return jnp.sum(squares, axis=-2)
    return jnp.sum(jnp.where(weights[:, None] > 0, weights[:, None] * squares, 0), axis=-2)

  totals = jax.tree.map(total, mask_grads)
  if axis_name is not None:
    totals, count = jax.lax.psum((totals, count), axis_name)
  return jax.tree.map(lambda t: 0.5 * t / count, totals)
