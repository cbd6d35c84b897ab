"""Sets without parts: everything, known sets, and live features of a mask."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.gates import FALSE, TRUE
from fisherprune_jax._graph.sets.expression import Bits, Set, bit_of, make
from fisherprune_jax._types import Size

if TYPE_CHECKING:
  from fisherprune_jax._graph.evaluate import Evaluation
  from fisherprune_jax._graph.gates import Builder, Gates
  from fisherprune_jax._graph.sets.junctions import Junction


def everything(size: Size) -> Set:
  """All positions; the size may be symbolic."""
  return make(All, size)


def weak(size: Size) -> Set:
  """All positions; but a union with any other set is that set.

  For diagnosis only: the demand of a use that could do without (causes.py).
  """
  return make(Weak, size)


def fixed(bits: Any) -> Set:
  """A known set, from booleans."""
  bits = np.array(bits, bool)
  return everything(bits.size) if bits.all() else make(Fixed, bits.size, data=bits)


def nothing(size: int) -> Set:
  return fixed(np.zeros(size, bool))


def leaf(key: Hashable, size: int, network: Hashable = None) -> Set:
  """The live features of one mask.

  Networks never share a set, so the nesting of one's sets does not depend on others.
  """
  return make(Leaf, size, data=key, same=(network, key))


class Whole(Set):
  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    return ev.xp.ones(self.size, bool)

  def count(self, ev: "Evaluation") -> Size:
    return self.size

  def gates(self, builder: "Builder") -> "Gates":
    return np.full(self.size, TRUE), True

  def split(self, sizes: Sequence[Size]) -> list[Set]:
    return [self.resized(n) for n in sizes]

  def nonempty(self) -> Set:
    return fixed([not (compat.is_static_size(self.size) and self.size == 0)])

  def resized(self, size: Size) -> Set:
    return make(type(self), size)


class All(Whole):
  """``everything``."""

  __slots__ = ()
  is_all = True

  def known_at(self, positions: np.ndarray) -> np.ndarray:
    return np.ones(positions.size, bool)


class Weak(Whole):
  """``weak``."""

  __slots__ = ()
  is_weak = True

  def beside(self, kind: "type[Junction]", other: Set) -> Set:
    """The other set takes precedence."""
    return self if kind.every and other.is_all else other

  def grouped(self, groups: np.ndarray, size: int) -> Set:
    return self.resized(size)


class Fixed(Set):
  """Its data are the bits, not all set."""

  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    return ev.xp.asarray(self.data)

  def gates(self, builder: "Builder") -> "Gates":
    return np.where(self.data, TRUE, FALSE), True

  @property
  def is_empty(self) -> bool:
    return not self.data.any()

  def nonempty(self) -> Set:
    return fixed([self.data.any()])

  def known_at(self, positions: np.ndarray) -> np.ndarray:
    return self.data[positions]

  def combined(self, kind: "type[Junction]", other: Set, parts: Sequence[Set]) -> Set:
    return fixed(kind.of_bits(self.data, other.data))


class Leaf(Set):
  """Its data are the key."""

  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    return ev.masks[self.data]

  def gates(self, builder: "Builder") -> "Gates":
    return builder.features(self.data, self.size), True

  def _masks_below(self) -> int:
    return bit_of(self.data)


ALWAYS, NEVER = everything(1), nothing(1)
"""Conditions that always hold, or never."""
