"""Flax's train state for mask gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import struct
from flax.training import train_state

from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._training.finding import get_masks
from fisherprune_jax._types import MaskGrads, Masks, PyTree


class TrainState(train_state.TrainState):
  """``flax.training.train_state.TrainState`` for a ``tx`` that contains :func:`fisher_prune`.

  Attributes:
    batch_stats: the batch statistics, if the model has any.
    collections: other variable collections, by name.

  >>> import jax, jax.numpy as jnp
  >>> import flax.linen as nn
  >>> import fisherprune_jax as fp
  >>> model = nn.Sequential([nn.Dense(4), fp.Mask(), nn.Dense(1)])
  >>> x = jnp.ones((2, 3))
  >>> variables = model.init(jax.random.key(0), x)
  >>> tx = fp.pruning_sgd(0.1, fp.cost_model(model.apply, variables, x))
  >>> state = fp.TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
  >>> def loss_fn(params, masks, x):
  ...   return jnp.mean(model.apply({"params": params, "masks": masks}, x))
  >>> _, (grads, mask_grads) = fp.value_and_mask_grads(loss_fn)(state.params, state.masks, x)
  >>> int(state.apply_gradients(grads=grads, mask_grads=mask_grads).step)
  1

  References:
    Flax, `Train state <https://flax.readthedocs.io/en/stable/api_reference/flax.training.html>`_
  """

  batch_stats: PyTree = None
  collections: Mapping[str, PyTree] = struct.field(default_factory=dict)

  @classmethod
  def create(
    cls,
    *,
    apply_fn: Callable[..., Any],
    params: optax.Params,
    tx: optax.GradientTransformation,
    **fields: Any,
  ) -> "TrainState":
    """A train state with a new optimizer state, like ``flax.training.train_state.TrainState.create``.

    Args:
      apply_fn: a function of ``variables``, such as ``model.apply``.
      params: the parameters.
      tx: the transformation.
      **fields: other fields, such as ``batch_stats``.

    Raises:
      ValueError: for masks among ``collections``; they live in the optimizer state.
    """
    if COLLECTION in (fields.get("collections") or {}):
      raise ValueError(
        f"collections must be other collections than {COLLECTION!r}, which live in the optimizer state, got "
        f"{sorted(fields['collections'])}. To start from masks of yours, use fp.fisher_prune(..., masks=...)."
      )
    return super().create(apply_fn=apply_fn, params=params, tx=tx, **fields)

  @property
  def masks(self) -> Masks:
    """The current masks."""
    return get_masks(self.opt_state)

  @property
  def variables(self) -> dict[str, PyTree]:
    """The argument of ``apply_fn``: parameters, masks and other collections."""
    stats = {} if self.batch_stats is None else {"batch_stats": self.batch_stats}
    return {"params": self.params, COLLECTION: self.masks, **stats, **self.collections}

  def apply_gradients(
    self, *, grads: optax.Updates, mask_grads: MaskGrads | None = None, **kwargs: Any
  ) -> "TrainState":
    """One step of ``tx``.

    Args:
      grads: gradients of the parameters.
      mask_grads: as from :func:`value_and_mask_grads`.
      **kwargs: ``example_weights`` for ``tx``, and new values of other fields, such as ``batch_stats``.
    """
    weights = {key: kwargs.pop(key) for key in ("example_weights",) if key in kwargs}
    updates, opt_state = self.tx.update(grads, self.opt_state, self.params, mask_grads=mask_grads, **weights)
    params = optax.apply_updates(self.params, updates)
    return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
