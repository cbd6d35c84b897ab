"""Trees of variables, their masks, and masks as vectors by key."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._errors import Path, path_name
from fisherprune_jax._masks import check_names
from fisherprune_jax._types import Array, Masks, PyTree

MaskSelector = str | Callable[[Path], bool]
Key = tuple[int, int]
"""A mask vector: the position of its leaf among masks, and its layer in a stack."""


@dataclass(frozen=True)
class VariableTree:
  variables: PyTree
  masks: MaskSelector

  def __post_init__(self) -> None:
    if not self.mask_leaves:
      chosen = f"collection {self.masks!r}" if isinstance(self.masks, str) else "paths chosen by `masks`"
      raise ValueError(
        f"The variables must hold masks, got none in the {chosen}. "
        "Put fp.Mask() after the layers to prune, and pass the variables that model.init returned."
      )
    for path, leaf in self.paths:
      if self.is_mask(path) and not len(leaf.shape):
        raise ValueError(f"A mask must have a feature axis, got a scalar at {path_name(path)}.")
    check_names(self.mask_tree)

  @property
  def paths(self) -> list[tuple[Path, Array]]:
    return jax.tree_util.tree_leaves_with_path(self.variables)

  def is_mask(self, path: Path) -> bool:
    if callable(self.masks):
      return bool(self.masks(path))
    return bool(path) and getattr(path[0], "key", getattr(path[0], "name", None)) == self.masks

  @property
  def flags(self) -> list[bool]:
    return [self.is_mask(path) for path, _ in self.paths]

  @property
  def mask_leaves(self) -> list[Array]:
    return [leaf for path, leaf in self.paths if self.is_mask(path)]

  @property
  def mask_tree(self) -> Masks:
    """The masks as a tree: their collection, or all variables with None for others."""
    if isinstance(self.masks, str):
      return self.variables[self.masks]
    return jax.tree_util.tree_map_with_path(lambda path, x: x if self.is_mask(path) else None, self.variables)

  def with_masks(self, leaves: Sequence[Array]) -> PyTree:
    given = iter(leaves)
    return jax.tree_util.tree_map_with_path(
      lambda path, x: next(given) if self.is_mask(path) else x, self.variables
    )

  def without_weights(self) -> "VariableTree":
    """The same, where only masks have values."""

    def leaf(path: Path, x: Any) -> Any:
      return np.asarray(x) if self.is_mask(path) else _abstract_leaf(x)

    return VariableTree(jax.tree_util.tree_map_with_path(leaf, self.variables), self.masks)

  def without_masks(self, tree: PyTree) -> PyTree:
    if isinstance(self.masks, str):
      return {name: part for name, part in tree.items() if name != self.masks}
    return jax.tree_util.tree_map_with_path(lambda path, x: None if self.is_mask(path) else x, tree)


def vectors_of(leaves: Sequence[Array]) -> dict[Key, np.ndarray]:
  return {
    (position, layer): vector
    for position, leaf in enumerate(leaves)
    for layer, vector in enumerate(np.reshape(np.asarray(leaf), (math.prod(leaf.shape[:-1]), leaf.shape[-1])))
  }


def sizes_of(leaves: Sequence[Array]) -> dict[Key, int]:
  shapes = [leaf.shape for leaf in leaves]
  return {(at, layer): shape[-1] for at, shape in enumerate(shapes) for layer in range(math.prod(shape[:-1]))}


def abstract(tree: PyTree) -> PyTree:
  return jax.tree.map(_abstract_leaf, tree)


def _abstract_leaf(x: Any) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  x = x if hasattr(x, "shape") and hasattr(x, "dtype") else jnp.asarray(x)
  return jax.ShapeDtypeStruct(x.shape, dtype_of(x), weak_type=getattr(x, "weak_type", False))


def dtype_of(x: Any) -> Any:
  """JAX's dtype for an array: without 64-bit types, requesting NumPy's would raise a warning."""
  is_host = isinstance(x, np.ndarray) and x.dtype.kind in "iufc"
  return jax.dtypes.canonicalize_dtype(x.dtype) if is_host else x.dtype


def signature(tree: PyTree) -> PyTree:
  """What a trace depends on: structure, shapes and dtypes."""
  shapes = abstract(tree)
  return jax.tree.structure(shapes), tuple((x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(shapes))
