"""Finding the pruning state inside any Optax state."""

from typing import Any

import jax
from flax import nnx

from fisherprune_jax.transform import FisherPruneState, corrected


def get_state(opt_state: Any) -> FisherPruneState:
  """The pruning state inside a chained, wrapped or injected Optax state.

  Args:
    opt_state: the state of any transformation that :func:`fisher_prune` is a part of.

  Raises:
    ValueError: if there is none, or more than one.

  >>> import jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> state = optax.chain(optax.sgd(0.1), fp.fisher_prune(cost)).init(jnp.zeros(3))
  >>> int(fp.get_state(state).step)
  0
  """

  def is_state(x: Any) -> bool:
    return isinstance(x, FisherPruneState)

  found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
  if len(found) != 1:
    raise ValueError(
      f"An optimizer state must hold one FisherPruneState, got {len(found)}. "
      "Put fp.fisher_prune into the chain once, and pass the whole state."
    )
  return jax.tree.map(_value, found[0], is_leaf=_is_variable)


def _is_variable(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def _value(x: Any) -> Any:
  """``nnx.Optimizer`` wraps every array of an Optax state in a variable."""
  return x.get_value() if _is_variable(x) else x


def get_masks(opt_state: Any) -> Any:
  """The masks inside any Optax state; see :func:`get_state`.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> fp.get_masks(fp.fisher_prune(cost).init({}))
  {'m': Array([1., 1.], dtype=float32)}
  """
  return get_state(opt_state).masks


def signals(opt_state: Any) -> Any:
  """The bias-corrected signals inside any Optax state, in nats: a tree like the masks.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.fisher_prune(cost)
  >>> _, state = tx.update({}, tx.init({}), mask_grads={"m": jnp.array([[2.0, 4.0]])})
  >>> [round(float(s), 4) for s in fp.signals(state)["m"]]
  [2.0, 8.0]
  """
  return corrected(get_state(opt_state))
