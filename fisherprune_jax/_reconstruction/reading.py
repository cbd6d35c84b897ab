"""Which columns of a product's operand each feature of each mask is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.consumers import Use
from fisherprune_jax._reconstruction.flat import Env, Flat
from fisherprune_jax._reconstruction.products import operand_matrix, row_step

MOST_ROWS = 4096
"""Masks are alike in all examples, so that some rows of a product show all of them."""
CASTS = ("convert_element_type", "copy")


class Reading(NamedTuple):
  """A row of a mask that a product reads.

  Attributes:
    mask: which leaf of the masks, by position.
    row: which row of it.
    columns: the columns of each feature, ``(C, p)``; -1 where a feature has fewer.
  """

  mask: int
  row: int
  columns: np.ndarray


def numbered(flat: Flat, flags: Sequence[bool]) -> dict[Value, int]:
  """The masks among the variables, by what ``flags`` says of each leaf, and the position of each among them."""
  masks = [value for value, is_mask in zip(flat.variables, flags, strict=True) if is_mask]
  return {value: at for at, value in enumerate(masks)}


def live_columns(flat: Flat, use: Use, masks: dict[Value, int], env: Env) -> np.ndarray:
  """Whether each column of a product's operand is left by the masks that are multiplied right onto it."""
  node = flat.nodes[use.at]
  operand = node.ins[1 - use.side]
  live = jnp.ones(operand.shape, bool)
  for value, _ in _multiplied(flat, operand, masks):
    live &= flat.get([value], env)[0] != 0
  return _of_columns(flat, use, live.astype(jnp.float32)) > 0


def readings(flat: Flat, use: Use, masks: dict[Value, int]) -> list[Reading]:
  """The rows of masks that a product reads, if they are multiplied right onto its operand."""
  node = flat.nodes[use.at]
  operand = node.ins[1 - use.side]
  found = []
  for value, leaves in _multiplied(flat, operand, masks):
    for leaf in leaves:
      code = jnp.broadcast_to(_codes(flat, value, leaf, masks), operand.shape)
      columns = _of_columns(flat, use, code).astype(np.int64)
      found += list(_by_row(leaf, masks[leaf], columns))
  return found


def _of_columns(flat: Flat, use: Use, entries: jax.Array) -> np.ndarray:
  """The largest entry in each column of a product's operand, over some rows; others are like them."""
  node = flat.nodes[use.at]
  return np.asarray(operand_matrix(node, use.side, entries, row_step(node, use.side, MOST_ROWS))).max((0, 1))


def _multiplied(flat: Flat, value: Value, masks: dict[Value, int]) -> list[tuple[Value, list[Value]]]:
  """The values made of masks alone that another value is the product with, and these masks."""
  found = []
  while value in flat.made:
    node = flat.nodes[flat.made[value]]
    if node.name in CASTS:
      (value,) = node.ins
    elif node.name == "mul":
      ours = [(v, leaves) for v in node.ins if (leaves := _of_masks(flat, v, masks))]
      if len(ours) != 1:
        break
      found += ours
      (value,) = [v for v in node.ins if v is not ours[0][0]]
    else:
      break
  return found


def _of_masks(flat: Flat, value: Value, masks: dict[Value, int]) -> list[Value]:
  """The masks that a value is made of; empty if it is made of anything else."""
  if value.literal is not None or value in flat.varies:
    return []
  constants = {const for const, _ in flat.program.consts}
  _, read = flat.before([value], flat.variables)
  inputs = [v for v in read if v not in constants]
  return inputs if all(v in masks for v in inputs) else []


def _codes(flat: Flat, value: Value, leaf: Value, masks: dict[Value, int]) -> jax.Array:
  """The number of the feature of one mask at each entry of a value, from 1; 0 where there is none."""
  env: dict[Value, Any] = {v: jnp.ones(v.shape, jnp.float32) for v in masks} | dict(flat.program.consts)
  numbers = jnp.arange(1, leaf.aval.size + 1, dtype=jnp.float32).reshape(leaf.shape)
  (dead,) = flat.get([value], {**env, leaf: jnp.zeros(leaf.shape, jnp.float32)})
  (code,) = flat.get([value], {**env, leaf: numbers})
  return jnp.where(dead == 0, code, 0)


def _by_row(leaf: Value, at: int, columns: np.ndarray) -> Any:
  size = leaf.shape[-1]
  for row in range(leaf.aval.size // size):
    own = [np.flatnonzero(columns == row * size + feature + 1) for feature in range(size)]
    width = max(len(places) for places in own)
    if width:
      table = np.full((size, width), -1)
      for feature, places in enumerate(own):
        table[feature, : len(places)] = places
      yield Reading(at, row, table)
