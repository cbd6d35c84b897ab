"""Slices trees shaped like the variables: parameters, gradients, averages."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from fisherprune_jax._compaction.placing import put_like, sharding_for
from fisherprune_jax._errors import describe
from fisherprune_jax._graph import compat, sets
from fisherprune_jax._graph.boxes import Box, Entries, Where, whole
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Value
from fisherprune_jax._graph.stack import padded
from fisherprune_jax._types import Array

Index = tuple[np.ndarray | None, ...]
"""Per axis the kept positions, or None for all."""


_NONE = np.zeros(0, int)


@dataclass(frozen=True, eq=False)
class Kept:
  """The kept entries of a leaf.

  ``layers`` is for a stack of layers that keep different entries, with one ``Index`` per layer. Their entries are moved
  to the front and zero-padded to the widest.
  """

  shape: tuple[int, ...]
  index: Index
  layers: tuple[Index, ...] | None = None

  @property
  def compact_shape(self) -> tuple[int, ...]:
    if self.layers is None:
      return _shape_of(self.shape, self.index)
    widths = [_shape_of(self.shape[1:], layer) for layer in self.layers]
    return (self.shape[0], *map(max, zip(*widths, strict=True)))

  @property
  def is_whole(self) -> bool:
    return self.layers is None and self.compact_shape == self.shape

  @property
  def held(self) -> Box | list[Box]:
    """The kept entries as sets."""
    if self.layers is None:
      return _box_of(self.shape, self.index)
    return [_box_of(self.shape[1:], layer) for layer in self.layers]

  def covers(self, other: "Kept") -> bool:
    """Whether it keeps all that another one keeps of the same leaf."""
    if self.layers is None and other.layers is None:
      return all(map(_within, other.index, self.index, self.shape))
    count = self.shape[0]
    mine, others = ((k.index[1:],) * count if k.layers is None else k.layers for k in (self, other))
    return all(all(map(_within, a, b, self.shape[1:])) for a, b in zip(others, mine, strict=True))

  def per_example(self, leaf: Array) -> "Kept":
    """The same for a mask with an example axis before its features."""
    if np.ndim(leaf) != len(self.shape) + 1:
      return self
    layers = self.layers and tuple(_with_examples(layer) for layer in self.layers)
    return Kept((*self.shape[:-1], np.shape(leaf)[-2], self.shape[-1]), _with_examples(self.index), layers)

  def along(self, axis: int) -> "Kept | None":
    """The kept entries of a vector along one axis; None if the layers of a stack differ there."""
    if self.layers is not None and axis > 0:
      return None
    return Kept((self.shape[axis],), (self.index[axis],))

  def slice(self, leaf: Array) -> jax.Array:
    if np.shape(leaf) != self.shape:
      raise ValueError(
        f"A leaf to shrink must have its parameter's shape {self.shape}, got {describe(leaf)}. "
        "Pass a tree shaped like the full parameters."
      )
    # The host needs no compilation, which takes longer than all the rest, and no device holds more than its part.
    if _is_at_hand(leaf):
      return put_like(leaf, self._cut(np.asarray(leaf), np))
    if compat.is_concrete(leaf) and isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return self._cut_in_place(leaf)
    return self._cut(leaf, jnp)

  def _cut_in_place(self, leaf: jax.Array) -> jax.Array:
    """Slice an array that is spread over several processes; all of them have to call."""
    place = sharding_for(leaf, self.compact_shape)

    def cut(leaf: jax.Array) -> jax.Array:
      return self._cut(leaf, jnp)

    if isinstance(place, NamedSharding):  # leaves explicit mesh axes to the compiler too
      cut = jax.sharding.auto_axes(cut, out_sharding=place)
    return jax.jit(cut, out_shardings=place)(leaf)

  def _cut(self, leaf: Array, xp: ModuleType) -> Any:
    if self.layers is None:
      return _slice(leaf, self.index, xp)
    return padded([_slice(leaf[at], layer, xp) for at, layer in enumerate(self.layers)], xp)


def _with_examples(index: Index) -> Index:
  return (*index[:-1], None, index[-1])


def keep(value: Value, live: Liveness, ev: Evaluation, returned: Entries | None = None) -> Kept:
  """The kept entries of a variable: the stored ones, or ``returned`` if given; all if it is not needed."""

  def index_of(where: Where) -> Index:
    index = tuple(map(ev.index, where.box))
    if any(i is not None and i.size == 0 for i in index):
      return index  # an empty axis empties the array: the others keep their sizes
    return tuple(map(ev.index, ev.box(where)))

  def index_of_layer(where: Where) -> Index:
    index = index_of(where)
    # An empty layer must not widen the others.
    return (_NONE,) * len(index) if any(i is not None and i.size == 0 for i in index) else index

  stored = live.stored(value) if value in live.demanded else whole(value.shape)
  entries = returned or (live.entries(value) if value in live.demanded else stored)
  if isinstance(entries, list):
    return Kept(value.shape, index_of(stored), tuple(map(index_of_layer, entries)))
  return Kept(value.shape, index_of(entries))


def _within(few: np.ndarray | None, many: np.ndarray | None, size: int) -> bool:
  return many is None or bool(np.isin(np.arange(size) if few is None else few, many).all())


def _shape_of(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
  return tuple(n if i is None else i.size for n, i in zip(shape, index, strict=True))


def _box_of(shape: tuple[int, ...], index: Index) -> Box:
  sizes = zip(shape, index, strict=True)
  return tuple(sets.everything(n) if i is None else sets.fixed(np.isin(np.arange(n), i)) for n, i in sizes)


def _slice(leaf: Array, index: Index, xp: ModuleType) -> Any:
  for axis, positions in enumerate(index):
    if positions is not None:
      leaf = xp.take(leaf, positions, axis=axis)
  return xp.array(leaf)  # always a copy, so that donating one keeps the other


def _is_at_hand(leaf: Array) -> bool:
  """Whether an array can be read here directly: concrete, on devices of this process, of a type that NumPy knows."""
  if not isinstance(leaf, jax.Array):
    return isinstance(leaf, np.ndarray)
  known = compat.is_concrete(leaf) and compat.dtype_of(leaf) != np.dtype(object) and not leaf.weak_type
  if not known or not leaf.is_fully_addressable:
    return False
  return isinstance(leaf.sharding, NamedSharding | SingleDeviceSharding)
