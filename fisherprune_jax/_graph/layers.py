"""Runs a step over arrays cut into layers, each depending on earlier ones."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax

from fisherprune_jax._types import Array

Same = TypeVar("Same", np.ndarray, jax.Array)
"""Arrays on the host, where steps may write in place, or on the device."""
Step = Callable[..., Any]
"""``step(state, at, *items) -> state``: items are consecutive, from number ``at`` on."""


class Layers:
  """Arrays of equal length, in layers.

  Under jit, one loop runs over chunks of equal width, so the program does not grow with the layers. A layer's last
  chunk is padded with zero items that reach into the next layer, which overwrites them.

  Attributes:
    bounds: where layers begin, and the end.
    padding: how far chunks may reach beyond it.
  """

  def __init__(self, bounds: np.ndarray, *items: np.ndarray) -> None:
    self.bounds, self.items = bounds, items
    total, count = int(bounds[-1]), bounds.size - 1
    # The mean width, rounded up: at most twice as many chunks as layers, half of it padding.
    self.padding = -(-total // max(count, 1))

  def run(self, step: Step, state: Same, first: int, reverse: bool = False) -> Same:
    """Applies a step to all layers, maybe in reverse; item 0 is number ``first``."""
    if not self.bounds[-1]:
      return state
    if isinstance(state, jax.Array):
      return self._in_a_loop(step, state, first, reverse)
    spans = list(zip(self.bounds[:-1], self.bounds[1:], strict=True))
    for low, high in reversed(spans) if reverse else spans:
      state = step(state, first + low, *(item[low:high] for item in self.items))
    return state

  def _in_a_loop(self, step: Step, state: jax.Array, first: int, reverse: bool) -> jax.Array:
    starts, chunks = self._chunks()

    def iteration(state: jax.Array, each: tuple[Any, ...]) -> tuple[jax.Array, None]:
      return step(state, *each), None

    return lax.scan(iteration, state, (np.int32(first) + starts, *chunks), reverse=reverse)[0]

  def _chunks(self) -> tuple[np.ndarray, list[np.ndarray]]:
    spans = zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True)
    chunks = [(start, high) for low, high in spans for start in range(low, high, self.padding)]
    starts, ends = np.array(chunks, np.int32).T
    places = starts[:, None] + np.arange(self.padding)
    inside = places < ends[:, None]
    places = np.where(inside, places, 0)
    return starts, [np.where(inside, item[places], np.zeros((), item.dtype)) for item in self.items]


def put(state: Array, at: int | jax.Array, values: Array) -> Array:
  if isinstance(state, jax.Array):
    return lax.dynamic_update_slice(state, values, (at,))
  state[at : at + values.size] = values
  return state


def columns_at(state: Array, at: int | jax.Array, width: int) -> Array:
  if isinstance(state, jax.Array):
    return lax.dynamic_slice_in_dim(state, at, width, axis=1)
  return state[:, at : at + width]
