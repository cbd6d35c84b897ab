"""Bundles: features that are masked together, for widths in multiples and tied masks."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._errors import is_number, require
from fisherprune_jax._masks import named_rows
from fisherprune_jax._training.floors import BLOCKS, Widths, first_that_fits, fits, require_used
from fisherprune_jax._types import Masks

Multiple = int | Mapping[str, int]
"""A number for all masks, or by glob patterns of their names; 1 for other masks."""


@dataclass(frozen=True, eq=False)
class Rows:
  """The rows (vectors) of all masks, concatenated, and the rows that lose features together.

  Attributes:
    starts: the start of each row, and the end of the last.
    floors: features that each row keeps.
    multiples: the divisor of each row's width above the floor.
    together: a number for each row, shared by tied rows.
    exact: whether each row shrinks to its floor whatever the cost.
    blocks: whether each row masks a residual block.
  """

  starts: np.ndarray
  floors: np.ndarray
  multiples: np.ndarray
  together: np.ndarray
  exact: np.ndarray
  blocks: np.ndarray

  @property
  def key(self) -> tuple[bytes, ...]:
    """Equal for equal rows."""
    parts = (self.starts, self.floors, self.multiples, self.together, self.exact)
    return tuple(part.tobytes() for part in parts)

  @property
  def are_single(self) -> bool:
    """Whether features are masked one by one."""
    return bool((self.multiples == 1).all() and len({*self.together}) == len(self.together))

  @property
  def units(self) -> int:
    """The number of groups of tied rows; each has one next bundle."""
    return int(self.together.max()) + 1

  @functools.cached_property
  def unit(self) -> np.ndarray:
    """Per feature, the index of its group."""
    return self.together[self._row]

  @functools.cached_property
  def _row(self) -> np.ndarray:
    return np.repeat(np.arange(len(self.floors)), np.diff(self.starts))

  def places(self, scores: jax.Array) -> jax.Array:
    """Per feature, its rank by score within its row; ties by index."""
    order = jnp.lexsort((scores, self._row))
    rank = jnp.zeros(scores.size, jnp.int32).at[order].set(jnp.arange(scores.size, dtype=jnp.int32))
    return rank - self.starts[:-1].astype(np.int32)[self._row]

  def earlier(self, at: jax.Array) -> jax.Array:
    """For features in order, the number of earlier ones in the same row."""
    row = jnp.asarray(self._row)[at]
    order = jnp.argsort(row, stable=True)
    first = jnp.searchsorted(row[order], row[order])
    return jnp.zeros(at.size, jnp.int32).at[order].set(jnp.arange(at.size, dtype=jnp.int32) - first)

  def add_up(self, values: jax.Array) -> jax.Array:
    """Per group, the sum over its features."""
    return jax.ops.segment_sum(values, jnp.asarray(self.unit), self.units)

  def sums(self, values: jax.Array) -> jax.Array:
    """Per row, the sum over its features."""
    return jax.ops.segment_sum(values, jnp.asarray(self._row), len(self.floors), indices_are_sorted=True)

  def widths(self, alive: jax.Array) -> jax.Array:
    """Per row, the number of live features."""
    return self.sums(alive.astype(jnp.int32))

  def spare(self, alive: jax.Array) -> jax.Array:
    """Per feature, the number that its row could lose."""
    return (self.widths(alive) - self.floors)[self._row]

  def owed(self, alive: jax.Array) -> jax.Array:
    """Per feature, whether its row is above its exact width."""
    return (self.exact & (self.widths(alive) > self.floors))[self._row]

  def is_block(self) -> jax.Array:
    """Per feature, whether it is a residual block."""
    return jnp.asarray(self.blocks[self._row])

  def surplus(self, alive: jax.Array, depth: jax.typing.ArrayLike) -> jax.Array:
    """Per feature, whether it is a block that may go, as more than ``depth`` blocks are live; tied blocks count as several."""
    live = alive & self.is_block()
    sizes = self.add_up(live.astype(jnp.int32))[self.unit]
    return live & (sizes <= jnp.sum(live) - depth) & (self.spare(alive) > 0)

  def next_bundle(self, alive: jax.Array) -> jax.Array:
    """Per feature, the number that its row loses next; 0 at the floor."""
    return self._losses(alive)[self._row]

  def all_ready(self, alive: jax.Array) -> jax.Array:
    """Per group, whether its rows can lose features."""
    return jax.ops.segment_max(self._losses(alive), jnp.asarray(self.together), self.units) > 0

  def all_of(self, holds: jax.Array) -> jax.Array:
    """Per group, whether ``holds`` is true of all its features."""
    return self._every(holds, self.unit)

  def _losses(self, alive: jax.Array) -> jax.Array:
    """Per row, the number of features it loses next; wider rows first shrink to the narrowest tied row."""
    width = self.widths(alive)
    together = jnp.asarray(self.together)
    among = jnp.where(width > 0, width, jnp.iinfo(jnp.int32).max)  # empty rows stay empty
    low = jax.ops.segment_min(among, together, self.units)[together]
    differ = jax.ops.segment_max(width, together, self.units)[together] > low
    goal = jnp.where(differ, low, (low - 1) // self.multiples * self.multiples)
    return jnp.where(width > 0, jnp.maximum(width - jnp.maximum(goal, self.floors), 0), 0)

  def _every(self, holds: jax.Array, of: np.ndarray) -> jax.Array:
    return jax.ops.segment_min(holds.astype(jnp.int32), jnp.asarray(of), self.units) > 0


def rows_of(masks: Masks, floors: Masks, multiple_of: Multiple, tie: Sequence[str], widths: Widths) -> Rows:
  """The rows of a tree of masks with known floors.

  Raises:
    ValueError: for an invalid multiple, or a pattern that matches no mask.

  >>> import jax.numpy as jnp
  >>> masks, floors = {"conv": jnp.ones(8), "layers": jnp.ones((2, 4))}, {"conv": [1], "layers": [[1], [1]]}
  >>> rows = rows_of(masks, floors, {"conv": 4}, ["layers"], {})
  >>> rows.starts.tolist(), rows.multiples.tolist(), rows.together.tolist()
  ([0, 8, 12, 16], [4, 1, 1], [0, 1, 1])
  """
  named = named_rows(masks)
  names = [name for name, _ in named]
  sizes = [mask.shape[-1] for _, mask in named]
  least = np.concatenate([np.reshape(floor, -1) for floor in jax.tree.leaves(floors)])
  given = zip(names, sizes, least, _given(names, multiple_of), strict=True)
  multiples = [
    1 if floor == size else _multiple(name, size, multiple) for name, size, floor, multiple in given
  ]
  together = _together(names, sizes, tie)
  of_unit = [np.flatnonzero(together == unit) for unit in together]
  exact = np.asarray([any(fits(name, pattern) for pattern in widths) for name in names])
  for rows in of_unit:
    given_widths = {names[row]: int(least[row]) for row in rows if exact[row]}
    require(
      len({*given_widths.values()}) <= 1, "widths must be equal for masks that tie keeps equal", given_widths
    )
  return Rows(
    np.cumsum([0, *sizes]),
    np.asarray([least[rows[exact[rows]] if exact[rows].any() else rows].max() for rows in of_unit]),
    np.asarray([math.lcm(*(multiples[row] for row in rows)) for rows in of_unit]),
    together,
    np.asarray([exact[rows].any() for rows in of_unit]),
    np.asarray([fits(name, BLOCKS) for name in names]),
  )


def _together(names: Sequence[str], sizes: Sequence[int], tie: Sequence[str]) -> np.ndarray:
  """Per row, a number shared by rows whose patterns overlap."""
  require_used("tie", tie, names)
  unit = np.arange(len(names))
  for pattern in tie:
    rows = [row for row, name in enumerate(names) if fits(name, pattern)]
    found = {names[row]: sizes[row] for row in rows}
    require(
      len({*found.values()}) == 1,
      f"tie must name masks of one size by each pattern, for {pattern!r}",
      found,
      "Give a pattern for each size.",
    )
    unit[np.isin(unit, unit[rows])] = unit[rows].min()
  return np.unique(unit, return_inverse=True)[1]


def _given(names: Sequence[str], multiple_of: Multiple) -> list[int]:
  if not isinstance(multiple_of, Mapping):
    return [1 if fits(name, BLOCKS) else multiple_of for name in names]
  require_used("multiple_of", multiple_of, names)
  return [first_that_fits(name, multiple_of, 1) for name in names]


def _multiple(name: str, size: int, multiple: int) -> int:
  valid = is_number(multiple) and multiple >= 1 and math.isfinite(multiple) and multiple == int(multiple)
  require(valid, f"multiple_of must be a whole number, at least 1, for {name}", multiple)
  remedy = "Name the masks that it is for: multiple_of={'conv*': 8}."
  require(
    multiple <= size, f"multiple_of must be at most {size}, the size of the mask {name}", multiple, remedy
  )
  return int(multiple)
