"""Evaluating sets for given masks: which positions are in them, and what each feature takes with it.

``Evaluation`` works on NumPy (exact, on the host) and on ``jax.numpy`` alike; pass the module. It looks at one
set at a time. Prices under ``jit`` evaluate all sets of a program at once, as one circuit (``prices.py``).
"""

from typing import Any

import numpy as np

from fisherprune_jax._graph.circuit import Circuit
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
  WEAK,
  Set,
  in_order,
)


class Evaluation:
  """Sets under the given masks: ``masks`` maps each leaf key to a vector, non-zero where alive."""

  def __init__(self, masks: dict[Any, Any], xp: Any = np) -> None:
    self.xp = xp
    self.masks = {key: mask != 0 for key, mask in masks.items()}
    self._bits: dict[Set, Any] = {}

  def bits(self, s: Set) -> Any:
    """One boolean per position: whether it is in the set."""
    if s not in self._bits:
      for part in in_order([s], self._bits):  # one by one: expressions are as deep as the network
        self._bits[part] = _BITS[part.kind](self, part)
    return self._bits[s]

  def count(self, s: Set) -> Any:
    """How many positions are in the set."""
    if s.kind == ALL:
      return s.size
    if s.kind == OUTER:
      out = 1
      for part in s.parts:
        out = out * self.count(part)
      return out
    return self.xp.sum(self.bits(s))

  def index(self, s: Set) -> np.ndarray | None:
    """The positions in the set, on the host; None if it is all of them."""
    if s.kind == ALL:
      return None
    bits = self.bits(s)
    return None if bits.all() else np.flatnonzero(bits)

  def drops(self, s: Set, key: Any, features: int) -> Any:
    """For each feature of mask ``key``: how many positions leave the set if it goes too."""
    circuit = Circuit([s], {k: self.masks[k].size for k in s.leaves} | {key: features})
    live = circuit.live(self.xp.concatenate([self.masks[k] for k in circuit.first]), self.xp)
    ((_, gates),) = circuit.gates.items()
    weights = np.zeros((1, circuit.size), np.float32)
    np.add.at(weights, (0, gates), 1)
    found = circuit.drops(live, self.xp.asarray(weights), self.xp)[0]
    return found[circuit.first[key] :][:features].astype(np.int32)


def product_drop(pairs: Any) -> tuple[Any, Any]:
  """The product of values, and how much it drops when every value does, without cancellation."""
  value, drop = 1, 0
  for v, d in pairs:
    drop = drop * v + (value - drop) * d
    value = value * v
  return value, drop


# How each kind of expression reads its bits from its parts'.


def _and_bits(ev: Evaluation, s: Set) -> Any:
  a, b = map(ev.bits, s.parts)
  return a & b


def _or_bits(ev: Evaluation, s: Set) -> Any:
  a, b = map(ev.bits, s.parts)
  return a | b


def _take_bits(ev: Evaluation, s: Set) -> Any:
  return ev.bits(s.parts[0])[s.data] & (s.data >= 0)


def _concat_bits(ev: Evaluation, s: Set) -> Any:
  return ev.xp.concatenate([ev.bits(part) for part in s.parts])


def _outer_bits(ev: Evaluation, s: Set) -> Any:
  out = ev.bits(s.parts[0])
  for part in s.parts[1:]:
    out = (out[:, None] & ev.bits(part)[None, :]).reshape(-1)
  return out


def _any_bits(ev: Evaluation, s: Set) -> Any:
  base = ev.bits(s.parts[0])
  if ev.xp is np:
    hit = np.zeros(s.size + 1, bool)
    hit[s.data[base]] = True  # what is in no group goes to the end
    return hit[: s.size]
  return ev.xp.zeros(s.size, bool).at[np.where(s.data >= 0, s.data, s.size)].max(base, mode="drop")


_BITS = {
  ALL: lambda ev, s: ev.xp.ones(s.size, bool),
  WEAK: lambda ev, s: ev.xp.ones(s.size, bool),
  FIXED: lambda ev, s: ev.xp.asarray(s.data),
  LEAF: lambda ev, s: ev.masks[s.data],
  AND: _and_bits,
  OR: _or_bits,
  TAKE: _take_bits,
  CONCAT: _concat_bits,
  OUTER: _outer_bits,
  ANY: _any_bits,
}
