"""Unions and intersections.

They are nested as they came about, two parts each, so that the stream of a residual network grows by one small
expression per block. But what is equal up to order and nesting is one object all the same, as each knows its
*atoms*: the parts of the flat expression, as the bits of an integer. By these the constructors see without
looking further that one set is within another, and what two have in common.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fisherprune_jax._graph.sets.basic import ALWAYS, Fixed, Weak, everything
from fisherprune_jax._graph.sets.expression import Bits, Set, make, members
from fisherprune_jax._graph.sets.picking import Nonempty, Spread, nonempty

if TYPE_CHECKING:
  from fisherprune_jax._graph.evaluate import Evaluation
  from fisherprune_jax._graph.gates import Builder, Gates


MOST_COMPARED = 16
"""Pairs of conditions that are looked at one by one, to see which follow from which."""


Halves = tuple[Set | None, Set | None]
NEITHER: Halves = (None, None)


class Junction(Set):
  """Two sets of one size, position by position.

  Its data are its atoms, those of the other kind in them, and whether a condition is among them.

  Attributes:
    every: whether a position has to be in both parts.
    halves: if a condition is among its atoms, what ``_halves`` found; else None.
  """

  __slots__ = ("halves",)
  every: ClassVar[bool]
  halves: "Halves | None"

  def __init__(self) -> None:
    self.halves = None

  @staticmethod
  def of_bits(a: Any, b: Any) -> Any:
    """What it is of the bits of its parts."""
    raise NotImplementedError

  def bits(self, ev: "Evaluation") -> Bits:
    a, b = self.parts
    return self.of_bits(ev.bits(a), ev.bits(b))

  def gates(self, builder: "Builder") -> "Gates":
    a, b = self.parts
    (of_a, once_a), (of_b, once_b) = builder.of(a), builder.of(b)
    shared = bool(a.support & b.support)
    return builder.gate(self.every, of_a, of_b, shared), once_a and once_b and not shared

  def of(self, parts: Sequence[Set]) -> Set:
    return combine(type(self), *parts)

  def nonempty(self) -> Set | None:
    """From its conditions, and the rest: so they stay one position and are not looked at for every one."""
    if not self.data[2] or self.size == 1:
      return None
    conditions, rest = _halves(self)
    return combine(type(self), conditions, nonempty(rest)) if conditions and rest else conditions

  def atoms(self, kind: "type[Junction]") -> int:
    return self.data[0] if kind is type(self) else 1 << self.number

  def dual_atoms(self, kind: "type[Junction]") -> int:
    return self.data[1] if kind is type(self) else self.data[0]


class And(Junction):
  """``intersection``."""

  __slots__ = ()
  every = True

  @staticmethod
  def of_bits(a: Any, b: Any) -> Any:
    return a & b


class Or(Junction):
  """``union``."""

  __slots__ = ()
  every = False

  @staticmethod
  def of_bits(a: Any, b: Any) -> Any:
    return a | b

  def nonempty(self) -> Set | None:
    if any(isinstance(part, Fixed) for part in self.parts):
      return ALWAYS
    return super().nonempty()


def intersection(*sets: Set) -> Set:
  """Positions in every one of ``sets``."""
  return _fold(And, sets)


def union(*sets: Set) -> Set:
  """Positions in any of ``sets``."""
  return _fold(Or, sets)


def conjuncts(s: Set) -> list[Set]:
  """The sets that one is the intersection of."""
  return members(s.atoms(And))


def unsaid(s: Set, given: Iterable[Set]) -> Set:
  """What an intersection says that some others do not: those of its parts that none of them has."""
  atoms = s.atoms(And)
  for other in given:
    atoms &= ~other.atoms(And)
  if atoms == s.atoms(And):
    return s
  return _fold(And, members(atoms)) if atoms else everything(s.size)


def _fold(kind: type[Junction], sets: Iterable[Set]) -> Set:
  """Neighbours first, so that many sets nest no deeper than they have to."""
  found = list(dict.fromkeys(sets))
  while len(found) > 1:
    pairs = zip(found[::2], found[1::2], strict=False)
    found = [*(combine(kind, a, b) for a, b in pairs), *(found[-1:] if len(found) % 2 else ())]
  return found[0]


def combine(kind: type[Junction], a: Set, b: Set) -> Set:
  """The union or intersection of two sets; of two that are cut alike, part by part."""
  found: dict[tuple[Set, Set], Set] = {}
  pending = [(a, b)]
  while pending:  # no recursion: two streams that are cut alike are so as deep as the network
    pair = pending[-1]
    sides = _sides(kind, *pair)
    if missing := [side for side in sides if side not in found]:
      pending += reversed(missing)
    else:
      found[pair] = _combined(kind, *pair, [found[side] for side in sides])
      pending.pop()
  return found[a, b]


def _sides(kind: type[Junction], a: Set, b: Set) -> Sequence[tuple[Set, Set]]:
  """The parts of two sets that are to be combined first."""
  sides = a.sides(kind, b) if type(a) is type(b) else ()
  return () if sides and (is_within(a, b) or is_within(b, a)) else sides


def _combined(kind: type[Junction], a: Set, b: Set, parts: Sequence[Set]) -> Set:
  """Two sets combined, of which the parts are if they are cut alike."""
  if isinstance(a, Weak):
    return a.beside(kind, b)
  if isinstance(b, Weak):
    return b.beside(kind, a)
  for small, big in ((a, b), (b, a)):
    if is_within(small, big):
      return small if kind.every else big
  if type(a) is type(b) and (found := a.combined(kind, b, parts)):
    return found
  return _by_atoms(kind, a, b)


def _by_atoms(kind: type[Junction], a: Set, b: Set) -> Set:
  """Two sets as one expression of two parts, if nothing in it is said twice."""
  atoms = a.atoms(kind) | b.atoms(kind)
  duals = a.dual_atoms(kind) | b.dual_atoms(kind)
  if duals & atoms:
    # Absorption: x and (x or y) is x; x or (x and y) is x.
    return _fold(kind, [p for p in members(atoms) if not p.dual_atoms(kind) & atoms])
  if common := a.atoms(kind) & b.atoms(kind):
    # What both have is said once, so that what features are critical to stays easy to see.
    few, many = sorted((a, b), key=lambda s: (s.atoms(kind) & ~common).bit_count())
    return _fold(kind, [many, _fold(kind, members(few.atoms(kind) & ~common))])
  parts = sorted((a, b), key=lambda s: s.serial)
  conditional = any(isinstance(p, Spread) or (isinstance(p, Junction) and p.data[2]) for p in parts)
  return make(kind, a.size, parts, (atoms, duals, conditional), same=atoms)


def _halves(s: Junction) -> Halves:
  """That those atoms of an expression are not empty that are conditions laid out, or under such (of a union); the others.

  Found from those of its parts: a stream has one more atom at every place where something is added to it. Nothing where
  none of the atoms is a condition.
  """
  kind, pending = type(s), [s]
  while pending:  # no recursion: a stream is as deep as the network
    here = pending[-1]
    missing = [p for p in here.parts if isinstance(p, kind) and p.data[2] and p.halves is None]
    if missing:
      pending += missing
    else:
      conditions, others = (
        [*filter(None, column)] for column in zip(*(_half(kind, p) for p in here.parts), strict=True)
      )
      rest = _fold(kind, others) if conditions and others else None
      here.halves = (_fold(kind, conditions) if conditions else None, rest)
      pending.pop()
  return s.halves or NEITHER


def _half(kind: type[Junction], part: Set) -> Halves:
  if isinstance(part, kind):
    return part.halves if part.halves and part.halves[0] else (None, part)
  conditional = isinstance(part, Spread) or (isinstance(part, And) and part.data[2])
  return (nonempty(part), None) if conditional else (None, part)


def is_within(small: Set, big: Set) -> bool:
  """Whether one set contains another by the look of their atoms."""
  if small is big or big.is_all or small.is_empty:
    return True
  if small.is_all or big.is_empty:
    return False
  if isinstance(big, Spread) and small.support & big.support:
    return is_within(nonempty(small), big.parts[0])
  conditions, choices = small.atoms(And), big.atoms(Or)
  return (
    not small.atoms(Or) & ~choices  # every choice of the small one is one of the big one
    or not (missing := big.atoms(And) & ~conditions)  # every condition of the big one is one of the small one
    or bool((conditions | 1 << small.number) & (choices | 1 << big.number))
    or (small.size == 1 and _follow(conditions & ~big.atoms(And), missing))
  )


def _follow(given: int, wanted: int) -> bool:
  """Whether each of some conditions, that a set is not empty, follows from another one that is given."""
  if given.bit_count() * wanted.bit_count() > MOST_COMPARED:
    return False
  found = [s for s in members(given) if isinstance(s, Nonempty)]
  return all(
    isinstance(s, Nonempty)
    and any(g.parts[0].size == s.parts[0].size and is_within(g.parts[0], s.parts[0]) for g in found)
    for s in members(wanted)
  )
