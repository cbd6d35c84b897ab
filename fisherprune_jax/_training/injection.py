"""Hyperparameters that can be set between steps."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from fisherprune_jax._training.options import is_static
from fisherprune_jax._training.transform import fisher_prune


def inject_hyperparams(
  inner_factory: Callable[..., Any] = fisher_prune, static_args: Any = (), **options: Any
) -> Callable[..., Any]:
  """``optax.inject_hyperparams`` for :func:`fisher_prune`, with the right static arguments.

  Optax takes any callable, also the cost model, for a schedule, and makes integers tracers. In the dtype of the updates
  a target of 250,123 FLOPs can be infinite. This wrapper names the static arguments and keeps numbers in float32.

  Args:
    inner_factory: :func:`fisher_prune`, or a factory with the same arguments.
    static_args: names of further static arguments.
    **options: options of ``optax.inject_hyperparams``.

  Returns:
    A factory whose state has ``hyperparams`` that can be set between steps.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.inject_hyperparams(fp.fisher_prune)(cost, target=250_123.0)
  >>> float(tx.init({}).hyperparams["target"])
  250123.0

  References:
    Optax, `Optimizer schedules <https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html>`_
  """
  extra = (static_args,) if isinstance(static_args, str) else tuple(static_args)
  options.setdefault("hyperparam_dtype", jnp.float32)
  defaults = {name: option.default for name, option in inspect.signature(inner_factory).parameters.items()}

  def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    static = (
      *(name for name, default in defaults.items() if is_static(name, kwargs.get(name, default))),
      *extra,
    )
    wrapped = optax.inject_hyperparams(inner_factory, static_args=static, **options)
    # An integer would become an int32, which cannot hold three billion FLOPs.
    return wrapped(*args, **{k: v if k in static else _float(v) for k, v in kwargs.items()})

  return factory


def _float(value: Any) -> Any:
  return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
