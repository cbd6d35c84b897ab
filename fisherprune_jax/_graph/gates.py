"""The gates of a circuit (circuit.py) while it is built.

A gate is an *or* of features, or an *and* or *or* of two earlier gates. Sets make theirs with a builder.
"""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # sets are made of gates, not gates of sets
  from fisherprune_jax._graph.sets import Set

FALSE, TRUE, FEATURES = 0, 1, 2
"""The first gates. The features of all masks follow, then wide gates, then the others by layer."""

Gates = tuple[np.ndarray, bool]
"""The gate of each position, and whether no feature is below two, or twice below one."""


class Wiring(NamedTuple):
  """The gates behind the features: wide ones, then those with two inputs, by layer.

  Attributes:
    wide: per input of wide gates, the gate.
    below: per such input, the feature.
    left: one input of each other gate.
    right: the other input.
    every: whether it is an *and*.
    shared: whether features may be below both inputs.
    bounds: where layers begin, and the end.
    places: by a gate's number while building (features, too), the final one.
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
  """A circuit under construction, with its size so far."""

  def __init__(self, first: Mapping[Hashable, int], features: int) -> None:
    self._first = first
    self._of: dict[Set, Gates] = {}
    self.size = self._start = FEATURES + features
    self._features = features
    self._made: list[tuple[bool, bool, np.ndarray, np.ndarray, np.ndarray]] = []
    self._wide: list[tuple[np.ndarray, np.ndarray]] = []

  def add(self, s: "Set") -> None:
    """Its parts must come first."""
    self._of[s] = s.gates(self)

  def of(self, s: "Set") -> Gates:
    return self._of[s]

  def features(self, key: Hashable, size: int) -> np.ndarray:
    return FEATURES + self._first[key] + np.arange(size)

  def gate(self, every: bool, a: np.ndarray, b: np.ndarray, shared: bool) -> np.ndarray:
    """The *and* (``every``) or *or* of pairs; ``shared`` if features may be below both."""
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
    """The *or* of each group of gates; false for empty groups."""
    # By group, each gate once.
    codes = np.unique(groups * np.int64(self.size) + gates)
    groups, gates = np.divmod(codes, self.size)
    if gates.size and gates.min() >= FEATURES and gates.max() < FEATURES + self._features:
      return self._any_of_features(groups, gates, size)
    while gates.size > (starts := np.flatnonzero(np.diff(groups, prepend=-1))).size:
      # Within groups, every other gate takes in the next one.
      rank = np.arange(gates.size) - np.repeat(starts, np.diff(starts, append=gates.size))
      first = np.flatnonzero((rank % 2 == 0) & (np.append(rank[1:], 0) > 0))
      gates[first] = self.gate(False, gates[first], gates[first + 1], shared)
      gates, groups = gates[rank % 2 == 0], groups[rank % 2 == 0]
    out = np.full(size, FALSE)
    out[groups] = gates
    return out

  def _any_of_features(self, groups: np.ndarray, gates: np.ndarray, size: int) -> np.ndarray:
    """One wide gate per group of features: a tree would need most gates of all."""
    out, counts = np.full(size, FALSE), np.bincount(groups, minlength=size)
    out[groups] = gates
    several = np.flatnonzero(counts > 1)
    out[several] = self.size + np.arange(several.size)
    there = counts[groups] > 1
    self._wide.append((out[groups[there]], gates[there] - FEATURES))
    self.size += several.size
    return out

  def finish(self) -> Wiring:
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
    order = order[own.size :]  # wide gates need only features, so come first
    bounds = np.searchsorted(layer[order], np.arange(1, layer.max(initial=0) + 2))
    left, right = places[inputs[:, order]]
    return Wiring(wide, below, left, right, every[order], shared[order], bounds, places)
