"""Products of activations and parameters as matrices: ``(G, n, d)`` times ``(G, d, c)``.

G counts what is done side by side (experts, heads, groups of a convolution), n rows, d terms of a sum, c columns.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
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


def operand_matrix(node: Node, side: int, x: jax.Array) -> jax.Array:
  """The other operand than the parameters, as ``(G, n, d)``."""
  if node.name == "conv_general_dilated":
    return _patches(node, x)
  return _sides(node, 1 - side, x, inner_last=True)


def parameter_matrix(node: Node, side: int, w: jax.Array) -> jax.Array:
  """The operand of parameters, as ``(G, d, c)``."""
  if node.name == "conv_general_dilated":
    spec, groups = node.params["dimension_numbers"].rhs_spec, node.params["feature_group_count"]
    w = w.transpose(spec)  # out, in, places
    return w.reshape(groups, w.shape[0] // groups, -1).swapaxes(1, 2)
  return _sides(node, side, w, inner_last=False)


def result_matrix(node: Node, side: int, y: jax.Array) -> jax.Array:
  """The result, as ``(G, n, c)``."""
  groups, rows, columns = (math.prod(part) for part in shapes_of(node, side))
  if node.name == "conv_general_dilated":
    spec = node.params["dimension_numbers"].out_spec
    y = y.transpose((spec[0], *spec[2:], spec[1])).reshape(rows, groups, columns)
    return y.swapaxes(0, 1)
  if side == 1:
    return y.reshape(groups, rows, columns)
  return y.reshape(groups, columns, rows).swapaxes(1, 2)


def _sides(node: Node, side: int, x: jax.Array, inner_last: bool) -> jax.Array:
  """An operand of ``dot_general`` as groups, and its own and the summed axes in one order or the other."""
  contracted, batch = (axes[side] for axes in node.params["dimension_numbers"])
  own = [at for at in range(x.ndim) if at not in (*contracted, *batch)]
  groups, inner, outer = (math.prod(x.shape[at] for at in axes) for axes in (batch, contracted, own))
  if inner_last:
    return x.transpose((*batch, *own, *contracted)).reshape(groups, outer, inner)
  return x.transpose((*batch, *contracted, *own)).reshape(groups, inner, outer)


def _patches(node: Node, x: jax.Array) -> jax.Array:
  """What a convolution sums over at every place."""
  params = node.params
  spec = params["dimension_numbers"]
  kernel = node.ins[1].shape
  filters: Sequence[int] = [kernel[at] for at in spec.rhs_spec[2:]]
  numbers = lax.ConvDimensionNumbers(spec.lhs_spec, tuple(range(len(spec.rhs_spec))), spec.out_spec)
  found = lax.conv_general_dilated_patches(
    x,
    filters,
    params["window_strides"],
    params["padding"],
    params["lhs_dilation"],
    params["rhs_dilation"],
    dimension_numbers=numbers,
    precision=HIGHEST,
  )
  found = found.transpose((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1]))
  groups = params["feature_group_count"]
  return found.reshape(-1, groups, found.shape[-1] // groups).swapaxes(0, 1)
