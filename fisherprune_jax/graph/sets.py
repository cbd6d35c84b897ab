"""Sets of positions along one axis, as expressions over the masks.

A ``Set`` says which of the ``size`` positions of an axis can matter, as a function of masks that are not known
yet. Expressions are built once per program and evaluated for any masks, on the host or under ``jit``
(``evaluate.py``). They are monotone: switching a feature off never adds a position.

Equal expressions are one object (hash-consing), so ``is`` compares them and the constructors below can
simplify: what a reshape merged, a later reshape splits again exactly.
"""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from fisherprune_jax.graph import compat

ALL, WEAK, FIXED, LEAF, AND, OR, TAKE, CONCAT, OUTER, ANY = [
  "all",
  "weak",
  "fixed",
  "leaf",
  "and",
  "or",
  "take",
  "concat",
  "outer",
  "any",
]


class Set:
  """An interned expression: ``kind`` over ``parts``, with static ``data``; use the constructors below."""

  __slots__ = ("__weakref__", "data", "kind", "leaves", "parts", "serial", "size")
  kind: str
  size: Any
  parts: "tuple[Set, ...]"
  data: Any
  leaves: frozenset[Any]
  serial: int

  @property
  def is_all(self) -> bool:
    """Whether it holds every position."""
    return self.kind == ALL

  @property
  def is_empty(self) -> bool:
    """Whether it is known to hold none."""
    return self.kind == FIXED and not any(self.data)

  def __repr__(self) -> str:
    inner = ", ".join(map(repr, self.parts)) or (str(self.data) if self.kind == LEAF else "")
    return f"{self.kind}[{self.size}]({inner})"


_interned: "weakref.WeakValueDictionary[Any, Set]" = weakref.WeakValueDictionary()
_count = 0


def _make(kind: str, size: Any, parts: Sequence[Set] = (), data: Any = None) -> Set:
  global _count
  key = (kind, size, tuple(part.serial for part in parts), data)
  found = _interned.get(key)
  if found is None:
    found = Set()
    found.kind, found.size, found.parts, found.data = kind, size, tuple(parts), data
    found.leaves = frozenset({data}) if kind == LEAF else frozenset().union(*(p.leaves for p in parts))
    found.serial = _count = _count + 1
    _interned[key] = found
  return found


def everything(size: Any) -> Set:
  """All positions; ``size`` may be symbolic."""
  return _make(ALL, size)


def weak(size: Any) -> Set:
  """All positions, unless somebody says more: the whole of a union with anything else is that.

  For the diagnosis alone: what is asked by a use that could do without (``causes.py``).
  """
  return _make(WEAK, size)


def _stronger(kind: str, parts: Sequence[Set]) -> list[Set]:
  """What says more than ``weak``, if anything does: for an intersection, what hangs on masks."""
  rest = [p for p in parts if p.kind != WEAK]
  if kind == AND and len(rest) < len(parts):
    rest = [p for p in rest if not p.is_all]
  return rest or [p for p in parts if p.kind == WEAK][:1]


def fixed(bits: Any) -> Set:
  """A known set, given as one boolean per position."""
  bits = np.asarray(bits, bool)
  return everything(bits.size) if bits.all() else _make(FIXED, bits.size, data=tuple(bits.tolist()))


def nothing(size: int) -> Set:
  """No position at all."""
  return fixed(np.zeros(size, bool))


def leaf(key: Any, size: int) -> Set:
  """The live features of one mask."""
  return _make(LEAF, size, data=key)


def intersection(*sets: Set) -> Set:
  """Positions in every one of ``sets``."""
  parts = _flatten(AND, sets)
  if any(part.is_empty for part in parts):
    return nothing(sets[0].size)
  parts = [part for part in parts if not part.is_all]
  return _combine(AND, OR, parts, intersection) if parts else sets[0]


def union(*sets: Set) -> Set:
  """Positions in any of ``sets``."""
  parts = _flatten(OR, sets)
  if full := [part for part in parts if part.is_all]:
    return full[0]
  parts = [part for part in parts if not part.is_empty]
  return _combine(OR, AND, parts, union) if parts else sets[0]


def _flatten(kind: str, sets: Sequence[Set]) -> list[Set]:
  parts = [p for s in sets for p in (s.parts if s.kind == kind else (s,))]
  return sorted(dict.fromkeys(_stronger(kind, parts)), key=lambda part: part.serial)


def _combine(kind: str, dual: str, parts: list[Set], again: Any) -> Set:
  # Absorption: x and (x or y) is x; x or (x and y) is x.
  parts = [p for p in parts if not (p.kind == dual and any(q in p.parts for q in parts))]
  if len(parts) == 1:
    return parts[0]
  if all(p.kind == FIXED for p in parts):
    reduce = np.logical_and if kind == AND else np.logical_or
    return fixed(reduce.reduce([p.data for p in parts]))
  if _aligned(CONCAT, parts):
    return concat([again(*column) for column in zip(*(p.parts for p in parts), strict=True)])
  if _aligned(OUTER, parts):
    columns = [tuple(dict.fromkeys(c)) for c in zip(*(p.parts for p in parts), strict=True)]
    # A union of products is a product only where they differ in one factor.
    if kind == AND or sum(len(c) > 1 for c in columns) == 1:
      return outer([again(*column) for column in columns])
  return _make(kind, parts[0].size, parts)


