"""All sets of a program as one circuit, evaluated layer by layer.

Every position of a set is a gate: false, true, a feature, the *or* of features (a wide gate), or the *and* or *or* of
two earlier gates. Sets that select, lay out or repeat positions share gates. Time is proportional to the gates; the
compiled program has one size for all networks.

**Marginal costs.** A gate is a monotone function of features: masking one never brings a gate to life. A feature is
*critical* to a live gate that would be dead without it (a critical component of a coherent system: Birnbaum 1969).
Write C(g) for the features critical to a live gate g:

    C(feature)  =  the feature itself;
    C(a and b)  =  C(a) | C(b)         losing either is enough;
    C(a or b)   =  C(a)                if only a is live; C(b) if only b is;
    C(a or b)   =  C(a) & C(b)         if both are live.

A gate's weight is the cost lost with it. A feature's marginal cost is the weight of all gates that it is critical to.
If no feature is below both a and b, C(a) and C(b) are disjoint. Then one reverse pass gives all marginal costs, like
back-propagation, for all sets together. The weight of an *and* goes to both inputs; that of an *or* to the only live
one, or nowhere; that of a wide gate to its last live feature.

Take features p, q, r, s, all live but q, and weights of one:

    x = p or q      C(x) = {p}         goes to p;
    y = r or s      C(y) = {}          goes nowhere;
    z = x and y     C(z) = {p}         goes to x, then p; and to y, no further.

So p gets two, and r and s nothing. This fails with a feature below both inputs:

    u = (p and r) and (p and s)        C(u) = {p, r} | {p, s}: p would get it twice;
    v = (p and r) or (p and s)         C(v) = {p, r} & {p, s} = {p}: p would get nothing.

There, sharing.py corrects single features, without subtraction:

- *and*: the weight goes to a alone, and to features critical to b but not to a (of u: s);
- *or*: features critical to both live inputs get it, too (of v: p).

The first three in code, with masks of one feature:

>>> from fisherprune_jax._graph import sets
>>> p, q, r, s = (sets.leaf(name, 1) for name in "pqrs")
>>> x, y = sets.union(p, q), sets.union(r, s)
>>> z = sets.intersection(x, y)
>>> circuit = Circuit([x, y, z], {"p": 1, "q": 1, "r": 1, "s": 1})
>>> live = circuit.live(np.array([True, False, True, True]), np)
>>> weights = np.zeros((1, circuit.size))
>>> weights[0, [circuit.gates[gate][0] for gate in (x, y, z)]] = 1
>>> circuit.drops(live, weights, np)
array([[2., 0., 0., 0.]])
"""

from collections.abc import Hashable, Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from fisherprune_jax._graph.gates import FEATURES, Builder
from fisherprune_jax._graph.kinds import Kinds, add_at
from fisherprune_jax._graph.layers import Layers, Same, columns_at, put
from fisherprune_jax._graph.sets import Set, in_order, keys_of
from fisherprune_jax._graph.sharing import Sharing
from fisherprune_jax._types import Array


class Circuit:
  """Sets as gates, over masks of given sizes.

  Attributes:
    first: by key, where a mask's features begin among all.
    features: the number of features.
    gates: by set, the gate of each position.
    size: the number of gates.
  """

  def __init__(self, roots: Iterable[Set], masks: Mapping[Any, int]) -> None:
    roots = list(dict.fromkeys(roots))
    self._masks: dict[Hashable, int] = dict(masks)
    starts = np.cumsum([0, *masks.values()])
    self.first: dict[Hashable, int] = dict(zip(masks, starts.tolist(), strict=False))
    self.features = int(starts[-1])
    builder = Builder(self.first, self.features)
    for s in in_order(roots):
      builder.add(s)
    wiring = builder.finish()
    self.gates = {s: wiring.places[builder.of(s)[0]] for s in roots}
    self.size = wiring.places.size
    self._wide = Kinds(wiring.wide, wiring.below, int(wiring.wide.max(initial=-1)) + 1, self.features)
    self._start = FEATURES + self.features + self._wide.count
    self._sharing = Sharing(self.features, wiring)
    sides = self._sharing.left, self._sharing.right
    self._layers = Layers(wiring.bounds, *sides, wiring.every, self._sharing.cut)

  def features_of(self, support: int) -> np.ndarray:
    """The features of masks given as bits."""
    keys = keys_of(support)
    return np.concatenate([np.zeros(0, int), *(self.first[k] + np.arange(self._masks[k]) for k in keys)])

  def positions(self, roots: Iterable[Set]) -> Kinds:
    roots = list(roots)
    gates = np.concatenate([np.zeros(0, int), *(self.gates[s] for s in roots)])
    of_root = np.repeat(np.arange(len(roots)), [s.size for s in roots])
    return Kinds(of_root, gates, len(roots), self.size)

  def live(self, features: Same, xp: ModuleType) -> Same:
    """Which gates are live, from which features are."""
    room = xp.zeros(self.size - self._start + self._layers.padding, bool)
    wide = self._wide.counts(features, xp) > 0
    state = xp.concatenate([xp.asarray([False, True]), features, wide, room])

    def step(state: Array, at: int, left: Array, right: Array, every: Array, cut: Array) -> Array:
      a, b = state[left], state[right]
      return put(state, at, xp.where(every, a & b, a | b))

    return self._layers.run(step, state, self._start)

  def drops(self, live: Same, weights: Same, xp: ModuleType) -> Same:
    """The marginal costs of features, ``(lanes, features)``; zero for dead ones.

    The weights of gates are ``(lanes, gates)``; lanes are independent.
    """
    room = xp.zeros((weights.shape[0], self._layers.padding), weights.dtype)
    state = xp.concatenate([weights * live[: self.size], room], axis=1)

    def step(state: Array, at: int, left: Array, right: Array, every: Array, cut: Array) -> Array:
      a, b = live[left], live[right]
      mine = columns_at(state, at, left.size)
      state = add_at(state, (slice(None), left), mine * xp.where(every, a & b, a & ~b))
      return add_at(state, (slice(None), right), mine * xp.where(every, a & b & ~cut, b & ~a))

    state = self._layers.run(step, state, self._start, reverse=True)
    end = FEATURES + self.features
    alive = live[FEATURES:end]
    last = self._wide.counts(alive, xp) == 1
    found = state[:, FEATURES:end] + self._wide.spread(state[:, end : self._start] * last, xp)
    if self._sharing.found:
      gates, features, extra = self._sharing.extras(live, last, xp)
      found = add_at(found, (slice(None), features), state[:, gates] * extra)
    return found * alive
