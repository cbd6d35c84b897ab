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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._reconstruction.bottlenecks import Block, Side, bottlenecks
from fisherprune_jax._reconstruction.fitting import Traced, replaced
from fisherprune_jax._reconstruction.flat import Compiled
from fisherprune_jax._reconstruction.importance import stride
from fisherprune_jax._reconstruction.products import HIGHEST, operand_matrix
from fisherprune_jax._reconstruction.proving import is_same
from fisherprune_jax._reconstruction.settling import Columns, bias_columns
from fisherprune_jax._types import PyTree


def balanced(traced: Traced, variables: PyTree, compiled: Compiled) -> PyTree:
  """Variables of the same network, in a basis where few features of each linear bottleneck hold most.

  Args:
    traced: the network, and batches.
    variables: its variables, with masks of ones.
    compiled: keeps programs.
  """
  rows = [_joined(blocks) for blocks in bottlenecks(traced, compiled).values()]
  job = _Job(traced, variables, compiled)
  parts = [part for row in rows if row and job.is_proven(row) for part in row]
  if not parts:
    return variables
  job.measure([block for part in parts for block in part.blocks])
  found = [
    replaced(*pair) for pair in zip(job.leaves, job.changed(job.leaves, parts, job.basis), strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(variables), found)


class _Part(NamedTuple):
  """Blocks that need one M, since they have sides in common."""

  blocks: list[Block]
  left: set[Side]
  right: set[Side]


Basis = Callable[[_Part, list[Any]], tuple[np.ndarray, np.ndarray] | None]
"""A matrix and its inverse for a part, and the leaves of the variables; None to leave it as it is."""


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
    self.biases: dict[int, Columns | None] = {}

  def is_proven(self, parts: Sequence[_Part]) -> bool:
    """Whether any change of basis of these parts leaves the network as it is."""
    sides = [side for part in parts for side in (*part.left, *part.right) if side.is_made]
    makers = sorted({self.traced.products[side.product].uses[0].at for side in sides})
    ends = sorted({block.at for part in parts for block in part.blocks})
    rng = np.random.default_rng(0)

    def some(part: _Part, leaves: list[Any]) -> tuple[np.ndarray, np.ndarray]:
      size = len(part.blocks[0].columns)
      matrix = np.linalg.qr(rng.normal(size=(size, size)))[0] * rng.uniform(0.5, 2, size)
      return matrix, np.linalg.inv(matrix)

    return is_same(self.traced, makers, ends, self.leaves, lambda leaves: self.changed(leaves, parts, some))

  def measure(self, blocks: Sequence[Block]) -> None:
    """The second moments ``(G, d, d)`` of the operands of the products that sum over blocks."""
    flat = self.traced.flat
    both = dict.fromkeys((block.at, mine) for block in blocks for mine in (0, 1))
    places = [(at, mine) for at, mine in both if flat.nodes[at].ins[mine] in flat.varies]

    @jax.jit
    def measured(leaves: list[Any], arrays: list[Any]) -> list[jax.Array]:
      operands = flat.get([flat.nodes[at].ins[mine] for at, mine in places], flat.env(leaves, arrays))
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

  def changed(self, leaves: list[Any], parts: Sequence[_Part], basis: Basis) -> list[Any]:
    """The leaves of the variables in another basis of each part."""
    found = list(leaves)
    for part in parts:
      if (pair := basis(part, found)) is None:
        continue
      matrix, inverse = pair
      changes = dict[tuple[int, bytes], tuple[np.ndarray, np.ndarray]]()  # what sides share changes once
      for sides, by in ((part.left, matrix), (part.right, inverse.T)):
        for leaf, places in itertools.chain.from_iterable(map(self._changing, sides)):
          changes.setdefault((leaf, places.tobytes()), (places, by))
      for (leaf, _), (places, by) in changes.items():
        new = np.array(found[leaf], np.float64)
        new.flat[places.ravel()] = (new.ravel()[places] @ by).ravel()
        found[leaf] = jnp.asarray(new, found[leaf].dtype)
    return found

  def basis(self, part: _Part, leaves: list[Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """The balanced basis of a part, and its inverse; None if anything is not finite."""
    others = [(block, 1 - block.mine) for block in part.blocks]
    right = [self._moment(block, other) for block, other in others if (block.at, other) in self.moments]
    right += [self._square(leaves, side) for side in part.right if not side.is_made]
    left = [self._moment(block, block.mine) for block in part.blocks]
    held = itertools.chain.from_iterable(self._changing(side) for side in (*part.left, *part.right))
    parameters = [np.asarray(leaves[leaf], np.float64).ravel()[places] for leaf, places in held]
    if not all(np.isfinite(x).all() for x in (*left, *right, *parameters)):
      return None
    kinds = [self.leaves[self.traced.products[side.product].leaf].dtype for side in (*part.left, *part.right)]
    return _balancing(np.sum(left, 0), np.sum(right, 0), max(float(jnp.finfo(kind).eps) for kind in kinds))

  def _moment(self, block: Block, mine: int) -> np.ndarray:
    moments = self.moments[block.at, mine][block.groups]
    with np.errstate(invalid="ignore"):  # some may be infinite
      return moments[:, block.columns[:, None], block.columns].sum(0)

  def _places(self, side: Side) -> np.ndarray:
    """The entries of the parameters of each feature, ``(n, F)``."""
    entries = self.traced.products[side.product].entries
    rows = entries.swapaxes(1, 2) if side.is_made else entries
    return rows.reshape(-1, rows.shape[-1])[list(side.columns)].T

  def _square(self, leaves: list[Any], side: Side) -> np.ndarray:
    parameters = np.asarray(leaves[self.traced.products[side.product].leaf], np.float64).ravel()
    rows = parameters[self._places(side)]
    return rows.T @ rows

  def _changing(self, side: Side) -> Iterator[tuple[int, np.ndarray]]:
    """The leaves, and the entries in them, that a change of one side multiplies."""
    product = self.traced.products[side.product]
    yield product.leaf, self._places(side)
    columns = self._biases(side.product) if side.is_made else None
    if columns is not None and product.bias is not None:
      places = columns.entries.reshape(-1)[list(side.columns)][None]
      if places.min() >= 0:
        yield product.bias.leaf, places

  def _biases(self, product: int) -> Columns | None:
    if product not in self.biases:
      flat = self.traced.flat
      given = flat, self.traced.products[product], flat.env(self.variables), self.compiled
      self.biases[product] = bias_columns(*given)
    return self.biases[product]


def _balancing(left: np.ndarray, right: np.ndarray, smallest: float) -> tuple[np.ndarray, np.ndarray]:
  """M and its inverse for the second moments of both sides; features come in falling order.

  Directions that hold less than ``smallest`` of the largest count as that much.
  """
  first, second = (_root(moments, smallest) for moments in (left, right))
  u, values, v = np.linalg.svd(first.T @ second)
  root = np.sqrt(values)
  return second @ v.T / root, (u / root).T @ first.T


def _root(moments: np.ndarray, smallest: float) -> np.ndarray:
  """L with L L^T the moments, of full rank."""
  values, vectors = np.linalg.eigh(moments)
  most = values.max()
  return vectors * np.sqrt(np.maximum(values, smallest * most) if most > 0 else np.ones_like(values))
