"""What residual blocks contribute, measured by leaving them out.

A gradient tells little of a change as large as a block. So blocks are left out one after the other: each time the one without
which the network suffers least.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from fisherprune_jax._masks import flatten, unflatten
from fisherprune_jax._training.bundles import rows_of
from fisherprune_jax._training.floors import floors_of
from fisherprune_jax._types import Masks

MOST_RUNS = 400
"""With more runs than that, several blocks are left out in one round."""
ORDER = 1 + 1e-4
"""A block that is left out later is more important by this factor at least."""
LEAST, WORST = 1e-30, 1e30
"""The importance of a block that does no good, and the harm of a network that is not finite."""


def with_blocks(masks: Masks, tie: Sequence[str], harm: Callable[[Masks], float]) -> Callable[[Masks], Masks]:
  """Returns a function that replaces the importance of residual blocks by what was measured.

  Args:
    masks: masks of ones.
    tie: patterns of masks that keep equal widths; tied blocks are left out together.
    harm: how much worse the network is under some masks.
  """
  rows = rows_of(masks, floors_of(masks, 1), 1, tie, {})
  units = [rows.starts[:-1][rows.together == unit] for unit in dict.fromkeys(rows.together[rows.blocks])]
  found = _left_out(
    units, np.ones(rows.starts[-1], np.float32), lambda alive: harm(unflatten(jnp.asarray(alive), masks))
  )

  def replaced(importance: Masks) -> Masks:
    vector = np.array(flatten(importance))
    for places, value in zip(units, found, strict=True):
      vector[places] = value / len(places)
    return unflatten(jnp.asarray(vector), masks) if units else importance

  return replaced


def _left_out(
  units: Sequence[np.ndarray], alive: np.ndarray, harm: Callable[[np.ndarray], float]
) -> list[float]:
  """The harm that each unit adds when it is left out, never less than that of one before."""
  found, left, before, least = [0.0] * len(units), list(range(len(units))), 0.0, LEAST
  each_round = math.ceil(len(units) * (len(units) + 1) / 2 / MOST_RUNS)

  def without(gone: Sequence[int]) -> float:
    tried = alive.copy()
    for unit in gone:
      tried[units[unit]] = 0
    value = harm(tried)
    return min(value, WORST) if math.isfinite(value) else WORST

  while left:
    harms = {unit: without([unit]) for unit in left}
    gone = sorted(left, key=lambda unit: harms[unit])[:each_round]
    for unit in gone:
      least = found[unit] = max(least * ORDER, harms[unit] - before)
    before = harms[gone[0]] if len(gone) == 1 else without(gone)
    for unit in gone:
      alive[units[unit]] = 0
    left = [unit for unit in left if unit not in gone]
  return found
