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


def with_blocks(
  masks: Masks, tie: Sequence[str], harm_of: Callable[[], Callable[[Masks], float]]
) -> Callable[[Masks], Masks]:
  """Returns a function that replaces the importance of residual blocks by what was measured.

  Args:
    masks: masks of ones.
    tie: patterns of masks that keep equal widths; tied blocks are left out together.
    harm_of: makes a function that tells how much worse the network is under some masks; without blocks it is not called.
  """
  rows = rows_of(masks, floors_of(masks, 1), 1, tie, {})
  units = [rows.starts[:-1][rows.together == unit] for unit in dict.fromkeys(rows.together[rows.blocks])]
  if not units:
    return lambda importance: importance
  harm = harm_of()

  def harm_without(gone: Sequence[int]) -> float:
    alive = np.ones(rows.starts[-1], np.float32)
    alive[np.concatenate([units[unit] for unit in gone])] = 0
    value = harm(unflatten(jnp.asarray(alive), masks))
    return min(value, WORST) if math.isfinite(value) else WORST

  found = _left_out(len(units), harm_without)

  def replaced(importance: Masks) -> Masks:
    vector = np.array(flatten(importance))
    for places, value in zip(units, found, strict=True):
      vector[places] = value / len(places)
    return unflatten(jnp.asarray(vector), masks)

  return replaced


def _left_out(count: int, harm_without: Callable[[Sequence[int]], float]) -> list[float]:
  """The harm that each unit adds when it is left out, never less than that of one before."""
  found, gone, before, least = [0.0] * count, list[int](), 0.0, LEAST
  each_round = math.ceil(count * (count + 1) / 2 / MOST_RUNS)
  while left := [unit for unit in range(count) if unit not in gone]:
    harms = {unit: harm_without([*gone, unit]) for unit in left}
    chosen = sorted(left, key=lambda unit: harms[unit])[:each_round]
    for unit in chosen:
      least = found[unit] = max(least * ORDER, harms[unit] - before)
    gone += chosen
    before = harms[chosen[0]] if len(chosen) == 1 else harm_without(gone)
  return found
