r"""Optimal brain surgeon for whole features: what their removal costs once the other parameters are refitted.

For products with operands X, Gram matrix :math:`H = X^\top X + \lambda I` and parameters W, removing the columns b of X and
refitting the rest adds

.. math:: \mathrm{tr}\bigl(W_b^\top (H^{-1})_{bb}^{-1} W_b\bigr)

to the squared error of the result. Features are removed one after the other, cheapest first.

References:
  Hassibi and Stork, `Second order derivatives for network pruning: Optimal Brain Surgeon
  <https://papers.nips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html>`_, 1992

  Kurtic et al., `ZipLM: Inference-aware structured pruning of language models <https://arxiv.org/abs/2302.04089>`_, 2023
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 64
"""In how many steps a group is taken down to nothing; several features go at once if it has more."""


class Block(NamedTuple):
  """A product that reads a group.

  Attributes:
    inverse: :math:`H^{-1}`, ``(G, d, d)``.
    parameters: ``(G, d, c)``.
    columns: the columns of each feature, ``(C, p)``; d where there are fewer.
  """

  inverse: jax.Array
  parameters: jax.Array
  columns: jax.Array


class Costs(NamedTuple):
  """What features cost, ``(C,)`` each: alone and with nothing refitted; when they were removed; and the step of that."""

  alone: np.ndarray
  removed: np.ndarray
  step: np.ndarray


def descend(
  grams: Sequence[jax.Array], parameters: Sequence[jax.Array], columns: Sequence[np.ndarray], ridge: float
) -> Costs:
  """Removes the features of one group one after the other, from all products that read it."""
  blocks, alone = [], jnp.float32(0)
  for gram, w, at in zip(grams, parameters, columns, strict=True):
    block, cost = _block(gram, w, jnp.asarray(at), ridge)
    blocks.append(block)
    alone += cost
  count = len(columns[0])
  size = -(-count // STEPS)
  removed, step = _descent(blocks, size)
  return Costs(np.asarray(alone), np.asarray(removed), np.asarray(step))


@jax.jit
def _block(gram: jax.Array, w: jax.Array, columns: jax.Array, ridge: float) -> tuple[Block, jax.Array]:
  size = gram.shape[-1]
  diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
  level = jnp.mean(diagonal, 1)
  level = jnp.where(level > 0, level, 1)
  gram_ = gram + (ridge * level)[:, None, None] * jnp.eye(size, dtype=gram.dtype)
  inverse = jnp.linalg.inv(gram_)
  cut = columns[:, :, None], columns[:, None, :]
  own = gram.at[:, cut[0], cut[1]].get(mode="fill", fill_value=0)  # (G, C, p, p)
  rows = w.at[:, columns].get(mode="fill", fill_value=0)  # (G, C, p, c)
  alone = jnp.einsum("gjac,gjab,gjbc->j", rows, own, rows)
  return Block(inverse, w, columns), alone


@functools.partial(jax.jit, static_argnums=1)
def _descent(blocks: list[Block], size: int) -> tuple[jax.Array, jax.Array]:
  count = len(blocks[0].columns)
  steps = -(-count // size)

  def body(number: jax.Array, state: tuple) -> tuple:
    blocks, alive, removed, step = state
    costs = sum(_costs(block) for block in blocks)
    costs = jnp.where(alive, costs, jnp.inf)
    _, chosen = jax.lax.top_k(-costs, size)
    going = alive[chosen]
    results = [_without(block, chosen, going) for block in blocks]
    joint = sum(cost for _, cost in results)
    single = jnp.where(going, costs[chosen], 0)
    share = single * joint / jnp.maximum(jnp.sum(single), 1e-30)
    removed = removed.at[chosen].set(jnp.where(going, share, removed[chosen]))
    step = step.at[chosen].set(jnp.where(going, number, step[chosen]))
    return [block for block, _ in results], alive.at[chosen].set(False), removed, step

  state = (blocks, jnp.ones(count, bool), jnp.zeros(count), jnp.zeros(count, jnp.int32))
  *_, removed, step = jax.lax.fori_loop(0, steps, body, state)
  return removed, step


def _costs(block: Block) -> jax.Array:
  inverse, w, columns = block
  cut = columns[:, :, None], columns[:, None, :]
  own = inverse.at[:, cut[0], cut[1]].get(mode="fill", fill_value=0)
  rows = w.at[:, columns].get(mode="fill", fill_value=0)
  own = _regular(own)
  if own.shape[-1] == 1:
    return jnp.sum(jnp.square(rows[:, :, 0]).sum(-1) / own[:, :, 0, 0], 0)
  return jnp.einsum("gjac,gjac->j", rows, jnp.linalg.solve(own, rows))


def _without(block: Block, chosen: jax.Array, going: jax.Array) -> tuple[Block, jax.Array]:
  inverse, w, columns = block
  size = inverse.shape[-1]
  at = jnp.where(going[:, None], columns[chosen], size).reshape(-1)
  rows = inverse.at[:, at].get(mode="fill", fill_value=0)  # (G, q, d)
  own = _regular(rows.at[:, :, at].get(mode="fill", fill_value=0))
  part = w.at[:, at].get(mode="fill", fill_value=0)
  both = jnp.linalg.solve(own, jnp.concatenate([rows, part], -1))
  cost = jnp.sum(part * both[..., size:])
  inverse = inverse - jnp.matmul(rows.swapaxes(1, 2), both[..., :size])
  w = w - jnp.matmul(rows.swapaxes(1, 2), both[..., size:])
  inverse = inverse.at[:, at].set(0, mode="drop").at[:, :, at].set(0, mode="drop")
  return Block(inverse, w.at[:, at].set(0, mode="drop"), columns), cost


def _regular(x: jax.Array) -> jax.Array:
  """Square matrices with ones on the diagonal of rows that are zero."""
  diagonal = jnp.diagonal(x, axis1=-2, axis2=-1)
  return x + jnp.where(diagonal <= 0, 1, 0)[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)


def rising(increments: np.ndarray) -> np.ndarray:
  """The closest sequence that does not fall: means of neighbours that do."""
  means: list[float] = []
  sizes: list[int] = []
  for value in increments:
    means.append(float(value))
    sizes.append(1)
    while len(means) > 1 and means[-2] > means[-1]:
      size = sizes[-2] + sizes[-1]
      means[-2:] = [(means[-2] * sizes[-2] + means[-1] * sizes[-1]) / size]
      sizes[-2:] = [size]
  return np.repeat(means, sizes)
