"""Fits times of parts to times of whole networks."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TRUST = 1.0
"""The weight of a product's own time, against relative errors of whole networks."""


def fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
  """Non-negative factors of columns that fit the times of rows best, and the first row exactly.

  Errors are relative to each row. The first column was measured, so its factor is drawn to one. All subsets of the few
  columns are tried: the best fit without negative factors is optimal.

  >>> [round(factor, 6) for factor in fitted([[4.0, 2.0], [2.0, 1.5]], [8.0, 5.0])]
  [1.0, 2.0]
  """
  wanted = np.array([*seconds, 1.0])
  columns = np.vstack([np.asarray(rows, float), np.eye(len(rows[0]))[0]])
  weight = np.array([*(1 / max(s, 1e-12) for s in seconds), TRUST])
  best, least = np.zeros(columns.shape[1]), np.inf
  norms = np.maximum(np.abs(columns[:-1]).max(axis=0), 1e-30)
  for chosen in itertools.product((False, True), repeat=len(best)):
    some = np.flatnonzero(chosen)
    factors = np.zeros(len(best))
    given = columns[:, some] / norms[some] * weight[:, None]
    factors[some] = np.linalg.lstsq(given, wanted * weight, rcond=1e-9)[0] / norms[some]
    off = np.square((columns @ factors - wanted) * weight).sum()
    if (factors >= 0).all() and off < least - 1e-12:
      best, least = factors, off
  first = columns[0] @ best
  return (best * (wanted[0] / first if first > 0 else 1.0)).tolist()


class Curve(NamedTuple):
  """A rising curve through points ``x`` and ``y``, from zero, linear between them."""

  x: tuple[float, ...]  # Python floats: NumPy's would widen a float32 under 64 bits
  y: tuple[float, ...]

  @classmethod
  def of(cls, x: Sequence[float], y: Sequence[float]) -> "Curve":
    """A curve through unordered points.

    Points above a later one are lowered to it; the highest counts at one place.

    >>> curve = Curve.of([8.0, 4.0, 4.0], [6.0, 1.0, 2.0])
    >>> float(curve(2.0)), float(curve(6.0)), float(curve.fall(6.0, 4.0))
    (1.0, 4.0, 3.0)
    """
    points, lowest = dict(sorted(zip(x, y, strict=True))), math.inf
    for at in reversed(points):  # starts at the dense network, which keeps its time
      points[at] = lowest = min(lowest, points[at])
    points = {0.0: 0.0} | points | {0.0: 0.0}
    return cls(tuple(points), tuple(points.values()))

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fall(x, x)

  def fall(self, x: jax.Array, by: jax.Array) -> jax.Array:
    """How much it falls from ``x`` to ``x - by``; exact for small ``by``."""
    total = 0.0 * by
    for (low, high), (start, end) in zip(itertools.pairwise(self.x), itertools.pairwise(self.y), strict=True):
      within = jnp.minimum(by, jnp.maximum(x - low, 0)) - jnp.minimum(by, jnp.maximum(x - high, 0))
      total = total + (end - start) / (high - low) * within
    return total

  def over(self, x: float) -> float:
    """The ratio of the curve to ``x``."""
    return float(self(jnp.asarray(x))) / x if x > 0 else 1.0
