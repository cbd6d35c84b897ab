"""Gates, as a circuit is built (``circuit.py``): each the *and* or the *or* of two earlier ones.

Sets bring their own (``Set.gates``) by the few operations of a ``Builder``.
"""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # sets are made of gates, not gates of sets
  from fisherprune_jax._graph.sets import Set

FALSE, TRUE, FEATURES = 0, 1, 2
"""The first gates; from ``FEATURES`` on come the features of all masks, then the gates layer by layer."""

Gates = tuple[np.ndarray, bool]
"""The gate of each position of a set, and whether no feature is found at two of them, or twice at one."""


class Wiring(NamedTuple):
  """The gates behind the features, layer by layer: each layer needs the ones before.

  Attributes:
    left: one input of each gate.
    right: the other one.
    every: whether both inputs are needed: an *and*.
    shared: whether features may be below both inputs.
    bounds: where layers begin, and the end.
    places: for every gate, features too, by the number that it had while the circuit was built: which it is now.
  """

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
    self._made: list[tuple[bool, bool, np.ndarray, np.ndarray]] = []

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
      self._made.append((every, shared, *np.divmod(pairs, self.size)))
      self.size += pairs.size
    return out

  def any_of_each(self, groups: np.ndarray, gates: np.ndarray, size: int, shared: bool) -> np.ndarray:
    """For each of ``size`` groups the *or* of its gates; false for one that has none."""
    # Group by group, each gate once.
    codes = np.unique(groups * np.int64(self.size) + gates)
    groups, gates = np.divmod(codes, self.size)
    while gates.size > (starts := np.flatnonzero(np.diff(groups, prepend=-1))).size:
      # Within each group, every other gate takes in the next one.
      rank = np.arange(gates.size) - np.repeat(starts, np.diff(starts, append=gates.size))
      first = np.flatnonzero((rank % 2 == 0) & (np.append(rank[1:], 0) > 0))
      gates[first] = self.gate(False, gates[first], gates[first + 1], shared)
      gates, groups = gates[rank % 2 == 0], groups[rank % 2 == 0]
    out = np.full(size, FALSE)
    out[groups] = gates
    return out

  def finish(self) -> Wiring:
    """All gates, sorted into layers."""
    layer, at = np.zeros(self.size, np.int64), self._start
    for _, _, left, right in self._made:
      layer[at : at + left.size] = 1 + np.maximum(layer[left], layer[right])
      at += left.size
    sizes = [left.size for _, _, left, _ in self._made]
    every, shared = (np.repeat(np.array([made[i] for made in self._made], bool), sizes) for i in (0, 1))
    left, right = (np.concatenate([np.zeros(0, int), *(made[i] for made in self._made)]) for i in (2, 3))
    order = np.argsort(layer[self._start :], kind="stable")
    places = np.arange(self.size)
    places[self._start + order] = self._start + np.arange(order.size)
    layer = layer[self._start + order]
    bounds = np.searchsorted(layer, np.arange(1, layer.max(initial=0) + 2))
    return Wiring(places[left[order]], places[right[order]], every[order], shared[order], bounds, places)
