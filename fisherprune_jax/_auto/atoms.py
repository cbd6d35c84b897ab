"""Axes as atoms, tied and cut.

An *atom* is the content of an axis, until it proves to be a product (heads times depth, row-major) or a sum (query, key
and value, concatenated) of others. Tied atoms are one; if they were cut differently, both are cut into the common
pieces. Uncut atoms are *leaves*: their entries are alike everywhere, so each can be pruned. A *blocked* atom cannot be
pruned, for a reason.

>>> heads, depth, merged = Atom(4), Atom(8), Atom(32)
>>> cut(merged, PRODUCT, [heads, depth])
>>> kernel = Atom(32)
>>> tie(kernel, merged)
>>> [leaf.size for leaf in leaves(kernel)]
[4, 8]
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fisherprune_jax._graph import compat
from fisherprune_jax._types import Size

PRODUCT, SUM = "product", "sum"


class Atom:
  """The content of an axis: ``size`` entries, a leaf or several ``parts``; ``why`` it cannot be pruned, if so."""

  __slots__ = ("_same", "kind", "parts", "size", "why")

  def __init__(self, size: Size, why: str = "") -> None:
    self.size, self.why = size, why
    self.kind = ""
    self.parts: tuple[Atom, ...] = ()
    self._same: Atom | None = None

  def root(self) -> "Atom":
    """The representative of all tied atoms."""
    top = self
    while top._same is not None:
      top = top._same
    while self._same is not None:  # shortens later paths
      self._same, self = top, self._same
    return top

  def become(self, other: "Atom") -> None:
    """Make another atom the representative of this one."""
    self._same = other


def leaves(atom: Atom) -> list[Atom]:
  """The uncut atoms of an atom, in order."""
  atom = atom.root()
  return [leaf for part in atom.parts for leaf in leaves(part)] if atom.kind else [atom]


def block(atom: Atom, why: str) -> None:
  """Record why an atom cannot be pruned; the first reason counts."""
  for leaf in leaves(atom):
    leaf.why = leaf.why or why


def cut(atom: Atom, kind: str, parts: Sequence[Atom]) -> None:
  """Cut an atom into ``parts``, as a product or a sum."""
  parts = _flat(kind, parts)
  if len(parts) == 1:
    tie(atom, parts[0])
    return
  whole = Atom(atom.size)
  whole.kind, whole.parts = kind, tuple(parts)
  tie(atom, whole)


def tie(a: Atom, b: Atom) -> None:
  """Make two atoms one."""
  a, b = a.root(), b.root()
  if a is b:
    return
  if _is(a.size, 0) or _is(b.size, 0) or compat.differ(a.size, b.size):
    _part_company(a, b, "axes of different sizes meet")
  elif not a.kind or not b.kind:
    whole, leaf = (a, b) if a.kind else (b, a)
    leaf.become(whole)
    if leaf.why:
      block(whole, leaf.why)
  elif a.kind == b.kind:
    _meet(a, b)
  else:
    _across(*((a, b) if a.kind == PRODUCT else (b, a)))


def _part_company(a: Atom, b: Atom, why: str) -> None:
  block(a, why)
  block(b, why)


def _is(size: Size, number: int) -> bool:
  return compat.is_static_size(size) and size == number


def _flat(kind: str, parts: Iterable[Atom]) -> list[Atom]:
  """Parts, with those of the same kind expanded, and without neutral ones."""
  found: list[Atom] = []
  for part in parts:
    part = part.root()
    found += _flat(kind, part.parts) if part.kind == kind else [part]
  neutral = 1 if kind == PRODUCT else 0
  return [part for part in found if not _is(part.size, neutral)] or found[:1]


def _meet(a: Atom, b: Atom) -> None:
  """Tie two atoms of one kind, at their common pieces."""
  pairs = _pieces(a.kind, _flat(a.kind, a.parts), _flat(b.kind, b.parts))
  if pairs is None:
    _part_company(a, b, "it is cut in two ways that do not fit")
    return
  b.become(a)
  for one, other in pairs:
    tie(one, other)


def _pieces(kind: str, ours: Sequence[Atom], theirs: Sequence[Atom]) -> list[tuple[Atom, Atom]] | None:
  """Pairs of equal size; a product starts at its innermost part, a sum at its first."""
  queues = deque(ours), deque(theirs)
  take: Callable[[deque[Atom]], Atom] = deque.pop if kind == PRODUCT else deque.popleft
  put = deque.append if kind == PRODUCT else deque.appendleft
  pairs = []
  while all(queues):
    one, other = map(take, queues)
    if not compat.differ(one.size, other.size):
      pairs.append((one, other))
      continue
    if not (compat.is_static_size(one.size) and compat.is_static_size(other.size)):
      return None
    at = 0 if one.size > other.size else 1
    large, small = (one, other) if at == 0 else (other, one)
    if kind == PRODUCT and large.size % small.size:
      return None
    piece, rest = (
      Atom(small.size),
      Atom(large.size // small.size if kind == PRODUCT else large.size - small.size),
    )
    cut(large, kind, (rest, piece) if kind == PRODUCT else (piece, rest))
    pairs.append((piece, small))
    put(queues[at], rest)
  return None if any(queues) else pairs


def _across(product: Atom, total: Atom) -> None:
  """Tie ``k n`` to ``n + n + ...``: the pieces are alike, and their number cannot be pruned."""
  parts, inner = _flat(SUM, total.parts), _flat(PRODUCT, product.parts)
  for start in range(1, len(inner)):
    size = math.prod(part.size for part in inner[start:])
    if all(compat.is_static_size(n) for n in (size, *(part.size for part in parts))) and not any(
      part.size % size for part in parts
    ):
      break
  else:
    _part_company(product, total, "it is cut in two ways that do not fit")
    return
  why = "its pieces are used in different ways"
  for part in inner[:start]:
    block(part, why)
  total.become(product)
  for part in parts:
    cut(part, PRODUCT, (Atom(part.size // size, why), *inner[start:]))
