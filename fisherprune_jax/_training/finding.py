"""Access to the pruning state inside any Optax state."""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._errors import Path, path_name
from fisherprune_jax._masks import check_masks
from fisherprune_jax._training.state import FisherPruneState, check_types, corrected, with_masks
from fisherprune_jax._types import Masks

Keys = tuple[str, ...]
"""A path in a tree, as names."""


def get_state(opt_state: optax.OptState, name: str | None = None) -> FisherPruneState:
  """The pruning state inside a chained, wrapped or injected Optax state.

  Args:
    opt_state: an Optax state that contains the state of :func:`fisher_prune`.
    name: which pruning, if there are several: a unique key on the path to it, or consecutive keys joined by ``"/"``.
      Keys are the ``name`` of its ``fisher_prune``, labels of ``optax.partition``, names of ``optax.named_chain`` and
      positions in chains.

  Raises:
    ValueError: unless there is exactly one; the message lists the names.

  >>> import jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> state = optax.chain(optax.sgd(0.1), fp.fisher_prune(cost)).init(jnp.zeros(3))
  >>> int(fp.get_state(state).step)
  0
  >>> tx = optax.chain(fp.fisher_prune(cost, name="generator"), fp.fisher_prune(cost, name="discriminator"))
  >>> int(fp.get_state(tx.init(jnp.zeros(3)), "generator").step)
  0
  """
  keys = _where(opt_state, name)
  (found,) = [state for at, state in _states(opt_state) if at == keys]
  return jax.tree.map(_value, found, is_leaf=_is_variable)


def set_masks(
  opt_state: optax.OptState, masks: Masks, name: str | None = None, *, cost: CostModel | None = None
) -> optax.OptState:
  """An Optax state with other masks in its pruning state; jit-able.

  In ``pruned_at``, features that come back are live (-1), and removed ones are pruned at the current step. Scores stay:
  the running mean covers masked features too. ``exhausted`` is reset.

  Args:
    opt_state: see :func:`get_state`.
    masks: the new 0/1 masks, a tree like that of :func:`get_masks`.
    name: see :func:`get_state`.
    cost: the cost model, to set ``cost`` and ``shares``. Without it they are NaN until the next update.

  Returns:
    The state, of the same structure and types. If a ``flax.nnx`` model holds the masks too, set them there as well.

  Raises:
    ValueError: for masks of another tree or shape, entries other than 0 and 1, or a compact network without masks.

  >>> import jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(3)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = optax.chain(optax.sgd(0.1), fp.fisher_prune(cost, prune_every=1))
  >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), mask_grads={"m": jnp.array([[3.0, 1.0, 2.0]])})
  >>> state = fp.set_masks(state, {"m": jnp.array([0.0, 1.0, 1.0])}, cost=cost)
  >>> fp.get_state(state).pruned_at["m"], float(fp.get_state(state).cost)
  (Array([ 1, -1, -1], dtype=int32), 2.0)

  References:
    Han et al., `DSD: Dense-sparse-dense training for deep neural networks
    <https://arxiv.org/abs/1607.04381>`_, 2017, puts back what was pruned
  """
  keys = _where(opt_state, name)
  state = get_state(opt_state, name)
  if not jax.tree.leaves(state.masks):
    raise ValueError(
      "set_masks needs a pruning state with masks, got that of a compact network, which has none. Set them before "
      "fp.compact, or keep them with keep_masks=True."
    )
  check_masks(masks, state.masks, "the optimizer state")
  new = with_masks(state, masks, cost)

  def replace(path: Path, leaf: Any) -> Any:
    if not _is_state(leaf) or _keys(path) != keys:
      return leaf
    return jax.tree.map(
      lambda old, x: old.copy(x) if _is_variable(old) else x, leaf, new, is_leaf=_is_variable
    )

  return jax.tree_util.tree_map_with_path(replace, opt_state, is_leaf=_is_state)


def _where(opt_state: optax.OptState, name: str | None) -> Keys:
  """The path of the selected pruning state."""
  paths = [keys for keys, _ in _states(opt_state)]
  found = paths if name is None else [keys for keys in paths if "/".join(keys) == name]
  found = found or [keys for keys in paths if f"/{name}/" in f"/{'/'.join(keys)}/"]
  if len(found) == 1:
    return found[0]
  check_types(opt_state)
  called = "" if name is None else f" called {name!r}"
  remedy = (
    f"Choose one with name=, out of {', '.join(repr(_label(keys, paths)) for keys in paths)}."
    if paths
    else "Put fp.fisher_prune into the chain once, and pass the whole state."
  )
  raise ValueError(f"An optimizer state must hold one FisherPruneState{called}, got {len(found)}. {remedy}")


def _label(keys: Keys, paths: Sequence[Keys]) -> str:
  """The shortest name of a path: a unique key, preferably a word, or the whole path."""
  own = [key for key in keys if sum(key in other for other in paths) == 1]
  return min(own, key=str.isdigit) if own else "/".join(keys)


def _states(opt_state: optax.OptState) -> list[tuple[Keys, FisherPruneState]]:
  leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_state)
  return [(_keys(path), leaf) for path, leaf in leaves if _is_state(leaf)]


def _keys(path: Path) -> Keys:
  return tuple(path_name((key,)) for key in path)


def _is_state(x: Any) -> bool:
  return isinstance(x, FisherPruneState)


def _is_variable(x: Any) -> bool:
  nnx = sys.modules.get("flax.nnx")  # no import, no variables
  return nnx is not None and isinstance(x, nnx.Variable)


def _value(x: Any) -> Any:
  """``nnx.Optimizer`` wraps every array of an Optax state in a variable."""
  return x.get_value() if _is_variable(x) else x


def get_masks(opt_state: optax.OptState, name: str | None = None) -> Masks:
  """The masks inside any Optax state.

  Args:
    opt_state: see :func:`get_state`.
    name: likewise.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> fp.get_masks(fp.fisher_prune(cost).init({}))
  {'m': Array([1., 1.], dtype=float32)}
  """
  return get_state(opt_state, name).masks


def get_importance(opt_state: optax.OptState, name: str | None = None) -> Masks:
  """The bias-corrected importance inside any Optax state: a tree like the masks, in nats or the criterion's unit.

  With ``method="fisher_magnitude"`` this is Fisher importance, before it is reassigned for a pruning step.

  Args:
    opt_state: see :func:`get_state`.
    name: likewise.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.fisher_prune(cost)
  >>> _, state = tx.update({}, tx.init({}), mask_grads={"m": jnp.array([[2.0, 4.0]])})
  >>> [round(float(s), 4) for s in fp.get_importance(state)["m"]]
  [2.0, 8.0]

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018

    Kingma and Ba, `Adam: A method for stochastic optimization <https://arxiv.org/abs/1412.6980>`_, 2015, section 3:
    bias correction
  """
  return corrected(get_state(opt_state, name))
