"""Sets that pick positions of others, or group them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fisherprune_jax._graph.gates import FALSE
from fisherprune_jax._graph.sets.basic import Weak, Whole, fixed
from fisherprune_jax._graph.sets.expression import Bits, Set, make
from fisherprune_jax._types import Shape

if TYPE_CHECKING:
  from fisherprune_jax._graph.evaluate import Evaluation
  from fisherprune_jax._graph.gates import Builder, Gates
  from fisherprune_jax._graph.sets.junctions import Junction


class Take(Set):
  """Its data are the index."""

  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    return ev.bits(self.parts[0])[self.data] & (self.data >= 0)

  def gates(self, builder: "Builder") -> "Gates":
    found, once = builder.of(self.parts[0])
    there = self.data[self.data >= 0]
    return np.where(self.data >= 0, found[self.data], FALSE), once and np.unique(there).size == there.size

  def sides(self, kind: "type[Junction]", other: Set) -> list[tuple[Set, Set]]:
    (a,), (b,) = self.parts, other.parts
    return [(a, b)] if a.size == b.size and np.array_equal(self.data, other.data) else []

  def combined(self, kind: "type[Junction]", other: Set, parts: Sequence[Set]) -> Set | None:
    return take(parts[0], self.data) if parts else None

  def below(self, index: np.ndarray) -> tuple[Set, np.ndarray]:
    return self.parts[0], np.where(index >= 0, self.data[index], -1)

  def joined(self, other: Set) -> Set | None:
    if isinstance(other, Take) and other.parts == self.parts:
      return take(self.parts[0], np.concatenate([self.data, other.data]))
    return None

  def grouped(self, groups: np.ndarray, size: int) -> Set | None:
    """Of a permutation: groups of what it permutes."""
    (base,) = self.parts
    if self.size != base.size or not np.array_equal(np.sort(self.data), np.arange(base.size)):
      return None
    before = np.empty_like(groups)
    before[self.data] = groups
    return any_of(base, before, size)

  def of(self, parts: Sequence[Set]) -> Set:
    return take(parts[0], self.data)

  def nonempty(self) -> Set | None:
    (base,) = self.parts
    return nonempty(base) if np.unique(self.data[self.data >= 0]).size == base.size else None


class Spread(Set):
  """A condition spread over an axis."""

  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    return ev.xp.broadcast_to(ev.bits(self.parts[0]), (self.size,))

  def gates(self, builder: "Builder") -> "Gates":
    return np.repeat(builder.of(self.parts[0])[0], self.size), False

  def sides(self, kind: "type[Junction]", other: Set) -> list[tuple[Set, Set]]:
    return [(self.parts[0], other.parts[0])]

  def combined(self, kind: "type[Junction]", other: Set, parts: Sequence[Set]) -> Set:
    return spread(parts[0], self.size)

  def below(self, index: np.ndarray) -> tuple[Set, np.ndarray]:
    return self.parts[0], np.minimum(index, 0)

  def joined(self, other: Set) -> Set | None:
    same = isinstance(other, Spread) and other.parts == self.parts
    return spread(self.parts[0], self.size + other.size) if same else None

  def grouped(self, groups: np.ndarray, size: int) -> Set:
    hit = np.full(size, -1)
    hit[groups[groups >= 0]] = 0
    return take(self.parts[0], hit)

  def of(self, parts: Sequence[Set]) -> Set:
    return spread(parts[0], self.size)

  def nonempty(self) -> Set:
    return self.parts[0]


class Nonempty(Set):
  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    return ev.xp.any(ev.bits(self.parts[0])).reshape(1)

  def gates(self, builder: "Builder") -> "Gates":
    found, once = builder.of(self.parts[0])
    return builder.any_of_each(np.zeros(found.size, int), found, 1, shared=not once), once

  def of(self, parts: Sequence[Set]) -> Set:
    return nonempty(parts[0])


class AnyOf(Set):
  """Its data are the groups."""

  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    base = ev.bits(self.parts[0])
    if ev.xp is np:
      hit = np.zeros(self.size + 1, bool)
      hit[self.data[base]] = True  # positions without a group go to the end
      return hit[: self.size]
    groups = np.where(self.data >= 0, self.data, self.size)
    return ev.xp.zeros(self.size, bool).at[groups].max(base, mode="drop")

  def gates(self, builder: "Builder") -> "Gates":
    found, once = builder.of(self.parts[0])
    there = self.data >= 0
    return builder.any_of_each(self.data[there], found[there], self.size, shared=not once), once

  def grouped(self, groups: np.ndarray, size: int) -> Set:
    return any_of(self.parts[0], np.where(self.data >= 0, groups[self.data], -1), size)

  def of(self, parts: Sequence[Set]) -> Set:
    return any_of(parts[0], self.data, self.size)

  def nonempty(self) -> Set | None:
    return nonempty(self.parts[0]) if (self.data >= 0).all() else None


def take(base: Set, index: np.ndarray | Sequence[int]) -> Set:
  """Position ``i`` is position ``index[i]`` of ``base``; -1 is never in the set."""
  index = np.array(index, np.int32)
  if isinstance(base, Weak):
    return base.resized(index.size)
  while found := base.below(index):  # no recursion: parts are as deep as the network
    base, index = found
  there = index >= 0
  if not there.any():
    return fixed(there)
  if (known := base.known_at(index)) is not None:
    return fixed(there & known)
  if index.size == base.size and np.array_equal(index, np.arange(base.size)):
    return base
  if base.size == 1 and there.all():
    return make(Spread, index.size, (base,))
  return make(Take, index.size, (base,), index.astype(np.int32))


def spread(when: Set, size: int) -> Set:
  return take(when, np.zeros(size, np.int32))


def nonempty(s: Set) -> Set:
  """One position, in the set if any of ``s`` is."""
  if s.inside is None:
    s.inside = s.nonempty()  # of many parts it is long, and all readers need it
  return s.inside or (s if s.size == 1 else make(Nonempty, 1, (s,)))


def any_of(base: Set, groups: np.ndarray | Sequence[int], size: int) -> Set:
  """Position ``i`` is in the set if any position of group ``i`` is; group -1 is left out."""
  groups = np.array(groups, np.int32)
  if found := base.grouped(groups, size):
    return found
  there = np.flatnonzero(groups >= 0)
  if size == 1 and there.size == base.size > 0:
    return nonempty(base)
  if (known := base.known_at(there)) is not None:
    hit = np.zeros(size, bool)
    hit[groups[there[known]]] = True
    return fixed(hit)
  if np.unique(groups[there]).size == there.size:
    index = np.full(size, -1)
    index[groups[there]] = there
    return take(base, index)
  return make(AnyOf, size, (base,), groups)


def any_over(base: Set, shape: Shape, keep: int) -> Set:
  """Where anything is along one axis of an array."""
  if isinstance(base, Whole):
    return base.resized(shape[keep])
  along = np.arange(shape[keep], dtype=np.int32).reshape([-1 if a == keep else 1 for a in range(len(shape))])
  return any_of(base, np.broadcast_to(along, shape).reshape(-1), shape[keep])
