"""What masks cost, and what each feature costs, under ``jit``: all terms and all features at once.

A sum of terms is a polynomial in the sizes of live sets. The sets are one circuit (``circuit.py``). What a term
loses with a feature is, where the feature lies below one of its sets alone, what that set loses times the sizes
of the others; so every set hands to its positions a weight, the sum over terms of the products of the others,
and the circuit hands all weights down to the features in one pass. Where a feature lies below several sets of
one term, that counts too much: of ``a b``, ``a db + da b`` where it should be ``a db + da b - da db``. What is
too much is added up apart (without cancellation), and taken off.

Programs are of one size, whatever the network: they work on a few arrays of static indices.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax.graph import sets
from fisherprune_jax.graph.circuit import Circuit
from fisherprune_jax.graph.flops import Dearest, Term, Terms, collect
from fisherprune_jax.graph.sets import Set

MAIN = 0
"""The sum of all, among the sums."""


class _Group(NamedTuple):
  """Of several sums the largest counts, ``scale`` times, in the sum ``parent``."""

  parent: int
  scale: int
  sums: tuple[int, ...]


class _Monomial(NamedTuple):
  """``scale`` times the sizes of ``factors``, in a sum."""

  sum: int
  scale: int
  factors: tuple[Set, ...]


class Prices:
  """Terms over masks of known sizes, given by key. Features are those of all masks, end to end, as booleans."""

  def __init__(self, terms: Terms, masks: Mapping[Any, int]) -> None:
    self._sums: list[list[Term]] = []
    self._groups: list[_Group] = []
    self._enter(terms)
    self._terms = [(at, t) for at, found in enumerate(self._sums) for t in found]
    self._monomials = list(_monomials(self._terms))
    roots = dict.fromkeys(s for m in self._monomials for s in m.factors)
    self._roots = {s: at for at, s in enumerate(roots)}
    self._masks = dict(masks)
    self._circuit = Circuit(self._roots, masks)
    self._gates = np.concatenate([np.zeros(0, int), *(self._circuit.gates[s] for s in self._roots)])
    self._ends = np.cumsum([0, *(s.size for s in self._roots)])
    self._rows = _Rows()
    self._row_of_sum = [self._rows.new(self._support(at)) for at in range(len(self._sums))]
    self._overlaps = _Overlaps(self)

  def _enter(self, terms: Terms) -> int:
    """Lists a sum, and after it those that it hangs on; returns its place."""
    at = len(self._sums)
    self._sums.append([])
    for t in collect(terms):
      if isinstance(t, Dearest):
        self._groups.append(_Group(at, t.scale, tuple(map(self._enter, t.sums))))
      else:
        self._sums[at].append(t)
    return at

  def _support(self, at: int) -> int:
    found = 0
    for s in (s for t in self._sums[at] for s in (*t.outer, *(t.inner or ()))):
      found |= s.support
    for group in self._groups:
      if group.parent == at:
        found |= self._support_of_group(group)
    return found

  def _support_of_group(self, group: _Group) -> int:
    found = 0
    for at in group.sums:
      found |= self._support(at)
    return found

  def total(self, features: jax.Array) -> jax.Array:
    """The sum of all terms, in float32."""
    return self._totals(self._counts(self._circuit.live(features, jnp)))[MAIN]

  def drops(self, features: jax.Array) -> jax.Array:
    """For each feature: how much the sum drops if it goes too, in float32; never a difference of two totals."""
    live = self._circuit.live(features, jnp)
    counts = self._counts(live)
    weights = self._handed_down(self._weights(counts))
    found = self._overlaps.taken_off(self._circuit.drops(live, weights, jnp), counts)
    if self._groups:
      totals = self._totals(counts)
      for group in self._groups:  # inner ones come first
        found = self._with_group(found, group, totals)
    return found[self._row_of_sum[MAIN]]

  def _counts(self, live: jax.Array) -> jax.Array:
    """The size of every root, and at the end a one."""
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(live[self._gates], dtype=jnp.int32)])
    counts = before[self._ends[1:]] - before[self._ends[:-1]]
    return jnp.concatenate([counts.astype(jnp.float32), jnp.ones(1, jnp.float32)])

  def _totals(self, counts: jax.Array) -> list[jax.Array]:
    """The value of every sum."""
    outer = self.places(t.outer for _, t in self._terms)
    inner = self.places(t.inner or () for _, t in self._terms)
    scales, terms = (np.array([t[i] for _, t in self._terms], np.float32) for i in (0, 3))
    plain = np.array([t.inner is None for _, t in self._terms], bool)
    products = jnp.maximum(2 * terms * jnp.prod(counts[inner], axis=1) - 1, 0)
    values = scales * jnp.prod(counts[outer], axis=1) * jnp.where(plain, 1, products)
    ends = np.cumsum([0, *map(len, self._sums)])
    totals = [jnp.sum(values[low:high]) for low, high in zip(ends[:-1], ends[1:], strict=True)]
    for group in self._groups:
      totals[group.parent] += group.scale * jnp.max(jnp.stack([totals[at] for at in group.sums]))
    return totals

  def places(self, found: Iterable[Sequence[Set]]) -> np.ndarray:
    """Where among the counts some sets' sizes are, one row each, filled up with that of the one."""
    rows = [[self._roots[s] for s in factors] for factors in found]
    out = np.full((len(rows), max(map(len, rows), default=0)), len(self._roots), np.int32)
    for at, row in enumerate(rows):
      out[at, : len(row)] = row
    return out

  def _weights(self, counts: jax.Array) -> jax.Array:
    """``(rows, roots)``: what each sum loses with one position of each root; ones where its own count is asked."""
    places = self.places(m.factors for m in self._monomials)
    scales = np.array([m.scale for m in self._monomials], np.float32)
    rows = np.array([self._row_of_sum[m.sum] for m in self._monomials], np.int32)
    weights = np.zeros((self._rows.count, len(self._roots) + 1), np.float32)
    for s, row in self._overlaps.rows.items():
      weights[row, self._roots[s]] = 1
    handed = scales[:, None] * _products_of_others(counts[places])
    return jnp.asarray(weights).at[rows[:, None], places].add(handed)

  def _handed_down(self, weights: jax.Array) -> jax.Array:
    """``(rows, gates)``, from the weights of the roots that they are positions of."""
    root = np.repeat(np.arange(len(self._roots)), np.diff(self._ends))
    out = jnp.zeros((self._rows.count, self._circuit.size), jnp.float32)
    return out.at[:, self._gates].add(weights[:, root])

  def _with_group(self, found: jax.Array, group: _Group, totals: list[jax.Array]) -> jax.Array:
    """The largest sum drops to what the sum that is then the largest still has."""
    features = self.features_of(self._support_of_group(group))
    falls = [
      found[self._row_of_sum[at], features] * np.isin(features, self.features_of(self._support(at)))
      for at in group.sums
    ]
    behind = [
      max_ - totals[at] for max_ in [_largest([totals[at] for at in group.sums])] for at in group.sums
    ]
    drop = jnp.min(jnp.stack(falls) + jnp.stack(behind)[:, None], axis=0)
    return found.at[self._row_of_sum[group.parent], features].add(group.scale * drop)

  def features_of(self, support: int) -> np.ndarray:
    """The features of some masks, given as bits."""
    keys = sets.keys_of(support)
    first = self._circuit.first
    return np.concatenate([np.zeros(0, int), *(first[k] + np.arange(self._masks[k]) for k in keys)])


