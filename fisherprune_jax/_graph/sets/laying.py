"""Sets of merged axes: end to end, or a product."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherprune_jax._graph.sets.basic import ALWAYS, Fixed, everything, fixed, nothing, weak
from fisherprune_jax._graph.sets.expression import Bits, Set, make
from fisherprune_jax._graph.sets.junctions import Junction, intersection, union
from fisherprune_jax._graph.sets.picking import any_over, nonempty
from fisherprune_jax._graph.sizes import are_static, quotient, runs
from fisherprune_jax._types import Size

if TYPE_CHECKING:
  from fisherprune_jax._graph.evaluate import Evaluation
  from fisherprune_jax._graph.gates import Builder, Gates


class Concat(Set):
  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    return ev.xp.concatenate([ev.bits(part) for part in self.parts])

  def gates(self, builder: "Builder") -> "Gates":
    once, support = True, 0
    for part in self.parts:
      once = once and builder.of(part)[1] and not part.support & support
      support |= part.support
    return np.concatenate([builder.of(part)[0] for part in self.parts]), once

  @property
  def pieces(self) -> tuple[Set, ...]:
    return self.parts

  def sides(self, kind: type[Junction], other: Set) -> list[tuple[Set, Set]]:
    return _pairs(self, other)

  def combined(self, kind: type[Junction], other: Set, parts: Sequence[Set]) -> Set | None:
    return concat(parts) if parts else None

  def below(self, index: np.ndarray) -> tuple[Set, np.ndarray] | None:
    there = index >= 0
    if not there.any():
      return None
    start, part = self._part_at(int(index[there].min()))
    if int(index[there].max()) >= start + part.size:
      return None
    return part, np.where(there, index - np.int32(start), -1)

  def of(self, parts: Sequence[Set]) -> Set:
    return concat(parts)

  def nonempty(self) -> Set:
    if any(part.is_all for part in self.parts):
      return ALWAYS
    return union(*map(nonempty, self.parts))

  def _part_at(self, position: int) -> tuple[int, Set]:
    """The part that holds a position, and where it starts."""
    start = 0
    for part in self.parts:
      if position < start + part.size:
        return start, part
      start += part.size
    raise IndexError(position)


class Outer(Set):
  """With a symbolic size, only products and whole sets exist; others are made larger."""

  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    out = ev.bits(self.parts[0])
    for part in self.parts[1:]:
      out = (out[:, None] & ev.bits(part)[None, :]).reshape(-1)
    return out

  def count(self, ev: "Evaluation") -> Any:
    return math.prod(ev.count(part) for part in self.parts)

  def gates(self, builder: "Builder") -> "Gates":
    out, support = builder.of(self.parts[0])[0], self.parts[0].support
    for part in self.parts[1:]:
      a, b = np.broadcast_arrays(out[:, None], builder.of(part)[0][None, :])
      out = builder.gate(True, a.reshape(-1), b.reshape(-1), bool(support & part.support))
      support |= part.support
    return out, False

  @property
  def factors(self) -> tuple[Set, ...]:
    return self.parts

  def sides(self, kind: type[Junction], other: Set) -> list[tuple[Set, Set]]:
    if not are_static([self.size]):
      return _runs(self, other)
    pairs = _pairs(self, other)
    if not kind.every and sum(p is not q for p, q in pairs) > 1:
      return []  # a union of products is a product only if they differ in one factor
    return pairs

  def combined(self, kind: type[Junction], other: Set, parts: Sequence[Set]) -> Set | None:
    if parts or are_static([self.size]):
      return outer(parts) if parts else None
    return self if kind.every else everything(self.size)

  def split(self, sizes: Sequence[Size]) -> list[Set] | None:
    """Adjacent factors in groups of these sizes, if possible."""
    groups, rest = [], list(self.parts)
    for at, size in enumerate(sizes):
      group: list[Set] = []
      have: Size = 1
      while rest and have != size:
        part = rest.pop(0)
        if quotient(size, have * part.size) is None:
          missing = quotient(size, have)
          beyond = None if missing is None else quotient(part.size, missing)
          if not part.is_all or missing is None or beyond is None:
            return None  # no cut there
          rest.insert(0, everything(beyond))
          part = everything(missing)
        group.append(part)
        have *= part.size
      if at == len(sizes) - 1:
        group += rest  # of size 1, if any
        have *= math.prod(p.size for p in rest)
      if have != size:
        return None
      groups.append(outer(group) if group else everything(1))
    return groups

  def of(self, parts: Sequence[Set]) -> Set:
    return outer(parts)

  def nonempty(self) -> Set:
    return intersection(*map(nonempty, self.parts))


def _pairs(a: Set, b: Set) -> list[tuple[Set, Set]]:
  """Parts side by side, if of the same sizes."""
  alike = [p.size for p in a.parts] == [p.size for p in b.parts]
  return list(zip(a.parts, b.parts, strict=True)) if alike else []


def _runs(a: Set, b: Set) -> list[tuple[Set, Set]]:
  """Runs of parts with equal products, side by side; none if there is only one."""
  found = runs([p.size for p in a.parts], [p.size for p in b.parts])
  return [(outer(a.parts[i]), outer(b.parts[j])) for i, j in found] if len(found) > 1 else []


def concat(sets: Sequence[Set]) -> Set:
  """The positions of each set in turn."""
  parts: list[Set] = []
  for part in (piece for s in sets for piece in s.pieces if piece.size != 0):
    if parts and (joined := parts[-1].joined(part)):
      parts[-1] = joined  # cut before, and joined again
    else:
      parts.append(part)
  size = sum(p.size for p in parts)
  if all(p.is_all for p in parts) or not are_static([size]):
    return everything(size)
  if all(p.is_weak for p in parts):
    return weak(size)
  if all(p.is_all or isinstance(p, Fixed) for p in parts):
    return fixed(np.concatenate([p.known_at(np.arange(p.size)) for p in parts]))
  return parts[0] if len(parts) == 1 else make(Concat, size, parts)


def outer(sets: Sequence[Set]) -> Set:
  """Row-major product: a position is in it if its place along each part is in that part."""
  parts = [factor for s in sets for factor in s.factors]
  parts = [p for p in parts if not (p.is_all and p.size == 1)]
  size = math.prod(p.size for p in parts)
  if any(p.is_weak for p in parts):
    return weak(size)
  if any(p.is_empty for p in parts) and are_static([size]):
    return nothing(size)
  if all(p.is_all for p in parts):
    return everything(size)
  return parts[0] if len(parts) == 1 else make(Outer, size, parts)


def split(base: Set, sizes: Sequence[Size]) -> list[Set]:
  """The smallest product of sets of these sizes that contains it; larger if symbolic."""
  if found := base.split(sizes):
    return found
  if are_static(sizes):
    return [any_over(base, sizes, axis) for axis in range(len(sizes))]
  alike = runs([p.size for p in base.factors], sizes)
  if len(alike) == 1:
    return [everything(n) for n in sizes]
  return [s for i, j in alike for s in split(outer(base.factors[i]), sizes[j])]
