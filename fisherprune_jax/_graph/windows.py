"""Windows that slide along an axis: which entries a place looks at, and which places look at an entry.

A primitive with windows works on all of such an axis, and so both of its factors are ``whole``. What it is asked for may
be less, and then it hangs on less: entries that none of these places looks at are shown as zeros.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.sets import Set


class Slide(NamedTuple):
  """How a window goes along one axis of its input.

  Attributes:
    places: at how many places it stops.
    stride: from place to place.
    taps: how many it has.
    step: from tap to tap.
    entries: how many the input has.
    distance: from entry to entry; between them is nothing.
    before: how much padding lies before the first.
  """

  places: int
  stride: int
  taps: int
  step: int
  entries: int
  distance: int
  before: int

  def meets(self, at: np.ndarray) -> np.ndarray:
    """Whether an entry is at a position of the input with its gaps, and not padding or nothing."""
    return (at % self.distance == 0) & (at >= 0) & (at <= self.distance * (self.entries - 1))


class Window(NamedTuple):
  """A window along one axis.

  Attributes:
    entries: the factor of operands that it slides along.
    places: the factor of results that has its places.
    slide: how it goes.
  """

  entries: str
  places: str
  slide: Slide

  def looked_at(self, places: Set) -> Set:
    """The entries that some of these places look at."""
    if not places.support:
      return sets.everything(self.slide.entries)
    at, entry = _pairs(self.slide)
    return sets.any_of(sets.take(places, at), entry, self.slide.entries)

  def looking(self, entries: Set) -> Set:
    """The places that look at some of these entries."""
    if not entries.support:
      return sets.everything(self.slide.places)
    at, entry = _pairs(self.slide)
    return sets.any_of(sets.take(entries, entry), at, self.slide.places)


@functools.lru_cache(maxsize=1024)
def _pairs(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
  """Every place with every entry that it looks at."""
  starts, taps = np.arange(slide.places) * slide.stride - slide.before, np.arange(slide.taps) * slide.step
  found = starts[:, None] + taps
  inside = slide.meets(found)
  return np.nonzero(inside)[0], found[inside] // slide.distance


def asked(
  windows: Sequence[Window], found: Mapping[str, Set], results: Iterable[Mapping[str, Set]]
) -> dict[str, Set]:
  """What operands are asked for, by factors: what a node works on, but for entries that no place looks at.

  Args:
    windows: those of the node.
    found: the entries of its factors that it works on.
    results: for each result, what is stored of it by factors.
  """
  results, asked = list(results), dict(found)
  for window in windows:
    places = sets.union(*(result[window.places] for result in results))
    asked[window.entries] = sets.intersection(asked[window.entries], window.looked_at(places))
  return asked


def linked(windows: Sequence[Window], factors: Iterable[str]) -> set[str]:
  """Factors with those that they are linked to by windows."""
  found = {*factors}
  pairs = [{window.entries, window.places} for window in windows]
  return found.union(*(pair for pair in pairs if pair & found))
