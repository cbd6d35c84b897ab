"""Sums over groups of members, fast if most members are alike.

Members of the same groups are one *kind*, such as a mask's features. Sums are computed per kind.
"""

from types import ModuleType
from typing import Any

import jax
import numpy as np

from fisherprune_jax._graph.layers import Same
from fisherprune_jax._types import Array


class Kinds:
  """Which members belong to which groups, by pairs (which may repeat).

  >>> kinds = Kinds(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 1, 2]), 2, 4)
  >>> kinds.of_member.tolist(), kinds.number
  ([1, 2, 2, 0], 3)
  >>> kinds.counts(np.array([True, True, False, True]), np), kinds.spread(np.array([[10, 5]]), np)
  (array([2, 1], dtype=int32), array([[10, 15, 15,  0]]))
  """

  def __init__(self, groups: np.ndarray, members: np.ndarray, count: int, size: int) -> None:
    self.count = count
    order = np.lexsort((groups, members))
    groups, members = groups[order], members[order]
    place = np.arange(members.size) - np.searchsorted(members, members)
    kind, made = np.zeros(size, np.int64), 1
    by_place = np.argsort(place, kind="stable")
    for here in np.split(by_place, np.cumsum(np.bincount(place))[:-1]):
      # By each member's first group, then by the second, ...
      key = kind[members[here]] * count + groups[here]
      found, number = np.unique(key, return_inverse=True)
      kind[members[here]] = made + number
      made += found.size
    _, first, self.of_member = np.unique(kind, return_index=True, return_inverse=True)
    self.number = first.size
    shown = np.isin(members, first)
    self._kind, self._group = self.of_member[members[shown]], groups[shown]

  def counts(self, values: Same, xp: ModuleType) -> Same:
    """How many members of each group are in a set of booleans, int32."""
    of_kinds = add_at(xp.zeros(self.number, np.int32), self.of_member, values.astype(np.int32))
    return add_at(xp.zeros(self.count, np.int32), self._group, of_kinds[self._kind])

  def spread(self, values: Same, xp: ModuleType) -> Same:
    """``(lanes, groups)`` to ``(lanes, members)``: sums over each member's groups."""
    of_kinds = xp.zeros((values.shape[0], self.number), values.dtype)
    return add_at(of_kinds, (slice(None), self._kind), values[:, self._group])[:, self.of_member]


def add_at(array: Any, places: Any, values: Array) -> Any:
  """Adds at places, which may repeat."""
  if isinstance(array, jax.Array):
    return array.at[places].add(values)
  np.add.at(array, places, values)
  return array
