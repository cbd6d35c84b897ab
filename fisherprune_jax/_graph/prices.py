"""Costs and marginal costs under jit, for all terms and features in one pass.

A sum of terms is a polynomial in the sizes of live sets; these are one circuit (circuit.py). If a feature is below one
set of a term, the term loses the set's drop times the other sizes. So positions of a set have a weight: the sum over
terms of the products of other sizes. The circuit propagates weights to features in one pass. For features below several
sets of a term, that is too much, by the excess of overlaps.py.

Programs have one size for all networks: they work on few arrays of static indices.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.circuit import Circuit
from fisherprune_jax._graph.nested import MAIN, Group, Sums, choices, filled
from fisherprune_jax._graph.overlaps import Lanes, Monomial, Overlaps
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.terms import Term, Terms


class Prices:
  """Terms over masks of known sizes, by key. Features are booleans for all masks, end to end."""

  def __init__(self, terms: Terms, masks: Mapping[Any, int]) -> None:
    self._sums = Sums(terms)
    self._terms = self._sums.all_terms
    self._monomials = list(_monomials(self._sums.terms))
    found = [*(s for t in self._terms for s in t.sets), *(s for m in self._monomials for s in m.factors)]
    self._roots = {s: at for at, s in enumerate(dict.fromkeys(found))}
    self._circuit = Circuit(self._roots, masks)
    self._positions = self._circuit.positions(self._roots)
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
    return self._totals(self._counts(self._circuit.live(features, jnp)))[MAIN]

  def sizes(self, features: jax.Array, found: Sequence[Set]) -> jax.Array:
    """The sizes of some sets of the terms, int32."""
    return self._sizes(self._circuit.live(features, jnp))[np.array([self._roots[s] for s in found], np.int32)]

  def drops(self, features: jax.Array) -> jax.Array:
    """For each feature, the drop of the sum, in float32; never a difference of totals."""
    live = self._circuit.live(features, jnp)
    counts = self._counts(live)
    found = self._circuit.drops(live, self._weights(counts), jnp)
    excess = self._overlaps.excess(found, counts[self._places])
    found = found.at[self._lane[self._overlaps.monomial], self._overlaps.feature].add(-excess)
    if self._sums.levels:
      totals = self._totals(counts)
      for level in self._sums.levels:
        found = self._with_groups(found, level, totals)
    return found[self._lane_of_sum[MAIN]]

  def _counts(self, live: jax.Array) -> jax.Array:
    """The size of every root, then a one, in float32."""
    return jnp.concatenate([self._sizes(live).astype(jnp.float32), jnp.ones(1, jnp.float32)])

  def _sizes(self, live: jax.Array) -> jax.Array:
    return self._positions.counts(live[: self._circuit.size], jnp)

  def _places_of(self, found: Iterable[Sequence[Set]]) -> np.ndarray:
    """Where sets' sizes are among the counts, a row each, padded with that of the one."""
    return filled(([self._roots[s] for s in factors] for factors in found), len(self._roots))

  def _totals(self, counts: jax.Array) -> jax.Array:
    outer = jnp.prod(counts[self._places_of(t.outer for t in self._terms)], axis=1)
    inner = jnp.prod(counts[self._places_of(t.inner or () for t in self._terms)], axis=1)
    scales, taps = (np.array([t[i] for t in self._terms], np.float32) for i in (0, 3))
    plain = np.array([t.inner is None for t in self._terms], bool)
    values = scales * outer * jnp.where(plain, 1, jnp.maximum(2 * taps * inner - 1, 0))
    main = jnp.sum(values[: len(self._sums.terms[MAIN])])
    others = jnp.sum(jnp.concatenate([values, jnp.zeros(1, values.dtype)])[self._sums.inner], axis=1)
    totals = jnp.concatenate([main[None], others])
    for level in self._sums.levels:
      largest = jnp.max(totals[choices(level)], axis=1)
      totals = totals.at[np.array([g.parent for g in level])].add(_scales(level) * largest)
    return totals

  def _weights(self, counts: jax.Array) -> jax.Array:
    """``(lanes, gates)``: what sums lose with one position of each root; for overlaps, one."""
    handed = self._scale[:, None] * _products_of_others(counts[self._places])
    of_roots = jnp.asarray(self._own).at[self._lane[:, None], self._places].add(handed)
    return self._positions.spread(of_roots[:, :-1], jnp)

  def _with_groups(self, found: jax.Array, level: list[Group], totals: jax.Array) -> jax.Array:
    """The largest sum drops to what is then the largest."""
    own = [self._circuit.features_of(group.support) for group in level]
    group, features = np.repeat(np.arange(len(level)), [f.size for f in own]), np.concatenate(own)
    sums, lanes = choices(level), np.array(self._lane_of_sum)
    falls = found[lanes[sums[group]], features[:, None]] * self._hangs(own, sums)
    values = totals[sums]
    behind = jnp.max(values, axis=1, keepdims=True) - values  # zero for the largest
    drop = jnp.min(behind[group] + falls, axis=1)
    parents = np.array([lanes[g.parent] for g in level])
    return found.at[parents[group], features].add(_scales(level)[group] * drop)

  def _hangs(self, own: list[np.ndarray], sums: np.ndarray) -> np.ndarray:
    """``(features, sums)``: for features of groups, whether the group's sums depend on each.

    Others may share a sum's lane.
    """
    below = {at: self._circuit.features_of(self._sums.supports[at]) for at in {*sums.flat}}
    groups = zip(own, sums, strict=True)
    return np.concatenate([np.stack([np.isin(f, below[at]) for at in row], axis=1) for f, row in groups])


def _scales(level: list[Group]) -> np.ndarray:
  return np.array([group.scale for group in level], np.float32)


def _products_of_others(values: jax.Array) -> jax.Array:
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
