"""The entries of variables that are removed with each feature, to add up values over them.

An entry is kept if all axes of its variable keep it. Axes that depend on different masks never lose an entry to the
same feature, so their losses add up. Axes that depend on a common mask, as both sides of a recurrent kernel, are merged
into one axis.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._errors import Path, path_name
from fisherprune_jax._graph import sets
from fisherprune_jax._graph.boxes import Where
from fisherprune_jax._graph.circuit import Circuit
from fisherprune_jax._graph.kinds import add_at
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.traced import Analysis
from fisherprune_jax._graph.variables import Key, VariableTree, sizes_of
from fisherprune_jax._masks import unflatten
from fisherprune_jax._types import Masks, Shape

Keys = tuple[str, ...]
"""A path in a tree, as names."""


class Owned(NamedTuple):
  """The kept entries of a variable, or of one layer of it.

  Attributes:
    path: the path of the variable.
    shape: its full shape.
    layer: an index of its leading axis; None for the whole variable.
    where: the kept entries.
  """

  path: Keys
  shape: Shape
  layer: int | None
  where: Where


def owned(analysis: Analysis, tree: VariableTree) -> list[Owned]:
  """The kept entries of each variable that is needed."""
  live, found = analysis.live, []
  for value, (path, _), is_mask in zip(analysis.variables, tree.paths, tree.flags, strict=True):
    if not is_mask and value in live.demanded:
      entries = live.entries(value)
      parts = list(enumerate(entries)) if isinstance(entries, list) else [(None, entries)]
      found += [Owned(keys_of(path), value.shape, layer, where) for layer, where in parts]
  return found


def keys_of(path: Path) -> Keys:
  return tuple(path_name((key,)) for key in path)


class Part(NamedTuple):
  """Axes of a variable or a layer, merged row by row, and the kept positions."""

  axes: tuple[int, ...]
  kept: Set


class Ownership:
  """Sums values over the entries that are removed with each feature; jit-able.

  Args:
    parts: the kept entries of each variable.
    masks: the tree of masks.

  Attributes:
    shapes: the shapes of the variables, by path.
  """

  def __init__(self, parts: Sequence[Owned], masks: Masks) -> None:
    self.shapes = {part.path: part.shape for part in parts}
    self._owned = [(part, list(_parts(part.where))) for part in parts]
    roots = [s for part, found in self._owned for s in (*part.where.box, *(p.kept for p in found))]
    self._circuit = Circuit(roots, sizes_of(jax.tree.leaves(masks)))

  def owners(self, paths: Collection[Keys]) -> set[Key]:
    """The mask vectors whose features own entries of some variables."""
    found = [s for part, _ in self._owned if part.path in paths for s in (*part.where.box, part.where.when)]
    return {key for s in found for key in sets.keys_of(s.support)}

  def add_up(self, values: Mapping[Keys, jax.Array], alive: jax.Array) -> jax.Array:
    """For each live feature, the sum of the values of all entries that are removed with it.

    Args:
      values: arrays of the variables' shapes, by path; other variables do not count.
      alive: the live features, of all masks concatenated. Other features own nothing.
    """
    live = self._circuit.live(alive, jnp)
    given = [(part, found) for part, found in self._owned if part.path in values]
    axes = [s for part, _ in given for s in part.where.box if not s.is_all]
    kept = iter(self._bits(live, axes))
    sums, gates = [jnp.zeros(0, jnp.float32)], [np.zeros(0, int)]
    for part, found in given:
      value = values[part.path] if part.layer is None else values[part.path][part.layer]
      for axis, s in enumerate(part.where.box):
        if not s.is_all:
          value = value * next(kept).reshape([-1 if at == axis else 1 for at in range(value.ndim)])
      for along, of in found:
        others = tuple(axis for axis in range(value.ndim) if axis not in along)
        sums.append(jnp.sum(value, others).reshape(-1))
        gates.append(self._circuit.gates[of])
    lost = add_at(jnp.zeros(self._circuit.size, jnp.float32), np.concatenate(gates), jnp.concatenate(sums))
    return self._circuit.drops(live, lost[None], jnp)[0]

  def _bits(self, live: jax.Array, axes: Sequence[Set]) -> list[jax.Array]:
    """The live positions of axes, as numbers; a few kernels for any number of axes."""
    gates = np.concatenate([np.zeros(0, int), *(self._circuit.gates[s] for s in axes)])
    return unflatten(
      live[gates].astype(jnp.float32), [jax.ShapeDtypeStruct((s.size,), jnp.float32) for s in axes]
    )


def _parts(where: Where) -> Iterator[Part]:
  """The axes and the condition that depend on masks, merged where they share one."""
  axes: list[tuple[tuple[int, ...], Set]] = [((at,), s) for at, s in enumerate(where.box) if s.support]
  when = sets.beyond(where.when, where.box)
  for group in _sharing([*axes, *([((), when)] if when.support else [])]):
    yield Part(tuple(at for axes, _ in group for at in axes), sets.outer([s for _, s in group]))


def _sharing(found: Iterable[tuple[tuple[int, ...], Set]]) -> list[list[tuple[tuple[int, ...], Set]]]:
  """Groups that share masks, directly or through others."""
  groups: list[list[tuple[tuple[int, ...], Set]]] = []
  for item in found:
    mine = [group for group in groups if any(s.support & item[1].support for _, s in group)]
    groups = [group for group in groups if group not in mine]
    groups.append([*(other for group in mine for other in group), item])
  return [sorted(group, key=lambda item: item[0] or (math.inf,)) for group in groups]
