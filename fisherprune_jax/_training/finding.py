"""Finding the pruning state inside any Optax state, and putting other masks into it."""

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
    opt_state: the state of any transformation that :func:`fisher_prune` is a part of.
    name: which one, where there are several: a key on the way to it that leads to no other, such as the ``name`` of
      its ``fisher_prune``, its label in ``optax.partition``, its name in ``optax.named_chain``, its position in a
      chain; or several keys in a row, joined by ``"/"``.

  Raises:
    ValueError: if there is none, or more than one; it lists the names to choose from.

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
  """An Optax state with other masks in its pruning state, from which pruning goes on; jit-able.

  Features that come back are alive in the history too (``pruned_at`` is -1 again), and those that go went at the
  current step. The scores stay as they are: the running mean follows the gradients of dead features as well, so it
  knows those that come back. ``exhausted`` is taken back, the step goes on.

  Args:
    opt_state: the state of any transformation that :func:`fisher_prune` is a part of.
    masks: the masks to put in, a tree like :func:`get_masks` returns, of 0 and 1.
    name: which pruning, where there are several; see :func:`get_state`.
    cost: the cost model, to have ``cost`` and ``shares`` of the new masks at once. Without it they are NaN until
      the next update takes them anew, before it decides on anything.

  Returns:
    The state, of the same structure and types; where the masks were a model's variables too (``flax.nnx``), set
    them there as well.

  Raises:
    ValueError: for masks of another tree or shape, or with entries other than 0 and 1 where that can be seen; or
      if the network was compacted and holds no masks any more.

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
  """The path of the pruning state that is meant."""
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
  """The shortest name of a path among others: a key of its own, a word rather than a number, or all of it."""
  own = [key for key in keys if sum(key in other for other in paths) == 1]
  return min(own, key=str.isdigit) if own else "/".join(keys)


def _states(opt_state: optax.OptState) -> list[tuple[Keys, FisherPruneState]]:
  """All pruning states, with their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_state)
  return [(_keys(path), leaf) for path, leaf in leaves if _is_state(leaf)]


def _keys(path: Path) -> Keys:
  return tuple(path_name((key,)) for key in path)


def _is_state(x: Any) -> bool:
  return isinstance(x, FisherPruneState)


def _is_variable(x: Any) -> bool:
  nnx = sys.modules.get("flax.nnx")  # where nobody has imported it there are none
  return nnx is not None and isinstance(x, nnx.Variable)


def _value(x: Any) -> Any:
  """``nnx.Optimizer`` wraps every array of an Optax state in a variable."""
  return x.get_value() if _is_variable(x) else x


def get_masks(opt_state: optax.OptState, name: str | None = None) -> Masks:
  """The masks inside any Optax state; see :func:`get_state`.

  Args:
    opt_state: the state of any transformation that :func:`fisher_prune` is a part of.
    name: which pruning, where there are several.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> fp.get_masks(fp.fisher_prune(cost).init({}))
  {'m': Array([1., 1.], dtype=float32)}
  """
  return get_state(opt_state, name).masks


def get_importance(opt_state: optax.OptState, name: str | None = None) -> Masks:
  """The bias-corrected importance inside any Optax state, in nats (or the criterion's unit): a tree like the masks.

  With ``method="fisher_magnitude"`` they are Fisher's: they are ranked with the parameters, at the steps that prune.

  Args:
    opt_state: the state of any transformation that :func:`fisher_prune` is a part of.
    name: which pruning, where there are several; see :func:`get_state`.

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
    the correction of the bias
  """
  return corrected(get_state(opt_state, name))