def _aligned(kind: str, parts: Sequence[Set]) -> bool:
  if any(p.kind != kind for p in parts):
    return False
  return len({tuple(q.size for q in p.parts) for p in parts}) == 1


def take(base: Set, index: Any) -> Set:
  """Position ``i`` of the result is position ``index[i]`` of ``base``; -1 is never in the set."""
  index = np.asarray(index, np.int64)
  if base.kind == WEAK:
    return weak(index.size)
  if base.is_all or base.kind == FIXED:
    bits = np.ones(base.size, bool) if base.is_all else np.asarray(base.data)
    return fixed(np.where(index >= 0, np.append(bits, False)[index], False))
  if index.size == base.size and np.array_equal(index, np.arange(base.size)):
    return base
  if base.kind in (AND, OR):
    combine = intersection if base.kind == AND else union
    return combine(*(take(part, index) for part in base.parts))
  if base.kind == TAKE:
    return take(base.parts[0], np.where(index >= 0, np.append(base.data, -1)[index], -1))
  if base.kind == CONCAT and index.size:
    start = 0
    for part in base.parts:
      if ((index >= start) & (index < start + part.size)).all():
        return take(part, index - start)
      start += part.size
  return _make(TAKE, index.size, (base,), tuple(index.tolist()))


def concat(sets: Sequence[Set]) -> Set:
  """The positions of each set in turn."""
  parts = [q for p in sets for q in (p.parts if p.kind == CONCAT else (p,)) if q.size != 0]
  if not parts:
    return everything(0)
  if all(p.is_all for p in parts):
    return everything(sum(p.size for p in parts))
  if all(p.kind == WEAK for p in parts):
    return weak(sum(p.size for p in parts))
  if all(p.is_all or p.kind == FIXED for p in parts):
    return fixed(np.concatenate([np.ones(p.size, bool) if p.is_all else p.data for p in parts]))
  return parts[0] if len(parts) == 1 else _make(CONCAT, sum(p.size for p in parts), parts)


def outer(sets: Sequence[Set]) -> Set:
  """Row-major product: position ``(i, j, ...)`` is in it where each part has its own position."""
  parts = [q for p in sets for q in (p.parts if p.kind == OUTER else (p,))]
  parts = [p for p in parts if not (p.is_all and p.size == 1)]
  size = math.prod(p.size for p in parts)
  if any(p.kind == WEAK for p in parts):
    return weak(size)
  if any(p.is_empty for p in parts):
    return nothing(size)
  if all(p.is_all for p in parts):
    return everything(size)
  return parts[0] if len(parts) == 1 else _make(OUTER, size, parts)


def split(base: Set, sizes: Sequence[Any]) -> list[Set]:
  """The smallest product of sets, of the given sizes, that contains ``base``."""
  if base.is_all or base.kind == WEAK:
    return [everything(n) if base.is_all else weak(n) for n in sizes]
  try:
    if base.kind == OUTER and (parts := _regroup(base.parts, sizes)):
      return parts
  except compat.UndecidedSize:
    return [everything(n) for n in sizes]
  return [any_over(base, tuple(sizes), axis) for axis in range(len(sizes))]


def _regroup(parts: Sequence[Set], sizes: Sequence[int]) -> list[Set] | None:
  """Groups adjacent factors of a product so that the groups have the given sizes, if they can."""
  groups, rest = [], list(parts)
  for at, size in enumerate(sizes):
    group: list[Set] = []
    while rest and (have := math.prod(p.size for p in group)) < size:
      part = rest.pop(0)
      if part.is_all and have * part.size > size and part.size % (size // have) == 0:
        rest.insert(0, everything(part.size // (size // have)))
        part = everything(size // have)
      group.append(part)
    if at == len(sizes) - 1:
      group += rest  # of size 1, if anything
    if math.prod(p.size for p in group) != size:
      return None
    groups.append(outer(group) if group else everything(1))
  return groups


def any_over(base: Set, shape: tuple[int, ...], keep: int) -> Set:
  """With ``base`` seen as an array of ``shape``: where along axis ``keep`` anything is in it."""
  if base.is_all or base.kind == WEAK:
    return everything(shape[keep]) if base.is_all else weak(shape[keep])
  if base.kind == FIXED:
    return fixed(np.asarray(base.data).reshape(shape).any(tuple(a for a in range(len(shape)) if a != keep)))
  if base.size == shape[keep]:
    return base
  if base.kind == OR:
    return union(*(any_over(part, shape, keep) for part in base.parts))
  return _make(ANY, shape[keep], (base,), (shape, keep))


def contains(big: Set, small: Set) -> bool:
  """Whether ``small`` is a subset of ``big`` for all masks, as far as the expressions show it."""
  return intersection(big, small) is small


def is_static(s: Set) -> bool:
  """Whether the set's size is a number."""
  return compat.is_static_size(s.size)
