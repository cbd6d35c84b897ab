"""Sets that are made of no others: everything, what is known, and the live features of a mask."""

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
  """All positions; ``size`` may be symbolic."""
  return make(All, size)


def weak(size: Size) -> Set:
  """All positions, unless somebody says more: the whole of a union with anything else is that.

  For the diagnosis alone: what is asked by a use that could do without (``causes.py``).
  """
  return make(Weak, size)


def fixed(bits: Any) -> Set:
  """A known set, given as one boolean per position."""
  bits = np.array(bits, bool)
  return everything(bits.size) if bits.all() else make(Fixed, bits.size, data=bits)


def nothing(size: int) -> Set:
  """No position at all."""
  return fixed(np.zeros(size, bool))


def leaf(key: Hashable, size: int, network: Hashable = None) -> Set:
  """The live features of one mask.

  Args:
    key: the mask.
    size: how many features it has.
    network: whose mask it is. Sets of two networks are never one object, so that how the sets of the one are nested does
      not depend on the other.
  """
  return make(Leaf, size, data=key, same=(network, key))


class Whole(Set):
  """All positions; a set of another size is as easily had."""

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
    """The same of another size."""
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
    """The union or intersection with anything else, which has the say."""
    return self if kind.every and other.is_all else other

  def grouped(self, groups: np.ndarray, size: int) -> Set:
    return self.resized(size)


class Fixed(Set):
  """``fixed``; its data are the bits, not all of which are set."""

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
  """``leaf``; its data are the key of the mask."""

  __slots__ = ()

  def bits(self, ev: "Evaluation") -> Bits:
    return ev.masks[self.data]

  def gates(self, builder: "Builder") -> "Gates":
    return builder.features(self.data, self.size), True

  def _masks_below(self) -> int:
    return bit_of(self.data)


ALWAYS, NEVER = everything(1), nothing(1)
"""Conditions, sets of one position, that hold whatever the masks are, or never."""
