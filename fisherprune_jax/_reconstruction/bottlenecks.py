"""Linear bottlenecks: features that products with parameters make and other products sum over, with linear maps between.

Queries and keys of a head are such a bottleneck, values and what reads them another.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.consumers import LINEAR, Consumer, Use
from fisherprune_jax._reconstruction.fitting import Traced
from fisherprune_jax._reconstruction.flat import Compiled, Flat
from fisherprune_jax._reconstruction.products import operand_matrix, result_matrix, shapes_of
from fisherprune_jax._reconstruction.reading import (
  Reading,
  at_masks,
  binary_digits,
  from_digits,
  of_masks,
  readings,
)

PASSED = (*LINEAR, "concatenate", "dot_general")
"""What may lie between the product that makes features and the one that sums over them, besides products with parameters."""
ROWS, SAME = 4, 1e-4
"""Of so many rows of an operand, and up to this relative difference, what features are multiplied by is compared."""


class Side(NamedTuple):
  """The features of a block in a product with parameters.

  Attributes:
    product: which product.
    is_made: whether they are columns of its result; else of its operand.
    columns: which column each of them is, counted over all groups of the product.
  """

  product: int
  is_made: bool
  columns: tuple[int, ...]


class Block(NamedTuple):
  """The features of one head where they are summed over.

  Attributes:
    at: the position of the product that sums over them.
    mine: which of its operands the mask is multiplied onto.
    groups: which groups of this product.
    columns: which columns of its operands the features are.
    left: what makes the masked operand.
    right: what it is multiplied by: parameters, or what makes the other operand.
  """

  at: int
  mine: int
  groups: np.ndarray
  columns: np.ndarray
  left: tuple[Side, ...]
  right: tuple[Side, ...]


def bottlenecks(traced: Traced, compiled: Compiled) -> dict[tuple[int, int], list[Block]]:
  """The blocks of the rows of masks, by mask and row; ``compiled`` keeps programs."""
  flat, products = traced.flat, traced.products
  single = {product.uses[0].at: number for number, product in enumerate(products) if len(product.uses) == 1}
  known = {
    consumer.uses[0].at: (1 - consumer.uses[0].side, uses[0])
    for consumer, uses in zip(traced.consumers, traced.readings, strict=True)
  }
  network = _Network(flat, products, single, traced.masks, compiled)
  found: dict[tuple[int, int], list[Block]] = {}
  for at, node in enumerate(flat.nodes):
    if node.name != "dot_general" or not jnp.issubdtype(node.outs[0].aval.dtype, jnp.floating):
      continue
    has_parameters = not all(value in flat.varies for value in node.ins)
    mine, read = known.get(at, (0, [])) if has_parameters else _reads(flat, at, traced.masks)
    if not read or (has_parameters and at not in single):
      continue
    left = network.makers(at, mine)
    right = [_own(products, single[at])] if has_parameters else network.makers(at, 1 - mine)
    for reading in read if left and right else ():
      for columns in _heads(reading, left):
        blocks = found.setdefault((reading.mask, reading.row), [])
        blocks += _blocks(at, mine, reading.groups, columns, left, right)
  return {row: blocks for row, blocks in found.items() if blocks}


def _reads(flat: Flat, at: int, masks: Mapping[Value, int]) -> tuple[int, list[Reading]]:
  """Which operand of a product of activations masks are multiplied onto, and the features; a mask on both is one mask."""
  for mine in (0, 1):
    if found := readings(flat, Use(at, 1 - mine, ()), masks):
      return mine, found
  return 0, []


class _Maker(NamedTuple):
  """A product, which of its columns each column of an operand ``(G, d)`` is, -1 for none, and times what, in rows ``(G, n, d)``."""

  product: int
  is_made: bool
  numbers: np.ndarray
  gains: np.ndarray


def _own(products: Sequence[Consumer], number: int) -> _Maker:
  groups, terms, _ = products[number].entries.shape
  numbers = np.arange(groups * terms).reshape(groups, terms)
  return _Maker(number, False, numbers, np.ones((groups, 1, terms)))


def _heads(reading: Reading, left: Sequence[_Maker]) -> list[np.ndarray]:
  """The columns of the features, head by head: those of one head are multiplied by the same on the way from what makes them."""
  gains = np.concatenate([maker.gains[reading.groups[0]] for maker in left])  # (n, d)
  first, *others = reading.columns
  if first.min() < 0 or len(first) == 1:
    return [] if reading.columns.min() < 0 else list(reading.columns.T)
  heads = [first]
  for columns in others:
    apart = np.abs(gains[:, columns, None] - gains[:, None, first]).max(0)
    is_same = (columns >= 0)[:, None] & (apart <= SAME * np.abs(gains).max())
    if (is_same.sum(0) != 1).any() or (is_same.sum(1) != 1).any():
      return []
    heads.append(columns[is_same.argmax(0)])
  return list(np.stack(heads, 1))


def _blocks(
  at: int, mine: int, groups: np.ndarray, columns: np.ndarray, left: list[_Maker], right: list[_Maker]
) -> Iterator[Block]:
  """One block for each choice of columns that the groups have on both sides; examples share theirs."""
  makers = [*left, *right]
  numbers = np.stack([_alike(maker, groups, columns) for maker in makers], 1)
  kinds, which = np.unique(numbers, axis=0, return_inverse=True)
  for kind, each in enumerate(kinds):
    sides = [
      Side(maker.product, maker.is_made, tuple(row.tolist())) if row.min() >= 0 else None
      for maker, row in zip(makers, each, strict=True)
    ]
    lefts = tuple(side for side in sides[: len(left)] if side)
    rights = tuple(side for side in sides[len(left) :] if side)
    if lefts and rights:
      yield Block(at, mine, groups[which.ravel() == kind], columns, lefts, rights)


def _alike(maker: _Maker, groups: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """The numbers at some groups and columns; -1 in groups where the columns are not multiplied by the same."""
  gains = maker.gains[groups][:, :, columns]
  is_same = np.ptp(gains, 2).max(1) <= SAME * np.abs(gains).max((1, 2))
  return np.where(is_same[:, None], maker.numbers[np.ix_(groups, columns)], -1)


class _Network(NamedTuple):
  """A network.

  Attributes:
    flat: the network.
    products: its products with parameters.
    single: the numbers of those that are used once, by the position of their node.
    masks: the leaves that are masks, and the position of each among them.
    compiled: keeps programs.
  """

  flat: Flat
  products: Sequence[Consumer]
  single: Mapping[int, int]
  masks: Mapping[Value, int]
  compiled: Compiled

  def makers(self, at: int, mine: int) -> list[_Maker]:
    """The products that an operand is a linear function of."""
    flat = self.flat
    found, seen, waiting = [], set[Value](), [flat.nodes[at].ins[mine]]
    while waiting:
      value = waiting.pop()
      if value in seen or value not in flat.made or value not in flat.varies:
        continue
      seen.add(value)
      node = flat.nodes[flat.made[value]]
      if flat.made[value] in self.single:
        numbers, gains = self._arriving(flat.made[value], at, mine)
        if (numbers >= 0).any():
          found.append(_Maker(self.single[flat.made[value]], True, numbers, gains))
      elif self._is_passed(flat.made[value]):
        waiting += node.ins
    return found

  def _is_passed(self, at: int) -> bool:
    """Whether a node may lie between."""
    node = self.flat.nodes[at]
    is_linear = node.name != "mul" or not all(value in self.flat.varies for value in node.ins)
    return node.name in PASSED and at not in self.single and is_linear

  def _arriving(self, made: int, at: int, mine: int) -> tuple[np.ndarray, np.ndarray]:
    """Which column of a product's result each column of an operand further on is, -1 for none, and times what in some rows.

    Derivatives by the result tell, with random numbers for all else that is read between. A change of the columns whose
    number has a one at some binary digit arrives where the column's number has it, as what a change of all columns is there.
    """
    flat = self.flat
    maker, node = flat.nodes[made], flat.nodes[at]
    (result,), operand = maker.outs, node.ins[mine]
    positions, outside = self._between(result, operand)
    side = self.products[self.single[made]].uses[0].side
    groups, rows, columns = map(math.prod, shapes_of(maker, side))
    rng, count = np.random.default_rng(0), groups * columns
    changes = np.concatenate([np.ones((1, count)), binary_digits(count)])

    def arrived(like: jax.Array, changes: jax.Array, around: list[Any]) -> tuple[jax.Array, ...]:
      y = like.astype(result.aval.dtype)

      def run(y: jax.Array) -> jax.Array:
        env = {result: y, **dict(zip(outside, around, strict=True))}
        return operand_matrix(node, 1 - mine, flat.run(positions, env)[operand])

      _, pull = jax.vjp(lambda y: result_matrix(maker, side, y), like)
      given = jnp.broadcast_to(changes.reshape(-1, groups, 1, columns), (len(changes), groups, rows, columns))
      one, *others = (jax.jvp(run, (y,), (pull(x)[0].astype(y.dtype),))[1] for x in given)
      is_all, is_none = (
        jnp.stack([jnp.all(x == wanted, 1) for x in others]) for wanted in (one, jnp.zeros_like(one))
      )
      return is_all, is_none, jnp.any(one != 0, 1), one[:, :ROWS].astype(jnp.float32)

    around = [self._like(value, rng) for value in outside]
    args = (jnp.ones(result.shape, jnp.float32), jnp.asarray(changes, jnp.float32), around)
    is_all, is_none, is_there, gains = map(np.asarray, self.compiled(arrived, *args)(*args))
    number = np.asarray(from_digits(is_all))
    is_clear = is_there & (is_all | is_none).all(0) & (number < count)
    return np.where(is_clear, number, -1), gains

  def _between(self, start: Value, end: Value) -> tuple[list[int], list[Value]]:
    """The positions of the nodes from one value to another, by what may lie between alone, and what else these read."""
    flat = self.flat
    behind, waiting = set[Value](), [end]
    while waiting:
      value = waiting.pop()
      if value not in behind:
        behind.add(value)
        if value is not start and value in flat.made and self._is_passed(flat.made[value]):
          waiting += flat.nodes[flat.made[value]].ins
    moving, positions, outside = {start}, [], dict[Value, None]()
    for at in sorted({flat.made[value] for value in behind if value in flat.made}):
      node = flat.nodes[at]
      if self._is_passed(at) and any(value in moving for value in node.ins):
        moving.update(node.outs)
        positions.append(at)
        outside.update(dict.fromkeys(v for v in node.ins if v.literal is None))
    return positions, [value for value in outside if value not in moving]

  def _like(self, value: Value, rng: np.random.Generator) -> jax.Array:
    """Random numbers instead of a value; what is made of masks alone is that of masks of ones."""
    if value in self.masks or of_masks(self.flat, value, self.masks):
      return at_masks(self.flat, value, self.masks, {})
    return random_like(value, rng)


def random_like(value: Value, rng: np.random.Generator) -> jax.Array:
  """Random numbers of the shape and dtype of a value."""
  dtype = value.aval.dtype
  if jnp.issubdtype(dtype, jnp.floating):
    return jnp.asarray(rng.uniform(0.5, 1.5, value.shape) * rng.choice([-1, 1], value.shape), dtype)
  return jnp.asarray(rng.integers(0, 2, value.shape), dtype)
