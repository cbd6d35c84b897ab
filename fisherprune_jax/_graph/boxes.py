"""Entries of an array: a set per axis, sets of joint axes, and a condition."""

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
"""Conditions on at most so many masks may stand beside sets that depend on them: overlaps.py prices these."""

_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextlib.contextmanager
def exact_conditions() -> Iterator[None]:
  """Keeps conditions exact, for sets that are not priced."""
  token = _exact.set(True)
  try:
    yield
  finally:
    _exact.reset(token)


class Where(NamedTuple):
  """Some entries of an array.

  Attributes:
    box: a set per axis.
    together: sets of joint axes, if smaller than the box.
    when: the condition that there are any entries; for scalars, too.
  """

  box: Box
  together: Together = MappingProxyType({})
  when: Set = sets.ALWAYS

  @property
  def some(self) -> Set:
    """That there are any, under all conditions."""
    return sets.every(self.when, *map(sets.nonempty, self.box))

  def in_an_iteration(self) -> "Where":
    """The same for one entry along the leading axis."""
    first, *rest = self.box
    when = sets.every(self.when, sets.nonempty(first))
    return Where(tuple(rest), together.in_an_iteration(self.together), when)

  def in_all_iterations(self, shape: Shape) -> "Where":
    """The same with a leading axis, for an array of this shape."""
    box = (*whole_box(shape[:1]), *self.box)
    return Where(box, together.in_all_iterations(self.together), self.when)


Entries = Where | list[Where]
"""Some entries of an array: of the whole, or of each layer of a stack."""


def whole_box(shape: Shape) -> Box:
  return tuple(sets.everything(n) for n in shape)


def weak_box(shape: Shape) -> Box:
  """The demand of a use that could do without."""
  return tuple(map(sets.weak, shape))


def empty_box(shape: Shape) -> Box:
  """Empty; but along symbolic axes, everything."""
  return tuple(sets.nothing(n) if compat.is_static_size(n) else sets.everything(n) for n in shape)


def whole(shape: Shape) -> Where:
  return Where(whole_box(shape))


def nowhere(shape: Shape) -> Where:
  return Where(empty_box(shape), when=sets.NEVER)


def hull(*boxes: Box) -> Box:
  """The smallest box that contains all, whatever their conditions."""
  return tuple(sets.union(*column) for column in zip(*boxes, strict=True))


def meet(a: Box, b: Box) -> Box:
  return tuple(map(sets.intersection, a, b))


def join(a: Where, b: Where, within: Box = ()) -> Where:
  """The smallest that contains both; only what is within the box matters."""
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
  """The smallest product of sets that contains several products, each under a condition.

  Args:
    parts: per product, its condition, and its sets by axis or factor.
    within: what of the sets matters.

  Returns:
    The sets, and the condition that there is any product. Sets that the products do not share are gated: by the
    condition of their product, and by its other such sets not being empty.
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
  if left_out:  # sets no longer show when there is nothing: conditions must, if simple
    kept = [sets.intersection(s, within.get(f, s)) for f, s in joined.items()]
    for at, own in enumerate(owns):
      some = sets.every(*map(sets.nonempty, own.values()))
      simple = some if some.support.bit_count() <= FEW_MASKS else _simple(some, kept)
      conditions[at] = sets.every(conditions[at], simple)
  return joined, sets.either(conditions)


def _simple(when: Set, beside: Iterable[Set]) -> Set:
  """What follows from a condition without the masks of ``beside``.

  Features on several sides are looked at one by one (sharing.py): in a masked stream, all later ones.
  """
  support = 0
  for s in beside:
    if s.is_weak:
      return sets.ALWAYS  # others take precedence over it
    support |= s.support
  return when if _exact.get() else sets.free_of(when, support)
