"""Where the entries of a compact network were in the network that it all began with."""

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from fisherprune_jax._compaction.kept import Index, Kept
from fisherprune_jax._errors import Path, path_names
from fisherprune_jax._types import PyTree

T = TypeVar("T")
Indices = tuple[np.ndarray, ...]
"""For each axis the original positions ``(n,)``; ``(L, n)`` where each of L stacked layers keeps entries of its own."""
Names = tuple[str, ...]
"""A path in a tree, as names."""
PADDING = -1
"""In the place of a position, where a stack has padding."""
PUT_IN = {0: "params", 1: "model"}
"""What ``auto_mask`` puts into the paths of variables, and at which place."""


@dataclass(frozen=True, eq=False)
class Original:
  """A leaf of a compact network, seen from the network that it all began with.

  Attributes:
    shape: the shape that it had there.
    index: which of its entries are kept, axis by axis.
  """

  shape: tuple[int, ...]
  index: Indices

  @property
  def compact_shape(self) -> tuple[int, ...]:
    """The shape of what is kept."""
    return tuple(positions.shape[-1] for positions in self.index)

  def then(self, later: "Original") -> "Original":
    """The same after one more compaction, of which ``later`` knows."""
    layers = later.index[0] if later.index else None
    pairs = zip(self.index, later.index, strict=True)
    return Original(self.shape, tuple(_compose(first, second, layers) for first, second in pairs))


def original_of(kept: Kept) -> Original:
  """What is kept of a leaf of a network that was never compacted before."""
  if kept.layers is None:
    return Original(kept.shape, _positions(kept.shape, kept.index))
  rows = [_positions(kept.shape[1:], layer) for layer in kept.layers]
  return Original(kept.shape, (np.arange(kept.shape[0]), *map(_stack, zip(*rows, strict=True))))


def originals(kept: PyTree, before: PyTree) -> PyTree:
  """A tree of ``Original`` for a tree of ``Kept``; ``before`` is that of the network which these were cut from."""
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
  """The compact network that a function is, or that it wraps as is usual in Python."""
  while function is not None and not isinstance(function, kind):
    function = getattr(function, "__wrapped__", getattr(function, "func", None))
  return function


def _positions(shape: tuple[int, ...], index: Index) -> Indices:
  return tuple(np.arange(n) if i is None else np.asarray(i) for n, i in zip(shape, index, strict=True))


def _stack(rows: tuple[np.ndarray, ...]) -> np.ndarray:
  """One row for each layer, padded to the widest."""
  widest = max(map(len, rows))
  return np.stack([np.pad(row, (0, widest - len(row)), constant_values=PADDING) for row in rows])


def _compose(first: np.ndarray, second: np.ndarray, layers: np.ndarray | None) -> np.ndarray:
  """The original positions of what is kept, in a second step, of what a first one kept along an axis."""
  if first.ndim == second.ndim == 1:
    return first[second]
  rows = first[layers] if first.ndim == 2 else np.broadcast_to(first, (len(second), len(first)))
  if second.ndim == 1:
    return rows[:, second]
  return np.where(second == PADDING, PADDING, np.take_along_axis(rows, np.maximum(second, 0), axis=1))
