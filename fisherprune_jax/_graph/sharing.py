"""Gates with the same features below both inputs.

Most circuits have none, and then nothing is computed. Otherwise these features are looked at one by one. A *pair* is a
gate and a feature below it. Whether it is critical follows from the feature's pairs with the gate's inputs. Pairs are
found once, on the host.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from fisherprune_jax._graph.gates import FEATURES, Wiring
from fisherprune_jax._graph.layers import Layers, put
from fisherprune_jax._types import Array

NONE = 0
"""The pair for "not below". Then come the features' own, and those of wide gates."""


class Sharing:
  """The pairs that a circuit needs.

  Attributes:
    left: the left inputs; where weights are cut, the right has fewer features below.
    right: the right inputs.
    cut: the gates that pass no weight to the right.
    found: whether any gate needs correction.
  """

  def __init__(self, features: int, wiring: Wiring) -> None:
    self.left, self.right, self._every = wiring.left, wiring.right, wiring.every
    self.cut = np.zeros(wiring.left.size, bool)
    self.found = False
    self._features = features
    if wiring.shared.any():
      self._finish(_Pairs(features, wiring), wiring.shared)

  def _finish(self, pairs: "_Pairs", suspects: np.ndarray) -> None:
    gate = pairs.gate - pairs.start
    below = np.stack([pairs.left, pairs.right])
    twice = (below != NONE).all(axis=0) & suspects[gate]
    shared = np.zeros(self.left.size, bool)
    shared[gate[twice]] = True
    self.cut = shared & self._every
    # Cut the input with fewer features below, as each needs a pair.
    counts = np.stack([np.bincount(gate, side != NONE, self.left.size) for side in below])
    swap = self.cut & (counts[1] > counts[0])
    self.left, self.right = np.where(swap, self.right, self.left), np.where(swap, self.left, self.right)
    below = np.where(swap[gate], below[::-1], below)
    wanted = twice | (self.cut[gate] & (below[1] != NONE))
    self.found = bool(wanted.any())
    self._extras = (pairs.gate[wanted], pairs.feature[wanted], self._every[gate[wanted]], *below[:, wanted])
    self._keep_needed(pairs, below, wanted)

  def _keep_needed(self, pairs: "_Pairs", below: np.ndarray, wanted: np.ndarray) -> None:
    """Drops pairs that are not needed, and renumbers the rest."""
    own = self._own = pairs.own  # the first pair of a gate with two inputs
    self._wide, self._below = pairs.wide, pairs.below
    needed = np.zeros(own + pairs.gate.size, bool)
    needed[below[:, wanted]] = True
    for low, high in reversed(pairs.spans):
      needed[below[:, low:high][:, needed[own + low : own + high]]] = True
    kept = np.flatnonzero(needed[own:])
    moved = np.zeros(needed.size, np.int64)
    moved[:own] = np.arange(own)
    moved[own + kept] = own + np.arange(kept.size)
    gate, (left, right) = pairs.gate[kept] - pairs.start, moved[below[:, kept]]
    self._layers = Layers(
      np.searchsorted(kept, [*(low for low, _ in pairs.spans), pairs.gate.size]),
      pairs.gate[kept], left, right, self.left[gate], self.right[gate], self._every[gate],
    )  # fmt: skip
    gates, features, every, *sides = self._extras
    self._extras = (gates, features, every, *(moved[side] for side in sides))
    self._size = kept.size

  def extras(self, live: Array, last: Array, xp: ModuleType) -> tuple[np.ndarray, np.ndarray, Array]:
    """Gates, features, and whether the feature gets the gate's weight beyond the reverse pass.

    ``last`` tells which wide gates have one live feature.
    """
    gates, features, every, left, right = self._extras
    alive = live[FEATURES : FEATURES + self._features]
    of_wide = last[self._wide] & alive[self._below]
    own = xp.concatenate([xp.zeros(1, bool), alive, of_wide])
    state = xp.concatenate([own, xp.zeros(self._size + self._layers.padding, bool)])

    def step(
      state: Array, at: int, gate: Array, x: Array, y: Array, a: Array, b: Array, every: Array
    ) -> Array:
      of_either = state[x] | state[y]
      of_all_alive = (state[x] | ~live[a]) & (state[y] | ~live[b])
      return put(state, at, live[gate] & xp.where(every, of_either, of_all_alive))

    state = self._layers.run(step, state, self._own)
    return gates, features, state[right] & xp.where(every, ~state[left], state[left])


