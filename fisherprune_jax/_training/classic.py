"""The classic Fisher-pruning optimizer as one call."""

from typing import Any

import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.transform import fisher_prune


def pruning_sgd(
  learning_rate: optax.ScalarOrSchedule,
  cost: CostModel,
  momentum: float | None = 0.9,
  nesterov: bool = False,
  update_params: optax.GradientTransformation | None = None,
  *,
  prune_every: int = 100,
  burn_in: int = 0,
  decay: optax.ScalarOrSchedule = 0.96,
  flops_weight: str | optax.ScalarOrSchedule = "auto",
  flops_target: optax.ScalarOrSchedule = 0.0,
  method: str | Criterion = "fisher",
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum SGD that prunes: the classic Fisher-pruning optimizer.

  .. math:: a \leftarrow momentum \cdot a + g, \quad w \leftarrow w - learning\_rate \cdot a

  Args:
    learning_rate: a number or a schedule.
    cost: the cost model, in FLOPs per example.
    momentum: of the SGD.
    nesterov: whether the momentum is Nesterov's.
    update_params: a transformation in place of the SGD.
    prune_every: as in :func:`fisher_prune`.
    burn_in: likewise.
    decay: likewise.
    flops_weight: the classic name of ``cost_weight``.
    flops_target: the classic name of ``target``.
    method: the importance criterion, by default the classic one.
    **options: other options of :func:`fisher_prune`.

  Returns:
    ``optax.chain(sgd, fisher_prune(cost, ...))``.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.pruning_sgd(0.5, cost, prune_every=10)
  >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), mask_grads={"m": jnp.ones((4, 2))})
  >>> updates
  Array([-0.5], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018

    Sutskever et al., `On the importance of initialization and momentum in deep learning
    <http://proceedings.mlr.press/v28/sutskever13.pdf>`_, 2013
  """
  train = optax.sgd(learning_rate, momentum, nesterov) if update_params is None else update_params
  prune = fisher_prune(
    cost,
    prune_every=prune_every,
    burn_in=burn_in,
    decay=decay,
    cost_weight=flops_weight,
    target=flops_target,
    method=method,
    **options,
  )
  return optax.chain(train, prune)
