r"""Ridge regression of a product's parameters towards what they are.

With X, ``(n, d)``, the operand of the masked network and R, ``(n, c)``, what its result lacks of the dense network's,

.. math:: \delta = (X^\top X + \lambda I)^{-1} X^\top R

is added to the parameters. A bias is a column of ones that is not shrunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.consumers import Consumer, Use
from fisherprune_jax._reconstruction.flat import Env, Flat
from fisherprune_jax._reconstruction.products import (
  HIGHEST,
  operand_matrix,
  result_matrix,
  row_step,
  shapes_of,
  some_rows,
)
from fisherprune_jax._reconstruction.settling import along, multipliers, settling
from fisherprune_jax._types import Shape

ROWS, MORE_ROWS = 32, 8192
"""So many rows of a product for each column of its operand, and more, are enough: positions of one image are much alike."""

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Tried on held-out batches; in units of the mean square of an operand's columns."""


class Moments(NamedTuple):
  """Sums over examples; of the operand with a column of ones behind it.

  Attributes:
    gram: products of columns, ``(G, d + 1, d + 1)``.
    cross: products of columns with what is missing, ``(G, d + 1, c)``.
  """

  gram: jax.Array
  cross: jax.Array


class Sample(NamedTuple):
  """One product on one batch: operand ``(G, n, d)``, what is missing ``(G, n, c)``, and weights ``(G, n, 1)``."""

  operand: jax.Array
  missing: jax.Array
  weights: jax.Array


def reads(flat: Flat, consumer: Consumer) -> tuple[list[Value], list[Value]]:
  """The values that ``moments_of`` needs of the masked network, and of the dense one."""
  own, dense = [], []
  for use in consumer.uses:
    node = flat.nodes[use.at]
    dense.append(settling(flat, use))
    own += [node.ins[1 - use.side], settling(flat, use)]
    own += multipliers(flat, use)
  own = [value for value in dict.fromkeys(own) if value.literal is None]
  return own, list(dict.fromkeys(dense))


def step_of(flat: Flat, consumer: Consumer, use: Use, batches: int) -> int:
  """One row of how many is enough of a product, over some batches."""
  enough = ROWS * consumer.entries.shape[1] + MORE_ROWS
  return row_step(flat.nodes[use.at], use.side, enough // batches)


def moments_of(
  flat: Flat,
  consumer: Consumer,
  own: Env,
  dense: Env,
  weights: jax.Array | None,
  places: jax.Array,
  one: jax.Array,
  batches: int,
) -> Moments:
  """The moments of one of some batches, of the values that ``reads`` names, over the operand's columns at some places."""
  total = None
  for use in consumer.uses:
    step = step_of(flat, consumer, use, batches)
    sample = sample_of(flat, use, own, dense[settling(flat, use)], weights, one, step)
    found = _moments(sample._replace(operand=sample.operand[..., places]))
    total = found if total is None else jax.tree.map(jnp.add, total, found)
  assert total is not None
  finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in total]))
  return jax.tree.map(lambda x: jnp.where(finite, x, 0), total)


def _moments(sample: Sample) -> Moments:
  operand, missing, weights = sample
  ones = jnp.ones((*operand.shape[:2], 1), operand.dtype)
  operand = jnp.concatenate([operand, ones], -1)
  # Whatever padding holds counts for nothing, even if it is not finite.
  operand, missing = (jnp.where(weights > 0, x, 0) for x in (operand, missing))
  weighted = (operand * weights).swapaxes(1, 2)
  return Moments(
    jnp.matmul(weighted, operand, precision=HIGHEST),
    jnp.matmul(weighted, missing, precision=HIGHEST),
  )


def sample_of(
  flat: Flat, use: Use, own: Env, dense: jax.Array, weights: jax.Array | None, one: jax.Array, step: int
) -> Sample:
  """What one in ``step`` rows of a product lacks, so that its settling point is what it is in the dense network."""
  node = flat.nodes[use.at]
  x, settled = own[node.ins[1 - use.side]], own[settling(flat, use)]
  wide = jnp.promote_types(settled.dtype, jnp.float32)
  error = dense.astype(wide) - settled.astype(wide)
  missing, scale = pulled(flat, use, own, error, one)
  missing = jnp.where(scale > 0, missing / jnp.where(scale > 0, scale, 1), 0)
  # Rows that never come to the settling point, since a slice leaves them out, count for nothing.
  seen = jnp.any(result_matrix(node, use.side, scale, step) > 0, -1)
  operand = operand_matrix(node, use.side, x, step).astype(wide)
  missing = result_matrix(node, use.side, missing, step)
  rows = row_weights(weights, shapes_of(node, use.side).rows)
  rows = rows if rows.size == 1 else some_rows(rows, step, 0)
  return Sample(operand, missing, (seen * rows).astype(wide)[..., None])


