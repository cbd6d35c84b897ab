"""Products of activations and parameters as matrices: ``(G, n, d)`` times ``(G, d, c)``.

G counts what is done side by side (experts, heads, groups of a convolution), n rows, d terms of a sum, c columns.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fisherprune_jax._graph.program import Node

HIGHEST = lax.Precision.HIGHEST
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


class Shapes(NamedTuple):
  """How a product's result is cut: groups, rows, columns."""

  groups: tuple[int, ...]
  rows: tuple[int, ...]
  columns: tuple[int, ...]


def is_supported(node: Node) -> bool:
  """Whether the three functions below know a node."""
  return node.name == "dot_general" or (
    node.name == "conv_general_dilated" and node.params["batch_group_count"] == 1
  )


def shapes_of(node: Node, side: int) -> Shapes:
  """Groups, rows and columns of the result, where operand ``side`` holds the parameters."""
  out = node.outs[0].shape
  if node.name == "conv_general_dilated":
    spec, groups = node.params["dimension_numbers"].out_spec, node.params["feature_group_count"]
    rows = (out[spec[0]], *(out[at] for at in spec[2:]))
    return Shapes((groups,), rows, (out[spec[1]] // groups,))
  _, (batch, _) = node.params["dimension_numbers"]
  first = len(node.ins[0].shape) - len(node.params["dimension_numbers"][0][0]) - len(batch)
  parts = out[len(batch) : len(batch) + first], out[len(batch) + first :]
  return Shapes(out[: len(batch)], parts[1 - side], parts[side])


def row_step(node: Node, side: int, most: int) -> int:
  """One row of how many is taken so that at most about so many are."""
  return max(1, math.prod(shapes_of(node, side).rows) // max(1, most))


def some_rows(x: jax.Array, step: int, axis: int) -> jax.Array:
  """One of every ``step`` rows along an axis, by a hash of its number: equal steps might meet an image in few places."""
  if step == 1:
    return x
  number = jnp.arange(x.shape[axis] // step, dtype=jnp.uint32)
  offset = (number * np.uint32(2654435761) >> 16) % np.uint32(step)  # Knuth's multiplicative hash
  return jnp.take(x, number * np.uint32(step) + offset, axis, mode="clip")


def operand_matrix(node: Node, side: int, x: jax.Array, step: int = 1) -> jax.Array:
  """The other operand than the parameters, as ``(G, n, d)``; of its rows one in ``step``."""
  if node.name == "conv_general_dilated":
    return _patches(node, x, step)
  return some_rows(_sides(node, 1 - side, x, inner_last=True), step, 1)


def parameter_matrix(node: Node, side: int, w: jax.Array) -> jax.Array:
  """The operand of parameters, as ``(G, d, c)``."""
  if node.name == "conv_general_dilated":
    spec, groups = node.params["dimension_numbers"].rhs_spec, node.params["feature_group_count"]
    w = w.transpose(spec)  # out, in, places
    return w.reshape(groups, w.shape[0] // groups, -1).swapaxes(1, 2)
  return _sides(node, side, w, inner_last=False)


def result_matrix(node: Node, side: int, y: jax.Array, step: int = 1) -> jax.Array:
  """The result, as ``(G, n, c)``; of its rows one in ``step``."""
  groups, rows, columns = (math.prod(part) for part in shapes_of(node, side))
  if node.name == "conv_general_dilated":
    spec = node.params["dimension_numbers"].out_spec
    y = y.transpose((spec[0], *spec[2:], spec[1])).reshape(rows, groups, columns)
    y = y.swapaxes(0, 1)
  elif side == 1:
    y = y.reshape(groups, rows, columns)
  else:
    y = y.reshape(groups, columns, rows).swapaxes(1, 2)
  return some_rows(y, step, 1)


def _sides(node: Node, side: int, x: jax.Array, inner_last: bool) -> jax.Array:
  """An operand of ``dot_general`` as groups, and its own and the summed axes in one order or the other."""
  contracted, batch = (axes[side] for axes in node.params["dimension_numbers"])
  own = [at for at in range(x.ndim) if at not in (*contracted, *batch)]
  groups, inner, outer = (math.prod(x.shape[at] for at in axes) for axes in (batch, contracted, own))
  if inner_last:
    return x.transpose((*batch, *own, *contracted)).reshape(groups, outer, inner)
  return x.transpose((*batch, *contracted, *own)).reshape(groups, inner, outer)


def _patches(node: Node, x: jax.Array, step: int) -> jax.Array:
  """What a convolution sums over at every place: one slice of the padded operand for each entry of the kernel.

  Slices, since XLA's own ``conv_general_dilated_patches`` takes longer than the convolution on a CPU.
  """
  params, spec = node.params, node.params["dimension_numbers"]
  strides, groups = params["window_strides"], params["feature_group_count"]
  x = x.transpose((spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
  edges = zip(params["padding"], params["lhs_dilation"], strict=True)
  padding = [(low, high, between - 1) for (low, high), between in edges]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
  filters = [node.ins[1].shape[at] for at in spec.rhs_spec[2:]]
  places = [node.outs[0].shape[at] for at in spec.out_spec[2:]]
  found = []
  for taps in itertools.product(*map(range, filters)):
    first = [tap * by for tap, by in zip(taps, params["rhs_dilation"], strict=True)]
    last = [at + (n - 1) * by + 1 for at, n, by in zip(first, places, strides, strict=True)]
    part = lax.slice(x, [0, *first, 0], [len(x), *last, x.shape[-1]], [1, *strides, 1])
    found.append(some_rows(part.reshape(-1, groups, x.shape[-1] // groups), step, 0))
  rows = jnp.stack(found, -1)
  return rows.reshape(*rows.shape[:2], -1).swapaxes(0, 1)
