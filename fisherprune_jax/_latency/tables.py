"""Times of kernels at all widths, interpolated from measured ones, for all kernels simultaneously.

A kernel's time is linear between the widths of its grid, along each free axis, and zero at width zero. The marginal
cost of a feature is a difference of two such times, summed over nodes. All is evaluated under ``jit``.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.circuit import Circuit
from fisherprune_jax._graph.nested import bits, filled
from fisherprune_jax._graph.overlaps import Lanes
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.terms import Term
from fisherprune_jax._latency.kernels import Kernel, Timed


class Table(NamedTuple):
  """Times of one kernel.

  Attributes:
    grid: the measured widths of each free axis, from zero.
    seconds: the times, ``(len(grid[0]), len(grid[1]), ...)``.
  """

  grid: tuple[tuple[int, ...], ...]
  seconds: np.ndarray


def monotone(seconds: np.ndarray) -> np.ndarray:
  """Times that never fall with a width: midway between the smallest monotone bound above and the largest below.

  >>> import numpy as np
  >>> monotone(np.array([0.0, 2.0, 1.0, 3.0]))
  array([0. , 1.5, 1.5, 3. ])
  """
  above, below = seconds, seconds
  for axis in range(seconds.ndim):
    above = np.maximum.accumulate(above, axis)
    below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
  return (above + below) / 2


class Times:
  """A sum of kernel times, as a function of the features of all masks, concatenated.

  Args:
    terms: the parts of the sum.
    tables: the times of each kernel.
    masks: the sizes of the masks by key.
  """

  def __init__(
    self, terms: Sequence[Timed], tables: Mapping[Kernel, Table], masks: Mapping[Any, int]
  ) -> None:
    self._terms = terms
    roots = {s: at for at, s in enumerate(dict.fromkeys(s for t in terms for s in t.sets))}
    self._circuit = Circuit(roots, masks)
    self._positions = self._circuit.positions(roots)
    self._one = len(roots)  # the index of a one after all sizes
    lanes = Lanes()
    self._lane = np.array([lanes.new(s.support) for s in roots], int)
    self._own = np.arange(lanes.count)[:, None] == self._lane
    self._lay_out(tables)
    self._place(roots)
    number = {kernel: at for at, kernel in enumerate(tables)}
    self._kernel = np.array([number[t.kernel] for t in terms], np.int32)
    self._pair(roots, [*masks.values()])

  def _lay_out(self, tables: Mapping[Kernel, Table]) -> None:
    """Lay all tables out in one array; missing axes have width one."""
    self._axes = max((len(table.grid) for table in tables.values()), default=0)
    points = max((len(g) for table in tables.values() for g in table.grid), default=2)
    self._grid = np.full((len(tables), self._axes, points), np.inf, np.float32)
    self._grid[:, :, :2] = [0, 1]
    self._seconds = np.zeros((len(tables), *[points] * self._axes), np.float32)
    for at, table in enumerate(tables.values()):
      for axis, grid in enumerate(table.grid):
        self._grid[at, axis, : len(grid)] = grid
      places: list[int | slice] = [at, *map(slice, table.seconds.shape)]
      self._seconds[(*places, *[1] * (self._axes - len(table.grid)))] = table.seconds

  def _place(self, roots: Mapping[Set, int]) -> None:
    """For every term and axis, the indices of the sizes whose product is its width; and other factors."""
    terms, one = self._terms, Term(1, ())
    columns = [[t.widths[axis] if axis < len(t.widths) else one for t in terms] for axis in range(self._axes)]
    self._whole = [np.array([w.scale for w in column], np.float32) for column in columns]
    self._places = [filled(([roots[s] for s in w.sets] for w in column), self._one) for column in columns]
    self._outer = filled(([roots[s] for s in t.outer] for t in terms), self._one)
    self._scale = np.array([t.scale for t in terms], np.float32)

  def _pair(self, roots: Mapping[Set, int], sizes: list[int]) -> None:
    """Pair every term with the features it depends on; note which root depends on which mask."""
    below = [self._circuit.features_of(bits(s.support for s in t.sets)) for t in self._terms]
    self._term = np.repeat(np.arange(len(below)), [f.size for f in below])
    self._feature = np.concatenate([np.zeros(0, int), *below])
    mask = np.repeat(np.arange(len(sizes)), sizes)
    self._mask = mask[self._feature]
    self._hangs = np.zeros((self._one + 1, len(sizes)), bool)
    for s, at in roots.items():
      self._hangs[at, mask[self._circuit.features_of(s.support)]] = True

  def parts(self, features: jax.Array) -> jax.Array:
    """The time of each term, in float32."""
    counts = self._counts(self._circuit.live(features, jnp))
    return self._taken(np.arange(len(self._terms)), counts.__getitem__)

  def drops(self, features: jax.Array) -> jax.Array:
    """The marginal time of each feature."""
    live = self._circuit.live(features, jnp)
    counts, falls = self._counts(live), self._falls(live)
    lane = np.append(self._lane, 0)
    feature, mask = self._feature[:, None], self._mask[:, None]

    def left(places: np.ndarray) -> jax.Array:
      return counts[places] - jnp.where(self._hangs[places, mask], falls[lane[places], feature], 0)

    before, after = (self._taken(self._term, sizes) for sizes in (counts.__getitem__, left))
    out = jnp.zeros(features.size, jnp.float32)
    return out.at[self._feature].add(jnp.where(features[self._feature], before - after, 0))

  def _counts(self, live: jax.Array) -> jax.Array:
    """The size of every root, and a one."""
    sizes = self._positions.counts(live[: self._circuit.size], jnp)
    return jnp.append(sizes.astype(jnp.float32), 1.0)

  def _falls(self, live: jax.Array) -> jax.Array:
    """``(lanes, features)``: how much smaller roots get without each feature."""
    weights = self._positions.spread(jnp.asarray(self._own, jnp.float32), jnp)
    return self._circuit.drops(live, weights, jnp)

  def _taken(self, terms: np.ndarray, sizes: Any) -> jax.Array:
    """The times of some terms; ``sizes`` gives the sizes at indices of roots, a row per term."""
    kernel = self._kernel[terms]
    index, share = [], []
    for axis, places in enumerate(self._places):
      width = self._whole[axis][terms] * jnp.prod(sizes(places[terms]), axis=1)
      at, part = _between(self._grid[kernel, axis], width)
      index.append(at)
      share.append(part)
    found = jnp.zeros(len(terms), jnp.float32)
    for corner in itertools.product((0, 1), repeat=self._axes):
      place = tuple(at + up for at, up in zip(index, corner, strict=True))
      weight = math.prod(part if up else 1 - part for part, up in zip(share, corner, strict=True))
      found = found + weight * jnp.asarray(self._seconds)[(kernel, *place)]
    return found * self._scale[terms] * jnp.prod(sizes(self._outer[terms]), axis=1)


def _between(grid: np.ndarray, width: jax.Array) -> tuple[jax.Array, jax.Array]:
  """For each row, the last grid point up to a width (except the very last), and the relative distance to the next."""
  points = np.sum(np.isfinite(grid), axis=1)
  at = jnp.clip(jnp.sum(width[:, None] >= grid, axis=1) - 1, 0, points - 2)
  low, high = (jnp.take_along_axis(jnp.asarray(grid), at[:, None] + up, axis=1)[:, 0] for up in (0, 1))
  return at, (width - low) / (high - low)