def pulled(flat: Flat, use: Use, env: Env, error: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
  """An error at the settling point handed back along the path, and what one entry of the result counts for there.

  ``one`` is 1: as an argument, since XLA would evaluate all that follows of a constant while it compiles.
  """
  like = jnp.broadcast_to(one.astype(error.dtype), flat.nodes[use.at].outs[0].shape)
  settled, pull = jax.vjp(lambda y: along(flat, use, None, env, y), like)
  (back,), (scale,) = pull(error), pull(settled)
  return back, scale


def row_weights(weights: jax.Array | None, rows: Shape) -> jax.Array:
  """Weights of examples ``(B,)``, or of examples and positions ``(B, T)``, for each row of a product: ``(n,)``."""
  if weights is None:
    return jnp.ones(1)
  if rows and rows[0] == weights.size:  # examples and positions are one axis
    weights = weights.reshape(-1)
  elif tuple(rows[: weights.ndim]) != weights.shape:
    weights = weights.reshape(len(weights), -1).max(1)
  if tuple(rows[: weights.ndim]) != weights.shape:
    return jnp.ones(1)
  return jnp.broadcast_to(weights.reshape(*weights.shape, *(1,) * (len(rows) - weights.ndim)), rows).reshape(
    -1
  )


@jax.jit
def squared_error(own: list[jax.Array], dense: list[jax.Array], weights: jax.Array | None) -> jax.Array:
  """The weighted squared error of some outputs."""
  total = jnp.float32(0)
  for a, b in zip(own, dense, strict=True):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    rows = row_weights(weights, a.shape)
    rows = rows.reshape(a.shape if rows.size == a.size else ())
    total += jnp.sum(jnp.where(rows > 0, rows * jnp.square(a.astype(wide) - b.astype(wide)), 0))
  return total


class Change(NamedTuple):
  """What is added to parameters ``(G, d, c)`` and to the bias of each column ``(G, c)``."""

  parameters: jax.Array
  bias: jax.Array


def solved(moments: Moments, ridge: jax.Array, has_bias: bool) -> Change:
  """The ridge regression of some moments; ``ridge`` is a multiple of the mean square of a live column."""
  gram, cross = moments.gram[:, :-1, :-1], moments.cross[:, :-1]
  sums, count = moments.gram[:, -1, :-1], moments.gram[:, -1, -1]
  count = jnp.maximum(count, jnp.finfo(count.dtype).tiny)
  mean, offset = sums / count[:, None], moments.cross[:, -1] / count[:, None]
  if has_bias:
    gram = gram - sums[:, :, None] * mean[:, None, :]
    cross = cross - sums[:, :, None] * offset[:, None, :]
  diagonal = jnp.diagonal(moments.gram[:, :-1, :-1], axis1=1, axis2=2)
  live = diagonal > 0
  level = jnp.sum(diagonal, 1) / jnp.maximum(jnp.sum(live, 1), 1)
  level = jnp.where(level > 0, level, 1)[:, None]
  added = jnp.where(live, ridge * level, level)  # a dead column is left as it is: its row of cross is zero
  gram = gram + added[:, :, None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)
  factor = lax.linalg.cholesky(gram)
  half = lax.linalg.triangular_solve(factor, cross, left_side=True, lower=True)
  change = lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)
  change = jnp.where(live[:, :, None], change, 0)
  bias = offset - jnp.einsum("gd,gdc->gc", mean, change, precision=HIGHEST)
  return Change(change, bias if has_bias else jnp.zeros_like(bias))


def left_error(moments: Moments, change: Change) -> jax.Array:
  """How much a change adds to the sum of squares of what is missing; below zero if it helps."""
  whole = jnp.concatenate([change.parameters, change.bias[:, None]], 1)
  through = jnp.matmul(moments.gram, whole, precision=HIGHEST)
  return jnp.sum(whole * (through - 2 * moments.cross))


def chosen(fitted: Moments, held: Moments | None, ridge: float | None, has_bias: bool) -> Change | None:
  """The change by the ridge that leaves the smallest error on batches that were held out; None if none helps there.

  Args:
    fitted: the moments to fit.
    held: those that were held out, if there are any.
    ridge: the ridge, if it is not to be chosen.
    has_bias: whether there is a bias to fit.
  """
  both = fitted if held is None else total(fitted, held)
  if ridge is None and held is None:
    ridge = RIDGES[1]
  if ridge is None:
    errors = [float(_tried(fitted, held, level, has_bias)[0]) for level in RIDGES]
    if not np.nanmin([*errors, 0.0]) < 0:
      return None
    ridge = RIDGES[int(np.nanargmin(errors))]
  _, is_finite, change = _tried(both, both, ridge, has_bias)
  return change if is_finite else None


# Compiled as wholes: on their own, the operations in them would be compiled one by one, for the shapes of each layer.


@jax.jit
def total(a: Moments, b: Moments) -> Moments:
  """The moments of the examples of both."""
  return jax.tree.map(jnp.add, a, b)


@functools.partial(jax.jit, static_argnums=3)
def _tried(
  fitted: Moments, held: Moments, ridge: jax.Array, has_bias: bool
) -> tuple[jax.Array, jax.Array, Change]:
  """How much the change by a ridge adds to an error, whether it is finite, and the change."""
  change = solved(fitted, ridge, has_bias)
  is_finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in change]))
  return left_error(held, change), is_finite, change
