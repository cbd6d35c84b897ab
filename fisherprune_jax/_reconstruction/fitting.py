"""The refitting of one product after the other, while batches move on through the masked network and the dense one."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._graph.variables import VariableTree
from fisherprune_jax._reconstruction.calibration import HELD_OUT, Arguments, signature
from fisherprune_jax._reconstruction.consumers import Consumer, LeftAlone, find
from fisherprune_jax._reconstruction.flat import Compiled, Flat, flatten_network
from fisherprune_jax._reconstruction.frontier import Frontier, final_values
from fisherprune_jax._reconstruction.regression import (
  Moments,
  chosen,
  moments_of,
  reads,
  squared_error,
  total,
)
from fisherprune_jax._reconstruction.settling import bias_columns, settling
from fisherprune_jax._types import ApplyFn, PyTree

ROUNDS = 4
"""How often products are refitted that are added up."""
Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""``rich.progress.track``, ``tqdm.tqdm``: is given a sequence, and hands on its items."""


@dataclass(eq=False)
class Traced:
  """A network at the shapes of some batches.

  Attributes:
    flat: the network.
    consumers: its products, in the order in which they are refitted.
    numbers: the numbers of the batches.
    batches: the arrays of their arguments.
    own, dense: where they are in the masked network, and in the dense one.
  """

  flat: Flat
  consumers: list[Consumer]
  numbers: list[int] = field(default_factory=list)
  batches: list[list[jax.Array]] = field(default_factory=list)
  own: Frontier | None = None
  dense: Frontier | None = None


def trained(tree: VariableTree) -> list[bool]:
  """Which leaves are parameters: floating-point numbers, of ``params`` if there is such a collection."""
  has_params = "params" in tree.variables
  return [
    not is_mask
    and jnp.issubdtype(leaf.dtype, jnp.floating)
    and (not has_params or getattr(path[0], "key", None) == "params")
    for (path, leaf), is_mask in zip(tree.paths, tree.flags, strict=True)
  ]


