"""Sums of terms that contain other sums: the most expensive branch of a conditional counts."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fisherprune_jax._graph.terms import MostExpensive, Term, Terms, collect

MAIN = 0
"""The place of the main sum."""


class Group(NamedTuple):
  """In the parent sum, the largest of some sums counts ``scale`` times; all depend on the support."""

  parent: int
  scale: int
  sums: tuple[int, ...]
  support: int


class Sums:
  """All sums of a cost: the main one, and those inside.

  Attributes:
    terms: by sum, its terms.
    levels: groups of sums, the innermost first.
    supports: by sum, its masks as bits.
  """

  def __init__(self, terms: Terms) -> None:
    self.terms: list[list[Term]] = []
    self.levels: list[list[Group]] = []
    self.supports: list[int] = []
    self._enter(terms)

  def _enter(self, terms: Terms) -> tuple[int, int]:
    """Lists a sum, then those inside it; returns its place and depth."""
    at, depth = len(self.terms), 0
    self.terms.append([])
    self.supports.append(0)
    for t in collect(terms):
      if isinstance(t, MostExpensive):
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
    return [t for terms in self.terms for t in terms]

  @property
  def inner(self) -> np.ndarray:
    """The places of terms of all sums but the main one: a row each, padded with the place behind all."""
    ends = np.cumsum([0, *map(len, self.terms)])
    rows = [range(low, high) for low, high in itertools.pairwise(ends[1:])]
    return filled(rows, int(ends[-1]))


def filled(rows: Iterable[Iterable[int]], with_: int) -> np.ndarray:
  lists = [[*row] for row in rows]
  width = max(map(len, lists), default=0)
  return np.array([row + [with_] * (width - len(row)) for row in lists], np.int32).reshape(len(lists), width)


def choices(level: list[Group]) -> np.ndarray:
  """The sums of each group, a row each, padded with the first: the maximum stays."""
  width = max(len(group.sums) for group in level)
  return np.array([[*group.sums, *[group.sums[0]] * (width - len(group.sums))] for group in level], np.int32)


def bits(supports: Iterable[int]) -> int:
  out = 0
  for support in supports:
    out |= support
  return out
