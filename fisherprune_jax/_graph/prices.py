"""What masks cost, and what each feature costs, under ``jit``: all terms and all features at once.

A sum of terms is a polynomial in the sizes of live sets. The sets are one circuit (``circuit.py``). What a term
loses with a feature is, where the feature lies below one of its sets alone, what that set loses times the sizes
of the others; so every set hands to its positions a weight, the sum over terms of the products of the others,
and the circuit hands all weights down to the features in one pass. Where a feature lies below several sets of
one term, that counts too much (``overlaps.py``), and what is too much is taken off.

Programs are of one size, whatever the network: they work on a few arrays of static indices.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.circuit import Circuit
from fisherprune_jax._graph.overlaps import Lanes, Monomial, Overlaps
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.terms import Dearest, Term, Terms, collect

MAIN = 0
"""The sum of everything, among the sums."""


class _Group(NamedTuple):
  """Of several sums the largest counts, ``scale`` times, in the sum ``parent``; all hang on ``support``."""

  parent: int
  scale: int
  sums: tuple[int, ...]
  support: int


class _Sums:
  """Sums of terms that stand in each other, as the branches of conditionals do.

  Attributes:
    terms: by sum, its own terms.
    groups: the groups of sums of which the largest counts, inner ones first.
    supports: by sum, the masks that it hangs on, as bits.
  """

  def __init__(self, terms: Terms) -> None:
    self.terms: list[list[Term]] = []
    self.groups: list[_Group] = []
    self.supports: list[int] = []
    self._enter(terms)

  def _enter(self, terms: Terms) -> int:
    """Lists a sum, and after it those that it hangs on; returns its place."""
    at = len(self.terms)
    self.terms.append([])
    self.supports.append(0)
    for t in collect(terms):
      if isinstance(t, Dearest):
        places = tuple(map(self._enter, t.sums))
        self.groups.append(_Group(at, t.scale, places, _bits(self.supports[place] for place in places)))
        self.supports[at] |= self.groups[-1].support
      else:
        self.terms[at].append(t)
        self.supports[at] |= _bits(s.support for s in t.sets)
    return at


class Prices:
  """Terms over masks of known sizes, given by key. Features are those of all masks, end to end, as booleans."""

  def __init__(self, terms: Terms, masks: Mapping[Any, int]) -> None:
    self._sums = _Sums(terms)
    self._terms = list(itertools.chain(*self._sums.terms))
    self._monomials = list(_monomials(self._sums.terms))
    found = [*(s for t in self._terms for s in t.sets), *(s for m in self._monomials for s in m.factors)]
    self._roots = {s: at for at, s in enumerate(dict.fromkeys(found))}
    self._circuit = Circuit(self._roots, masks)
    self._gates = np.concatenate([np.zeros(0, int), *(self._circuit.gates[s] for s in self._roots)])
    self._ends = np.cumsum([0, *(s.size for s in self._roots)])
    self._places = self._places_of(m.factors for m in self._monomials)
    lanes = Lanes()
    self._lane_of_sum = [lanes.new(support) for support in self._sums.supports]
    self._lane = np.array([self._lane_of_sum[m.sum] for m in self._monomials], np.int32)
    self._scale = np.array([m.scale for m in self._monomials], np.float32)
    self._overlaps = Overlaps(self._monomials, self._circuit, lanes)
    self._own = np.zeros((lanes.count, len(self._roots) + 1), np.float32)
    for s, lane in self._overlaps.lanes.items():
      self._own[lane, self._roots[s]] = 1

  def total(self, features: jax.Array) -> jax.Array:
    """The sum of all terms, in float32."""
    return self._totals(self._counts(self._circuit.live(features, jnp)))[MAIN]

  def sizes(self, features: jax.Array, found: Sequence[Set]) -> jax.Array:
    """How many positions each of some sets of the terms has, int32."""
    return self._sizes(self._circuit.live(features, jnp))[np.array([self._roots[s] for s in found], np.int32)]

  def drops(self, features: jax.Array) -> jax.Array:
    """For each feature: how much the sum drops if it goes too, in float32; never a difference of two totals."""
    live = self._circuit.live(features, jnp)
    counts = self._counts(live)
    found = self._circuit.drops(live, self._weights(counts), jnp)
    excess = self._overlaps.excess(found, counts[self._places])
    found = found.at[self._lane[self._overlaps.monomial], self._overlaps.feature].add(-excess)
    if self._sums.groups:
      totals = self._totals(counts)
      for group in self._sums.groups:
        found = self._with_group(found, group, totals)
    return found[self._lane_of_sum[MAIN]]

  def _counts(self, live: jax.Array) -> jax.Array:
    """The size of every root, and at the end a one, in float32."""
    return jnp.concatenate([self._sizes(live).astype(jnp.float32), jnp.ones(1, jnp.float32)])

  def _sizes(self, live: jax.Array) -> jax.Array:
    """The size of every root, int32."""
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(live[self._gates], dtype=jnp.int32)])
    return before[self._ends[1:]] - before[self._ends[:-1]]

  def _places_of(self, found: Iterable[Sequence[Set]]) -> np.ndarray:
    """Where among the counts some sets' sizes are, one row each, filled up with that of the one."""
    rows = [[self._roots[s] for s in factors] for factors in found]
    out = np.full((len(rows), max(map(len, rows), default=0)), len(self._roots), np.int32)
    for at, row in enumerate(rows):
      out[at, : len(row)] = row
    return out

  def _totals(self, counts: jax.Array) -> list[jax.Array]:
    """The value of every sum."""
    outer = jnp.prod(counts[self._places_of(t.outer for t in self._terms)], axis=1)
    inner = jnp.prod(counts[self._places_of(t.inner or () for t in self._terms)], axis=1)
    scales, taps = (np.array([t[i] for t in self._terms], np.float32) for i in (0, 3))
    plain = np.array([t.inner is None for t in self._terms], bool)
    values = scales * outer * jnp.where(plain, 1, jnp.maximum(2 * taps * inner - 1, 0))
    ends = itertools.accumulate(map(len, self._sums.terms), initial=0)
    totals = [jnp.sum(values[low:high]) for low, high in itertools.pairwise(ends)]
    for group in self._sums.groups:
      totals[group.parent] += group.scale * jnp.max(jnp.stack([totals[at] for at in group.sums]))
    return totals

  def _weights(self, counts: jax.Array) -> jax.Array:
    """``(lanes, gates)``: what each sum loses with one position of each root, at the gates of the positions.

    In the lanes of ``Overlaps`` it is one: there the roots' own counts are asked for.
    """
    handed = self._scale[:, None] * _products_of_others(counts[self._places])
    of_roots = jnp.asarray(self._own).at[self._lane[:, None], self._places].add(handed)
    root = np.repeat(np.arange(len(self._roots)), np.diff(self._ends))
    out = jnp.zeros((self._own.shape[0], self._circuit.size), jnp.float32)
    return out.at[:, self._gates].add(of_roots[:, root])

  def _with_group(self, found: jax.Array, group: _Group, totals: list[jax.Array]) -> jax.Array:
    """The largest sum drops to what the sum that is then the largest still has."""
    features = self._circuit.features_of(group.support)
    of_sums = [
      np.isin(features, self._circuit.features_of(self._sums.supports[at])) for at in group.sums
    ]  # a lane may be shared with what hangs on other masks
    falls = [
      found[self._lane_of_sum[at], features] * own for at, own in zip(group.sums, of_sums, strict=True)
    ]
    values = jnp.stack([totals[at] for at in group.sums])
    behind = jnp.max(values) - values  # exactly zero for the largest one
    drop = jnp.min(behind[:, None] + jnp.stack(falls), axis=0)
    return found.at[self._lane_of_sum[group.parent], features].add(group.scale * drop)


