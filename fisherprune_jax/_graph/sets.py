"""Sets of positions along one axis, as expressions over the masks.

A ``Set`` says which of the ``size`` positions of an axis can matter, as a function of masks that are not known
yet. Expressions are built once per program and evaluated for any masks, on the host (``evaluate.py``) or under
``jit`` (``circuit.py``). They are monotone: switching a feature off never adds a position.

Equal expressions are one object (hash-consing), so ``is`` compares them and the constructors below can
simplify: what a reshape merged, a later reshape splits again exactly. Unions and intersections are nested as
they came about, two parts each, so that the stream of a residual network grows by one small expression per
block; but what is equal up to order and nesting is one object all the same, as each knows its *atoms*, the
parts of the flat expression, as the bits of an integer.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.expression import ALL as ALL
from fisherprune_jax._graph.expression import AND as AND
from fisherprune_jax._graph.expression import ANY as ANY
from fisherprune_jax._graph.expression import CONCAT as CONCAT
from fisherprune_jax._graph.expression import FIXED as FIXED
from fisherprune_jax._graph.expression import LEAF as LEAF
from fisherprune_jax._graph.expression import OR as OR
from fisherprune_jax._graph.expression import OUTER as OUTER
from fisherprune_jax._graph.expression import TAKE as TAKE
from fisherprune_jax._graph.expression import WEAK as WEAK
from fisherprune_jax._graph.expression import Set as Set
from fisherprune_jax._graph.expression import in_order as in_order
from fisherprune_jax._graph.expression import keys_of as keys_of
from fisherprune_jax._graph.expression import make, members

_DUAL = {AND: OR, OR: AND}


def everything(size: Any) -> Set:
  """All positions; ``size`` may be symbolic."""
  return make(ALL, size)


def weak(size: Any) -> Set:
  """All positions, unless somebody says more: the whole of a union with anything else is that.

  For the diagnosis alone: what is asked by a use that could do without (``causes.py``).
  """
  return make(WEAK, size)


def fixed(bits: Any) -> Set:
  """A known set, given as one boolean per position."""
  bits = np.array(bits, bool)
  return everything(bits.size) if bits.all() else make(FIXED, bits.size, data=bits)


def nothing(size: int) -> Set:
  """No position at all."""
  return fixed(np.zeros(size, bool))


def leaf(key: Any, size: int) -> Set:
  """The live features of one mask."""
  return make(LEAF, size, data=key)


def intersection(*sets: Set) -> Set:
  """Positions in every one of ``sets``."""
  return _fold(AND, sets)


def union(*sets: Set) -> Set:
  """Positions in any of ``sets``."""
  return _fold(OR, sets)


def _fold(kind: str, sets: Iterable[Set]) -> Set:
  """Neighbours first, so that many sets nest no deeper than they have to."""
  found = list(dict.fromkeys(sets))
  while len(found) > 1:
    pairs = zip(found[::2], found[1::2], strict=False)
    found = [*(_combine(kind, a, b) for a, b in pairs), *(found[-1:] if len(found) % 2 else ())]
  return found[0]


def _combine(kind: str, a: Set, b: Set) -> Set:
  if WEAK in (a.kind, b.kind):
    faint, other = (a, b) if a.kind == WEAK else (b, a)
    return faint if kind == AND and other.is_all else other
  for small, big in ((a, b), (b, a)):
    if _is_within(small, big):
      return small if kind == AND else big
  if a.kind == b.kind and (found := _by_parts(kind, a, b)):
    return found
  atoms = _atoms(kind, a) | _atoms(kind, b)
  duals = _duals(kind, a) | _duals(kind, b)
  if duals & atoms:
    # Absorption: x and (x or y) is x; x or (x and y) is x.
    return _fold(kind, [p for p in members(atoms) if not (p.kind == _DUAL[kind] and p.atoms & atoms)])
  if common := _atoms(kind, a) & _atoms(kind, b):
    # What both have is said once, so that what features are critical to stays easy to see.
    few, many = sorted((a, b), key=lambda s: (_atoms(kind, s) & ~common).bit_count())
    return _fold(kind, [many, _fold(kind, members(_atoms(kind, few) & ~common))])
  return make(kind, a.size, sorted((a, b), key=lambda s: s.serial), None, atoms, duals)


def _atoms(kind: str, s: Set) -> int:
  return s.atoms if s.kind == kind else 1 << s.number


def _duals(kind: str, s: Set) -> int:
  return s.duals if s.kind == kind else s.atoms  # the atoms of the other kind, if it has any


def _is_within(small: Set, big: Set) -> bool:
  """Whether one set contains another by the look of their atoms."""
  if small is big or big.is_all or small.is_empty:
    return True
  if small.is_all or big.is_empty:
    return False
  conditions, choices = _atoms(AND, small), _atoms(OR, big)
  return (
    not _atoms(OR, small) & ~choices  # every choice of the small one is one of the big one
    or not _atoms(AND, big) & ~conditions  # every condition of the big one is one of the small one
    or bool((conditions | 1 << small.number) & (choices | 1 << big.number))
  )


def _by_parts(kind: str, a: Set, b: Set) -> Set | None:
  """Two sets of one kind, combined part by part where they are cut alike."""
  if a.kind == FIXED:
    return fixed(a.data & b.data if kind == AND else a.data | b.data)
  if a.kind == TAKE and a.parts[0].size == b.parts[0].size and np.array_equal(a.data, b.data):
    return take(_combine(kind, a.parts[0], b.parts[0]), a.data)
  if a.kind not in (CONCAT, OUTER) or [p.size for p in a.parts] != [p.size for p in b.parts]:
    return None
  pairs = list(zip(a.parts, b.parts, strict=True))
  if a.kind == OUTER and kind == OR and sum(p is not q for p, q in pairs) > 1:
    return None  # a union of products is a product only where they differ in one factor
  return (concat if a.kind == CONCAT else outer)([_combine(kind, p, q) for p, q in pairs])


def take(base: Set, index: Any) -> Set:
  """Position ``i`` of the result is position ``index[i]`` of ``base``; -1 is never in the set."""
  index = np.array(index, np.int32)
  there = index >= 0
  if base.kind == WEAK:
    return weak(index.size)
  while base.kind == TAKE or (base.kind == CONCAT and there.any()):
    if base.kind == TAKE:
      index = np.where(there, base.data[index], -1)
      base, there = base.parts[0], index >= 0
    else:
      start, part = _part_at(base, int(index[there].min()))
      if int(index[there].max()) >= start + part.size:
        break
      base, index = part, np.where(there, index - np.int32(start), -1)
  if base.is_all or not there.any():
    return fixed(there)
  if base.kind == FIXED:
    return fixed(there & base.data[index])
  if index.size == base.size and np.array_equal(index, np.arange(base.size)):
    return base
  return make(TAKE, index.size, (base,), index.astype(np.int32))


def _part_at(base: Set, position: int) -> tuple[int, Set]:
  """The part of a concatenation that holds a position, and where it starts."""
  start = 0
  for part in base.parts:
    if position < start + part.size:
      return start, part
    start += part.size
  raise IndexError(position)


def concat(sets: Sequence[Set]) -> Set:
  """The positions of each set in turn."""
  parts: list[Set] = []
  for part in (q for p in sets for q in (p.parts if p.kind == CONCAT else (p,)) if q.size != 0):
    if parts and part.kind == parts[-1].kind == TAKE and part.parts == parts[-1].parts:
      parts[-1] = take(part.parts[0], np.concatenate([parts[-1].data, part.data]))  # cut, and laid together
    else:
      parts.append(part)
  if not parts:
    return everything(0)
  if all(p.is_all for p in parts):
    return everything(sum(p.size for p in parts))
  if all(p.kind == WEAK for p in parts):
    return weak(sum(p.size for p in parts))
  if all(p.is_all or p.kind == FIXED for p in parts):
    return fixed(np.concatenate([np.ones(p.size, bool) if p.is_all else p.data for p in parts]))
  return parts[0] if len(parts) == 1 else make(CONCAT, sum(p.size for p in parts), parts)


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
  return parts[0] if len(parts) == 1 else make(OUTER, size, parts)


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
    have = 1
    while rest and have < size:
      part = rest.pop(0)
      if part.is_all and have * part.size > size:
        missing = size // have
        if size % have or part.size % missing:
          return None  # it cannot be cut there
        rest.insert(0, everything(part.size // missing))
        part = everything(missing)
      group.append(part)
      have *= part.size
    if at == len(sizes) - 1:
      group += rest  # of size 1, if anything
      have *= math.prod(p.size for p in rest)
    if have != size:
      return None
    groups.append(outer(group) if group else everything(1))
  return groups


def any_over(base: Set, shape: tuple[int, ...], keep: int) -> Set:
  """With ``base`` seen as an array of ``shape``: where along axis ``keep`` anything is in it."""
  if base.is_all or base.kind == WEAK:
    return everything(shape[keep]) if base.is_all else weak(shape[keep])
  along = np.arange(shape[keep], dtype=np.int32).reshape([-1 if a == keep else 1 for a in range(len(shape))])
  return any_of(base, np.broadcast_to(along, shape).reshape(-1), shape[keep])


def any_of(base: Set, groups: Any, size: int) -> Set:
  """Position ``i`` is in the set where any position of ``base`` of group ``i`` is; group -1 is left out."""
  if base.kind == WEAK:
    return weak(size)
  groups = np.array(groups, np.int32)
  there = np.flatnonzero(groups >= 0)
  if base.is_all or base.kind == FIXED:
    hit = np.zeros(size, bool)
    hit[groups[there] if base.is_all else groups[there[base.data[there]]]] = True
    return fixed(hit)
  if base.kind == ANY:
    return any_of(base.parts[0], np.where(base.data >= 0, groups[base.data], -1), size)
  if np.unique(groups[there]).size == there.size:
    index = np.full(size, -1)
    index[groups[there]] = there
    return take(base, index)
  return make(ANY, size, (base,), groups)


def contains(big: Set, small: Set) -> bool:
  """Whether ``small`` is a subset of ``big`` for all masks, as far as the expressions show it."""
  return intersection(big, small) is small
