"""Running a step over arrays that are cut into layers, each of which needs the ones before."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax

from fisherprune_jax._types import Array

Same = TypeVar("Same", np.ndarray, jax.Array)
"""Arrays on the host, where steps may write in place, or on the device, under ``jit`` as a rule."""
Step = Callable[..., Any]
"""``step(state, at, *items) -> state``: ``items`` of some neighbours, the first of which is number ``at``."""


class Layers:
  """Arrays of equal length, in layers.

  Under ``jit`` the layers run in one loop, in chunks of one width, so that the program does not grow with their
  number. The last chunk of a layer is padded with items of zero, and so reaches into the next layer: what is
  written there is written again when that one's turn comes.

  Attributes:
    bounds: where layers begin, and the end.
    padding: how far beyond the end a chunk may reach.
  """

  def __init__(self, bounds: np.ndarray, *items: np.ndarray) -> None:
    self.bounds, self.items = bounds, items
    total, count = int(bounds[-1]), bounds.size - 1
    # The mean width, rounded up: no more chunks than twice the layers, at most half of it padding.
    self.padding = -(-total // max(count, 1))

  def run(self, step: Step, state: Same, first: int, reverse: bool = False) -> Same:
    """Applies ``step`` to all layers, from the last one if ``reverse``; item 0 has number ``first``."""
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

    def turn(state: jax.Array, each: tuple[Any, ...]) -> tuple[jax.Array, None]:
      return step(state, *each), None

    return lax.scan(turn, state, (np.int32(first) + starts, *chunks), reverse=reverse)[0]

  def _chunks(self) -> tuple[np.ndarray, list[np.ndarray]]:
    spans = zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True)
    chunks = [(start, high) for low, high in spans for start in range(low, high, self.padding)]
    starts, ends = np.array(chunks, np.int32).T
    places = starts[:, None] + np.arange(self.padding)
    inside = places < ends[:, None]
    places = np.where(inside, places, 0)
    return starts, [np.where(inside, item[places], np.zeros((), item.dtype)) for item in self.items]


def put(state: Array, at: int | jax.Array, values: Array) -> Array:
  """Writes neighbours into a vector, from number ``at`` on."""
  if isinstance(state, jax.Array):
    return lax.dynamic_update_slice(state, values, (at,))
  state[at : at + values.size] = values
  return state


def columns_at(state: Array, at: int | jax.Array, width: int) -> Array:
  """The columns of some neighbours, from number ``at`` on."""
  if isinstance(state, jax.Array):
    return lax.dynamic_slice_in_dim(state, at, width, axis=1)
  return state[:, at : at + width]
