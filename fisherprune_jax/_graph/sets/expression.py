"""The base of sets: interned expressions, each with two readings.

A kind is one class. Its *readings* are bits for given masks, and gates in a circuit, both from those of its parts.
Other methods have nothing to add by default; a kind overrides them if, for example, two of it combine part by part.
Constructors call these before they make anything new.
"""

import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from fisherprune_jax._types import Array, Size

if TYPE_CHECKING:  # what reads sets
  from fisherprune_jax._graph.evaluate import Evaluation
  from fisherprune_jax._graph.gates import Builder, Gates
  from fisherprune_jax._graph.sets.junctions import Junction

Bits: TypeAlias = Array
"""One boolean per position, on the host or traced."""
Kind = TypeVar("Kind", bound="Set")

_free: list[int] = []


class Set:
  """An interned expression; use the constructors of ``sets``, which simplify first.

  Attributes:
    size: the number of positions; may be symbolic for whole sets and products.
    parts: the sets that it is made of.
    data: other data, such as an index.
    serial: greater than those of its parts.
    support: the masks that it depends on, as bits.
    number: a small unique number, reused later: its bit among atoms.
    inside: its ``nonempty``, cached unless that holds the set (a cycle).
    is_all: whether it holds every position.
    is_weak: whether other sets take precedence (``weak``).
  """

  __slots__ = ("__weakref__", "data", "inside", "number", "parts", "serial", "size", "support")
  size: Size
  parts: "tuple[Set, ...]"
  data: Any
  serial: int
  support: int
  number: int
  inside: "Set | None"
  is_all: ClassVar[bool] = False
  is_weak: ClassVar[bool] = False

  # The two readings.

  def bits(self, ev: "Evaluation") -> Bits:
    raise NotImplementedError(type(self).__name__)

  def gates(self, builder: "Builder") -> "Gates":
    """The gates of positions, from those of its parts."""
    raise NotImplementedError(type(self).__name__)

  # What follows from them, unless a kind has a shorter way.

  def count(self, ev: "Evaluation") -> Any:
    return ev.xp.sum(ev.bits(self))

  @property
  def is_empty(self) -> bool:
    return False

  @property
  def factors(self) -> "tuple[Set, ...]":
    """The sets that it is the product of."""
    return (self,)

  @property
  def pieces(self) -> "tuple[Set, ...]":
    """The sets that it lays end to end."""
    return (self,)

  def _masks_below(self) -> int:
    found = 0
    for part in self.parts:
      found |= part.support
    return found

  @property
  def leaves(self) -> frozenset[Hashable]:
    return frozenset(keys_of(self.support))

  # What constructors ask of a kind; None if it has nothing to add.

  def sides(self, kind: "type[Junction]", other: "Set") -> "Sequence[tuple[Set, Set]]":
    """Its parts beside those of another of its kind, if cut alike."""
    return ()

  def combined(self, kind: "type[Junction]", other: "Set", parts: "Sequence[Set]") -> "Set | None":
    """The union or intersection with another of its kind, if of this kind, from combined sides."""
    return None

  def below(self, index: np.ndarray) -> "tuple[Set, np.ndarray] | None":
    """A part with all positions of an index, and the index there."""
    return None

  def known_at(self, positions: np.ndarray) -> np.ndarray | None:
    """Whether positions are in it, if known without masks."""
    return None

  def joined(self, other: "Set") -> "Set | None":
    """Itself and another, end to end, if cut from one set."""
    return None

  def grouped(self, groups: np.ndarray, size: int) -> "Set | None":
    """Groups with any position in it."""
    return None

  def split(self, sizes: Sequence[Size]) -> "list[Set] | None":
    """The smallest product of sets of these sizes that contains it."""
    return None

  def nonempty(self) -> "Set | None":
    """Whether any position is in it, as one position."""
    return None

  def of(self, parts: "Sequence[Set]") -> "Set | None":
    """The same kind, of other parts."""
    return None

  # How unions and intersections see it (junctions.py).

  def atoms(self, kind: "type[Junction]") -> int:
    """The parts of its flat expression of that kind, as bits."""
    return 1 << self.number

  def dual_atoms(self, kind: "type[Junction]") -> int:
    """The same of the other kind, for itself or for its atoms."""
    return 0

  def __repr__(self) -> str:
    return f"{type(self).__name__}[{self.size}]({', '.join(map(str, keys_of(self.support)))})"


_interned: "weakref.WeakValueDictionary[Any, Set]" = weakref.WeakValueDictionary()
_numbered: "dict[int, weakref.ref[Set]]" = {}
_masks: dict[Hashable, int] = {}
_keys: list[Hashable] = []
_count = _numbers = 0
_lock = threading.RLock()
"""Threads must not make one expression twice, or two with one number."""


def make(
  kind: type[Kind], size: Size, parts: Sequence[Set] = (), data: Any = None, same: Hashable = None
) -> Kind:
  """The one expression of a kind, of these parts and data, or identified by ``same``."""
  if same is None:
    same = (*(part.serial for part in parts), data.tobytes() if isinstance(data, np.ndarray) else data)
  key = (kind, size, same)
  with _lock:
    found = _interned.get(key)
    if found is None:
      found = _interned[key] = _new(kind, size, tuple(parts), data)
      _numbered[found.number] = weakref.ref(found, partial(_freed, found.number))
  return found  # type: ignore[return-value]  # the key names its class


def _freed(number: int, _: Any, free: Callable[[int], None] = _free.append) -> None:
  """Frees the number of an expression that is gone.

  ``__del__`` is too early: another thread could revive the expression, whose number a new one then shares. No set has
  it as an atom any more: parts live at least as long as what is made of them.
  """
  free(number)


def _new(kind: type[Kind], size: Size, parts: tuple[Set, ...], data: Any) -> Kind:
  global _count, _numbers
  if not _free:
    _free.append(_numbers)
    _numbers += 1
  found = kind()
  found.number = _free.pop()
  found.size, found.parts, found.data, found.inside = size, parts, data, None
  found.support = found._masks_below()
  found.serial = _count = _count + 1
  return found


def bit_of(key: Hashable) -> int:
  """The bit of a mask in supports."""
  with _lock:
    if key not in _masks:
      _masks[key] = len(_keys)
      _keys.append(key)
  return 1 << _masks[key]


def keys_of(support: int) -> list[Any]:
  """The masks of bits, in time that does not depend on other networks."""
  return [_keys[at] for at in _places(support)]


def in_order(roots: Iterable[Set], known: Collection[Set] = ()) -> list[Set]:
  """All that sets are made of, parts first, without known ones."""
  pending, found = list(roots), set()
  while pending:
    s = pending.pop()
    if s not in found and s not in known:
      found.add(s)
      pending += s.parts
  return sorted(found, key=lambda s: s.serial)


def members(atoms: int) -> list[Set]:
  """The expressions of bits, in the order of their making, which numbers do not give."""
  found = []
  for number in _places(atoms):
    alive = _numbered[number]()
    assert alive is not None
    found.append(alive)
  return sorted(found, key=lambda s: s.serial)


def _places(bits: int) -> Iterator[int]:
  while bits:
    lowest = bits & -bits
    yield lowest.bit_length() - 1
    bits ^= lowest
