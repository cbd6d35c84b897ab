"""Trees of variables, with the masks among them told apart, and masks as vectors by key."""

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
"""A mask vector: the position of its leaf among the mask leaves, and its layer if the leaf is a stack."""


@dataclass(frozen=True)
class VariableTree:
  """A tree of variables, with the masks among them told apart."""

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
    """All leaves with their paths."""
    return jax.tree_util.tree_leaves_with_path(self.variables)

  def is_mask(self, path: Path) -> bool:
    """Whether the leaf at ``path`` is a mask."""
    if callable(self.masks):
      return bool(self.masks(path))
    return bool(path) and getattr(path[0], "key", getattr(path[0], "name", None)) == self.masks

  @property
  def flags(self) -> list[bool]:
    """Per leaf, whether it is a mask."""
    return [self.is_mask(path) for path, _ in self.paths]

  @property
  def mask_leaves(self) -> list[Array]:
    """The masks, in tree order."""
    return [leaf for path, leaf in self.paths if self.is_mask(path)]

  @property
  def mask_tree(self) -> Masks:
    """The masks as a tree: the collection itself, or all variables with None in place of the others."""
    if isinstance(self.masks, str):
      return self.variables[self.masks]
    return jax.tree_util.tree_map_with_path(lambda path, x: x if self.is_mask(path) else None, self.variables)

  def with_masks(self, leaves: Sequence[Array]) -> PyTree:
    """The variables with other masks, given in tree order."""
    given = iter(leaves)
    return jax.tree_util.tree_map_with_path(
      lambda path, x: next(given) if self.is_mask(path) else x, self.variables
    )

  def without_weights(self) -> "VariableTree":
    """The same variables, of which only the masks have values."""

    def leaf(path: Path, x: Any) -> Any:
      return np.asarray(x) if self.is_mask(path) else _abstract_leaf(x)

    return VariableTree(jax.tree_util.tree_map_with_path(leaf, self.variables), self.masks)

  def without_masks(self, tree: PyTree) -> PyTree:
    """A tree of this structure without its masks."""
    if isinstance(self.masks, str):
      return {name: part for name, part in tree.items() if name != self.masks}
    return jax.tree_util.tree_map_with_path(lambda path, x: None if self.is_mask(path) else x, tree)


def vectors_of(leaves: Sequence[Array]) -> dict[Key, np.ndarray]:
  """Mask leaves as vectors by key, on the host."""
  return {
    (position, layer): vector
    for position, leaf in enumerate(leaves)
    for layer, vector in enumerate(np.reshape(np.asarray(leaf), (math.prod(leaf.shape[:-1]), leaf.shape[-1])))
  }


def sizes_of(leaves: Sequence[Array]) -> dict[Key, int]:
  """How many features each mask vector has."""
  shapes = [leaf.shape for leaf in leaves]
  return {(at, layer): shape[-1] for at, shape in enumerate(shapes) for layer in range(math.prod(shape[:-1]))}


def abstract(tree: PyTree) -> PyTree:
  """Arrays as shapes and dtypes."""
  return jax.tree.map(_abstract_leaf, tree)


def _abstract_leaf(x: Any) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  x = x if hasattr(x, "shape") and hasattr(x, "dtype") else jnp.asarray(x)
  return jax.ShapeDtypeStruct(x.shape, dtype_of(x), weak_type=getattr(x, "weak_type", False))


def dtype_of(x: Any) -> Any:
  """The dtype that JAX takes an array in: without 64-bit types, to ask for those of a NumPy array would be a warning."""
  is_host = isinstance(x, np.ndarray) and x.dtype.kind in "iufc"
  return jax.dtypes.canonicalize_dtype(x.dtype) if is_host else x.dtype


def signature(tree: PyTree) -> PyTree:
  """What a trace depends on: structure, shapes and dtypes."""
  shapes = abstract(tree)
  return jax.tree.structure(shapes), tuple((x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(shapes))
