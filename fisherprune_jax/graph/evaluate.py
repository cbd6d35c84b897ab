"""Evaluating sets for given masks: which positions are in them, and which features each position hangs on.

``Evaluation`` works on NumPy (exact, on the host) and on ``jax.numpy`` (under ``jit``) alike; pass the module.

A live position is *critical* to a feature when switching that one feature off takes the position out of the
set. Expressions are monotone, so critical features have an algebra of their own: of an intersection they are
the union of the parts' critical features, of a union their intersection. It gives for every feature at once
how many positions would go, by one pass over the expression.
"""

from typing import Any, NamedTuple

import numpy as np

from fisherprune_jax.graph.sets import ALL, AND, ANY, CONCAT, FIXED, LEAF, OR, OUTER, TAKE, WEAK, Set


class Slot(NamedTuple):
  """At position ``i``, where ``bits[i]``, feature ``features[i]`` is critical. ``features`` is static."""

  features: np.ndarray
  bits: Any


class Evaluation:
  """Sets under the given masks: ``masks`` maps each leaf key to a vector, non-zero where alive."""

  def __init__(self, masks: dict[Any, Any], xp: Any = np) -> None:
    self.xp = xp
    self._masks = {key: mask != 0 for key, mask in masks.items()}
    self._bits: dict[Set, Any] = {}
    self._slots: dict[tuple[Set, Any], list[Slot]] = {}

  def bits(self, s: Set) -> Any:
    """One boolean per position: whether it is in the set."""
    if s not in self._bits:
      self._bits[s] = _BITS[s.kind](self, s)
    return self._bits[s]

  def count(self, s: Set) -> Any:
    """How many positions are in the set."""
    if s.kind == ALL:
      return s.size
    if s.kind == OUTER:
      return _product(self.count(part) for part in s.parts)
    return self.xp.sum(self.bits(s))

  def index(self, s: Set) -> np.ndarray | None:
    """The positions in the set, on the host; None if it is all of them."""
    if s.kind == ALL:
      return None
    bits = self.bits(s)
    return None if bits.all() else np.flatnonzero(bits)

  def drops(self, s: Set, key: Any, features: int) -> Any:
    """For each feature of mask ``key``: how many positions leave the set if it goes too."""
    if s.kind == OUTER:
      return product_drop([(self.count(part), self.drops(part, key, features)) for part in s.parts])[1]
    total = self.xp.zeros(features, np.int32)
    for slot in self.slots(s, key):
      total = total + _segment_sum(self.xp, slot, features)
    return total

  def slots(self, s: Set, key: Any) -> list[Slot]:
    """The critical features of mask ``key``, position by position, no feature twice at one position."""
    if key not in s.leaves:
      return []
    if (s, key) not in self._slots:
      self._slots[s, key] = _SLOTS[s.kind](self, s, key)
    return self._slots[s, key]


def product_drop(pairs: Any) -> tuple[Any, Any]:
  """The product of values, and how much it drops when every value does, without cancellation."""
  value, drop = 1, 0
  for v, d in pairs:
    drop = drop * v + (value - drop) * d
    value = value * v
  return value, drop


def _product(values: Any) -> Any:
  out = 1
  for value in values:
    out = out * value
  return out


def _segment_sum(xp: Any, slot: Slot, features: int) -> Any:
  index, bits = slot
  if index.size == features and np.array_equal(index, np.arange(features)):
    return bits.astype(np.int32)
  at = np.where(index >= 0, index, features)
  if xp is np:
    return np.bincount(at, weights=bits, minlength=features + 1)[:features].astype(np.int64)
  return xp.zeros(features + 1, np.int32).at[at].add(bits.astype(np.int32))[:features]


# How each kind of expression reads its bits from its parts.


def _all_bits(ev: Evaluation, s: Set) -> Any:
  return ev.xp.ones(s.size, bool)


def _fixed_bits(ev: Evaluation, s: Set) -> Any:
  return ev.xp.asarray(np.asarray(s.data, bool))


def _leaf_bits(ev: Evaluation, s: Set) -> Any:
  return ev._masks[s.data]


def _and_bits(ev: Evaluation, s: Set) -> Any:
  out = ev.bits(s.parts[0])
  for part in s.parts[1:]:
    out = out & ev.bits(part)
  return out


def _or_bits(ev: Evaluation, s: Set) -> Any:
  out = ev.bits(s.parts[0])
  for part in s.parts[1:]:
    out = out | ev.bits(part)
  return out


def _take_bits(ev: Evaluation, s: Set) -> Any:
  return _gather(ev.xp, ev.bits(s.parts[0]), np.asarray(s.data, np.int64))


def _gather(xp: Any, bits: Any, index: np.ndarray) -> Any:
  padded = xp.concatenate([bits, xp.zeros(1, bool)])
  return padded[index]


def _concat_bits(ev: Evaluation, s: Set) -> Any:
  return ev.xp.concatenate([ev.bits(part) for part in s.parts])