def _bits(supports: Iterable[int]) -> int:
  out = 0
  for support in supports:
    out |= support
  return out


def _products_of_others(values: jax.Array) -> jax.Array:
  """For each value of a row the product of all the others."""
  before, after = jnp.ones_like(values), jnp.ones_like(values)
  for at in range(1, values.shape[1]):
    before = before.at[:, at].set(before[:, at - 1] * values[:, at - 1])
    after = after.at[:, -at - 1].set(after[:, -at] * values[:, -at])
  return before * after


def _monomials(sums: Sequence[Iterable[Term]]) -> Iterator[Monomial]:
  """Terms multiplied out: ``max(2 K - 1, 0)`` is ``2 K - [K > 0]``."""
  found: dict[tuple[int, tuple[Set, ...]], int] = {}

  def add(at: int, scale: int, factors: Iterable[Set]) -> None:
    key = at, tuple(sorted(factors, key=lambda s: s.serial))
    found[key] = found.get(key, 0) + scale

  for at, terms in enumerate(sums):
    for t in terms:
      if t.inner is None:
        add(at, t.scale, t.outer)
      elif t.taps:
        add(at, 2 * t.scale * t.taps, (*t.outer, *t.inner))
        add(at, -t.scale, (*t.outer, sets.intersection(*map(sets.nonempty, t.inner))))
  return (Monomial(at, scale, factors) for (at, factors), scale in found.items() if scale and factors)
