"""Measured latency as a cost model: every product timed at a grid of widths, and a few whole networks."""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.counted import Row
from fisherprune_jax._cost.counters import BytesCounter
from fisherprune_jax._cost.flat import FlatCost
from fisherprune_jax._cost.measures import analysed, cost_of, variables_of
from fisherprune_jax._cost.owned import owned
from fisherprune_jax._errors import is_number, require
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.structured import Cost, costs_of
from fisherprune_jax._graph.terms import MostExpensive, Term
from fisherprune_jax._graph.variables import MaskSelector, sizes_of
from fisherprune_jax._latency.clock import Memory
from fisherprune_jax._latency.fitting import Curve, fitted
from fisherprune_jax._latency.grids import grid_of, some_of, table_of
from fisherprune_jax._latency.kernels import PRODUCTS, Kernel, ProductsCounter, Timed
from fisherprune_jax._latency.tables import Table, Times
from fisherprune_jax._latency.whole import wholes
from fisherprune_jax._masks import flatten
from fisherprune_jax._types import ApplyFn, BatchAxes, Masks, Progress, PyTree

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)


def measure_latency(
  apply_fn: ApplyFn,
  variables: PyTree,
  *args: PyTree,
  masks: MaskSelector = "masks",
  batch_axes: BatchAxes = 0,
  fractions: Sequence[float] = FRACTIONS,
  multiple_of: int = 1,
  repeats: int = 5,
  cache: str | os.PathLike[str] | None = None,
  track: Progress = iter,
) -> CostModel:
  r"""Measure how long ``apply_fn(variables, *args)`` takes on this machine, as a function of its masks.

  Each distinct product and convolution is timed alone, at a grid of the widths that masks can cut it to. Its programs
  alternate, and the median counts. Times are made monotone, and interpolated between widths. Then four networks are
  timed whole: the dense one, and compact ones with all masks cut to about a half, a third and a quarter. Three
  non-negative factors are fitted to these: of product times, of bytes that other nodes move, and of parameters read. A
  rising piecewise linear curve ``g`` corrects the rest, so that the whole networks get their measured times. A network
  slower than a larger one gets the time of the larger one.

  .. math:: cost(m) = \frac1B \Bigl(t_{call} + g\bigl(\alpha \sum_{products} t(widths(m)) + \beta \sum_{others} bytes(m)
    + \gamma \, params(m)\bigr)\Bigr)

  Args:
    apply_fn: ``apply_fn(variables, *args)``, such as ``model.apply``.
    variables: the variables, including the masks.
    *args: the other arguments, arrays or ``jax.ShapeDtypeStruct``, at the batch size to optimise.
    masks: as in :func:`cost_model`.
    batch_axes: likewise.
    fractions: the widths to time along each axis that masks can cut, from small to 1; fewer for several axes, for at
      most 64 points in all.
    multiple_of: as in :func:`fisher_prune`. Widths to time are odd multiples of it, since some hardware is faster at
      multiples of 8 or 128.
    repeats: how often each program is visited.
    cache: a JSON file of times by machine and shapes; known times are not measured again.
    track: shows progress, such as ``rich.progress.track`` or ``tqdm.tqdm``.

  Returns:
    A cost model in seconds per example; marginal costs are differences of interpolated times.

  Raises:
    ValueError: for fractions that do not rise to 1, fewer than one repeat, a file with other content, and as in
      :func:`cost_model`.
    OSError: if something must be timed and the file cannot be written.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> apply = lambda v, x: ((x @ v["a"]) * v["masks"]) @ v["b"]
  >>> variables = {"a": jnp.ones((256, 2048)), "b": jnp.ones((2048, 256)), "masks": jnp.ones(2048)}
  >>> cost = fp.measure_latency(apply, variables, jnp.ones((64, 256)), repeats=1)
  >>> cost.unit, bool(cost.dense > cost(variables["masks"].at[:1536].set(0)))
  ('seconds', True)

  References:
    Shen et al., `Structural pruning via latency-saliency knapsack <https://arxiv.org/abs/2210.06659>`_, 2022

    Yang et al., `NetAdapt: platform-aware neural network adaptation <https://arxiv.org/abs/1804.03230>`_, 2018
  """
  rising = all(is_number(f) and f > 0 for f in fractions) and list(fractions) == sorted({*fractions})
  require(
    bool(fractions) and rising and fractions[-1] == 1, "fractions must rise from above 0 to 1", fractions
  )
  for name, number in (("multiple_of", multiple_of), ("repeats", repeats)):
    require(isinstance(number, int) and number >= 1, f"{name} must be an int of at least 1", number)
  memory = Memory(cache)
  analysis, tree, examples = analysed(apply_fn, variables, args, masks, batch_axes)
  costs = list(costs_of(analysis.program, analysis.live, ProductsCounter()))
  tables = _tables(costs, fractions, multiple_of, repeats, memory, track)
  products = [replaced for cost in costs for replaced in _without_branches(cost, tables)]
  times = Times([cost.term for cost in products], tables, sizes_of(tree.mask_leaves))
  others = cost_of(analysis, tree, examples, OthersCounter(BytesCounter()))
  held = variables_of(analysis, tree)
  timed = wholes(apply_fn, tree, args, batch_axes, analysis.program, multiple_of, repeats, memory)
  parts = jax.jit(times.parts)
  rows = [
    [float(jnp.sum(parts(flatten(m) != 0))), float(others(m)) * examples, float(held(m))] for m in timed.masks
  ]
  per_second, per_byte, per_entry = factors = fitted(rows, timed.seconds)
  rest = ((others, per_byte), (held, per_entry / examples))
  sums = [sum(map(operator.mul, row, factors)) / examples for row in rows]
  found = Latency(
    others.masks,
    products,
    parts,
    times.drops,
    per_second / examples,
    rest,
    Curve.of(sums, [seconds / examples for seconds in timed.seconds]),
    timed.calling / examples,
  )
  return CostModel(
    found.masks,
    FlatCost(found.total, found.drops),
    "seconds",
    rows=found.rows,
    examples=examples,
    owned=owned(analysis, tree),
  )


