"""The example that each entry of an array belongs to, where its position shows it.

``Rows`` index examples by position. Moving, slicing or concatenating by known positions changes the index alike. By
unknown positions it is lost; or, for data that depends on no variable, row n becomes example n.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fisherprune_jax._graph.program import Node, Value

Key = Any
"""An axis (by number), a factor of a spec (by name), or the node of a loop, for its iterations."""

FIRST = frozenset({""})
"""The original numbering of examples."""
LARGEST = 2**24
"""The largest index, in entries."""


class Rows(NamedTuple):
  """The examples of an array.

  Attributes:
    keys: where examples differ.
    index: the example at each position along ``keys``, -1 for none; None if unknown.
    base: the numbering: ``FIRST``, or what reordered the data.
    order: the order of all examples in the data, if it is known and differs from the numbers.
    via: arrays of positions, known at run time only, that picked from ``index`` one after the other.
    why: the node through which examples cannot be followed.
  """

  keys: tuple[Key, ...]
  index: np.ndarray | None  # type: ignore[assignment]  # not that of a tuple
  base: frozenset[Any] = FIRST
  order: tuple[int, ...] | None = None
  via: tuple[Value, ...] = ()
  why: Node | None = None

  def same(self, other: "Rows") -> bool:
    if self._replace(index=None) != other._replace(index=None):
      return False
    return self.index is other.index or (
      self.index is not None and other.index is not None and np.array_equal(self.index, other.index)
    )

  def along(self, keys: Sequence[Key], sizes: Sequence[int]) -> "Rows":
    """The same rows along all of ``keys``, a superset of their own."""
    assert self.index is not None
    own = [key for key in keys if key in self.keys]
    index = self.index.transpose([self.keys.index(key) for key in own])
    full = [at for at, key in enumerate(keys) if key not in self.keys]
    index = np.broadcast_to(np.expand_dims(index, full), tuple(sizes)) if full else index
    return self._replace(keys=tuple(keys), index=index)

  def simple(self) -> "Rows":
    """The same rows, without keys along which the example is constant."""
    if self.index is None or self.via:
      return self
    if self.index.size > LARGEST:
      return self._replace(index=None)
    keys, index = list(self.keys), self.index
    for at in reversed(range(index.ndim)):
      if index.shape[at] and (index == index.take([0], at)).all():
        index = index.take(0, at)
        del keys[at]
    return self._replace(keys=tuple(keys), index=index)


def lost(keys: Iterable[Key], why: Node | None, base: frozenset[Any] = FIRST) -> Rows:
  """Rows of unknown examples."""
  return Rows(tuple(keys), None, base, why=why)


def is_all(rows: Rows, count: int) -> bool:
  """Whether every example occurs exactly once."""
  return (
    rows.index is not None
    and not rows.via
    and rows.index.size == count
    and np.array_equal(np.sort(rows.index, axis=None), np.arange(count))
  )


def ordered(rows: Rows, count: int) -> Rows:
  """Rows of data, with their order if all examples are there."""
  if not is_all(rows, count):
    return rows
  assert rows.index is not None
  order = rows.index.reshape(-1)
  return rows._replace(order=None if (order[:-1] < order[1:]).all() else tuple(order.tolist()))


def met(one: Rows, other: Rows, why: Node) -> Rows:
  """The rows that two sources agree on; lost where they differ."""
  keys = (*one.keys, *(key for key in other.keys if key not in one.keys))
  base = one.base | other.base
  if one.index is None or other.index is None:
    return lost(keys, one.why or other.why, base)
  if {*one.keys} != {*other.keys} or one.via != other.via:
    return lost(keys, why, base)
  if one.via:
    return one._replace(base=base) if np.array_equal(one.index, other.index) else lost(keys, why, base)
  other = other.along(one.keys, one.index.shape)
  assert other.index is not None
  if one.index is other.index and one.order == other.order:
    return one._replace(base=base)
  mine, theirs = one.index, other.index
  if ((mine != theirs) & (mine >= 0) & (theirs >= 0)).any():
    return lost(keys, why, base)
  index = mine if (mine >= theirs).all() else np.maximum(mine, theirs)
  return Rows(one.keys, index, base, one.order if one.order == other.order else None)


def together(found: Iterable[Rows], why: Node) -> tuple[Rows, ...]:
  """Merge the rows of operands for one array; rows along disjoint keys stay apart, as in a table of pairs.

  A single example beside others, as in ``h - h[0]``, is ignored, like a mean.
  """
  result: list[Rows] = []
  found = list(found)
  found = [rows for rows in found if rows.keys] or found
  for rows in found:
    at = next((at for at, one in enumerate(result) if {*one.keys} & {*rows.keys} or not rows.keys), None)
    if at is None:
      result.append(rows)
    else:
      result[at] = met(result[at], rows, why)
  return tuple(result)


def mixed(found: Sequence[Rows], why: Node, count: int) -> tuple[Rows, ...]:
  """The same for data: if examples are mixed in as many rows, row n becomes example n."""
  result = []
  for rows in together(found, why):
    whole = next((one for one in found if {*one.keys} <= {*rows.keys} and is_all(one, count)), None)
    if rows.index is None and whole is not None:
      assert whole.index is not None
      index = np.arange(count).reshape(whole.index.shape)
      rows = Rows(whole.keys, index, rows.base)
    result.append(ordered(rows, count))
  return tuple(result)
