"""The expressions that sets are (``sets.py``): interned, so that equal ones are one object.

What is equal up to order and nesting is one object as well: a union or an intersection is known by its *atoms*,
the parts of the flat expression, as the bits of an integer.
"""

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

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
_free: list[int] = []


class Set:
  """An interned expression: ``kind`` over ``parts``, with static ``data``; use the constructors of ``sets.py``.

  Attributes:
    serial: greater than that of every part.
    support: the masks that it depends on, as bits.
    number: a small number of its own, used again once it is gone: the bit that it is among the atoms of others.
    atoms: of a union or intersection the parts of the flat expression, as bits.
    duals: the atoms of those of its atoms that are intersections, if it is a union, and the other way round.
  """

  __slots__ = (
    "__weakref__", "atoms", "data", "duals", "kind", "number", "parts", "serial", "size", "support",
  )  # fmt: skip
  kind: str
  size: Any
  parts: "tuple[Set, ...]"
  data: Any
  serial: int
  support: int
  number: int
  atoms: int
  duals: int

  @property
  def is_all(self) -> bool:
    """Whether it holds every position."""
    return self.kind == ALL

  @property
  def is_empty(self) -> bool:
    """Whether it is known to hold none."""
    return self.kind == FIXED and not self.data.any()

  @property
  def leaves(self) -> frozenset[Any]:
    """The masks that it depends on."""
    return frozenset(keys_of(self.support))

  def __repr__(self) -> str:
    return f"{self.kind}[{self.size}]({', '.join(map(str, keys_of(self.support)))})"

  def __del__(self, free: Callable[[int], None] = _free.append) -> None:
    # Nothing that has it for an atom is left: parts live at least as long as what is made of them.
    free(self.number)


_interned: "weakref.WeakValueDictionary[Any, Set]" = weakref.WeakValueDictionary()
_numbered: "weakref.WeakValueDictionary[int, Set]" = weakref.WeakValueDictionary()
_masks: dict[Any, int] = {}
_count = _numbers = 0
_lock = threading.RLock()
"""Two threads that trace at once must not make one expression twice, nor two with one number."""


def make(
  kind: str, size: Any, parts: Sequence[Set] = (), data: Any = None, atoms: int = 0, duals: int = 0
) -> Set:
  """The one expression of this kind, of these parts; the constructors of ``sets.py`` simplify before."""
  same = atoms or tuple(part.serial for part in parts)
  key = (kind, size, same, data.tobytes() if isinstance(data, np.ndarray) else data)
  with _lock:
    found = _interned.get(key)
    if found is None:
      found = _new(kind, size, tuple(parts), data)
      found.atoms, found.duals = atoms, duals
      _interned[key] = _numbered[found.number] = found
  return found


def _new(kind: str, size: Any, parts: tuple[Set, ...], data: Any) -> Set:
  global _count, _numbers
  if not _free:
    _free.append(_numbers)
    _numbers += 1
  found = Set()
  found.number = _free.pop()
  found.kind, found.size, found.parts, found.data, found.support = kind, size, parts, data, 0
  for part in parts:
    found.support |= part.support
  if kind == LEAF:
    found.support = 1 << _masks.setdefault(data, len(_masks))
  found.serial = _count = _count + 1
  return found


def keys_of(support: int) -> list[Any]:
  """The masks whose bits are set."""
  return [key for key, at in list(_masks.items()) if support >> at & 1] if support else []


def in_order(roots: Iterable[Set], known: Collection[Set] = ()) -> list[Set]:
  """Everything that some sets are made of, parts first, without what is ``known``."""
  pending, found = list(roots), set()
  while pending:
    s = pending.pop()
    if s not in found and s not in known:
      found.add(s)
      pending += s.parts
  return sorted(found, key=lambda s: s.serial)


def members(atoms: int) -> list[Set]:
  """The expressions whose bits are set."""
  found = []
  while atoms:
    lowest = atoms & -atoms
    found.append(_numbered[lowest.bit_length() - 1])
    atoms ^= lowest
  return found