@dataclass(frozen=True, eq=False)
class Latency:
  """The fitted times of a network.

  Attributes:
    masks: the tree of masks.
    products: the products.
    parts: ``parts(features)``, the time of each alone; jit-able.
    times: ``times(features)``, the marginal times of features; jit-able.
    per_second: the fitted factor of these, per example.
    rest: the costs of other bytes and of parameters, with the time of a unit.
    curve: corrects the sum.
    calling: the time of a call, per example.
  """

  masks: Masks
  products: list[Cost]
  parts: Callable[[jax.Array], jax.Array]
  times: Callable[[jax.Array], jax.Array]
  per_second: float
  rest: tuple[tuple[CostModel, float], ...]
  curve: Curve
  calling: float

  def total(self, features: jax.Array) -> jax.Array:
    return self.calling + self.curve(self._sum(features))

  def _sum(self, features: jax.Array) -> jax.Array:
    products = self.per_second * jnp.sum(self.parts(features != 0))
    return sum((scale * cost.flat.total(features) for cost, scale in self.rest), start=products)

  def drops(self, features: jax.Array) -> jax.Array:
    found = self.per_second * self.times(features != 0)
    for cost, scale in self.rest:
      found = found + scale * cost.flat.drops(features)
    return self.curve.fall(self._sum(features), found)

  def rows(self, masks: Masks) -> list[Row]:
    features = [flatten(m) != 0 for m in (self.masks, masks)]
    dense, now = (np.asarray(self.parts(each)) * self.per_second for each in features)
    sums: dict[tuple[str, str], np.ndarray] = {}
    for cost, *pair in zip(self.products, dense, now, strict=True):
      key = cost.node.source, cost.label
      sums[key] = sums.get(key, np.zeros(2)) + pair
    rows = [Row(*key, float(before), float(after), "seconds") for key, (before, after) in sums.items()]
    rows += [
      row._replace(dense=scale * row.dense, now=scale * row.now, unit="seconds")
      for cost, scale in self.rest
      for row in cost.breakdown(masks)
    ]
    was, is_ = (self.curve.over(float(self._sum(each))) for each in features)
    rows = [row._replace(dense=was * row.dense, now=is_ * row.now) for row in rows]
    return [*rows, Row("", "calling it", self.calling, self.calling, "seconds")]


@dataclass(frozen=True)
class OthersCounter:
  """Counts the bytes of all nodes except products."""

  moved: BytesCounter
  unit: str = "bytes"

  def __call__(self, node: Node, live: Liveness) -> Iterable[Term] | None:
    return () if node.name in PRODUCTS else self.moved(node, live)

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    return ()


def _tables(
  costs: Sequence[Cost],
  fractions: Sequence[float],
  multiple_of: int,
  repeats: int,
  memory: Memory,
  track: Progress,
) -> dict[Kernel, Table]:
  tables: dict[Kernel, Table] = {}
  for kernel in track(list(dict.fromkeys(kernel for cost in costs for kernel in _kernels(cost.term)))):
    some = some_of(fractions, len(kernel.free))
    tables[kernel] = table_of(kernel, [grid_of(n, some, multiple_of) for n in kernel.full], repeats, memory)
  return tables


def _kernels(term: Any) -> Iterator[Kernel]:
  if isinstance(term, Timed):
    yield term.kernel
  elif isinstance(term, MostExpensive):
    for inner in (t for terms in term.sums for t in terms):
      yield from _kernels(inner)


def _without_branches(cost: Cost, tables: dict[Kernel, Table]) -> Iterator[Cost]:
  """The terms of a cost; of branches, those of the slowest without masks."""

  def seconds(term: Any) -> float:
    if isinstance(term, MostExpensive):
      return term.scale * max(sum(map(seconds, terms)) for terms in term.sums)
    times = term.scale * np.prod([s.size for s in term.outer])
    return float(times * tables[term.kernel].seconds.flat[-1]) if isinstance(term, Timed) else 0.0

  def parts(term: Any) -> Iterator[Timed]:
    if isinstance(term, Timed):
      yield term
    elif isinstance(term, MostExpensive):
      most_expensive = max(term.sums, key=lambda terms: sum(map(seconds, terms)))
      yield from (t._replace(scale=t.scale * term.scale) for inner in most_expensive for t in parts(inner))

  yield from (cost._replace(term=term) for term in parts(cost.term))
