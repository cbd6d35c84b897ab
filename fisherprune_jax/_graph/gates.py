"""Gates, as a circuit is built (``circuit.py``): the *or* of features, and the *and* or the *or* of two earlier gates.

Sets bring their own (``Set.gates``) by the few operations of a ``Builder``.
"""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # sets are made of gates, not gates of sets
  from fisherprune_jax._graph.sets import Set

FALSE, TRUE, FEATURES = 0, 1, 2
"""The first gates; from ``FEATURES`` on come the features of all masks, then wide gates, then the others layer by layer."""

Gates = tuple[np.ndarray, bool]
"""The gate of each position of a set, and whether no feature is found at two of them, or twice at one."""


class Wiring(NamedTuple):
  """The gates behind the features: wide ones, then layer by layer those of two inputs, which need the ones before.

  Attributes:
    wide: for each input of each wide gate, which of these it is of.
    below: likewise, the feature.
    left: one input of each gate.
    right: the other one.
    every: whether both inputs are needed: an *and*.
    shared: whether features may be below both inputs.
    bounds: where layers begin, and the end.
    places: for every gate, features too, by the number that it had while the circuit was built: which it is now.
  """

  wide: np.ndarray
  below: np.ndarray
  left: np.ndarray
  right: np.ndarray
  every: np.ndarray
  shared: np.ndarray
  bounds: np.ndarray
  places: np.ndarray


class Builder:
  """A circuit as it grows, in the order in which gates are made.

  Args:
    first: by key, where the features of a mask begin among all features.
    features: how many features there are.

  Attributes:
    size: how many gates there are so far.
  """

  def __init__(self, first: Mapping[Hashable, int], features: int) -> None:
    self._first = first
    self._of: dict[Set, Gates] = {}
    self.size = self._start = FEATURES + features
    self._features = features
    self._made: list[tuple[bool, bool, np.ndarray, np.ndarray, np.ndarray]] = []
    self._wide: list[tuple[np.ndarray, np.ndarray]] = []

  def add(self, s: "Set") -> None:
    """Makes the gates of a set whose parts have theirs."""
    self._of[s] = s.gates(self)

  def of(self, s: "Set") -> Gates:
    """The gates of a set that has been added."""
    return self._of[s]

  def features(self, key: Hashable, size: int) -> np.ndarray:
    """The features of one mask, which are gates already."""
    return FEATURES + self._first[key] + np.arange(size)

  def gate(self, every: bool, a: np.ndarray, b: np.ndarray, shared: bool) -> np.ndarray:
    """The *and* (``every``) or *or* of gates, pair by pair; ``shared`` if features may be below both of a pair."""
    absorbing, neutral = (FALSE, TRUE) if every else (TRUE, FALSE)
    a, b = np.minimum(a, b), np.maximum(a, b)
    out = np.where((a == absorbing) | (b == absorbing), absorbing, np.where(a == neutral, b, a))
    new = np.flatnonzero((a >= FEATURES) & (a != b))
    if new.size:
      pairs, place = np.unique(a[new] * np.int64(self.size) + b[new], return_inverse=True)
      out[new] = self.size + place
      made = np.arange(self.size, self.size + pairs.size)
      self._made.append((every, shared, made, *np.divmod(pairs, self.size)))
      self.size += pairs.size
    return out

  def any_of_each(self, groups: np.ndarray, gates: np.ndarray, size: int, shared: bool) -> np.ndarray:
    """For each of ``size`` groups the *or* of its gates; false for one that has none."""
    # Group by group, each gate once.
    codes = np.unique(groups * np.int64(self.size) + gates)
    groups, gates = np.divmod(codes, self.size)
    if gates.size and gates.min() >= FEATURES and gates.max() < FEATURES + self._features:
      return self._any_of_features(groups, gates, size)
    while gates.size > (starts := np.flatnonzero(np.diff(groups, prepend=-1))).size:
      # Within each group, every other gate takes in the next one.
      rank = np.arange(gates.size) - np.repeat(starts, np.diff(starts, append=gates.size))
      first = np.flatnonzero((rank % 2 == 0) & (np.append(rank[1:], 0) > 0))
      gates[first] = self.gate(False, gates[first], gates[first + 1], shared)
      gates, groups = gates[rank % 2 == 0], groups[rank % 2 == 0]
    out = np.full(size, FALSE)
    out[groups] = gates
    return out

  def _any_of_features(self, groups: np.ndarray, gates: np.ndarray, size: int) -> np.ndarray:
    """The same of features: a wide gate for each group of several. In a tree of gates most would be of these."""
    out, counts = np.full(size, FALSE), np.bincount(groups, minlength=size)
    out[groups] = gates
    several = np.flatnonzero(counts > 1)
    out[several] = self.size + np.arange(several.size)
    there = counts[groups] > 1
    self._wide.append((out[groups[there]], gates[there] - FEATURES))
    self.size += several.size
    return out

  def finish(self) -> Wiring:
    """All gates, sorted into layers."""
    columns = zip((np.zeros(0, int), np.zeros(0, int)), *self._wide, strict=True)
    wide, below = (np.concatenate(column) for column in columns)
    own, wide = np.unique(wide, return_inverse=True)
    inputs = np.zeros((2, self.size), int)
    every, shared = np.zeros((2, self.size), bool)
    layer = np.zeros(self.size, int)
    for is_every, is_shared, out, left, right in self._made:
      inputs[:, out] = left, right
      every[out], shared[out] = is_every, is_shared
      layer[out] = 1 + np.maximum(layer[left], layer[right])
    order = self._start + np.argsort(layer[self._start :], kind="stable")
    places = np.arange(self.size)
    places[order] = self._start + np.arange(order.size)
    order = order[own.size :]  # wide gates need nothing but features, and so come first
    bounds = np.searchsorted(layer[order], np.arange(1, layer.max(initial=0) + 2))
    left, right = places[inputs[:, order]]
    return Wiring(wide, below, left, right, every[order], shared[order], bounds, places)
