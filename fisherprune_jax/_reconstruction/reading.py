"""Which columns of a product's operand the features of masks are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

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
  """Features of a row of a mask that a product reads, in those of its groups where they have the same columns.

  Attributes:
    mask: which leaf of the masks, by position.
    row: which row of it.
    features: which features of the row, ``(F,)``.
    groups: which groups of the product.
    columns: the columns of each of the features, ``(F, p)``; -1 where one has fewer.
  """

  mask: int
  row: int
  features: np.ndarray
  groups: np.ndarray
  columns: np.ndarray


def live_columns(
  readings: Sequence[Reading], masks: Sequence[np.ndarray], groups: int, columns: int
) -> np.ndarray:
  """Whether the masks leave a column of a product's operand in any of its groups."""
  live = np.ones((groups, columns), bool)
  for reading in readings:
    mask = masks[reading.mask]
    dead = reading.columns[mask.reshape(-1, mask.shape[-1])[reading.row, reading.features] == 0]
    live[np.ix_(reading.groups, dead[dead >= 0])] = False
  return np.any(live, 0)


def readings(flat: Flat, use: Use, masks: Mapping[Value, int]) -> list[Reading]:
  """The features that a product reads, of masks that are multiplied right onto its operand.

  Args:
    flat: the network.
    use: the product.
    masks: the leaves that are masks, and the position of each among them.
  """
  node = flat.nodes[use.at]
  operand, step = node.ins[1 - use.side], row_step(node, use.side, MOST_ROWS)
  found = []
  for value, leaves in _multiplied(flat, operand, masks):
    for leaf in leaves:
      code = jnp.broadcast_to(_codes(flat, value, leaf, masks), operand.shape)
      columns = np.asarray(operand_matrix(node, use.side, code, step)).max(1).astype(np.int64)
      found += list(_by_row(leaf.shape[-1], masks[leaf], columns))
  return found


def _multiplied(flat: Flat, value: Value, masks: Mapping[Value, int]) -> list[tuple[Value, list[Value]]]:
  """The values made of masks alone that another value is the product with, and these masks."""
  found = []
  while value in flat.made:
    node = flat.nodes[flat.made[value]]
    if node.name in CASTS:
      (value,) = node.ins
    elif node.name == "mul":
      ours = [(v, leaves) for v in node.ins if (leaves := of_masks(flat, v, masks))]
      if len(ours) != 1:
        break
      found += ours
      (value,) = [v for v in node.ins if v is not ours[0][0]]
    else:
      break
  return found


def of_masks(flat: Flat, value: Value, masks: Mapping[Value, int]) -> list[Value]:
  """The masks that a value is made of; empty if it is made of anything else."""
  if value.literal is not None or value in flat.varies:
    return []
  constants = {const for const, _ in flat.program.consts}
  _, read = flat.before([value], flat.variables)
  inputs = [v for v in read if v not in constants]
  return inputs if all(v in masks for v in inputs) else []


def _codes(flat: Flat, value: Value, leaf: Value, masks: Mapping[Value, int]) -> jax.Array:
  """The number of the feature of one mask at each entry of a value, from 1; 0 elsewhere."""
  bits = binary_digits(leaf.aval.size)
  rows = np.concatenate([np.zeros((1, leaf.aval.size)), np.ones((1, leaf.aval.size)), bits])
  given = jnp.asarray(rows.reshape(-1, *leaf.shape), leaf.aval.dtype)
  dead, whole, *found = jax.vmap(lambda mask: at_masks(flat, value, masks, {leaf: mask}))(given)
  is_all, is_none = (jnp.stack(found) == wanted for wanted in (whole, dead))
  is_one = (dead == 0) & (whole != 0) & jnp.all(is_all | is_none, 0)
  return jnp.where(is_one, 1 + from_digits(is_all), 0).astype(jnp.float32)


def binary_digits(count: int) -> np.ndarray:
  """The digits of the numbers below ``count``, ``(digits, count)``, lowest first: exact in any dtype, as the numbers are not."""
  return np.arange(count) >> np.arange(max(1, (count - 1).bit_length()))[:, None] & 1


def from_digits(digits: jax.typing.ArrayLike) -> jax.Array:
  """The numbers that binary digits ``(digits, ...)`` are."""
  digits = jnp.asarray(digits, jnp.int32)
  return jnp.tensordot(2 ** jnp.arange(len(digits), dtype=jnp.int32), digits, 1)


def at_masks(flat: Flat, value: Value, masks: Iterable[Value], given: Env) -> jax.Array:
  """A value that is made of masks, at some masks; others are ones."""
  ones = {v: jnp.ones(v.shape, v.aval.dtype) for v in masks}
  return flat.get([value], {**ones, **dict(flat.program.consts), **given})[0]


def _by_row(size: int, mask: int, codes: np.ndarray) -> Iterator[Reading]:
  """The readings of one mask with rows of some size, from the code of each column ``(G, d)``."""
  for row in np.unique((codes[codes > 0] - 1) // size):
    numbers = codes - row * size
    patterns, which = np.unique(
      np.where((numbers > 0) & (numbers <= size), numbers, 0), axis=0, return_inverse=True
    )
    for at, pattern in enumerate(patterns):
      features, counts = np.unique(pattern[pattern > 0], return_counts=True)
      if len(features):
        table = np.full((len(features), counts.max()), -1)
        places = np.argsort(pattern, kind="stable")[np.count_nonzero(pattern == 0) :]
        table[np.arange(counts.max()) < counts[:, None]] = places
        yield Reading(mask, int(row), features - 1, np.flatnonzero(which.ravel() == at), table)
