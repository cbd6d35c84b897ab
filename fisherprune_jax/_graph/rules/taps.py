"""How many taps of a sliding window meet an entry, place by place."""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fisherprune_jax._graph.windows import Slide


@functools.lru_cache(maxsize=4096)
def met(slide: Slide) -> np.ndarray:
  """Taps on entries, not on padding or gaps, per place."""
  places = np.arange(slide.places) * slide.stride - slide.before
  taps = np.arange(slide.taps) * slide.step
  if places.size < taps.size:  # loop over fewer
    return np.asarray([np.sum(slide.meets(place + taps)) for place in places], np.int64)
  return sum((slide.meets(places + tap).astype(np.int64) for tap in taps), np.zeros(places.size, np.int64))


def histogram(slides: Sequence[Slide]) -> Counter[int]:
  """How many places have how many taps on entries, over all axes."""
  counts = Counter({1: 1})
  for slide in slides:
    joint: Counter[int] = Counter()
    for (taken, n), (more, m) in itertools.product(counts.items(), Counter(met(slide).tolist()).items()):
      joint[taken * more] += n * m
    counts = joint
  return counts
