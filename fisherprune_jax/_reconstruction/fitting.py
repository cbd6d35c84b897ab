"""The refitting of one product after the other, while batches move on through the masked network and the dense one."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._graph.variables import VariableTree
from fisherprune_jax._reconstruction.calibration import Arguments, is_held_out, signature
from fisherprune_jax._reconstruction.consumers import Consumer, LeftAlone, find
from fisherprune_jax._reconstruction.flat import Compiled, Flat, flatten_network
from fisherprune_jax._reconstruction.frontier import Frontier, final_values
from fisherprune_jax._reconstruction.reading import Reading, live_columns, readings
from fisherprune_jax._reconstruction.regression import (
  Moments,
  chosen,
  moments_of,
  reads,
  squared_error,
  total,
)
from fisherprune_jax._reconstruction.settling import bias_columns, settling
from fisherprune_jax._types import ApplyFn, Progress, PyTree

ROUNDS = 4
"""How often products are refitted that are added up."""


@dataclass(eq=False)
class Traced:
  """A network at the shapes of some batches.

  Attributes:
    flat: the network.
    masks: the leaves of its variables that are masks, and the position of each among them.
    consumers: its products, in the order in which they are refitted.
    trained: which leaves of its variables are parameters.
    numbers: the numbers of the batches.
    batches: the arrays of their arguments.
  """

  flat: Flat
  masks: dict[Value, int]
  consumers: list[Consumer]
  trained: list[bool]
  numbers: list[int] = field(default_factory=list)
  batches: list[list[jax.Array]] = field(default_factory=list)

  @functools.cached_property
  def readings(self) -> list[list[list[Reading]]]:
    """The features that each of the products reads, for each of its uses."""
    return [[readings(self.flat, use, self.masks) for use in c.uses] for c in self.consumers]

  @functools.cached_property
  def products(self) -> list[Consumer]:
    """All its products with parameters, masks or not."""
    return find(self.flat, self.trained, self.flat.varies).consumers


def trained(tree: VariableTree) -> list[bool]:
  """Which leaves are parameters: floating-point numbers, of ``params`` if there is such a collection."""
  has_params = "params" in tree.variables
  return [
    not is_mask
    and jnp.issubdtype(leaf.dtype, jnp.floating)
    and (not has_params or getattr(path[0], "key", None) == "params")
    for (path, leaf), is_mask in zip(tree.paths, tree.flags, strict=True)
  ]


def changed(flat: Flat, masks: Iterable[Value]) -> set[Value]:
  """The values that masks can change."""
  found = set(masks)
  for node in flat.nodes:
    if any(value in found for value in node.ins):
      found.update(node.outs)
  return found


def visits(traced: Traced) -> list[int]:
  """The order in which consumers are refitted; those that are added up come several times, to share what is missing."""
  found: list[int] = []
  order = range(len(traced.consumers))
  for _, group in itertools.groupby(order, lambda at: settling(traced.flat, traced.consumers[at].uses[0])):
    together = list(group)
    found += together * (ROUNDS if len(together) > 1 else 1)
  return found


class Fit:
  """A network at the shapes of its batches, and its refitting for any masks.

  Args:
    apply_fn: the network.
    tree: its variables, with masks.
    batches: arguments.
    weights: a function of the arguments, or None.

  Attributes:
    traced: the network at each of the shapes.
    weights: of each batch, or None.
    compiled: what has been compiled for it.
    left_alone: the products that are not refitted.
  """

  def __init__(
    self,
    apply_fn: ApplyFn,
    tree: VariableTree,
    batches: Sequence[Arguments],
    weights: Callable[..., jax.Array] | None = None,
  ) -> None:
    self.weights = [weights(*batch) if weights else None for batch in batches]
    self.compiled = Compiled()
    self.left_alone: list[LeftAlone] = []
    found: dict[Any, Traced] = {}
    parameters = trained(tree)
    for number, batch in enumerate(batches):
      key = signature(batch)
      if key not in found:
        flat = flatten_network(apply_fn, tree.variables, batch)
        masks = {value: at for at, value in enumerate(itertools.compress(flat.variables, tree.flags))}
        here = find(flat, parameters, changed(flat, masks))
        found[key] = Traced(flat, masks, here.consumers, parameters)
        self.left_alone = here.left_alone
      found[key].numbers.append(number)
      found[key].batches.append([jnp.asarray(x) for x in jax.tree.leaves(batch)])
    self.traced = list(found.values())

  def run(
    self, variables: PyTree, dense: PyTree, ridge: float | None = None, progress: Progress | None = None
  ) -> PyTree:
    """The variables, refitted to reproduce a dense network.

    Args:
      variables: what to begin with, with masks.
      dense: the variables of the dense network.
      ridge: a ridge for all products; None to choose it for each.
      progress: shows progress.
    """
    run, left = _Run(self, variables, dense), visits(self.traced[0])
    order = range(len(left))
    for place in progress(order) if progress else order:
      run.refit(left[place:], ridge)
    return run.result()


class _Run:
  """Variables on their way to those that reproduce a dense network, and where the batches are in both networks."""

  def __init__(self, fit: Fit, variables: PyTree, dense: PyTree) -> None:
    self.fit, self.first, self.dense = fit, variables, dense
    self.leaves = jax.tree.leaves(variables)
    places = [fit.traced[0].flat.variables.index(value) for value in fit.traced[0].masks]
    self.masks = [np.asarray(self.leaves[at]) for at in places]
    self.frontiers = [(self._start(traced), self._start(traced)) for traced in fit.traced]

  def _start(self, traced: Traced) -> Frontier:
    return Frontier(traced.flat, traced.batches, self.fit.compiled)

  @property
  def variables(self) -> PyTree:
    """The variables as they are now."""
    return jax.tree.unflatten(jax.tree.structure(self.first), self.leaves)

  def refit(self, left: Sequence[int], ridge: float | None) -> None:
    """Refits the parameters of the first of the consumers that are left."""
    sums: list[Moments | None] = [None, None]
    flat, consumer = self.fit.traced[0].flat, self.fit.traced[0].consumers[left[0]]
    places = self._places(left[0])
    for at, traced in enumerate(self.fit.traced):
      first, *later = [traced.consumers[place] for place in left]
      own, dense = self.frontiers[at]
      own.move(self.variables, final_values(traced.flat, [first, *later]))
      # Of the dense network all is final: it goes one product ahead, so that nothing of it is computed twice.
      dense.move(self.dense, [*final_values(traced.flat, later), *reads(traced.flat, first)[1]])
      for number, found in self._moments(at, first, places):
        part = is_held_out(number, len(self.fit.weights))
        sums[part] = found if sums[part] is None else total(sums[part], found)
    columns = bias_columns(flat, consumer, flat.env(self.variables), self.fit.compiled)
    fitted, held = sums
    assert fitted is not None
    change = chosen(fitted, held, ridge, columns is not None)
    if change is None:
      return
    self._add(consumer.leaf, consumer.entries[:, places], change.parameters)
    if columns is not None and consumer.bias is not None:
      self._add(consumer.bias.leaf, columns.entries, change.bias * columns.scale)

  def result(self) -> PyTree:
    """The refitted variables; those that were given if their outputs are closer to the dense network's."""
    found = []
    for traced, (own, dense) in zip(self.fit.traced, self.frontiers, strict=True):
      outputs = traced.flat.outputs
      before, after = self._start(traced).reader(self.first, outputs), own.reader(self.variables, outputs)
      wanted = dense.reader(self.dense, outputs)
      for place, number in enumerate(traced.numbers):
        weights = self.fit.weights[number]
        found.append([squared_error(run(place), wanted(place), weights) for run in (before, after)])
    known = np.array([errors for errors in found if np.isfinite(errors[0])]).reshape(-1, 2)
    before_all, after_all = known.sum(0)
    return self.variables if after_all <= before_all else self.first

  def _places(self, at: int) -> np.ndarray:
    """The columns of a product that are live; of as many that few programs have to be compiled."""
    traced = self.fit.traced[0]
    groups, columns, _ = traced.consumers[at].entries.shape
    live = np.any([live_columns(use, self.masks, groups, columns) for use in traced.readings[at]], 0)
    step = max(512, len(live) // 8)
    count = min(len(live), -(-np.count_nonzero(live) // step) * step)
    return np.sort(np.argsort(~live, kind="stable")[:count])

  def _moments(self, at: int, consumer: Consumer, places: np.ndarray) -> Iterator[tuple[int, Moments]]:
    """The number of each batch of one shape, and its moments."""
    traced, (own, dense) = self.fit.traced[at], self.frontiers[at]
    flat = traced.flat
    of_own, of_dense = reads(flat, consumer)
    fixed = [value for value in of_own if value not in flat.varies]
    varying = [value for value in of_own if value in flat.varies]
    multipliers = flat.get(fixed, flat.env(self.variables))
    mine, whole = own.part(self.variables, varying), dense.part(self.dense, of_dense)

    def moments(constant: Any, held: Any, weights: Any, places: jax.Array, one: jax.Array) -> Moments:
      found = [*constant[0], *mine.fn(constant[1], held[0])]
      wanted = whole.fn(constant[2], held[1])
      env, dense = dict(zip([*fixed, *varying], found, strict=True)), dict(zip(of_dense, wanted, strict=True))
      return moments_of(flat, consumer, env, dense, weights, places, one, count)

    count = len(self.fit.weights)
    run, constant = None, (multipliers, mine.constant, whole.constant)
    for place, number in enumerate(traced.numbers):
      held = mine.arrays[place], whole.arrays[place]
      given = (constant, held, self.fit.weights[number], jnp.asarray(places), jnp.float32(1))
      run = run or self.fit.compiled(moments, *given)
      yield number, run(*given)

  def _add(self, leaf: int, entries: np.ndarray, change: jax.Array) -> None:
    """Adds to some entries of a leaf; those below zero are none."""
    old = self.leaves[leaf]
    self.leaves[leaf] = replaced(old, _added(old, entries, change))


def replaced(old: Any, new: Any) -> jax.Array:
  """A new array where an old one is, if that was put somewhere."""
  is_placed = isinstance(old, jax.Array) and old.committed
  return jax.device_put(new, old.sharding) if is_placed else jnp.asarray(new)


@jax.jit
def _added(leaf: jax.Array, entries: jax.Array, change: jax.Array) -> jax.Array:
  flat = leaf.astype(change.dtype).reshape(-1)
  places = jnp.where(entries >= 0, entries, flat.size).ravel()
  return flat.at[places].add(change.ravel(), mode="drop").reshape(leaf.shape).astype(leaf.dtype)
