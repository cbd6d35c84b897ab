"""Slicing what is shaped like the parameters: parameters themselves, gradients, optimizer states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax.errors import describe
from fisherprune_jax.graph import sets
from fisherprune_jax.graph.facts import Box
from fisherprune_jax.model import Path, keystr
from fisherprune_jax.transform import FisherPruneState


@dataclass(frozen=True, eq=False)
class Kept:
  """Which entries of a leaf are kept: per axis the positions, or None for all of them."""

  shape: tuple[int, ...]
  index: tuple[np.ndarray | None, ...]

  @property
  def compact_shape(self) -> tuple[int, ...]:
    """The shape after slicing."""
    return tuple(n if i is None else i.size for n, i in zip(self.shape, self.index, strict=True))

  @property
  def box(self) -> Box:
    """The kept entries as sets."""
    return tuple(
      sets.everything(n) if i is None else sets.fixed(np.isin(np.arange(n), i))
      for n, i in zip(self.shape, self.index, strict=True)
    )

  def slice(self, leaf: Any) -> jax.Array:
    """The kept entries of a leaf of the full shape."""
    if jnp.shape(leaf) != self.shape:
      raise ValueError(
        f"A leaf to shrink must have its parameter's shape {self.shape}, got {describe(leaf)}. "
        "Pass a tree shaped like the full parameters."
      )
    for axis, index in enumerate(self.index):
      if index is not None:
        leaf = jnp.take(leaf, index, axis=axis)
    return jnp.asarray(leaf)


def shrink_opt_state(tx: Any, opt_state: Any, params: Any, kept: Any, masks: Any | None) -> Any:
  """Slices every leaf of an optimizer state that belongs to a parameter.

  A leaf belongs to the parameter whose path its own path ends with. Where it has the parameter's shape it is
  sliced; where it has another shape that no longer fits (factored second moments), it starts anew.

  Args:
    tx: the transformation.
    opt_state: its state for the full parameters.
    params: the compact parameters.
    kept: a tree of ``Kept``, like the parameters.
    masks: a tree of ``Kept`` for the masks, or None if they were dropped.

  Returns:
    The state for the compact parameters.
  """
  by_path = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(kept)}
  fresh = _without_pruning(jax.eval_shape(tx.init, params))
  fresh_shapes = {_keys(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(fresh)}
  restarted = None

  def shrink(path: Path, leaf: Any) -> Any:
    nonlocal restarted
    if isinstance(leaf, FisherPruneState):
      return _shrink_pruning(leaf, masks)
    owner = _owner(_keys(path), by_path)
    if (
      owner is None or jnp.shape(leaf) == fresh_shapes.get(_keys(path)) == owner.compact_shape == owner.shape
    ):
      return leaf
    if jnp.shape(leaf) == owner.shape:
      return owner.slice(leaf)
    if jnp.shape(leaf) == fresh_shapes.get(_keys(path)):
      return leaf
    if restarted is None:
      restarted = dict(_leaves_by_keys(_without_pruning(tx.init(params))))
    return restarted[_keys(path)]

  return jax.tree_util.tree_map_with_path(shrink, opt_state, is_leaf=_is_pruning)


def _is_pruning(x: Any) -> bool:
  return isinstance(x, FisherPruneState)


def _without_pruning(state: Any) -> Any:
  return jax.tree.map(lambda x: None if _is_pruning(x) else x, state, is_leaf=_is_pruning)


def _leaves_by_keys(tree: Any) -> Any:
  return ((_keys(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def _keys(path: Path) -> tuple[str, ...]:
  return tuple(keystr((key,)) for key in path)


def _owner(path: tuple[str, ...], by_path: Mapping[tuple[str, ...], Kept]) -> Kept | None:
  """The parameter whose path is the longest ending of ``path``."""
  endings = (path[start:] for start in range(len(path)))
  return next((by_path[ending] for ending in endings if ending in by_path), None)


def _shrink_pruning(state: FisherPruneState, masks: Any | None) -> FisherPruneState:
  if masks is None:
    return state._replace(scores={}, masks={}, pruned_at={})
  slices = {
    name: jax.tree.map(lambda kept, leaf: kept.slice(leaf), masks, getattr(state, name))
    for name in ("scores", "masks", "pruned_at")
  }
  return state._replace(**slices)
