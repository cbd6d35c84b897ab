"""Many sets at once as one circuit: a flat list of gates, evaluated layer by layer.

Every position of every set is a gate: false, true, a feature, the *or* of some features (a wide gate), or the *and* or
*or* of two earlier gates. Where sets take, lay out or repeat the positions of others, gates are shared and nothing is
added. What is computed from it takes time in proportion to the gates, and its program is of one size whatever the
network is.

**What features take with them.** A gate is a monotone function of the features: switching one off never brings
a gate to life. A feature is *critical* to a gate if the gate is alive and would not be without that feature:
a critical variable of a monotone function, at the point that the masks are (in the theory of reliability, a
critical component of a coherent system: Birnbaum 1969). Write C(g) for the features critical to a live gate g.
Then

    C(feature)  =  the feature itself
    C(a and b)  =  C(a) | C(b)         both are alive, and either's going is enough
    C(a or b)   =  C(a)                if a alone is alive; C(b) if b alone is
    C(a or b)   =  C(a) & C(b)         if both are: both have to go

Let every gate have a weight: what is lost if it goes. What a feature takes with it is the sum of the weights of
all gates that it is critical to. It is found without looking at pairs of a gate and a feature where no feature
lies below both a and b, since then C(a) and C(b) have nothing in common. From the last gate to the first, the
weight of ``a and b`` goes to a and to b; that of ``a or b`` goes to the one that alone is alive, and nowhere if
both are, and that of a wide gate to the last feature that is alive; what arrives at a feature is the answer. It is
back-propagation, and all sets' weights go down together.

Take features p, q, r, s, all alive but q, and gates of weight one:

    x = p or q      C(x) = {p}         its weight goes to p
    y = r or s      C(y) = {}          either keeps it alive: its weight goes nowhere
    z = x and y     C(z) = {p}         its weight goes to x, and on to p; and to y, and no further

So p takes x and z with it, two in all; r and s take nothing. Where a feature lies below both inputs, this fails:

    u = (p and r) and (p and s)        C(u) = {p, r} | {p, s}: the weight would arrive at p twice
    v = (p and r) or (p and s)         C(v) = {p, r} & {p, s} = {p}: it would arrive nowhere

There (``sharing.py``) what handing weights on would miss or count twice is added feature by feature, without any
subtraction:

- ``a and b``: the weight goes to a alone, and to every feature critical to b but not to a (of u: s);
- ``a or b``: a feature critical to both, which are both alive, takes the gate with it too (of v: p).

The first three in code, each mask of one feature:

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
    """The features of some masks, given as bits."""
    keys = keys_of(support)
    return np.concatenate([np.zeros(0, int), *(self.first[k] + np.arange(self._masks[k]) for k in keys)])

  def positions(self, roots: Iterable[Set]) -> Kinds:
    """Which gates are the positions of which of some of the sets."""
    roots = list(roots)
    gates = np.concatenate([np.zeros(0, int), *(self.gates[s] for s in roots)])
    of_root = np.repeat(np.arange(len(roots)), [s.size for s in roots])
    return Kinds(of_root, gates, len(roots), self.size)

  def live(self, features: Same, xp: ModuleType) -> Same:
    """Which gates are alive, from which features are."""
    room = xp.zeros(self.size - self._start + self._layers.padding, bool)
    wide = self._wide.counts(features, xp) > 0
    state = xp.concatenate([xp.asarray([False, True]), features, wide, room])

    def step(state: Array, at: int, left: Array, right: Array, every: Array, cut: Array) -> Array:
      a, b = state[left], state[right]
      return put(state, at, xp.where(every, a & b, a | b))

    return self._layers.run(step, state, self._start)

  def drops(self, live: Same, weights: Same, xp: ModuleType) -> Same:
    """What each feature takes with it.

    Args:
      live: which gates are alive.
      weights: ``(lanes, gates)``, what is lost with each gate; lanes are independent of each other.
      xp: the module that computes.

    Returns:
      ``(lanes, features)``: what is lost with each feature; nothing with those already gone.
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