def changed(flat: Flat, tree: VariableTree) -> set[Value]:
  """The values that masks can change."""
  found = {value for value, is_mask in zip(flat.variables, tree.flags, strict=True) if is_mask}
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
  """

  def __init__(
    self,
    apply_fn: ApplyFn,
    tree: VariableTree,
    batches: Sequence[Arguments],
    weights: Callable[..., jax.Array] | None = None,
  ) -> None:
    self._weights = [weights(*batch) if weights else None for batch in batches]
    self._compiled = Compiled()
    self._held_out = len(batches) >= HELD_OUT
    self.left_alone: list[LeftAlone] = []
    self.traced = self._trace(apply_fn, tree, batches)

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
    self._first, self._dense, self._ridge = variables, dense, ridge
    self._leaves = jax.tree.leaves(variables)
    for traced in self.traced:
      traced.own, traced.dense = (Frontier(traced.flat, traced.batches, self._compiled) for _ in range(2))
    self._visits = visits(self.traced[0])
    order = range(len(self._visits))
    for place in progress(order) if progress else order:
      self._refit(place)
    return self._result()

  def _trace(self, apply_fn: ApplyFn, tree: VariableTree, batches: Sequence[Arguments]) -> list[Traced]:
    found: dict[Any, Traced] = {}
    arrays = [list(map(jnp.asarray, jax.tree.leaves(batch))) for batch in batches]
    for number, batch in enumerate(batches):
      key = signature(batch)
      if key not in found:
        flat = flatten_network(apply_fn, tree.variables, batch)
        here = find(flat, trained(tree), changed(flat, tree))
        found[key] = Traced(flat, here.consumers)
        self.left_alone = here.left_alone
      found[key].numbers.append(number)
      found[key].batches.append(arrays[number])
    return list(found.values())

  @property
  def variables(self) -> PyTree:
    """The variables as they are now."""
    return jax.tree.unflatten(jax.tree.structure(self._first), self._leaves)

  def _refit(self, place: int) -> None:
    """Refits the parameters of one consumer; those of visits before it are done."""
    variables, at = self.variables, self._visits[place]
    sums: list[Moments | None] = [None, None]
    for traced in self.traced:
      self._move(traced, self._visits[place:])
      for number, found in self._moments(traced, traced.consumers[at], variables):
        part = self._held_out and number % HELD_OUT == HELD_OUT - 1
        sums[part] = found if sums[part] is None else total(sums[part], found)
    flat, consumer = self.traced[0].flat, self.traced[0].consumers[at]
    columns = bias_columns(flat, consumer, flat.env(variables), self._compiled)
    fitted, held = sums
    assert fitted is not None
    change = chosen(fitted, held, self._ridge, columns is not None)
    if change is None:
      return
    self._add(consumer.leaf, consumer.entries, change.parameters)
    if columns is not None and consumer.bias is not None:
      self._add(consumer.bias.leaf, columns.entries, change.bias * columns.scale)

  def _result(self) -> PyTree:
    """The refitted variables; those that were given if their outputs are closer to the dense network's."""
    found = {}
    for traced in self.traced:
      outputs = [v for v in traced.flat.program.outputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]
      outputs = [v for v in outputs if v in traced.flat.varies]
      start = Frontier(traced.flat, traced.batches, self._compiled)
      before, after = start.reader(self._first, outputs), traced.own.reader(self.variables, outputs)  # type: ignore[union-attr]
      dense = traced.dense.reader(self._dense, outputs)  # type: ignore[union-attr]
      for place, number in enumerate(traced.numbers):
        wanted, weights = dense(place), self._weights[number]
        found[number] = [squared_error(run(place), wanted, weights) for run in (before, after)]
    known = np.array([errors for errors in found.values() if np.isfinite(errors[0])]).reshape(-1, 2)
    before_all, after_all = known.sum(0)
    return self.variables if after_all <= before_all else self._first

  def _move(self, traced: Traced, left: Sequence[int]) -> None:
    pending = [traced.consumers[at] for at in left]
    kept = final_values(traced.flat, pending, traced.flat.program.outputs)
    traced.own.move(self.variables, kept)  # type: ignore[union-attr]
    traced.dense.move(self._dense, kept)  # type: ignore[union-attr]

  def _moments(self, traced: Traced, consumer: Consumer, variables: PyTree) -> Any:
    """The number of each batch, and its moments."""
    flat = traced.flat
    own, dense = reads(flat, consumer)
    env = flat.env(variables)
    fixed = [value for value in own if value not in flat.varies]
    varying = [value for value in own if value in flat.varies]
    of_own, of_dense = traced.own.reader(variables, varying), traced.dense.reader(self._dense, dense)  # type: ignore[union-attr]
    constant = flat.get(fixed, env)

    def moments(constant: Any, arrays: Any, whole: Any, weights: Any, one: jax.Array) -> Moments:
      mine = dict(zip([*fixed, *varying], [*constant, *arrays], strict=True))
      return moments_of(flat, consumer, mine, dict(zip(dense, whole, strict=True)), weights, one)

    run = None
    for place, number in enumerate(traced.numbers):
      given = (constant, of_own(place), of_dense(place), self._weights[number], jnp.float32(1))
      run = run or self._compiled(moments, *given)
      yield number, run(*given)

  def _add(self, leaf: int, entries: np.ndarray, change: jax.Array) -> None:
    """Adds to some entries of a leaf; those below zero are none."""
    old = self._leaves[leaf]
    new = _added(old, entries, change)
    is_placed = isinstance(old, jax.Array) and old.committed
    self._leaves[leaf] = jax.device_put(new, old.sharding) if is_placed else new


@jax.jit
def _added(leaf: jax.Array, entries: jax.Array, change: jax.Array) -> jax.Array:
  flat = leaf.astype(change.dtype).reshape(-1)
  places = jnp.where(entries >= 0, entries, flat.size).ravel()
  return flat.at[places].add(change.ravel(), mode="drop").reshape(leaf.shape).astype(leaf.dtype)
