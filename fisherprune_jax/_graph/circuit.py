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

from fisherprune_jax._graph.gates import FEATURES, Builder
from fisherprune_jax._graph.layers import Layers, put, rows_at
from fisherprune_jax._graph.sets import Set, in_order, keys_of
from fisherprune_jax._graph.sharing import Sharing


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
    builder = Builder(self.first, self.features)
    for s in in_order(roots):
      builder.add(s)
    left, right, both, shared, layer = builder.finish()
    order = np.argsort(layer, kind="stable")
    moved = np.arange(FEATURES + self.features + order.size)
    moved[FEATURES + self.features + order] = FEATURES + self.features + np.arange(order.size)
    self.gates = {s: moved[builder.of(s)[0]] for s in roots}
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
