r"""Importance of features once what reads them is refitted.

The importance of a feature alone, in nats, is the damage of its removal if nothing makes up for it. Least squares on the
parameters that read a group makes up for most of that damage. The rest follows from second moments of the dense network
(``surgeon.py``). They are of the operand X of every product with parameters W, and of the gradient g of random projections of
the outputs by the product's result. An error e of the result costs about

.. math:: \tfrac12 \, \mathrm{mean} \, (g^\top e)^2 = \tfrac12 \, e^\top A e, \qquad A = \mathrm{mean} \, g g^\top

for every row. Rows are not independent, so this is right up to a factor. For each group, the median ratio to the importance
of features alone corrects it.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.consumers import Consumer
from fisherprune_jax._reconstruction.fitting import Traced
from fisherprune_jax._reconstruction.flat import Compiled, Env, Flat
from fisherprune_jax._reconstruction.frontier import MOST_BYTES
from fisherprune_jax._reconstruction.products import (
  HIGHEST,
  operand_matrix,
  result_matrix,
  shapes_of,
)
from fisherprune_jax._reconstruction.reading import Reading
from fisherprune_jax._reconstruction.regression import step_of
from fisherprune_jax._reconstruction.settling import bias_columns
from fisherprune_jax._reconstruction.surgeon import Reader, descend, rising
from fisherprune_jax._training.estimation import random_projection
from fisherprune_jax._types import Masks, PyTree

RIDGE = 1e-2
"""Of the Gram matrices, over the mean square of their columns."""
MOST_COLUMNS = 4096
"""Results of more columns count by the diagonal of A alone."""


ENOUGH_EXAMPLES, ENOUGH_ROWS = 1024, 8
"""Importance is taken from every n-th batch, if that leaves as many examples, and as many rows for each column."""


class Second(NamedTuple):
  """Sums over the rows of a product.

  How many there are is nowhere divided by: the factor of each group corrects that too.

  Attributes:
    gram: of its operand with a column of ones, ``(G, d + 1, d + 1)``.
    gradients: of the gradients of its result, ``(G, c, c)``, or their squares ``(G, c)``.
  """

  gram: jax.Array
  gradients: jax.Array


def stride(traced: Traced) -> int:
  """From every how many-th batch importance is taken."""
  examples = max((x.shape[0] for x in traced.batches[0] if x.ndim), default=1)
  needed = ENOUGH_EXAMPLES / examples
  for consumer in traced.consumers:
    use = consumer.uses[0]
    rows = math.prod(shapes_of(traced.flat.nodes[use.at], use.side).rows)
    needed = max(needed, ENOUGH_ROWS * consumer.entries.shape[1] / rows)
  return max(1, int(len(traced.batches) / needed))


def refitted_importance(traced: Traced, variables: PyTree, importance: Masks, key: jax.Array) -> Masks:
  """The importance of every feature after everything that reads it is refitted, where that can be told.

  Args:
    traced: the network, and batches.
    variables: its variables, with masks of ones.
    importance: that of every feature alone, in nats.
    key: for the random projections.

  Returns:
    A tree like ``importance``. Within a mask it rises in the order in which features are best removed.
  """
  rows: dict[tuple[int, int], list[tuple[int, Reading]]] = {}
  for at, uses in enumerate(traced.readings):
    for reading in uses[0]:
      rows.setdefault((reading.mask, reading.row), []).append((at, reading))
  leaves = [np.array(x, np.float32) for x in jax.tree.leaves(importance)]
  network = _Network(traced, variables, key)
  for part in _parts(rows, traced.consumers):
    needed = sorted({at for row in part for at, _ in rows[row]})
    products = dict(zip(needed, map(network.product, needed, network.moments(needed)), strict=True))
    for mask, row in part:
      vectors = leaves[mask].reshape(-1, leaves[mask].shape[-1])
      readers = [products[at].reader(reading) for at, reading in rows[mask, row]]
      vectors[row] = _importance(readers, vectors[row])
  return jax.tree.unflatten(jax.tree.structure(importance), [jnp.asarray(x) for x in leaves])


def _importance(readers: Sequence[Reader], alone: np.ndarray) -> np.ndarray:
  """The importance of the features of one row of a mask, from what reads it and their importance alone."""
  costs = descend(readers, len(alone), RIDGE)
  comparable = (costs.alone > 0) & (alone > 0)
  if not comparable.any():  # the outputs do not depend on it through these products
    return alone
  factor = np.median(alone[comparable] / costs.alone[comparable])
  is_read = np.isin(np.arange(len(alone)), np.concatenate([reader.features for reader in readers]))
  order = np.lexsort((costs.removed, costs.step))
  order = order[is_read[order]]
  rises = rising(costs.removed[order]) * factor
  rises = rises * (1 + 1e-5 * np.arange(len(order)) / len(order))  # equals go in this order too
  found = alone.copy()
  found[order] = rises
  return found


def _parts(
  rows: Mapping[tuple[int, int], list[tuple[int, Reading]]], consumers: Sequence[Consumer]
) -> Iterator[list[tuple[int, int]]]:
  """The rows in parts whose moments fit into ``MOST_BYTES`` together."""
  part: list[tuple[int, int]] = []
  held: set[int] = set()
  for row, readers in rows.items():
    more = held | {at for at, _ in readers}
    if part and sum(_size(consumers[at]) for at in more) > MOST_BYTES:
      yield part
      part, more = [], {at for at, _ in readers}
    part.append(row)
    held = more
  if part:
    yield part


def _size(consumer: Consumer) -> int:
  groups, terms, columns = consumer.entries.shape
  return 4 * groups * (terms**2 + (columns**2 if columns <= MOST_COLUMNS else columns))


class _Product(NamedTuple):
  """A product whose result is turned so that errors of all columns cost alike; as of :class:`Reader`, with all groups."""

  gram: np.ndarray
  plain: np.ndarray
  parameters: np.ndarray

  def reader(self, reading: Reading) -> Reader:
    """What a group of features has of it."""
    gram, plain, parameters = (x[reading.groups] for x in self)
    return Reader(gram, plain, parameters, reading.features, reading.columns)


class _Network:
  """The dense network, and what is measured of it."""

  def __init__(self, traced: Traced, variables: PyTree, key: jax.Array) -> None:
    self.flat, self.consumers, self.key = traced.flat, traced.consumers, key
    self.env, self.compiled = traced.flat.env(variables), Compiled()
    self.leaves = jax.tree.leaves(variables)
    self.arrays = traced.batches[:: stride(traced)]

  def moments(self, needed: Sequence[int]) -> list[Second]:
    """The moments of some consumers, over all batches."""
    flat, known = self.flat, list(self.env)

    def measured(constant: list[Any], arrays: list[Any], key: jax.Array) -> list[Second]:
      env = dict(zip([*known, *flat.arguments], [*constant, *arrays], strict=True))
      uses = [(at, use) for at in needed for use in self.consumers[at].uses]
      gradients = projected_gradients(flat, [flat.nodes[use.at].outs[0] for _, use in uses], env, key)
      operands = flat.get([flat.nodes[use.at].ins[1 - use.side] for _, use in uses], env)
      found: dict[int, Second] = {}
      for (at, use), x, g in zip(uses, operands, gradients, strict=True):
        node = flat.nodes[use.at]
        step = step_of(flat, self.consumers[at], use, len(self.arrays))
        more = _second(operand_matrix(node, use.side, x, step), result_matrix(node, use.side, g, step))
        found[at] = jax.tree.map(jnp.add, found[at], more) if at in found else more
      return [found[at] for at in needed]

    @functools.partial(jax.jit, donate_argnums=0)
    def added(sums: list[Second], *args: Any) -> list[Second]:
      return jax.tree.map(jnp.add, sums, measured(*args))

    args = [list(self.env.values()), self.arrays[0], self.key]
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measured, *args))
    for number, arrays in enumerate(self.arrays):
      total = added(total, args[0], arrays, jax.random.fold_in(self.key, number))
    return total

  def product(self, at: int, second: Second) -> _Product:
    """A product, from its moments."""
    consumer = self.consumers[at]
    gram = np.asarray(second.gram, np.float64)
    parameters = np.asarray(self.leaves[consumer.leaf], np.float64).ravel()[consumer.entries]
    parameters = _weighted(parameters, np.asarray(second.gradients, np.float64))
    has_bias = bias_columns(self.flat, consumer, self.env, self.compiled) is not None
    plain, ones = gram[:, :-1, :-1], gram[:, -1:, :-1]
    centred = plain - ones.swapaxes(1, 2) * ones / np.maximum(gram[:, -1:, -1:], 1e-300)
    return _Product(centred if has_bias else plain, plain, parameters)


def _second(x: jax.Array, g: jax.Array) -> Second:
  """The moments of one product; rows that no output depends on, such as padding, count nothing."""
  x, g = (jnp.where(jnp.isfinite(y), y, 0).astype(jnp.float32) for y in (x, g))
  seen = jnp.any(g != 0, -1, keepdims=True).astype(jnp.float32)
  x = jnp.concatenate([x, jnp.ones((*x.shape[:2], 1), x.dtype)], -1)
  turned = g.swapaxes(1, 2)
  squares = jnp.matmul(turned, g, precision=HIGHEST) if g.shape[-1] <= MOST_COLUMNS else jnp.sum(g * g, 1)
  return Second(jnp.matmul((x * seen).swapaxes(1, 2), x, precision=HIGHEST), squares)


def _weighted(parameters: np.ndarray, gradients: np.ndarray) -> np.ndarray:
  """Parameters times a square root of A, ``(G, c, c)`` or its diagonal ``(G, c)``."""
  if gradients.ndim == 2:
    return parameters * np.sqrt(gradients)[:, None]
  # What was summed up in float32 may have eigenvalues below zero, by rounding.
  level = 1e-6 * np.trace(gradients, axis1=1, axis2=2) + 1e-300
  return parameters @ np.linalg.cholesky(gradients + level[:, None, None] * np.eye(gradients.shape[-1]))


def projected_gradients(flat: Flat, values: Sequence[Value], env: Env, key: jax.Array) -> list[jax.Array]:
  """Gradients by some values of the outputs' projection on a random direction, summed over examples."""
  positions, _ = flat.before([*flat.outputs, *values], env)

  def project(added: list[jax.Array]) -> jax.Array:
    found = flat.run(positions, env, dict(zip(values, added, strict=True)))
    return random_projection([found[v] for v in flat.outputs], key)

  return jax.grad(project)([jnp.zeros(v.shape, v.aval.dtype) for v in values])
