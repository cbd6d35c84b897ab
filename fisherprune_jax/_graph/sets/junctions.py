"""Unions and intersections.

They nest as they arise, two parts each, so that a residual stream grows by one small expression per block. Still, ones
that are equal up to order and nesting are one object, by their *atoms*: the parts of the flat expression, as bits.
Atoms also show quickly whether a set is within another, and what two share.
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
"""How many pairs of conditions are compared one by one."""


Halves = tuple[Set | None, Set | None]
NEITHER: Halves = (None, None)


class Junction(Set):
  """Two sets of one size, position by position.

  Its data are its atoms, their atoms of the other kind, and whether one is a condition. If so, ``_halves`` gives its
  halves.
  """

  __slots__ = ("halves",)
  every: ClassVar[bool]
  halves: "Halves | None"

  def __init__(self) -> None:
    self.halves = None

  @staticmethod
  def of_bits(a: Any, b: Any) -> Any:
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
    """From conditions and the rest: so conditions stay one position."""
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
  return _fold(And, sets)


def union(*sets: Set) -> Set:
  return _fold(Or, sets)


def conjuncts(s: Set) -> list[Set]:
  """The sets that it is the intersection of."""
  return members(s.atoms(And))


def unsaid(s: Set, given: Iterable[Set]) -> Set:
  """The intersection of its parts that others do not have."""
  atoms = s.atoms(And)
  for other in given:
    atoms &= ~other.atoms(And)
  if atoms == s.atoms(And):
    return s
  return _fold(And, members(atoms)) if atoms else everything(s.size)


def _fold(kind: type[Junction], sets: Iterable[Set]) -> Set:
  """Neighbours first, for the least nesting."""
  found = list(dict.fromkeys(sets))
  while len(found) > 1:
    pairs = zip(found[::2], found[1::2], strict=False)
    found = [*(combine(kind, a, b) for a, b in pairs), *(found[-1:] if len(found) % 2 else ())]
  return found[0]


def combine(kind: type[Junction], a: Set, b: Set) -> Set:
  """The union or intersection of two sets, part by part if cut alike."""
  found: dict[tuple[Set, Set], Set] = {}
  pending = [(a, b)]
  while pending:  # no recursion: streams may be cut alike all along
    pair = pending[-1]
    sides = _sides(kind, *pair)
    if missing := [side for side in sides if side not in found]:
      pending += reversed(missing)
    else:
      found[pair] = _combined(kind, *pair, [found[side] for side in sides])
      pending.pop()
  return found[a, b]


def _sides(kind: type[Junction], a: Set, b: Set) -> Sequence[tuple[Set, Set]]:
  """The parts to combine first."""
  sides = a.sides(kind, b) if type(a) is type(b) else ()
  return () if sides and (is_within(a, b) or is_within(b, a)) else sides


def _combined(kind: type[Junction], a: Set, b: Set, parts: Sequence[Set]) -> Set:
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
  """As one expression of two parts, without repetition."""
  atoms = a.atoms(kind) | b.atoms(kind)
  duals = a.dual_atoms(kind) | b.dual_atoms(kind)
  if duals & atoms:
    # Absorption: x and (x or y) is x; x or (x and y) is x.
    return _fold(kind, [p for p in members(atoms) if not p.dual_atoms(kind) & atoms])
  if common := a.atoms(kind) & b.atoms(kind):
    # Shared parts occur once, so that critical features are easy to see.
    few, many = sorted((a, b), key=lambda s: (s.atoms(kind) & ~common).bit_count())
    return _fold(kind, [many, _fold(kind, members(few.atoms(kind) & ~common))])
  parts = sorted((a, b), key=lambda s: s.serial)
  conditional = any(isinstance(p, Spread) or (isinstance(p, Junction) and p.data[2]) for p in parts)
  return make(kind, a.size, parts, (atoms, duals, conditional), same=atoms)


def _halves(s: Junction) -> Halves:
  """That the conditional atoms are not empty, as one condition; and the other atoms.

  Conditional are conditions spread over an axis and, in a union, intersections with such. This comes from parts, as a
  stream grows by an atom per addition.
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
  """Whether a set contains another, by their atoms."""
  if small is big or big.is_all or small.is_empty:
    return True
  if small.is_all or big.is_empty:
    return False
  if isinstance(big, Spread) and small.support & big.support:
    return is_within(nonempty(small), big.parts[0])
  conditions, choices = small.atoms(And), big.atoms(Or)
  return (
    not small.atoms(Or) & ~choices  # every choice of ``small`` is one of ``big``
    or not (missing := big.atoms(And) & ~conditions)  # every condition of ``big`` is one of ``small``
    or bool((conditions | 1 << small.number) & (choices | 1 << big.number))
    or (small.size == 1 and _follow(conditions & ~big.atoms(And), missing))
  )


def _follow(given: int, wanted: int) -> bool:
  """Whether wanted conditions that sets are not empty follow from given ones."""
  if given.bit_count() * wanted.bit_count() > MOST_COMPARED:
    return False
  found = [s for s in members(given) if isinstance(s, Nonempty)]
  return all(
    isinstance(s, Nonempty)
    and any(g.parts[0].size == s.parts[0].size and is_within(g.parts[0], s.parts[0]) for g in found)
    for s in members(wanted)
  )
