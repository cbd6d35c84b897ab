"""Training a module with masks: gradients, and an optimizer that updates the masks."""

from typing import Any

import optax
from flax import nnx

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._masks import check_same_masks
from fisherprune_jax._training import gradients
from fisherprune_jax._training.finding import get_masks, set_masks
from fisherprune_jax._types import Masks, PyTree
from fisherprune_jax.nnx._modules import Call, Filter, MaskVariable, split


class Optimizer(nnx.Optimizer):
  """``nnx.Optimizer`` for a ``tx`` that prunes: ``update`` also updates the model's masks.

  With a plain ``nnx.Optimizer``, call this after each ``update``:
  ``nnx.update(model, fp.get_masks(optimizer.opt_state))``.

  >>> import jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
  >>> x = jnp.ones((4, 2))
  >>> tx = fp.pruning_sgd(0.1, fp.nnx.cost_model(model, x), prune_every=1)
  >>> optimizer = fp.nnx.Optimizer(model, tx, wrt=nnx.Param)
  >>> loss, (grads, mask_grads) = fp.nnx.value_and_mask_grads(lambda m, x: jnp.mean(m(x) ** 2))(model, x)
  >>> _ = optimizer.update(model, grads, mask_grads=mask_grads)
  >>> float(jnp.sum(model.layers[1].mask[...]))
  2.0

  References:
    Flax, `Optimizer <https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/training/optimizer.html>`_
  """

  def __init__(self, model: nnx.Module, tx: optax.GradientTransformation, **options: Any) -> None:
    """Raise ``ValueError`` if the model's masks are known to differ from the initial masks of ``tx``."""
    super().__init__(model, tx, **options)
    check_same_masks(nnx.to_pure_dict(nnx.state(model, MaskVariable)), get_masks(self.opt_state))

  def set_masks(self, model: nnx.Module, masks: Masks, *, cost: CostModel | None = None) -> None:
    """Set the masks of the pruning state and of ``model``; see :func:`fisherprune_jax.set_masks`.

    Args:
      model: the module in training.
      masks: a tree like ``fp.get_masks(optimizer.opt_state)``.
      cost: the cost model, to set the new cost now.
    """
    state = set_masks(nnx.as_pure(self.opt_state), masks, cost=cost)
    nnx.update(self.opt_state, nnx.state(state))
    nnx.update(model, get_masks(state))

  def update(self, model: nnx.Module, grads: PyTree, /, **kwargs: Any) -> PyTree:
    """One step of parameters and masks of ``model``; ``tx`` gets ``mask_grads=`` and ``example_weights=``."""
    updates = super().update(model, grads, **kwargs)
    nnx.update(model, get_masks(self.opt_state))
    return updates


def value_and_mask_grads(
  loss_fn: Call, *, wrt: Filter = nnx.Param, has_aux: bool = False, reduction: gradients.Reduction = "mean"
) -> Call:
  """``fp.value_and_mask_grads`` for a module: gradients of parameters and per-example gradients of masks, in one pass.

  Args:
    loss_fn: ``loss_fn(model, batch, *rest)``; its changes of state (batch statistics, random counters) reach the model.
    wrt: which variables are parameters.
    has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
    reduction: as in ``fp.value_and_mask_grads``.

  Returns:
    ``f(model, batch, *rest) -> (value, (grads, mask_grads))``: ``grads`` as from ``nnx.grad``, ``mask_grads`` a nested
    dictionary with leaves ``(..., B, C)``.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> step = fp.nnx.value_and_mask_grads(lambda mask, x: jnp.mean(jnp.sum(mask(x), axis=1)))
  >>> step(fp.nnx.Mask(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))[1][1]["mask"]
  Array([[1., 2.],
         [3., 4.]], dtype=float32)
  """

  def value_and_both(model: nnx.Module, batch: PyTree, *rest: Any) -> Any:
    graph, masks, params, state = split(model, wrt)

    def pure(params: nnx.State, masks: Masks, batch: PyTree, *rest: Any) -> Any:
      copy = nnx.merge(graph, masks, params, state, copy=True)
      result = loss_fn(copy, batch, *rest)
      value, aux = result if has_aux else (result, None)
      return value, (aux, split(copy, wrt)[3])

    differentiate = gradients.value_and_mask_grads(pure, has_aux=True, reduction=reduction)
    (value, (aux, state)), grads = differentiate(params, masks, batch, *rest)
    nnx.update(model, state)
    return ((value, aux) if has_aux else value), grads

  return value_and_both
