"""Entries of arrays: one set for each axis, what is known of several axes merged, and whether there are any at all."""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from fisherprune_jax._graph import compat, sets, together
from fisherprune_jax._graph.joint import Together
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._types import Shape

Box = tuple[Set, ...]
F = TypeVar("F", bound=Hashable)
FEW_MASKS = 4
"""A condition on so few masks may stand beside sets that hang on them too: prices (``overlaps.py``) bear that."""

_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextlib.contextmanager
def exact_conditions() -> Iterator[None]:
  """Here conditions are not made simple: for what is only evaluated, and not priced."""
  token = _exact.set(True)
  try:
    yield
  finally:
    _exact.reset(token)


class Where(NamedTuple):
  """Some entries of an array.

  Attributes:
    box: per axis, where they are.
    together: the same of several axes merged, where that is less.
    when: a condition; where it does not hold there are none, whatever the box says. An array without axes has it too.
  """

  box: Box
  together: Together = MappingProxyType({})
  when: Set = sets.ALWAYS

  @property
  def some(self) -> Set:
    """The condition that there are any."""
    return sets.every(self.when, *map(sets.nonempty, self.box))

  def in_a_turn(self) -> "Where":
    """The same of one entry along the leading axis."""
    first, *rest = self.box
    when = sets.every(self.when, sets.nonempty(first))
    return Where(tuple(rest), together.in_a_turn(self.together), when)

  def in_all_turns(self, shape: Shape) -> "Where":
    """The same of an array of this shape, which has one more axis in front."""
    box = (*whole_box(shape[:1]), *self.box)
    return Where(box, together.in_all_turns(self.together), self.when)


def whole_box(shape: Shape) -> Box:
  """The box that holds everything."""
  return tuple(sets.everything(n) for n in shape)


def weak_box(shape: Shape) -> Box:
  """The box of what could do without."""
  return tuple(map(sets.weak, shape))


def empty_box(shape: Shape) -> Box:
  """The box that holds nothing (along an axis of symbolic size, everything)."""
  return tuple(sets.nothing(n) if compat.is_static_size(n) else sets.everything(n) for n in shape)


def whole(shape: Shape) -> Where:
  """All entries."""
  return Where(whole_box(shape))


def nowhere(shape: Shape) -> Where:
  """No entry."""
  return Where(empty_box(shape), when=sets.NEVER)


def hull(*boxes: Box) -> Box:
  """The smallest box that contains all of ``boxes``, whenever these hold."""
  return tuple(sets.union(*column) for column in zip(*boxes, strict=True))


def meet(a: Box, b: Box) -> Box:
  """What two boxes share."""
  return tuple(map(sets.intersection, a, b))


def join(a: Where, b: Where, within: Box = ()) -> Where:
  """The smallest box that contains both, and when there is either; of use is only what is in the box ``within``."""
  if a == b:
    return a
  parts = [(w.when, dict(enumerate(w.box))) for w in (a, b)]
  found, when = united(parts, dict(enumerate(within)))
  box = tuple(found.values())
  one, other = ((w.box, w.together, sets.ALWAYS if w.when is when else w.when) for w in (a, b))
  return Where(box, together.union(one, other, box), when)


def _is_nothing(when: Set, found: Mapping[F, Set]) -> bool:
  return when.is_empty or any(s.is_empty for s in found.values())


def united(
  parts: Sequence[tuple[Set, Mapping[F, Set]]], within: Mapping[F, Set] = MappingProxyType({})
) -> tuple[dict[F, Set], Set]:
  """The smallest product of sets that contains several, each of which is there under a condition.

  Args:
    parts: of each its condition, and its sets by what they are of (axes, factors).
    within: what of the sets is of use.

  Returns:
    The sets, and the condition that any of the parts is there. A set is gated where it is the part's own, by what else
    has to hold for the part to be there: with ``x`` alone of ``(x, y)``, ``(z, y)`` gone there is nothing of ``x``.
  """
  parts = [part for part in parts if not _is_nothing(*part)] or parts[:1]
  columns: dict[F, list[Set]] = {}
  for _, part in parts:
    for f, s in part.items():
      columns.setdefault(f, []).append(s)
  common = {f for f, column in columns.items() if len(column) == len(parts) and len({*column}) == 1}
  owns = [{f: s for f, s in part.items() if f not in common} for _, part in parts]
  conditions = [condition for condition, _ in parts]
  found: dict[F, list[Set]] = {f: column[:1] if f in common else [] for f, column in columns.items()}
  left_out = False
  for condition, own in zip(sets.apart(conditions)[0], owns, strict=True):
    for f, s in own.items():
      gate = sets.every(condition, *(sets.nonempty(other) for g, other in own.items() if g != f))
      simple = _simple(gate, columns[f])
      found[f].append(sets.gated(s, simple))
      left_out = left_out or simple is not gate
  joined = {f: sets.union(*column) for f, column in found.items()}
  if left_out:  # then sets no longer say when there is nothing: of that, too, what is simple
    kept = [sets.intersection(s, within.get(f, s)) for f, s in joined.items()]
    for at, own in enumerate(owns):
      some = sets.every(*map(sets.nonempty, own.values()))
      simple = some if some.support.bit_count() <= FEW_MASKS else _simple(some, kept)
      conditions[at] = sets.every(conditions[at], simple)
  return joined, sets.either(conditions)


def _simple(when: Set, beside: Iterable[Set]) -> Set:
  """What follows from a condition and keeps an expression of some sets under it simple: larger, if need be.

  It must not hang on masks that the sets hang on, too: features on several sides are looked at one by one
  (``sharing.py``), and in a stream under masks all later ones would be.
  """
  support = 0
  for s in beside:
    if s.is_weak:
      return sets.ALWAYS  # others have the say beside it, and have it in any case
    support |= s.support
  return when if _exact.get() else sets.free_of(when, support)
