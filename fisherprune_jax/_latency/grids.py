"""Times of kernels, alone, at a grid of widths."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._latency.clock import Memory, medians
from fisherprune_jax._latency.kernels import Kernel, Widths
from fisherprune_jax._latency.tables import Table, monotone
from fisherprune_jax._types import Shape

POINTS = 64
"""The most widths to time of one kernel: with three free axes, four of each."""


def some_of(fractions: Sequence[float], axes: int) -> list[float]:
  """As many fractions as can be combined along some axes, including the last."""
  count = min(len(fractions), int(POINTS ** (1 / max(axes, 1)) + 1e-9))
  return [fractions[at] for at in np.linspace(len(fractions) - 1, 0, count).round().astype(int)]


def grid_of(size: int, fractions: Sequence[float], multiple_of: int) -> list[int]:
  """Widths to time, in order: odd multiples of a number, and the full size.

  >>> fractions = 0.125, 0.25, 0.5, 1.0
  >>> grid_of(64, fractions, 1), grid_of(64, fractions, 8)
  ([7, 15, 31, 64], [8, 24, 64])
  """
  times = (max(1, round(f * size / multiple_of)) for f in fractions if f < 1)
  found = {(n - 1 + n % 2) * multiple_of for n in times}
  return [*sorted(n for n in found if n < size), size]


def table_of(kernel: Kernel, grid: Sequence[Sequence[int]], repeats: int, memory: Memory) -> Table:
  """The times of a kernel at a grid of widths."""
  points = list(itertools.product(*grid))
  names = [kernel.name(widths) for widths in points]
  new = {name: w for name, w in zip(names, points, strict=True) if name not in memory.times}
  if new:
    memory.check_place()
    memory.add(dict(zip(new, _seconds(kernel, [*new.values()], repeats), strict=True)))
  seconds = np.zeros([len(g) + 1 for g in grid])
  found = [memory.times[name] for name in names]
  seconds[(slice(1, None),) * len(grid)] = np.reshape(found, [len(g) for g in grid])
  return Table(tuple((0, *g) for g in grid), monotone(seconds))


def _seconds(kernel: Kernel, points: Sequence[Widths], repeats: int) -> list[float]:
  """The times of a kernel at some widths, without that of a call."""
  dtypes = [value.aval.dtype for value in kernel.node.ins]
  given = [[some(s, d) for s, d in zip(kernel.shapes(w), dtypes, strict=True)] for w in points]
  runs = [partial(jax.jit(partial(_run, kernel, w)), arrays) for w, arrays in zip(points, given, strict=True)]
  nothing = partial(jax.jit(lambda arrays: arrays[0].reshape(-1)[:1] + 1), [some((1,), d) for d in dtypes])
  empty, *found = medians([nothing, *runs], repeats).tolist()
  return [max(seconds - empty, 0.0) for seconds in found]


def _run(kernel: Kernel, widths: Widths, arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
  return kernel.run(widths, arrays)


def some(shape: Shape, dtype: Any) -> jax.Array:
  """Random numbers, like those of a network; zeros for integers."""
  if not jnp.issubdtype(dtype, jnp.inexact):
    return jnp.zeros(shape, dtype)
  return jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32)).astype(dtype)
