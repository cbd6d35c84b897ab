"""Evaluating sets for given masks: which positions are in them.

``Evaluation`` works on NumPy (exact, on the host) and on ``jax.numpy`` alike; pass the module. It looks at one
set at a time. Prices under ``jit`` evaluate all sets of a program at once, as one circuit (``prices.py``).
"""

import math
from collections.abc import Hashable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.boxes import Box, Where, empty_box
from fisherprune_jax._graph.sets import Bits, Set, in_order
from fisherprune_jax._types import Array, Size


class Evaluation:
  """Sets under the given masks: ``masks`` maps each leaf key to a vector, non-zero where alive."""

  def __init__(self, masks: Mapping[Any, Array], xp: ModuleType = np) -> None:
    self.xp = xp
    self.masks: dict[Hashable, Bits] = {key: mask != 0 for key, mask in masks.items()}
    self._bits: dict[Set, Bits] = {}

  def bits(self, s: Set) -> Bits:
    """One boolean per position: whether it is in the set."""
    if s not in self._bits:
      for part in in_order([s], self._bits):  # one by one: expressions are as deep as the network
        self._bits[part] = part.bits(self)
    return self._bits[s]

  def count(self, s: Set) -> Any:
    """How many positions are in the set."""
    return s.count(self)

  def is_so(self, when: Set) -> bool:
    """Whether a condition holds, on the host."""
    return when.is_all or bool(self.bits(when)[0])

  def holds(self, where: Where) -> bool:
    """Whether there are any of some entries, on the host."""
    return self.is_so(where.when) and all(map(self._has_any, where.box))

  def box(self, where: Where) -> Box:
    """The box of some entries, on the host: empty along every axis if there are none."""
    return where.box if self.holds(where) else empty_box([s.size for s in where.box])

  def _has_any(self, s: Set) -> bool:
    return all(f.size != 0 if (i := self.index(f)) is None else i.size > 0 for f in _parts(s))

  def index(self, s: Set) -> np.ndarray | None:
    """The positions in the set, on the host; None if it is all of them."""
    if s.is_all:
      return None
    bits = self.bits(s)
    return None if bits.all() else np.flatnonzero(bits)

  def width(self, s: Set) -> Size:
    """How many positions the set has, on the host; with symbols where its size has them."""
    widths = (f.size if (index := self.index(f)) is None else index.size for f in _parts(s))
    return math.prod(widths)


def _parts(s: Set) -> tuple[Set, ...]:
  """The factors of a set of symbolic size, of which each is whole or has a number of positions; else the set."""
  return (s,) if compat.is_static_size(s.size) else s.factors
