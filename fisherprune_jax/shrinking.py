"""Slicing what is shaped like the parameters: parameters themselves, gradients, optimizer states."""

import functools
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax.errors import describe, require_same_tree
from fisherprune_jax.graph import compat, sets
from fisherprune_jax.graph.evaluate import Evaluation
from fisherprune_jax.graph.facts import Box
from fisherprune_jax.graph.liveness import Liveness
from fisherprune_jax.graph.program import Value
from fisherprune_jax.model import Path, keystr
from fisherprune_jax.transform import FisherPruneState

Index = tuple[np.ndarray | None, ...]
"""Per axis the positions that are kept, or None for all of them."""
Keys = tuple[str, ...]
"""A path in a tree, as names."""
Shapes = Mapping[Keys, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Kept:
  """Which entries of a leaf are kept.

  ``rows`` is given for a stack of layers that keep different entries: one ``Index`` for each entry along the
  leading axis. They are moved to the front and padded with zeros to the widest.
  """

  shape: tuple[int, ...]
  index: Index
  rows: tuple[Index, ...] | None = None

  @property
  def compact_shape(self) -> tuple[int, ...]:
    """The shape after slicing."""
    if self.rows is None:
      return _shape_of(self.shape, self.index)
    widths = [_shape_of(self.shape[1:], row) for row in self.rows]
    return (self.shape[0], *map(max, zip(*widths, strict=True)))

  @property
  def is_whole(self) -> bool:
    """Whether nothing was removed."""
    return self.rows is None and self.compact_shape == self.shape

  @property
  def held(self) -> Box | list[Box]:
    """The kept entries as sets."""
    if self.rows is None:
      return _box_of(self.shape, self.index)
    return [_box_of(self.shape[1:], row) for row in self.rows]

  def covers(self, other: "Kept") -> bool:
    """Whether everything that another one keeps of the same leaf is kept here."""
    if self.rows is None and other.rows is None:
      return all(map(_within, other.index, self.index, self.shape))
    count = self.shape[0]
    mine, others = ((k.index[1:],) * count if k.rows is None else k.rows for k in (self, other))
    return all(all(map(_within, a, b, self.shape[1:])) for a, b in zip(others, mine, strict=True))

  def per_example(self, leaf: Any) -> "Kept":
    """The same for a mask that comes with an example axis before its features."""
    if jnp.ndim(leaf) != len(self.shape) + 1:
      return self
    rows = self.rows and tuple(_with_examples(row) for row in self.rows)
    return Kept((*self.shape[:-1], jnp.shape(leaf)[-2], self.shape[-1]), _with_examples(self.index), rows)

  def slice(self, leaf: Any) -> jax.Array:
    """The kept entries of a leaf of the full shape."""
    if jnp.shape(leaf) != self.shape:
      raise ValueError(
        f"A leaf to shrink must have its parameter's shape {self.shape}, got {describe(leaf)}. "
        "Pass a tree shaped like the full parameters."
      )
    # On the host nothing has to be compiled, which takes longer than all the rest.
    return _put_like(leaf, self._cut(np.asarray(leaf), np)) if _is_at_hand(leaf) else self._cut(leaf, jnp)

  def _cut(self, leaf: Any, xp: Any) -> Any:
    if self.rows is None:
      return _slice(leaf, self.index, xp)
    widest = self.compact_shape[1:]
    rows = [_slice(leaf[at], row, xp) for at, row in enumerate(self.rows)]
    return xp.stack([xp.pad(r, [(0, n - m) for n, m in zip(widest, r.shape, strict=True)]) for r in rows])


def _with_examples(index: Index) -> Index:
  return (*index[:-1], None, index[-1])


def keep(value: Value, live: Liveness, ev: Evaluation, shown: Box | None = None) -> Kept:
  """What is kept of a variable: what is stored of it, ``shown`` if given, all if nothing asks for it."""
  stored = live.stored(value) if value in live.asked else tuple(map(sets.everything, value.shape))
  index = tuple(map(ev.index, stored if shown is None else shown))
  rows = live.rows(value) if shown is None else None
  return Kept(value.shape, index, None if rows is None else tuple(tuple(map(ev.index, row)) for row in rows))


def _within(few: np.ndarray | None, many: np.ndarray | None, size: int) -> bool:
  return many is None or bool(np.isin(np.arange(size) if few is None else few, many).all())


def _shape_of(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
  return tuple(n if i is None else i.size for n, i in zip(shape, index, strict=True))


def _box_of(shape: tuple[int, ...], index: Index) -> Box:
  sizes = zip(shape, index, strict=True)
  return tuple(sets.everything(n) if i is None else sets.fixed(np.isin(np.arange(n), i)) for n, i in sizes)


def _slice(leaf: Any, index: Index, xp: Any) -> Any:
  for axis, positions in enumerate(index):
    if positions is not None:
      leaf = xp.take(leaf, positions, axis=axis)
  return xp.array(leaf)  # a copy where nothing went: whoever donates the one keeps the other


def _is_at_hand(leaf: Any) -> bool:
  """Whether an array can be read here as it is: a value, on one device, of a type that NumPy knows."""
  if not isinstance(leaf, jax.Array):
    return isinstance(leaf, np.ndarray)
  known = compat.is_concrete(leaf) and compat.dtype_of(leaf) != np.dtype(object) and not leaf.weak_type
  return known and len(leaf.sharding.device_set) == 1 and leaf.is_fully_addressable


def _put_like(leaf: Any, array: np.ndarray) -> jax.Array:
  """An array as JAX holds it, where the leaf is if that was said (or else wherever arrays go)."""
  committed = isinstance(leaf, jax.Array) and leaf.committed
  return jax.device_put(array, leaf.sharding if committed else None)


def shrink_opt_state(tx: Any, opt_state: Any, params: Any, kept: Any, masks: Any | None) -> Any:
  """Slices every leaf of an optimizer state that belongs to a parameter.

  A leaf belongs to the parameter whose path its own path ends with. Where it has the parameter's shape it is
  sliced, also after axes of its own; where it has another (factored second moments), it starts anew, with a warning.

  Args:
    tx: the transformation.
    opt_state: its state for the full parameters.
    params: the compact parameters.
    kept: a tree of ``Kept``, like the parameters.
    masks: a tree of ``Kept`` for the masks, or None if they were dropped.

  Returns:
    The state for the compact parameters.

  Raises:
    ValueError: if the state is not one of the full parameters.
  """
  full = jax.tree.map(lambda k, p: jax.ShapeDtypeStruct(k.shape, p.dtype), kept, params)
  before, after = _shapes(tx, full), _shapes(tx, params)
  owners = _owners(before, dict(_leaves_by_keys(kept)))
  restarted: set[Keys] = set()

  def shrink(path: Path, leaf: Any) -> Any:
    if isinstance(leaf, FisherPruneState):
      return _shrink_pruning(leaf, masks)
    keys = _keys(path)
    _check_leaf(keys, leaf, before)
    smaller = _shrink_leaf(leaf, owners[keys], after[keys])
    if smaller is None:
      restarted.add(keys)
    return leaf if smaller is None else smaller

  own = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, opt_state)
  state = jax.tree_util.tree_map_with_path(shrink, own, is_leaf=_is_pruning)
  return _restart(state, tx, params, restarted) if restarted else state


def _shapes(tx: Any, params: Any) -> Shapes:
  state = _without_pruning(jax.eval_shape(tx.init, params))
  return {keys: leaf.shape for keys, leaf in _leaves_by_keys(state)}


def _check_leaf(keys: Keys, leaf: Any, before: Shapes) -> None:
  """Raises unless the state of the full parameters has such a leaf."""
  if jnp.shape(leaf) != before.get(keys):
    have = f"{'/'.join(keys)} has shape {before[keys]}" if keys in before else f"there is no {'/'.join(keys)}"
    raise ValueError(
      f"opt_state must belong to the full parameters, for which {have}; got {describe(leaf)}. "
      "Pass the state as it was before compaction, and the transformation that made it."
    )


def _shrink_leaf(leaf: Any, owner: Kept | None, after: tuple[int, ...]) -> Any | None:
  """What is kept of a leaf of the state, or None if its entries cannot be told apart."""
  shape = jnp.shape(leaf)
  if owner is None or owner.is_whole:
    return leaf
  own = len(shape) - len(owner.shape)  # axes before the parameter's: several gradients in L-BFGS's memory
  if own >= 0 and shape[own:] == owner.shape:
    slicer = owner.slice
    for _ in range(own):
      slicer = jax.vmap(slicer)
    return slicer(leaf)
  # One number for all of the parameter stays; what else there is, is factored.
  return leaf if shape == after and math.prod(shape) <= 1 else None


def _restart(state: Any, tx: Any, params: Any, restarted: Collection[Keys]) -> Any:
  """Puts the leaves of a fresh state in place of those that could not be sliced, and says so."""
  warnings.warn(
    "Optimizer statistics that are not shaped like their parameters cannot be sliced, so these start anew: "
    f"{', '.join(sorted(map('/'.join, restarted)))}. Others go on where they were.",
    stacklevel=4,
  )
  fresh = dict(_leaves_by_keys(_without_pruning(tx.init(params))))

  def choose(path: Path, leaf: Any) -> Any:
    return fresh[_keys(path)] if not _is_pruning(leaf) and _keys(path) in restarted else leaf

  return jax.tree_util.tree_map_with_path(choose, state, is_leaf=_is_pruning)


def _is_pruning(x: Any) -> bool:
  return isinstance(x, FisherPruneState)


def _without_pruning(state: Any) -> Any:
  return jax.tree.map(lambda x: None if _is_pruning(x) else x, state, is_leaf=_is_pruning)


def _leaves_by_keys(tree: Any) -> Iterator[tuple[Keys, Any]]:
  return ((_keys(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def _keys(path: Path) -> Keys:
  return tuple(keystr((key,)) for key in path)


def _owners(paths: Collection[Keys], by_path: Mapping[Keys, Kept]) -> dict[Keys, Kept | None]:
  """Per path of the state, the parameter whose path it ends with.

  There may be several where a parameter bears the name of a part of the state, such as ``mu``. Then it is the one
  most of whose fellow parameters are found beside it, or else the one of the longest path.
  """

  @functools.cache
  def fellows(start: Keys) -> int:
    return sum(start + path in paths for path in by_path)

  def owner(path: Keys) -> Kept | None:
    starts = [at for at in range(len(path)) if path[at:] in by_path]
    return by_path[path[max(starts, key=lambda at: fellows(path[:at])) :]] if starts else None

  return {path: owner(path) for path in paths}


def _shrink_pruning(state: FisherPruneState, masks: Any | None) -> FisherPruneState:
  if masks is None:
    return state._replace(scores={}, masks={}, pruned_at={}, shares={})
  how = "Pass the optimizer state whose masks the network was compacted with."
  require_same_tree(state.masks, masks, "the masks of opt_state", "the compact network's masks", how)
  slices = {
    name: jax.tree.map(lambda kept, leaf: kept.slice(leaf), masks, getattr(state, name))
    for name in ("scores", "masks", "pruned_at")
  }
  return state._replace(**slices)