def _outer_bits(ev: Evaluation, s: Set) -> Any:
  out = ev.bits(s.parts[0])
  for part in s.parts[1:]:
    out = (out[:, None] & ev.bits(part)[None, :]).reshape(-1)
  return out


def _grouped(s: Set, values: Any) -> Any:
  """A vector of an ``any`` set's operand as a table: one row per position, its group along the columns."""
  shape, keep = s.data
  order = np.moveaxis(np.arange(s.parts[0].size).reshape(shape), keep, 0).reshape(shape[keep], -1)
  return values[order]


def _any_bits(ev: Evaluation, s: Set) -> Any:
  return _grouped(s, ev.bits(s.parts[0])).any(axis=1)


_BITS = {
  ALL: _all_bits,
  WEAK: _all_bits,
  FIXED: _fixed_bits,
  LEAF: _leaf_bits,
  AND: _and_bits,
  OR: _or_bits,
  TAKE: _take_bits,
  CONCAT: _concat_bits,
  OUTER: _outer_bits,
  ANY: _any_bits,
}


# How each kind of expression reads its critical features from its parts'.


def _leaf_slots(ev: Evaluation, s: Set, key: Any) -> list[Slot]:
  return [Slot(np.arange(s.size), ev.bits(s))]


def _and_slots(ev: Evaluation, s: Set, key: Any) -> list[Slot]:
  live = ev.bits(s)
  found = [Slot(index, bits & live) for part in s.parts for index, bits in ev.slots(part, key)]
  return _distinct(found)


def _or_slots(ev: Evaluation, s: Set, key: Any) -> list[Slot]:
  # A feature is critical to a union where it is critical to every part that holds the position.
  found = []
  for part in s.parts:
    for index, bits in ev.slots(part, key):
      for other in s.parts:
        if other is not part:
          bits = bits & (~ev.bits(other) | _critical_at(ev.slots(other, key), index))
      found.append(Slot(index, bits))
  return _distinct(found)


def _critical_at(slots: list[Slot], index: np.ndarray) -> Any:
  hit: Any = False
  for slot in slots:
    hit = hit | (slot.bits & (slot.features == index))
  return hit


def _distinct(slots: list[Slot]) -> list[Slot]:
  """Drops from each slot what an earlier one already says."""
  out: list[Slot] = []
  for index, bits in slots:
    earlier = [slot for slot in out if (slot.features == index).any()]
    same = next((i for i, slot in enumerate(out) if np.array_equal(slot.features, index)), None)
    if same is not None and len(earlier) == 1:
      out[same] = Slot(index, out[same].bits | bits)
    else:
      out.append(Slot(index, bits & ~_critical_at(earlier, index)) if earlier else Slot(index, bits))
  return out


def _take_slots(ev: Evaluation, s: Set, key: Any) -> list[Slot]:
  at = np.asarray(s.data, np.int64)
  return [
    Slot(np.where(at >= 0, index[at], -1), _gather(ev.xp, bits, at))
    for index, bits in ev.slots(s.parts[0], key)
  ]


def _concat_slots(ev: Evaluation, s: Set, key: Any) -> list[Slot]:
  columns = [ev.slots(part, key) for part in s.parts]
  out = []
  for row in range(max(map(len, columns))):
    slots = [
      column[row] if row < len(column) else Slot(np.full(part.size, -1), ev.xp.zeros(part.size, bool))
      for part, column in zip(s.parts, columns, strict=True)
    ]
    out.append(Slot(np.concatenate([a.features for a in slots]), ev.xp.concatenate([a.bits for a in slots])))
  return out


def _outer_slots(ev: Evaluation, s: Set, key: Any) -> list[Slot]:
  live, shape = ev.bits(s), [part.size for part in s.parts]
  found = []
  for axis, part in enumerate(s.parts):
    along = np.indices(shape)[axis].reshape(-1)
    found += [Slot(index[along], bits[along] & live) for index, bits in ev.slots(part, key)]
  return _distinct(found)


def _any_slots(ev: Evaluation, s: Set, key: Any) -> list[Slot]:
  # A feature is critical to a group when it is critical to every live member of the group.
  base = s.parts[0]
  members = _grouped(s, ev.bits(base)).sum(axis=1)
  columns = [
    Slot(index[:, column], bits[:, column])
    for slot in ev.slots(base, key)
    for index, bits in [(_grouped(s, slot.features), _grouped(s, slot.bits))]
    for column in range(index.shape[1])
  ]
  found = []
  for index, bits in columns:
    votes = sum((other.bits & (other.features == index)).astype(np.int32) for other in columns)
    found.append(Slot(index, bits & (votes == members)))
  return _distinct(found)


_SLOTS = {
  LEAF: _leaf_slots,
  AND: _and_slots,
  OR: _or_slots,
  TAKE: _take_slots,
  CONCAT: _concat_slots,
  OUTER: _outer_slots,
  ANY: _any_slots,
}
