"""Sums of terms in which other sums stand: of the branches of a conditional, say, the dearest counts."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fisherprune_jax._graph.terms import Dearest, Term, Terms, collect

MAIN = 0
"""The sum of everything, among the sums."""


class Group(NamedTuple):
  """Of several sums the largest counts, ``scale`` times, in the sum ``parent``; all hang on ``support``."""

  parent: int
  scale: int
  sums: tuple[int, ...]
  support: int


class Sums:
  """All sums of a cost: the main one, and those that stand in it or in each other.

  Attributes:
    terms: by sum, its own terms.
    levels: groups of sums of which the largest counts, by how deep others stand in them, those without others first.
    supports: by sum, the masks that it hangs on, as bits.
  """

  def __init__(self, terms: Terms) -> None:
    self.terms: list[list[Term]] = []
    self.levels: list[list[Group]] = []
    self.supports: list[int] = []
    self._enter(terms)

  def _enter(self, terms: Terms) -> tuple[int, int]:
    """Lists a sum, and after it those that stand in it; returns its place, and how deep they go."""
    at, depth = len(self.terms), 0
    self.terms.append([])
    self.supports.append(0)
    for t in collect(terms):
      if isinstance(t, Dearest):
        places, depths = zip(*map(self._enter, t.sums), strict=True)
        group = Group(at, t.scale, places, bits(self.supports[place] for place in places))
        self.levels += [[] for _ in range(max(depths) + 1 - len(self.levels))]
        self.levels[max(depths)].append(group)
        self.supports[at] |= group.support
        depth = max(depth, max(depths) + 1)
      else:
        self.terms[at].append(t)
        self.supports[at] |= bits(s.support for s in t.sets)
    return at, depth

  @property
  def all_terms(self) -> list[Term]:
    """The terms of all sums, one sum after the other."""
    return [t for terms in self.terms for t in terms]

  @property
  def inner(self) -> np.ndarray:
    """Of all sums but the main one, the places of their terms among all: one row each, filled up with that behind all."""
    ends = np.cumsum([0, *map(len, self.terms)])
    rows = [range(low, high) for low, high in itertools.pairwise(ends[1:])]
    return filled(rows, int(ends[-1]))


def filled(rows: Iterable[Iterable[int]], with_: int) -> np.ndarray:
  """Rows of different lengths as one array."""
  lists = [[*row] for row in rows]
  width = max(map(len, lists), default=0)
  return np.array([row + [with_] * (width - len(row)) for row in lists], np.int32).reshape(len(lists), width)


def choices(level: list[Group]) -> np.ndarray:
  """The sums of each group, one row each, filled up with the first: the largest is the same."""
  width = max(len(group.sums) for group in level)
  return np.array([[*group.sums, *[group.sums[0]] * (width - len(group.sums))] for group in level], np.int32)


def bits(supports: Iterable[int]) -> int:
  """All bits of some numbers."""
  out = 0
  for support in supports:
    out |= support
  return out
