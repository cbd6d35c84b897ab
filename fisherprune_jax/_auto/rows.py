"""Which example each entry of an array belongs to, as far as its place tells.

``Rows`` are an index: of each position along some axes the number of the example there. Where arrays are moved, cut or
laid end to end by known positions, so is the index. Where positions are not known, the index is lost, or, of data that no
variable has touched, the rows that come out are examples of their own: row n is example n.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fisherprune_jax._graph.program import Node, Value

Key = Any
"""An axis of an array by its number, a factor of a spec by its name, or the node of a loop, for its turns."""

FIRST = frozenset({""})
"""The numbering of examples in which they are given."""
LARGEST = 2**24
"""Entries of an index beyond which it is not followed."""


class Rows(NamedTuple):
  """Where the examples are in an array.

  Attributes:
    keys: along what they differ.
    index: the example at each position along ``keys``, -1 for nobody's; None where that cannot be told.
    base: whose numbers these are: ``FIRST``, or what made rows of data anew.
    order: the order of all examples in the data, where it is a known one and not that of the numbers.
    via: arrays of positions that are only known when the program runs, by which one after the other it was picked
      from what ``index`` says.
    why: what it was that nobody can follow.
  """

  keys: tuple[Key, ...]
  index: np.ndarray | None  # type: ignore[assignment]  # not that of a tuple
  base: frozenset[Any] = FIRST
  order: tuple[int, ...] | None = None
  via: tuple[Value, ...] = ()
  why: Node | None = None

  def same(self, other: "Rows") -> bool:
    """Whether two are equal."""
    if self._replace(index=None) != other._replace(index=None):
      return False
    return self.index is other.index or (
      self.index is not None and other.index is not None and np.array_equal(self.index, other.index)
    )

  def along(self, keys: Sequence[Key], sizes: Sequence[int]) -> "Rows":
    """The same along all of ``keys``, of which it may lack some."""
    assert self.index is not None
    own = [key for key in keys if key in self.keys]
    index = self.index.transpose([self.keys.index(key) for key in own])
    full = [at for at, key in enumerate(keys) if key not in self.keys]
    index = np.broadcast_to(np.expand_dims(index, full), tuple(sizes)) if full else index
    return self._replace(keys=tuple(keys), index=index)

  def simple(self) -> "Rows":
    """Without keys along which the example is always the same."""
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
  """Rows of which nobody can tell whose they are."""
  return Rows(tuple(keys), None, base, why=why)


def is_all(rows: Rows, count: int) -> bool:
  """Whether every example is there once."""
  return (
    rows.index is not None
    and not rows.via
    and rows.index.size == count
    and np.array_equal(np.sort(rows.index, axis=None), np.arange(count))
  )


def ordered(rows: Rows, count: int) -> Rows:
  """Rows of data, which number examples in their own order where all are there."""
  if not is_all(rows, count):
    return rows
  assert rows.index is not None
  order = rows.index.reshape(-1)
  return rows._replace(order=None if (order[:-1] < order[1:]).all() else tuple(order.tolist()))


def met(one: Rows, other: Rows, why: Node) -> Rows:
  """What both say, of one place; lost where they differ."""
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
  """What several say of one array; apart from each other where they speak of other keys, as in a table of pairs.

  A single example beside others, as in ``h - h[0]``, is like a mean of them: it does not say whose a row is.
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
  """The same of data: where examples are mixed, row n is example n, if there are as many rows as examples."""
  result = []
  for rows in together(found, why):
    whole = next((one for one in found if {*one.keys} <= {*rows.keys} and is_all(one, count)), None)
    if rows.index is None and whole is not None:
      assert whole.index is not None
      index = np.arange(count).reshape(whole.index.shape)
      rows = Rows(whole.keys, index, rows.base)
    result.append(ordered(rows, count))
  return tuple(result)
