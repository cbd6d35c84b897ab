"""What every set is: an expression, interned, so that equal ones are one object, with its readings.

A kind of set is one class. It gives two *readings* of itself, each from those of its parts: its bits for given
masks, and its gates in a circuit. What else is particular to it (that a part of a
part is a part, say, or that two of it that are cut alike combine part by part) it says in the methods that have
nothing to say here; the constructors ask these before they make anything new.
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
  """An interned expression; use the constructors of ``sets``, which simplify before they make one.

  Attributes:
    size: of how many positions it is a set; may be symbolic where it is all of them.
    parts: the sets that it is made of.
    data: what else it is made of, such as an index.
    serial: greater than that of every part.
    support: the masks that it depends on, as bits.
    number: a small number of its own, used again once it is gone: the bit that it is among the atoms of others.
    inside: what ``nonempty`` found for it, kept where that does not hold the set itself; so there is no circle.
    is_all: whether it holds every position.
    is_weak: whether it holds every position only until somebody says more (``weak``).
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

  # The two readings of every kind.

  def bits(self, ev: "Evaluation") -> Bits:
    """One boolean per position: whether it is in the set, under the masks of ``ev``."""
    raise NotImplementedError(type(self).__name__)

  def gates(self, builder: "Builder") -> "Gates":
    """The gates of its positions, made by ``builder`` from those of its parts."""
    raise NotImplementedError(type(self).__name__)

  # What follows from them, unless a kind knows a shorter way.

  def count(self, ev: "Evaluation") -> Any:
    """How many positions are in the set: an integer, NumPy's or traced."""
    return ev.xp.sum(ev.bits(self))

  @property
  def is_empty(self) -> bool:
    """Whether it is known to hold no position."""
    return False

  @property
  def factors(self) -> "tuple[Set, ...]":
    """The sets that it is the product of."""
    return (self,)

  @property
  def pieces(self) -> "tuple[Set, ...]":
    """The sets that lie in it end to end."""
    return (self,)

  def _masks_below(self) -> int:
    found = 0
    for part in self.parts:
      found |= part.support
    return found

  @property
  def leaves(self) -> frozenset[Hashable]:
    """The masks that it depends on."""
    return frozenset(keys_of(self.support))

  # What a kind has to say when something is made of it; None: nothing of its own.

  def sides(self, kind: "type[Junction]", other: "Set") -> "Sequence[tuple[Set, Set]]":
    """Its parts beside those of another of its own kind that is cut alike; none if it is not."""
    return ()

  def combined(self, kind: "type[Junction]", other: "Set", parts: "Sequence[Set]") -> "Set | None":
    """The union or intersection with another of its own kind, if that is of this kind again.

    Args:
      kind: which of the two.
      other: the other one.
      parts: what the two ``sides`` are combined.
    """
    return None

  def below(self, index: np.ndarray) -> "tuple[Set, np.ndarray] | None":
    """A part in which all positions of an index are found, and where in it."""
    return None

  def known_at(self, positions: np.ndarray) -> np.ndarray | None:
    """Whether each of some positions is in it, if that is known without masks."""
    return None

  def joined(self, other: "Set") -> "Set | None":
    """Itself and, end to end with it, another, if they are cut from one."""
    return None

  def grouped(self, groups: np.ndarray, size: int) -> "Set | None":
    """Where any position of a group is in it (``any_of``)."""
    return None

  def split(self, sizes: Sequence[Size]) -> "list[Set] | None":
    """The smallest product of sets of these sizes that contains it."""
    return None

  def nonempty(self) -> "Set | None":
    """One position, in the set if any of its own is."""
    return None

  def of(self, parts: "Sequence[Set]") -> "Set | None":
    """The same made of other parts."""
    return None

  # How unions and intersections see it (``junctions.py``).

  def atoms(self, kind: "type[Junction]") -> int:
    """The parts of the flat expression of that kind that it is, as the bits of their numbers."""
    return 1 << self.number

  def dual_atoms(self, kind: "type[Junction]") -> int:
    """The same of the other kind, of itself or of those of its atoms that have such; 0 if there are none."""
    return 0

  def __repr__(self) -> str:
    return f"{type(self).__name__}[{self.size}]({', '.join(map(str, keys_of(self.support)))})"


_interned: "weakref.WeakValueDictionary[Any, Set]" = weakref.WeakValueDictionary()
_numbered: "dict[int, weakref.ref[Set]]" = {}
_masks: dict[Hashable, int] = {}
_keys: list[Hashable] = []
_count = _numbers = 0
_lock = threading.RLock()
"""Two threads that trace at once must not make one expression twice, nor two with one number."""


def make(
  kind: type[Kind], size: Size, parts: Sequence[Set] = (), data: Any = None, same: Hashable = None
) -> Kind:
  """The one expression of a kind, of these parts and data.

  Args:
    kind: its class.
    size: of how many positions.
    parts: what it is made of.
    data: what else.
    same: what tells it from others of its kind and size, if not its parts and data.
  """
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
  """An expression is gone, and its number is free.

  Not before, as in a ``__del__``, from which another thread could still find it: an expression back to life, whose number
  the next one gets too. Nothing that has it for an atom is left: parts live at least as long as what is made of them.
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
  """The bit that a mask is in the support of sets."""
  with _lock:
    if key not in _masks:
      _masks[key] = len(_keys)
      _keys.append(key)
  return 1 << _masks[key]


def keys_of(support: int) -> list[Any]:
  """The masks whose bits are set; takes as long as these are many, however many masks other networks have."""
  return [_keys[at] for at in _places(support)]


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
  """The expressions whose bits are set, as they were made: their numbers may have been those of others before."""
  found = []
  for number in _places(atoms):
    alive = _numbered[number]()
    assert alive is not None
    found.append(alive)
  return sorted(found, key=lambda s: s.serial)


def _places(bits: int) -> Iterator[int]:
  """Which bits are set."""
  while bits:
    lowest = bits & -bits
    yield lowest.bit_length() - 1
    bits ^= lowest