class _Pairs:
  """The pairs of some gates, and of all below them.

  Attributes:
    start: the first gate with two inputs.
    own: the number of its first pair.
    wide: the gate of each pair of a wide gate.
    below: its feature.
    gate: the gate of each other pair.
    feature: its feature.
    left: the feature's pair with the left input, or NONE.
    right: likewise.
    spans: the layers of pairs.
  """

  def __init__(self, features: int, wiring: Wiring) -> None:
    self._features, self._wiring = features, wiring
    end = FEATURES + features
    self.start = end + int(wiring.wide.max(initial=-1)) + 1
    layers = list(zip(wiring.bounds[:-1].tolist(), wiring.bounds[1:].tolist(), strict=True))
    wanted = self._wanted(layers)
    demanded = wanted[end + wiring.wide]
    self.wide, self.below = wiring.wide[demanded], wiring.below[demanded]
    self.own = self._known = 1 + features + self.wide.size
    self._feature = np.concatenate([np.arange(-1, features), self.below])  # by pair, with spare room
    self._first = np.zeros(wanted.size, np.int64)  # by gate
    self._count = np.zeros(wanted.size, np.int64)
    self._first[FEATURES:end] = 1 + np.arange(features)
    self._count[FEATURES:end] = 1
    gates, first, count = np.unique(self.wide, return_index=True, return_counts=True)
    self._first[end + gates], self._count[end + gates] = 1 + features + first, count
    self.spans: list[tuple[int, int]] = []
    two = wanted[self.start :]
    found = [self._layer(low + np.flatnonzero(two[low:high])) for low, high in layers]
    self.gate, self.feature, self.left, self.right = map(np.concatenate, zip(*found, strict=True))

  def _wanted(self, layers: Sequence[tuple[int, int]]) -> np.ndarray:
    """The gates that need pairs: those that may share features, and all below."""
    wanted = np.concatenate([np.zeros(self.start, bool), self._wiring.shared])
    for low, high in reversed(layers):
      there = wanted[self.start + low : self.start + high]
      for side in (self._wiring.left, self._wiring.right):
        wanted[side[low:high][there]] = True
    return wanted

  def _layer(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of a layer's gates: gate, feature, left and right."""
    gates = self.start + at
    codes, sides = [], []
    for inputs in (self._wiring.left[at], self._wiring.right[at]):
      count = self._count[inputs]
      offsets = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
      sides.append(np.repeat(self._first[inputs], count) + offsets)
      codes.append(np.repeat(gates, count) * self._features + self._feature[sides[-1]])
    found, place = np.unique(np.concatenate(codes), return_inverse=True)
    below = np.full((2, found.size), NONE)
    below[0, place[: codes[0].size]], below[1, place[codes[0].size :]] = sides
    gate, feature = np.divmod(found, max(self._features, 1))
    first, end = np.searchsorted(gate, gates), np.searchsorted(gate, gates, side="right")
    self._count[gates], self._first[gates] = end - first, self._known + first
    self._append(feature)
    return gate, feature, below[0], below[1]

  def _append(self, feature: np.ndarray) -> None:
    end = self._known + feature.size
    if end > self._feature.size:
      self._feature = np.concatenate([self._feature, np.zeros(end, np.int64)])  # at least twice the room
    self._feature[self._known : end] = feature
    self.spans.append((self._known - self.own, end - self.own))
    self._known = end
