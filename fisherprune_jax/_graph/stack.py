"""Arrays with an entry per layer, of different widths."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fisherprune_jax._graph.align import align
from fisherprune_jax._graph.boxes import Box
from fisherprune_jax._graph.evaluate import Evaluation

Held = Box | list[Box]
"""The entries of an array: one box, or one per layer, padded to the widest."""


@dataclass
class Stack:
  """Layers of different widths in one array, each padded with zeros at the end."""

  array: jax.Array
  boxes: list[Box]

  def layer(self, layer: int, ev: Evaluation) -> jax.Array:
    """One layer, without padding."""
    sizes = [ev.width(s) for s in self.boxes[layer]]
    return lax.slice(entry(self.array, layer), (0,) * len(sizes), sizes)

  def read(self, box: Box, ev: Evaluation) -> jax.Array:
    wanted = ev.index(box[0])
    layers = range(len(self.boxes)) if wanted is None else wanted
    return jnp.stack([align(self.layer(at, ev), self.boxes[at], box[1:], ev) for at in layers])


def entry(array: jax.Array, layer: int) -> jax.Array:
  return lax.index_in_dim(array, layer, keepdims=False)


def padded(layers: Sequence[Any], xp: ModuleType = jnp) -> Any:
  """Layers of different shapes in one array, of NumPy's or JAX's functions."""
  widest = np.max([layer.shape for layer in layers], 0)
  return xp.stack([xp.pad(x, [(0, n - m) for n, m in zip(widest, x.shape, strict=True)]) for x in layers])
