"""Keeping a few dead features, for widths that hardware likes."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fisherprune_jax.graph.evaluate import Evaluation
from fisherprune_jax.graph.liveness import Liveness
from fisherprune_jax.graph.program import Value
from fisherprune_jax.graph.sets import ALL, AND, ANY, CONCAT, FIXED, LEAF, OR, OUTER, TAKE, Set

Rows = dict[Any, np.ndarray]
Features = list[tuple[Any, int]]
"""Features by mask and position."""


def widths_of(values: Iterable[Value], live: Liveness) -> list[Set]:
  """What is kept along each axis of these variables, where that depends on masks."""
  boxes = [box for value in values if value in live.asked for box in live.rows(value) or [live.stored(value)]]
  return list(dict.fromkeys(s for box in boxes for s in box if s.leaves))


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
  others = [ev.bits(t) for t in widths if t is not s and t.size == s.size and t.leaves & s.leaves]
  shared = sum(others, np.zeros(s.size, int))
  dead = np.flatnonzero(~ev.bits(s))
  return dead[np.argsort(-shared[dead], kind="stable")].tolist()


def _features(s: Set, at: int) -> Features | None:
  """Features that bring one position into a set; None if nothing can."""
  return _FEATURES[s.kind](s, at)


def _every(choices: Iterable[Features | None]) -> Features | None:
  found = list(choices)
  return None if None in found else [feature for features in found for feature in features or []]


def _first(choices: Iterable[Features | None]) -> Features | None:
  return next((features for features in choices if features is not None), None)


def _of_take(s: Set, at: int) -> Features | None:
  return None if s.data[at] < 0 else _features(s.parts[0], s.data[at])


def _of_concat(s: Set, at: int) -> Features | None:
  for part in s.parts:
    if at < part.size:
      return _features(part, at)
    at -= part.size
  raise IndexError(at)


def _of_outer(s: Set, at: int) -> Features | None:
  places = np.unravel_index(at, [part.size for part in s.parts])
  return _every(_features(part, int(place)) for part, place in zip(s.parts, places, strict=True))


def _of_any(s: Set, at: int) -> Features | None:
  shape, keep = s.data
  group = np.moveaxis(np.arange(s.parts[0].size).reshape(shape), keep, 0)[at].reshape(-1)
  return _first(_features(s.parts[0], int(place)) for place in group)


_FEATURES = {
  ALL: lambda s, at: [],
  FIXED: lambda s, at: [] if s.data[at] else None,
  LEAF: lambda s, at: [(s.data, at)],
  AND: lambda s, at: _every(_features(part, at) for part in s.parts),
  OR: lambda s, at: _first(_features(part, at) for part in s.parts),
  TAKE: _of_take,
  CONCAT: _of_concat,
  OUTER: _of_outer,
  ANY: _of_any,
}
