"""Keeping a few dead features, for widths that hardware likes."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Value
from fisherprune_jax._graph.sets import Leaf, Place, Set

Masks = dict[Any, np.ndarray]
"""One vector by key."""
Feature = tuple[Any, int]
"""A feature by mask and position."""


def widths_of(values: Iterable[Value], live: Liveness) -> list[Set]:
  """What is kept along each axis of these variables, where that depends on masks."""
  found = [
    where for value in values if value in live.asked for where in live.layers(value) or [live.stored(value)]
  ]
  return list(dict.fromkeys(sets.gated(s, where.when) for where in found for s in where.box if s.support))


def round_up(masks: Mapping[Any, np.ndarray], widths: Iterable[Set], multiple: int) -> Masks:
  """Switches on just enough features for every width to be a multiple of a number, or whole.

  Args:
    masks: the masks, one vector by key.
    widths: the sets whose sizes are to be multiples.
    multiple: of what.

  Returns:
    Masks that keep everything that the given ones keep, and a little more.
  """
  grown = {key: np.array(mask) != 0 for key, mask in masks.items()}
  all_on = Evaluation({key: np.ones_like(mask) for key, mask in grown.items()})
  pending = list(widths)
  growing = True
  while growing:  # what one width gained may have unsettled another: a union, say
    ev = Evaluation(grown)
    growing = any(_grow(s, ev, grown, pending, multiple, all_on) for s in pending)
  return {key: mask.astype(np.float32) for key, mask in grown.items()}


def _grow(s: Set, ev: Evaluation, masks: Masks, widths: list[Set], multiple: int, all_on: Evaluation) -> bool:
  """Switches on features, in place, until one width is a multiple; returns whether any was."""
  if not _missing(ev, s, multiple):
    return False
  grew = False
  for position in _by_preference(ev, s, widths):
    features = _features(s, position, all_on)
    for key, feature in features:
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


def _features(s: Set, position: int, all_on: Evaluation) -> list[Feature]:
  """Features that bring one position into a set; none if nothing can.

  What cannot be there with every feature switched on cannot be there at all. So where a position hangs on any of
  several, the first that can is chosen once and for all, and no choice is taken back.
  """
  if not _is_in((s, position), all_on):
    return []
  found: list[Feature] = []
  pending: list[Place] = [(s, position)]
  seen = {*pending}
  while pending:
    here, at = pending.pop()
    if isinstance(here, Leaf):
      found.append((here.data, at))
    every, places = here.hangs_on(at)
    chosen = places if every else [next(place for place in places if _is_in(place, all_on))]
    pending += [place for place in chosen if place not in seen]
    seen.update(chosen)
  return found


def _is_in(place: Place, ev: Evaluation) -> bool:
  s, position = place
  return bool(ev.bits(s)[position])
