"""Conditions: sets of one position, whether something exists at all.

One is that a set is not empty (``nonempty``). A set is not gated by what any of its positions implies.
"""

from collections.abc import Iterable, Sequence

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.sets.basic import ALWAYS, NEVER, everything
from fisherprune_jax._graph.sets.expression import Set
from fisherprune_jax._graph.sets.junctions import And, intersection, is_within, union
from fisherprune_jax._graph.sets.laying import concat, outer
from fisherprune_jax._graph.sets.picking import nonempty, spread

MOST_LOOKED_AT = 100
"""How many expressions below a condition are searched for masks: it may be deep."""


def every(*conditions: Set) -> Set:
  found = [when for when in conditions if when is not ALWAYS]
  if len(found) > 1:
    return intersection(*found)
  return found[0] if found else ALWAYS


def gated(s: Set, when: Set) -> Set:
  """A set under a condition, empty without it (if symbolic without other factors, everything)."""
  when = beyond(when, [s])
  at = next((at for at, f in enumerate(s.factors) if compat.is_static_size(f.size)), None)
  if when.is_all or s.is_weak or at is None:
    return s
  if len(s.factors) > 1:  # a product stays one
    return outer([_gated(f, when) if i == at else f for i, f in enumerate(s.factors)])
  return concat([_gated(piece, when) for piece in s.pieces])


def _gated(s: Set, when: Set) -> Set:
  return intersection(s, spread(when, s.size))


def beyond(when: Set, held: Iterable[Set]) -> Set:
  """What a condition needs beyond that held sets are not empty."""
  implied = 0
  for s in held:
    if s.support & when.support:
      inside = nonempty(s)
      if is_within(inside, when):
        return ALWAYS
      implied |= inside.atoms(And)
  return _taken_off(when, implied)[0]


def either(conditions: Sequence[Set]) -> Set:
  """Any of some conditions; what all need occurs once."""
  rests, common = apart(conditions)
  return every(*common, union(*rests)) if rests else NEVER


def apart(conditions: Sequence[Set]) -> tuple[list[Set], list[Set]]:
  """What each condition needs beyond what all need; and the latter."""
  shared = -1
  for when in conditions:
    shared &= when.atoms(And)
  if shared == -1 or not shared:
    return list(conditions), []
  split = [_taken_off(when, shared) for when in conditions]
  if any(not taken for _, taken in split):
    return list(conditions), []
  return [rest for rest, _ in split], split[0][1]


def free_of(when: Set, support: int) -> Set:
  """What follows from a condition without some masks."""
  found, pending = [], [when]
  while pending:
    part = pending.pop()
    if isinstance(part, And) and part.support & support:
      pending += part.parts  # keeps most of a long condition
    else:
      found.append(_without_masks(part, support))
  return every(*found)


def _without_masks(s: Set, support: int) -> Set:
  """A set with all features of some masks live, if soon found; else everything."""
  found: dict[Set, Set] = {}
  pending = [s]
  while pending and len(found) < MOST_LOOKED_AT:
    here = pending[-1]
    if not here.support & support:
      found[here] = here
    elif not here.support & ~support:
      found[here] = everything(here.size)
    elif missing := [part for part in here.parts if part not in found]:
      pending += missing
      continue
    else:
      made = here.of([found[part] for part in here.parts]) if here.parts else None
      found[here] = made or everything(here.size)
    pending.pop()
  return found.get(s) or everything(s.size)


def _taken_off(when: Set, implied: int) -> tuple[Set, list[Set]]:
  """A condition without parts (as bits) that are easy to remove; and these."""
  taken = []
  while implied and not when.is_all:
    parts = when.parts if isinstance(when, And) else (when,)
    rest = [part for part in parts if part.atoms(And) & ~implied]
    if len(rest) > 1 or rest == [when]:
      break
    taken += [part for part in parts if part not in rest]
    when = rest[0] if rest else ALWAYS
  return when, taken
