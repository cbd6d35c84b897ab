"""Windows that slide along an axis.

Both factors are indivisible: the primitive runs on the full axis. But entries that no demanded place reads do not
matter, and are shown as zeros.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.sets import Set


class Slide(NamedTuple):
  """How a window moves along one axis.

  Attributes:
    places: number of places.
    stride: distance between places.
    taps: number of taps.
    step: distance between taps.
    entries: number of input entries.
    distance: distance between entries, with gaps between.
    before: padding before the first entry.
  """

  places: int
  stride: int
  taps: int
  step: int
  entries: int
  distance: int
  before: int

  def meets(self, at: np.ndarray) -> np.ndarray:
    """Whether positions hold an entry, not padding or a gap."""
    return (at % self.distance == 0) & (at >= 0) & (at <= self.distance * (self.entries - 1))


class Window(NamedTuple):
  """A window from a factor of operands (``entries``) to one of results (``places``)."""

  entries: str
  places: str
  slide: Slide

  def looked_at(self, places: Set) -> Set:
    """The entries that these places read."""
    if not places.support:
      return sets.everything(self.slide.entries)
    at, entry = _pairs(self.slide)
    return sets.any_of(sets.take(places, at), entry, self.slide.entries)

  def looking(self, entries: Set) -> Set:
    """The places that read these entries."""
    if not entries.support:
      return sets.everything(self.slide.places)
    at, entry = _pairs(self.slide)
    return sets.any_of(sets.take(entries, entry), at, self.slide.places)


@functools.lru_cache(maxsize=1024)
def _pairs(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
  """Each place with each entry that it reads."""
  starts, taps = np.arange(slide.places) * slide.stride - slide.before, np.arange(slide.taps) * slide.step
  found = starts[:, None] + taps
  inside = slide.meets(found)
  return np.nonzero(inside)[0], found[inside] // slide.distance


def demanded(
  windows: Sequence[Window], found: Mapping[str, Set], results: Iterable[Mapping[str, Set]]
) -> dict[str, Set]:
  """What a node demands of operands, by factor: only entries that demanded places read.

  ``found`` has the entries that it works on, ``results`` the stored ones of each result.
  """
  results, demanded = list(results), dict(found)
  for window in windows:
    places = sets.union(*(result[window.places] for result in results))
    demanded[window.entries] = sets.intersection(demanded[window.entries], window.looked_at(places))
  return demanded


def linked(windows: Sequence[Window], factors: Iterable[str]) -> set[str]:
  """Factors, and those that windows link to them."""
  found = {*factors}
  pairs = [{window.entries, window.places} for window in windows]
  return found.union(*(pair for pair in pairs if pair & found))
