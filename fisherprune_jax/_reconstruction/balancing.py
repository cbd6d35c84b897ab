r"""A change of basis in linear bottlenecks, after which few features hold most.

With a, the features of one head, and the parameters or activations B that they are multiplied by, a B is (a M) (M^-1 B) for
any invertible M. The balanced one makes the features uncorrelated on both sides, and equally large: of all ways to leave out
features, leaving out the last ones then changes a B the least.

.. math:: M^\top \, \mathrm{mean}(a a^\top) \, M = M^{-1} B B^\top M^{-\top} = \Sigma

References:
  Moore, `Principal component analysis in linear systems: controllability, observability, and model reduction
  <https://doi.org/10.1109/TAC.1981.1102568>`_, 1981
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.bottlenecks import Block, Side, bottlenecks
from fisherprune_jax._reconstruction.fitting import Traced, replaced
from fisherprune_jax._reconstruction.flat import Compiled
from fisherprune_jax._reconstruction.importance import stride
from fisherprune_jax._reconstruction.products import HIGHEST, operand_matrix
from fisherprune_jax._reconstruction.settling import bias_columns
from fisherprune_jax._types import PyTree

SMALLEST = 1e-8
"""Of the second moments of a side, over the largest."""
DIFFERENCE = 1e-3
"""Of the outputs, that rounding may make; more means that a map between was not linear."""


def balanced(traced: Traced, variables: PyTree, compiled: Compiled) -> PyTree:
  """Variables of the same network, in a basis where few features of each linear bottleneck hold most.

  Args:
    traced: the network, and batches.
    variables: its variables, with masks of ones.
    compiled: keeps programs.
  """
  rows = [_joined(blocks) for blocks in bottlenecks(traced, compiled).values()]
  every = list(itertools.chain.from_iterable(rows))
  if not every:
    return variables
  job = _Job(traced, variables, compiled)
  job.measure([block for part in every for block in part.blocks])
  whole = job.changed(job.leaves, every)
  if not job.is_same(whole):  # some of them only
    whole = job.leaves
    for parts in rows:
      tried = job.changed(whole, parts)
      whole = tried if job.is_same(tried) else whole
  found = [replaced(old, new) for old, new in zip(job.leaves, whole, strict=True)]
  return jax.tree.unflatten(jax.tree.structure(variables), found)


class _Part(NamedTuple):
  """Blocks that need one M, since they have sides in common."""

  blocks: list[Block]
  left: set[Side]
  right: set[Side]


def _joined(blocks: Sequence[Block]) -> list[_Part]:
  """The blocks of one row of a mask in parts; none if sides overlap otherwise than by being equal."""
  parts: list[_Part] = []
  for block in blocks:
    mine = _Part([block], set(block.left), set(block.right))
    apart = []
    for part in parts:
      if part.left & mine.left or part.right & mine.right:
        mine = _Part(part.blocks + mine.blocks, part.left | mine.left, part.right | mine.right)
      else:
        apart.append(part)
    parts = [*apart, mine]
  taken: dict[tuple[int, bool], list[int]] = {}
  for side in [side for part in parts for side in (*part.left, *part.right)]:
    taken.setdefault((side.product, side.is_made), []).extend(side.columns)
  return parts if all(len(set(columns)) == len(columns) for columns in taken.values()) else []


class _Job:
  """A network, second moments of operands, and changes of its variables."""

  def __init__(self, traced: Traced, variables: PyTree, compiled: Compiled) -> None:
    self.traced, self.variables, self.compiled = traced, variables, compiled
    self.leaves = jax.tree.leaves(variables)
    self.moments: dict[tuple[int, int], np.ndarray] = {}
    self.outputs = jax.jit(lambda leaves, arrays: self._values(traced.flat.outputs, leaves, arrays))
    self.wanted = self.outputs(self.leaves, traced.batches[0])

  def _values(self, values: Sequence[Value], leaves: list[Any], arrays: list[Any]) -> list[jax.Array]:
    flat = self.traced.flat
    given = zip([*flat.variables, *flat.arguments], [*leaves, *arrays], strict=True)
    return flat.get(values, {**dict(flat.program.consts), **dict(given)})

  def is_same(self, leaves: list[Any]) -> bool:
    """Whether the network gives the same outputs with other variables."""
    found = self.outputs(leaves, self.traced.batches[0])
    kinds = [v.aval.dtype for node in self.traced.flat.nodes for v in node.outs]
    coarsest = max(float(jnp.finfo(x).eps) for x in kinds if jnp.issubdtype(x, jnp.floating))
    difference = sum(float(jnp.sum(jnp.square(a - b))) for a, b in zip(found, self.wanted, strict=True))
    size = sum(float(jnp.sum(jnp.square(b))) for b in self.wanted)
    return difference <= max(DIFFERENCE, 4 * coarsest) ** 2 * size

  def measure(self, blocks: Sequence[Block]) -> None:
    """The second moments ``(G, d, d)`` of the operands of the products that sum over blocks."""
    flat = self.traced.flat
    both = dict.fromkeys((block.at, mine) for block in blocks for mine in (0, 1))
    places = [(at, mine) for at, mine in both if flat.nodes[at].ins[mine] in flat.varies]

    @jax.jit
    def measured(leaves: list[Any], arrays: list[Any]) -> list[jax.Array]:
      operands = self._values([flat.nodes[at].ins[mine] for at, mine in places], leaves, arrays)
      found = []
      for (at, mine), x in zip(places, operands, strict=True):
        x = operand_matrix(flat.nodes[at], 1 - mine, x).astype(jnp.float32)
        x = jnp.where(jnp.isfinite(x), x, 0)
        found.append(jnp.matmul(x.swapaxes(1, 2), x, precision=HIGHEST))
      return found

    total = None
    for arrays in self.traced.batches[:: stride(self.traced)]:
      more = measured(self.leaves, arrays)
      total = more if total is None else jax.tree.map(jnp.add, total, more)
    self.moments = {place: np.asarray(x, np.float64) for place, x in zip(places, total or [], strict=True)}

  def changed(self, leaves: list[Any], parts: Sequence[_Part]) -> list[Any]:
    """The leaves of the variables in the balanced basis of each part."""
    found = list(leaves)
    for part in parts:
      first = np.sum([self._moment(block, block.mine) for block in part.blocks], 0)
      others = [(block, 1 - block.mine) for block in part.blocks]
      second = [self._moment(block, mine) for block, mine in others if (block.at, mine) in self.moments]
      second += [self._square(found, side) for side in part.right if not side.is_made]
      matrix, inverse = _balancing(first, np.sum(second, 0))
      for sides, by in ((part.left, matrix), (part.right, inverse.T)):
        for side in sides:
          self._change(found, side, by)
    return found

  def _moment(self, block: Block, mine: int) -> np.ndarray:
    moments = self.moments[block.at, mine][block.groups].sum(0)
    return moments[np.ix_(block.columns, block.columns)]

  def _places(self, side: Side) -> np.ndarray:
    """The entries of the parameters of each feature, ``(n, F)``."""
    entries = self.traced.products[side.product].entries
    rows = entries.swapaxes(1, 2) if side.is_made else entries
    return rows.reshape(-1, rows.shape[-1])[list(side.columns)].T

  def _square(self, leaves: list[Any], side: Side) -> np.ndarray:
    parameters = np.asarray(leaves[self.traced.products[side.product].leaf], np.float64).ravel()
    rows = parameters[self._places(side)]
    return rows.T @ rows

  def _change(self, leaves: list[Any], side: Side, by: np.ndarray) -> None:
    """Multiplies the features of one side by a matrix from the right, biases too."""
    product, flat = self.traced.products[side.product], self.traced.flat
    changes = [(product.leaf, self._places(side))]
    columns = bias_columns(flat, product, flat.env(self.variables), self.compiled) if side.is_made else None
    if columns is not None and product.bias is not None:
      changes.append((product.bias.leaf, columns.entries.reshape(-1)[list(side.columns)][None]))
    for leaf, places in changes:
      new = np.array(leaves[leaf], np.float64)
      if places.min() >= 0:
        new.flat[places.ravel()] = (new.ravel()[places] @ by).ravel()
        leaves[leaf] = new.astype(leaves[leaf].dtype)


def _balancing(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """M and its inverse for the second moments of both sides; features come in falling order."""
  left, right = map(_root, (first, second))
  u, values, v = np.linalg.svd(left.T @ right)
  root = np.sqrt(values)
  return right @ v.T / root, (u / root).T @ left.T


def _root(moments: np.ndarray) -> np.ndarray:
  """L with L L^T the moments, of full rank."""
  values, vectors = np.linalg.eigh(moments)
  most = values.max()
  return vectors * np.sqrt(np.maximum(values, SMALLEST * most) if most > 0 else np.ones_like(values))
