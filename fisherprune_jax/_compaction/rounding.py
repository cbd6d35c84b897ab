"""Keeping a few dead features, for widths that hardware likes."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Value
from fisherprune_jax._graph.sets import ALL, AND, ANY, CONCAT, FIXED, LEAF, OR, OUTER, TAKE, Set

Rows = dict[Any, np.ndarray]
Features = list[tuple[Any, int]]
"""Features by mask and position."""
Place = tuple[Set, int]
"""A position of a set."""


def widths_of(values: Iterable[Value], live: Liveness) -> list[Set]:
  """What is kept along each axis of these variables, where that depends on masks."""
  boxes = [
    box for value in values if value in live.asked for box in live.layers(value) or [live.stored(value)]
  ]
  return list(dict.fromkeys(s for box in boxes for s in box if s.support))


def round_up(masks: Rows, widths: Iterable[Set], multiple: int) -> Rows:
  """Switches on just enough features for every width to be a multiple of a number, or whole.

  Args:
    masks: the masks, one vector by key.
    widths: the sets whose sizes are to be multiples.
    multiple: of what.

  Returns:
    Masks that keep everything that the given ones keep, and a little more.
  """
  masks = {key: np.array(mask) != 0 for key, mask in masks.items()}
  pending = list(widths)
  while any(_grow(s, masks, pending, multiple) for s in pending):
    pass  # what one width gained may have unsettled another: a union, say
  return {key: mask.astype(np.float32) for key, mask in masks.items()}


def _grow(s: Set, masks: Rows, widths: list[Set], multiple: int) -> bool:
  """Switches on features, in place, until one width is a multiple; returns whether any was."""
  ev = Evaluation(masks)
  if not _missing(ev, s, multiple):
    return False
  grew = False
  for at in _by_preference(ev, s, widths):
    features = _features(s, at)
    for key, feature in features or []:
      masks[key][feature] = True
    grew = grew or bool(features)
    if not _missing(Evaluation(masks), s, multiple):
      break
  return grew


def _missing(ev: Evaluation, s: Set, multiple: int) -> bool:
  count = int(ev.count(s))
  return count % multiple != 0 and count != s.size


def _by_preference(ev: Evaluation, s: Set, widths: list[Set]) -> list[int]:
  """The dead positions, those first that are alive in most other widths: these do not grow by them."""
  others = [ev.bits(t) for t in widths if t is not s and t.size == s.size and t.support & s.support]
  shared = sum(others, np.zeros(s.size, int))
  dead = np.flatnonzero(~ev.bits(s))
  return dead[np.argsort(-shared[dead], kind="stable")].tolist()


def _features(s: Set, at: int) -> Features | None:
  """Features that bring one position into a set; None if nothing can."""
  found: dict[Place, Features | None] = {}
  pending = [(s, at)]
  while pending:  # no recursion: expressions are as deep as the network
    here = pending[-1]
    if here[0].kind == LEAF:
      found[here] = [(here[0].data, here[1])]
    elif (missing := _settle(here, found)) is not None:
      pending.append(missing)
      continue
    pending.pop()
  return found[s, at]


def _settle(here: Place, found: dict[Place, Features | None]) -> Place | None:
  """Works one position out from those that it hangs on; returns one that has to be worked out before, if any."""
  every, places = _PLACES[here[0].kind](*here)
  features: Features | None = [] if every else None
  for place in places:
    if place not in found:
      return place
    one = found[place]
    if (one is None) == every:  # one that cannot be, of all; one that can be, of any
      features = one
      break
    if every:
      features = [*(features or []), *(one or [])]
  found[here] = features
  return None


def _of_take(s: Set, at: int) -> tuple[bool, list[Place]]:
  return False, [(s.parts[0], int(s.data[at]))] if s.data[at] >= 0 else []


def _of_concat(s: Set, at: int) -> tuple[bool, list[Place]]:
  for part in s.parts:
    if at < part.size:
      return True, [(part, at)]
    at -= part.size
  raise IndexError(at)


def _of_outer(s: Set, at: int) -> tuple[bool, list[Place]]:
  places = np.unravel_index(at, [part.size for part in s.parts])
  return True, [(part, int(place)) for part, place in zip(s.parts, places, strict=True)]


def _of_any(s: Set, at: int) -> tuple[bool, list[Place]]:
  return False, [(s.parts[0], place) for place in np.flatnonzero(s.data == at).tolist()]


_PLACES: dict[str, Callable[[Set, int], tuple[bool, list[Place]]]] = {
  ALL: lambda s, at: (True, []),
  FIXED: lambda s, at: (bool(s.data[at]), []),
  AND: lambda s, at: (True, [(part, at) for part in s.parts]),
  OR: lambda s, at: (False, [(part, at) for part in s.parts]),
  TAKE: _of_take,
  CONCAT: _of_concat,
  OUTER: _of_outer,
  ANY: _of_any,
}
"""What a position hangs on: whether every one of some positions has to be in its set, or any of them."""
