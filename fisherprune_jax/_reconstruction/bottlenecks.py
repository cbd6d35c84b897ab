"""Linear bottlenecks: features that products with parameters make and other products sum over, with linear maps between.

Queries and keys of a head are such a bottleneck, values and what reads them another.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.consumers import LINEAR, Consumer, Use
from fisherprune_jax._reconstruction.fitting import Traced
from fisherprune_jax._reconstruction.flat import Compiled, Flat
from fisherprune_jax._reconstruction.products import operand_matrix, result_matrix
from fisherprune_jax._reconstruction.reading import Reading, of_masks, readings

PASSED = (*LINEAR, "concatenate", "dot_general")
"""What may lie between the product that makes features and the one that sums over them."""


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
  network = _Network(flat, single, traced.masks, compiled)
  found: dict[tuple[int, int], list[Block]] = {}
  for at, node in enumerate(flat.nodes):
    if node.name != "dot_general":
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
  numbers = np.stack([_alike(maker, np.ix_(groups, columns)) for maker in makers], 1)
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


def _alike(maker: _Maker, places: Any) -> np.ndarray:
  """The numbers at some groups and columns; -1 in groups where the columns are not multiplied by the same."""
  groups, columns = places
  gains = maker.gains[groups[:, 0]][:, :, columns[0]]
  is_same = np.ptp(gains, 2).max(1) <= SAME * np.abs(gains).max((1, 2))
  return np.where(is_same[:, None], maker.numbers[places], -1)


class _Network(NamedTuple):
  """A network, its products with parameters by the position of their node, its masks, and where programs are kept."""

  flat: Flat
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
      elif node.name in PASSED and (node.name != "mul" or not all(v in flat.varies for v in node.ins)):
        waiting += node.ins
    return found

  def _arriving(self, made: int, at: int, mine: int) -> tuple[np.ndarray, np.ndarray]:
    """Which column of a product's result each column of an operand further on is, -1 for none, and times what in some rows.

    Derivatives by the result tell, with random numbers for all else that is read between: where a change of all columns by
    their numbers arrives as a multiple of one number, and one by random numbers as the same multiple of the random number.
    """
    flat = self.flat
    maker, node = flat.nodes[made], flat.nodes[at]
    (result,), operand = maker.outs, node.ins[mine]
    positions, outside = _between(flat, result, operand)
    side = 0 if maker.ins[0] not in flat.varies else 1
    like = jnp.ones(result.shape, jnp.float32)
    groups, rows, columns = jax.eval_shape(lambda y: result_matrix(maker, side, y), like).shape
    rng = np.random.default_rng(0)
    count = groups * columns
    changes = np.stack([np.ones(count), np.arange(count), rng.uniform(0.5, 1.5, count)])

    def arrived(like: jax.Array, changes: jax.Array, around: list[Any]) -> tuple[jax.Array, ...]:
      y = like.astype(result.aval.dtype)

      def run(y: jax.Array) -> jax.Array:
        env = {result: y, **dict(zip(outside, around, strict=True))}
        return operand_matrix(node, 1 - mine, flat.run(positions, env)[operand])

      _, pull = jax.vjp(lambda y: result_matrix(maker, side, y), like)
      given = jnp.broadcast_to(changes.reshape(3, groups, 1, columns), (3, groups, rows, columns))
      one, *others = (jax.jvp(run, (y,), (pull(x)[0].astype(y.dtype),))[1] for x in given)
      number, other = (jnp.where(one != 0, x / jnp.where(one != 0, one, 1), jnp.nan) for x in others)
      return *(f(x, 1) for x in (number, other) for f in (jnp.nanmin, jnp.nanmax)), one[:, :ROWS]

    around = [self._like(value, rng) for value in outside]
    args = (like, jnp.asarray(changes, jnp.float32), around)
    low, high, first, last, gains = map(np.asarray, self.compiled(arrived, *args)(*args))
    found = np.where((low > -0.5) & (low < count - 0.5), np.round(low), -1).astype(np.int64)
    wanted = np.where(found >= 0, changes[2][found], np.nan)
    close = (np.abs(high - low) < 0.1) & (np.abs(first - wanted) < 1e-3) & (np.abs(last - wanted) < 1e-3)
    return np.where(close, found, -1), gains

  def _like(self, value: Value, rng: np.random.Generator) -> jax.Array:
    """Random numbers instead of a value; ones of one that is made of masks alone."""
    if not jnp.issubdtype(value.aval.dtype, jnp.floating):
      return jnp.zeros(value.shape, value.aval.dtype)
    is_mask = bool(of_masks(self.flat, value, self.masks))
    return jnp.asarray(
      np.ones(value.shape) if is_mask else rng.uniform(0.5, 1.5, value.shape), value.aval.dtype
    )


def _between(flat: Flat, start: Value, end: Value) -> tuple[list[int], list[Value]]:
  """The positions of the nodes from one value to another, and what else these read."""
  needed, _ = flat.before([end], [start])
  moving, positions, outside = {start}, [], dict[Value, None]()
  for at in needed:
    node = flat.nodes[at]
    if any(value in moving for value in node.ins):
      moving.update(node.outs)
      positions.append(at)
      outside.update(dict.fromkeys(v for v in node.ins if v.literal is None))
  return positions, [value for value in outside if value not in moving]