def _largest(values: list[jax.Array]) -> jax.Array:
  return jnp.max(jnp.stack(values))


def _products_of_others(values: jax.Array) -> jax.Array:
  """For each value of a row the product of all the others."""
  before, after = jnp.ones_like(values), jnp.ones_like(values)
  for at in range(1, values.shape[1]):
    before = before.at[:, at].set(before[:, at - 1] * values[:, at - 1])
    after = after.at[:, -at - 1].set(after[:, -at] * values[:, -at])
  return before * after


def _monomials(terms: Iterable[tuple[int, Term]]) -> Iterator[_Monomial]:
  """Terms multiplied out: ``max(2 K - 1, 0)`` is ``2 K - [K > 0]``."""
  found: dict[tuple[int, tuple[Set, ...]], int] = {}

  def add(at: int, scale: int, factors: Iterable[Set]) -> None:
    key = at, tuple(sorted(factors, key=lambda s: s.serial))
    found[key] = found.get(key, 0) + scale

  for at, t in terms:
    if t.inner is None:
      add(at, t.scale, t.outer)
    elif t.terms:
      add(at, 2 * t.scale * t.terms, (*t.outer, *t.inner))
      add(at, -t.scale, (*t.outer, sets.intersection(*map(_nonempty, t.inner))))
  return (_Monomial(at, scale, factors) for (at, factors), scale in found.items() if scale)


