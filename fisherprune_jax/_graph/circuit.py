"""Many sets at once as one circuit: a flat list of gates of two inputs each, evaluated layer by layer.

Every position of every set is a gate: false, true, a feature, or the *and* or *or* of two earlier gates. Where
sets take, lay out or repeat the positions of others, gates are shared and nothing is added. What is computed
from it takes time in proportion to the gates, and its program is of one size whatever the network is.

**What features take with them.** Let every gate have a weight: what is lost if it goes. A feature is *critical*
to a live gate if the gate goes with it. Critical to ``a and b`` is what is critical to ``a`` or to ``b``; to
``a or b``, what is critical to every live one of the two. So, from the last gate to the first, the weight of
``a and b`` goes to both, and that of ``a or b`` to the one that alone is alive, as back-propagation would; all
sets' weights go down together, and what arrives at a feature is what it takes with it.

That is exact where no feature lies below both ``a`` and ``b``. Where some do (``sharing.py``), what passing
weights on would miss or count twice is added feature by feature, without any subtraction:

- ``a or b``: a feature critical to both, which are both alive, takes the gate with it too;
- ``a and b``: the weight goes to ``a`` alone, and to every feature critical to ``b`` but not to ``a``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fisherprune_jax._graph.layers import Layers, put, rows_at
from fisherprune_jax._graph.sets import (
  ALL,
  AND,
  ANY,
  CONCAT,
  FIXED,
  LEAF,
  OR,
  OUTER,
  TAKE,
  Set,
  in_order,
  keys_of,
)
from fisherprune_jax._graph.sharing import Sharing

FALSE, TRUE, FEATURES = 0, 1, 2
"""The first gates; from ``FEATURES`` on come the features of all masks, then the gates layer by layer."""


class Circuit:
  """Some sets as gates.

  Args:
    roots: the sets.
    masks: the sizes of all masks, by key.

  Attributes:
    first: by key, where the features of a mask begin among all features.
    features: how many features there are.
    gates: by set, the gate of each of its positions.
    size: how many gates there are.
  """

  def __init__(self, roots: Iterable[Set], masks: Mapping[Any, int]) -> None:
    roots = list(dict.fromkeys(roots))
    self._masks = dict(masks)
    starts = np.cumsum([0, *masks.values()])
    self.first = dict(zip(masks, starts.tolist(), strict=False))
    self.features = int(starts[-1])
    builder = _Builder(self.first, self.features)
    for s in in_order(roots):
      builder.add(s)
    left, right, both, shared, layer = builder.finish()
    order = np.argsort(layer, kind="stable")
    moved = np.arange(FEATURES + self.features + order.size)
    moved[FEATURES + self.features + order] = FEATURES + self.features + np.arange(order.size)
    self.gates = {s: moved[builder.gates[s]] for s in roots}
    self.size = moved.size
    bounds = np.searchsorted(layer[order], np.arange(1, layer.max(initial=0) + 2))
    left, right = moved[left[order]], moved[right[order]]
    self._sharing = Sharing(self.features, left, right, both[order], shared[order], bounds)
    self._layers = Layers(bounds, self._sharing.left, self._sharing.right, both[order], self._sharing.cut)

  def features_of(self, support: int) -> np.ndarray:
    """The features of some masks, given as bits."""
    keys = keys_of(support)
    return np.concatenate([np.zeros(0, int), *(self.first[k] + np.arange(self._masks[k]) for k in keys)])

  def live(self, features: Any, xp: Any) -> Any:
    """Which gates are alive, from which features are."""
    room = xp.zeros(self.size - FEATURES - self.features + self._layers.padding, bool)
    state = xp.concatenate([xp.asarray([False, True]), features, room])

    def step(state: Any, at: Any, left: Any, right: Any, both: Any, cut: Any) -> Any:
      a, b = state[left], state[right]
      return put(xp, state, at, xp.where(both, a & b, a | b))

    return self._layers.run(xp, step, state, FEATURES + self.features)

  def drops(self, live: Any, weights: Any, xp: Any) -> Any:
    """What each feature takes with it.

    Args:
      live: which gates are alive.
      weights: ``(rows, gates)``, what is lost with each gate; rows are independent of each other.
      xp: the module that computes.

    Returns:
      ``(rows, features)``: what is lost with each feature; nothing with those already gone.
    """
    room = xp.zeros((weights.shape[0], self._layers.padding), weights.dtype)
    state = xp.concatenate([weights * live[: self.size], room], axis=1)

    def step(state: Any, at: Any, left: Any, right: Any, both: Any, cut: Any) -> Any:
      a, b = live[left], live[right]
      mine = rows_at(xp, state, at, left.size)
      state = _add(xp, state, left, mine * xp.where(both, a & b, a & ~b))
      return _add(xp, state, right, mine * xp.where(both, a & b & ~cut, b & ~a))

    state = self._layers.run(xp, step, state, FEATURES + self.features, reverse=True)
    found = state[:, FEATURES : FEATURES + self.features]
    if self._sharing.found:
      gates, features, extra = self._sharing.extras(live, xp)
      found = _add(xp, found, features, state[:, gates] * extra)
    return found * live[FEATURES : FEATURES + self.features]


def _add(xp: Any, rows: Any, columns: Any, values: Any) -> Any:
  if xp is not np:
    return rows.at[:, columns].add(values)
  for row, of_row in zip(rows, values, strict=True):
    np.add.at(row, columns, of_row)
  return rows


class _Builder:
  """A circuit as it grows, in the order in which gates are made."""

  def __init__(self, first: Mapping[Any, int], features: int) -> None:
    self.first = first
    self.gates: dict[Set, np.ndarray] = {}
    self._once: dict[Set, bool] = {}  # whether no feature is found at two positions, or twice at one
    self._count = self._start = FEATURES + features
    self._made: list[tuple[bool, bool, np.ndarray, np.ndarray]] = []

  def add(self, s: Set) -> None:
    """The gates of a set whose parts have theirs."""
    self.gates[s], self._once[s] = _GATES[s.kind](self, s)

  def gate(self, both: bool, a: Any, b: Any, shared: bool) -> np.ndarray:
    """The *and* (``both``) or *or* of gates, pair by pair; ``shared`` if features may be below both of a pair."""
    absorbing, neutral = (FALSE, TRUE) if both else (TRUE, FALSE)
    a, b = np.minimum(a, b), np.maximum(a, b)
    out = np.where((a == absorbing) | (b == absorbing), absorbing, np.where(a == neutral, b, a))
    new = np.flatnonzero((a >= FEATURES) & (a != b))
    if new.size:
      pairs, place = np.unique(a[new] * np.int64(self._count) + b[new], return_inverse=True)
      out[new] = self._count + place
      self._made.append((both, shared, *np.divmod(pairs, self._count)))
      self._count += pairs.size
    return out

  def finish(self) -> tuple[np.ndarray, ...]:
    """Per gate its inputs, whether it is an *and*, whether features may be below both inputs, and its layer."""
    layer, at = np.zeros(self._count, np.int64), self._start
    for _, _, left, right in self._made:
      layer[at : at + left.size] = 1 + np.maximum(layer[left], layer[right])
      at += left.size
    sizes = [left.size for _, _, left, _ in self._made]
    both, shared = (np.repeat(np.array([made[i] for made in self._made], bool), sizes) for i in (0, 1))
    left, right = (np.concatenate([np.zeros(0, int), *(made[i] for made in self._made)]) for i in (2, 3))
    return left, right, both, shared, layer[self._start :]

  def leaf(self, s: Set) -> tuple[np.ndarray, bool]:
    return FEATURES + self.first[s.data] + np.arange(s.size), True

  def pair(self, s: Set) -> tuple[np.ndarray, bool]:
    a, b = s.parts
    shared = bool(a.support & b.support)
    once = self._once[a] and self._once[b] and not shared
    return self.gate(s.kind == AND, self.gates[a], self.gates[b], shared), once

  def take(self, s: Set) -> tuple[np.ndarray, bool]:
    (base,) = s.parts
    once = self._once[base] and np.unique(found := s.data[s.data >= 0]).size == found.size
    return np.where(s.data >= 0, self.gates[base][s.data], FALSE), once

  def concat(self, s: Set) -> tuple[np.ndarray, bool]:
    once, support = True, 0
    for part in s.parts:
      once = once and self._once[part] and not part.support & support
      support |= part.support
    return np.concatenate([self.gates[part] for part in s.parts]), once

  def outer(self, s: Set) -> tuple[np.ndarray, bool]:
    out, support = self.gates[s.parts[0]], s.parts[0].support
    for part in s.parts[1:]:
      a, b = np.broadcast_arrays(out[:, None], self.gates[part][None, :])
      out = self.gate(True, a.reshape(-1), b.reshape(-1), bool(support & part.support))
      support |= part.support
    return out, False

  def any(self, s: Set) -> tuple[np.ndarray, bool]:
    (base,) = s.parts
    there = s.data >= 0
    # Group by group, each gate once.
    codes = np.unique(s.data[there] * np.int64(self._count) + self.gates[base][there])
    groups, gates = np.divmod(codes, self._count)
    while gates.size > (starts := np.flatnonzero(np.diff(groups, prepend=-1))).size:
      # Within each group, every other gate takes in the next one.
      rank = np.arange(gates.size) - np.repeat(starts, np.diff(starts, append=gates.size))
      first = np.flatnonzero((rank % 2 == 0) & (np.append(rank[1:], 0) > 0))
      gates[first] = self.gate(False, gates[first], gates[first + 1], not self._once[base])
      gates, groups = gates[rank % 2 == 0], groups[rank % 2 == 0]
    out = np.full(s.size, FALSE)
    out[groups] = gates
    return out, self._once[base]


_GATES = {
  ALL: lambda builder, s: (np.full(s.size, TRUE), True),
  FIXED: lambda builder, s: (np.where(s.data, TRUE, FALSE), True),
  LEAF: _Builder.leaf,
  AND: _Builder.pair,
  OR: _Builder.pair,
  TAKE: _Builder.take,
  CONCAT: _Builder.concat,
  OUTER: _Builder.outer,
  ANY: _Builder.any,
}
