"""Evaluates sets for given masks, one by one.

It uses NumPy (exact, on the host) or JAX. Under jit, prices.py evaluates all sets as one circuit.
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
  """Sets under masks: vectors by key, non-zero where live.

  All but ``bits`` and ``count`` run on the host.
  """

  def __init__(self, masks: Mapping[Any, Array], xp: ModuleType = np) -> None:
    self.xp = xp
    self.masks: dict[Hashable, Bits] = {key: mask != 0 for key, mask in masks.items()}
    self._bits: dict[Set, Bits] = {}

  def bits(self, s: Set) -> Bits:
    if s not in self._bits:
      for part in in_order([s], self._bits):  # no recursion: expressions are as deep as the network
        self._bits[part] = part.bits(self)
    return self._bits[s]

  def count(self, s: Set) -> Any:
    return s.count(self)

  def is_so(self, when: Set) -> bool:
    return when.is_all or bool(self.bits(when)[0])

  def holds(self, where: Where) -> bool:
    """Whether there are any entries."""
    return self.is_so(where.when) and all(map(self._has_any, where.box))

  def box(self, where: Where) -> Box:
    """The box; empty along every axis if there are no entries."""
    return where.box if self.holds(where) else empty_box([s.size for s in where.box])

  def _has_any(self, s: Set) -> bool:
    return all(f.size != 0 if (i := self.index(f)) is None else i.size > 0 for f in _parts(s))

  def index(self, s: Set) -> np.ndarray | None:
    """The positions; None for all."""
    if s.is_all:
      return None
    bits = self.bits(s)
    return None if bits.all() else np.flatnonzero(bits)

  def width(self, s: Set) -> Size:
    """The number of positions; may be symbolic."""
    widths = (f.size if (index := self.index(f)) is None else index.size for f in _parts(s))
    return math.prod(widths)


def _parts(s: Set) -> tuple[Set, ...]:
  """The factors of a set of symbolic size, each whole or of fixed size; else the set."""
  return (s,) if compat.is_static_size(s.size) else s.factors