def _nonempty(s: Set) -> Set:
  """One position, in the set if any position is in ``s``."""
  if s.kind == sets.OUTER:
    return sets.intersection(*map(_nonempty, s.parts))
  return sets.any_of(s, np.zeros(s.size), 1)


class _Rows:
  """Rows of weights; what hangs on different masks can share one."""

  def __init__(self) -> None:
    self._supports: list[int] = []

  @property
  def count(self) -> int:
    """How many there are."""
    return len(self._supports)

  def new(self, support: int) -> int:
    """A row for something that hangs on the masks of ``support``."""
    free = (row for row, taken in enumerate(self._supports) if not taken & support)
    row = next(free, self.count)
    self._supports[row:] = [support] if row == self.count else self._supports[row:]
    self._supports[row] |= support
    return row


class _Overlaps:
  """Features below several factors of one monomial.

  Attributes:
    rows: the factors in question, and in which row of weights each one's own drops are found.
  """

  def __init__(self, prices: Prices) -> None:
    self.rows: dict[Set, int] = {}
    self._prices = prices
    monomials, features, places = [], [], []
    zero = -1
    width = max((len(m.factors) for m in prices._monomials), default=0)
    for at, m in enumerate(prices._monomials):
      if not (twice := _in_several(m.factors)):
        continue
      found = prices.features_of(twice)
      place = np.full((found.size, width), zero)
      for column, s in enumerate(m.factors):
        if s.support & twice:
          row = self._row(s)
          inside = np.isin(found, prices.features_of(s.support))
          place[:, column] = np.where(inside, row * prices._circuit.features + found, zero)
      monomials.append(np.full(found.size, at))
      features.append(found)
      places.append(place)
    self._any = bool(monomials)
    if self._any:
      self._monomial, self._feature = np.concatenate(monomials), np.concatenate(features)
      self._place = np.concatenate(places)

  def _row(self, s: Set) -> int:
    if s not in self.rows:
      self.rows[s] = self._prices._rows.new(s.support)
    return self.rows[s]

  def taken_off(self, found: jax.Array, counts: jax.Array) -> jax.Array:
    """Drops to the first order in, drops out."""
    if not self._any:
      return found
    prices = self._prices
    values = counts[prices.places(m.factors for m in prices._monomials)][self._monomial]
    drops = jnp.concatenate([found.reshape(-1), jnp.zeros(1, found.dtype)])[self._place]
    value, drop, excess = jnp.ones_like(values[:, 0]), 0, 0
    for v, d in zip(values.T, drops.T, strict=True):
      excess = excess * v + drop * d
      drop = drop * v + (value - drop) * d
      value = value * v
    scales = np.array([m.scale for m in prices._monomials], np.float32)[self._monomial]
    rows = np.array([prices._row_of_sum[m.sum] for m in prices._monomials])[self._monomial]
    return found.at[rows, self._feature].add(-scales * excess)


def _in_several(factors: Iterable[Set]) -> int:
  once = twice = 0
  for s in factors:
    twice |= once & s.support
    once |= s.support
  return twice
