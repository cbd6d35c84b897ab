"""The positions of a compact network's entries in the first network."""

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from fisherprune_jax._compaction.kept import Index, Kept
from fisherprune_jax._errors import Path, path_names
from fisherprune_jax._types import PyTree

T = TypeVar("T")
Indices = tuple[np.ndarray, ...]
"""For each axis the original positions ``(n,)``, or ``(L, n)`` if L stacked layers keep different entries."""
Names = tuple[str, ...]
"""A path in a tree, as names."""
PADDING = -1
"""Marks padding of a stack."""
PUT_IN = {0: "params", 1: "model"}
"""What ``auto_mask`` inserts into the paths of variables, by position."""


@dataclass(frozen=True, eq=False)
class Original:
  """A leaf of a compact network in the first network: its shape there, and the kept positions along each axis."""

  shape: tuple[int, ...]
  index: Indices

  @property
  def compact_shape(self) -> tuple[int, ...]:
    return tuple(positions.shape[-1] for positions in self.index)

  def then(self, later: "Original") -> "Original":
    """The same after a later compaction."""
    layers = later.index[0] if later.index else None
    pairs = zip(self.index, later.index, strict=True)
    return Original(self.shape, tuple(_compose(first, second, layers) for first, second in pairs))


def original_of(kept: Kept) -> Original:
  """The kept positions of a leaf that was never compacted before."""
  if kept.layers is None:
    return Original(kept.shape, _positions(kept.shape, kept.index))
  rows = [_positions(kept.shape[1:], layer) for layer in kept.layers]
  return Original(kept.shape, (np.arange(kept.shape[0]), *map(_stack, zip(*rows, strict=True))))


def originals(kept: PyTree, before: PyTree) -> PyTree:
  """A tree of ``Original`` for a tree of ``Kept``; ``before`` is that of the network they were cut from."""
  known = {path_names(path): original for path, original in jax.tree_util.tree_leaves_with_path(before)}

  def of_leaf(path: Path, leaf: Kept) -> Original:
    own, names = original_of(leaf), path_names(path)
    ways = [
      names,
      *(names[:at] + names[at + 1 :] for at, name in PUT_IN.items() if names[at : at + 1] == (name,)),
    ]
    found = [known[way] for way in ways if way in known and known[way].compact_shape == leaf.shape]
    return found[0].then(own) if found else own

  return jax.tree_util.tree_map_with_path(of_leaf, kept)


def inside(function: Any, kind: type[T]) -> T | None:
  """The compact network that a function is or wraps, by Python's conventions."""
  while function is not None and not isinstance(function, kind):
    function = getattr(function, "__wrapped__", getattr(function, "func", None))
  return function


def _positions(shape: tuple[int, ...], index: Index) -> Indices:
  return tuple(np.arange(n) if i is None else np.asarray(i) for n, i in zip(shape, index, strict=True))


def _stack(rows: tuple[np.ndarray, ...]) -> np.ndarray:
  """One row per layer, padded to the widest."""
  widest = max(map(len, rows))
  return np.stack([np.pad(row, (0, widest - len(row)), constant_values=PADDING) for row in rows])


def _compose(first: np.ndarray, second: np.ndarray, layers: np.ndarray | None) -> np.ndarray:
  """The original positions along an axis after a second selection."""
  if first.ndim == second.ndim == 1:
    return first[second]
  rows = first[layers] if first.ndim == 2 else np.broadcast_to(first, (len(second), len(first)))
  if second.ndim == 1:
    return rows[:, second]
  return np.where(second == PADDING, PADDING, np.take_along_axis(rows, np.maximum(second, 0), axis=1))
