r"""Optimal brain surgeon for whole features: what their removal costs once the other parameters are refitted.

For products with operands X, Gram matrix :math:`H = X^\top X + \lambda I` and parameters W, removing the columns b of X and
refitting the rest by ridge regression adds

.. math:: \mathrm{tr}\bigl(W_b^\top \bigl((H^{-1})_{bb}^{-1} - \lambda I\bigr) W_b\bigr)

to its error: what is removed is no change that the ridge should punish. Features are removed one after the other, cheapest
first.

References:
  Hassibi and Stork, `Second order derivatives for network pruning: Optimal Brain Surgeon
  <https://papers.nips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html>`_, 1992

  Kurtic et al., `ZipLM: Inference-aware structured pruning of language models <https://arxiv.org/abs/2302.04089>`_, 2023
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

STEPS = 64
"""In how many steps a group is taken down to nothing; several features go together if it has more."""


class Reader(NamedTuple):
  """A product that reads a group.

  Attributes:
    gram: second moments of its operand, ``(G, d, d)``, about the mean if there is a bias to refit.
    plain: second moments of its operand.
    parameters: ``(G, d, c)``.
    features: which features of the group it reads, ``(F,)``.
    columns: the columns of each of them, ``(F, p)``; -1 where there are fewer.
  """

  gram: np.ndarray
  plain: np.ndarray
  parameters: np.ndarray
  features: np.ndarray
  columns: np.ndarray


class Costs(NamedTuple):
  """What features cost, ``(C,)`` each: alone and with nothing refitted; when they were removed; and the step of that."""

  alone: np.ndarray
  removed: np.ndarray
  step: np.ndarray


def descend(readers: Sequence[Reader], count: int, ridge: float) -> Costs:
  """Removes the features of one group one after the other, from all products that read it.

  Args:
    readers: the products.
    count: how many features the group has.
    ridge: added to the diagonal of each Gram matrix, over the mean of it.
  """
  descents = [_Descent(reader, ridge) for reader in readers]
  alone = _total(count, [(reader.features, _alone(reader)) for reader in readers])
  is_left, removed, step = np.ones(count, bool), np.zeros(count), np.zeros(count, int)
  size = -(-count // STEPS)
  while is_left.any():
    costs = _total(count, [(descent.features, descent.costs) for descent in descents])
    chosen = np.flatnonzero(is_left)[np.argsort(costs[is_left], kind="stable")[:size]]
    step[chosen] = np.count_nonzero(~is_left)
    is_left[chosen] = False
    joint = sum(descent.remove(~is_left) for descent in descents)
    removed[chosen] = joint * costs[chosen] / max(costs[chosen].sum(), 1e-300)
  return Costs(alone, removed, step)


def _total(count: int, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
  """The sum over products of what the features cost in each."""
  total = np.zeros(count)
  for features, costs in parts:
    total[features] += costs
  return total


def _alone(reader: Reader) -> np.ndarray:
  """What each feature costs if it is removed alone, and nothing is refitted."""
  rows, blocks = _rows(reader.parameters, reader.columns), _blocks(reader.plain, reader.columns)
  return np.einsum("gjac,gjab,gjbc->j", rows, blocks, rows, optimize=True)


class _Descent:
  """A product on the way down: what is left of it.

  Attributes:
    features: the features that are left, with their ``columns`` among those that are left.
    inverse: :math:`H^{-1}`.
    parameters: as refitted so far.
    costs: what each of the features costs next.
  """

  def __init__(self, reader: Reader, ridge: float) -> None:
    level = np.diagonal(reader.plain, axis1=1, axis2=2).mean(1)
    level = ridge * np.where(level > 0, level, 1)
    self.inverse = np.linalg.inv(reader.gram + level[:, None, None] * np.eye(reader.gram.shape[-1]))
    self.parameters, self.features, self.columns = reader.parameters, reader.features, reader.columns
    rows = _rows(reader.parameters, reader.columns)
    self.penalties = np.einsum("gjac,gjac,g->j", rows, rows, level)
    self.costs = self._costs()

  def _costs(self) -> np.ndarray:
    rows, blocks = _rows(self.parameters, self.columns), _blocks(self.inverse, self.columns)
    costs = np.einsum("gjac,gjac->j", rows, np.linalg.solve(blocks, rows)) - self.penalties
    return np.maximum(costs, 0)  # of dead columns it is zero up to rounding

  def remove(self, is_removed: np.ndarray) -> float:
    """Removes its features among these of the group, refits the rest, and returns what that costs."""
    chosen = is_removed[self.features]
    if not chosen.any():
      return 0.0
    is_left = np.ones(self.inverse.shape[-1], bool)
    is_left[self.columns[chosen][self.columns[chosen] >= 0]] = False
    across, part = self.inverse[:, ~is_left], self.parameters[:, ~is_left]
    block, across = across[:, :, ~is_left], across[:, :, is_left]
    by_inverse, by_part = np.split(
      np.linalg.solve(block, np.concatenate([across, part], -1)), [across.shape[-1]], -1
    )
    self.inverse = self.inverse[:, is_left][:, :, is_left] - across.swapaxes(1, 2) @ by_inverse
    self.parameters = self.parameters[:, is_left] - across.swapaxes(1, 2) @ by_part
    cost = float(np.sum(part * by_part) - self.penalties[chosen].sum())
    places = np.where(is_left, np.cumsum(is_left) - 1, -1)
    columns = self.columns[~chosen]
    self.columns = np.where(columns >= 0, places[columns], -1)
    self.features, self.penalties = self.features[~chosen], self.penalties[~chosen]
    self.costs = self._costs()
    return max(0.0, cost)


def _rows(parameters: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """The parameters of each feature, ``(G, C, p, c)``."""
  return np.where((columns >= 0)[:, :, None], parameters[:, columns], 0)


def _blocks(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """The blocks of a matrix ``(G, d, d)`` that belong to each feature, ``(G, C, p, p)``; the identity where there are fewer."""
  there = columns >= 0
  own = matrix[:, columns[:, :, None], columns[:, None, :]]
  return np.where(there[:, :, None] & there[:, None, :], own, np.eye(columns.shape[1]))


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
