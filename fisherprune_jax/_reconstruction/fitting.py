"""The refitting of one product after the other, while batches move on through the masked network and the dense one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._graph.variables import VariableTree
from fisherprune_jax._reconstruction.calibration import HELD_OUT, Arguments, signature
from fisherprune_jax._reconstruction.consumers import Consumer, LeftAlone, bias_columns, find
from fisherprune_jax._reconstruction.flat import Compiled, Flat, flatten_network
from fisherprune_jax._reconstruction.frontier import Frontier, final_values
from fisherprune_jax._reconstruction.regression import Moments, chosen, moments_of, reads
from fisherprune_jax._types import ApplyFn, PyTree


@dataclass(eq=False)
class Traced:
  """A network at the shapes of some batches.

  Attributes:
    flat: the network.
    consumers: its products, in the order in which they are refitted.
    numbers: the numbers of the batches.
    own, dense: where they are in the masked network, and in the dense one.
  """

  flat: Flat
  consumers: list[Consumer]
  numbers: list[int] = field(default_factory=list)
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


class Fit:
  """Variables on their way to those that reproduce a dense network.

  Args:
    apply_fn: the network.
    tree: its variables, with masks.
    dense: the variables of the dense network.
    batches: arguments.
    ridge: a ridge for all products, or None.
    weights: a function of the arguments, or None.
  """

  def __init__(
    self,
    apply_fn: ApplyFn,
    tree: VariableTree,
    dense: PyTree,
    batches: Sequence[Arguments],
    ridge: float | None,
    weights: Callable[..., jax.Array] | None,
  ) -> None:
    self._first, self._dense, self._ridge = tree.variables, dense, ridge
    self._leaves = jax.tree.leaves(tree.variables)
    self._weights = [weights(*batch) if weights else None for batch in batches]
    self._compiled = Compiled()
    self._held_out = len(batches) >= HELD_OUT
    self.left_alone: list[LeftAlone] = []
    self._traced = self._trace(apply_fn, tree, batches)
    self.count = len(self._traced[0].consumers)

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
    for traced in found.values():
      own = [arrays[number] for number in traced.numbers]
      traced.own, traced.dense = (Frontier(traced.flat, own, self._compiled) for _ in range(2))
    return list(found.values())

  @property
  def variables(self) -> PyTree:
    """The variables as they are now."""
    return jax.tree.unflatten(jax.tree.structure(self._first), self._leaves)

  def refit(self, at: int) -> None:
    """Refits the parameters of one consumer; those before it are done."""
    variables = self.variables
    sums: list[Moments | None] = [None, None]
    for traced in self._traced:
      self._move(traced, at)
      for number, found in self._moments(traced, traced.consumers[at], variables):
        part = self._held_out and number % HELD_OUT == HELD_OUT - 1
        sums[part] = found if sums[part] is None else jax.tree.map(jnp.add, sums[part], found)
    flat, consumer = self._traced[0].flat, self._traced[0].consumers[at]
    columns = bias_columns(flat, consumer, flat.env(variables), self._compiled)
    fitted, held = sums
    assert fitted is not None
    change = chosen(fitted, held, self._ridge, columns is not None)
    if change is None:
      return
    self._add(consumer.leaf, consumer.entries, change.parameters)
    if columns is not None and consumer.bias is not None:
      self._add(consumer.bias.leaf, columns.entries, change.bias * columns.scale)

  def result(self) -> PyTree:
    """The refitted variables; those that were given if their outputs are closer to the dense network's."""
    before, after = (self._error(variables) for variables in (self._first, self.variables))
    return self.variables if after <= before else self._first

  def _error(self, variables: PyTree) -> float:
    """The squared error of the outputs, of batches where both networks give finite ones."""
    total = 0.0
    for traced in self._traced:
      outputs = [v for v in traced.flat.program.outputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]
      outputs = [v for v in outputs if v in traced.flat.varies]
      start = Frontier(traced.flat, traced.own.batches, self._compiled)  # type: ignore[union-attr]
      own, dense = start.reader(variables, outputs), traced.dense.reader(self._dense, outputs)  # type: ignore[union-attr]
      for place in range(len(traced.numbers)):
        pairs = zip(own(place), dense(place), strict=True)
        error = sum(float(jnp.sum(jnp.square(a.astype(jnp.float32) - b))) for a, b in pairs)
        total += error if np.isfinite(error) else 0.0
    return total

  def _move(self, traced: Traced, at: int) -> None:
    kept = final_values(traced.flat, traced.consumers[at:], traced.flat.program.outputs)
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
    old = jnp.asarray(self._leaves[leaf])
    flat = old.astype(change.dtype).reshape(-1)
    places = np.where(entries >= 0, entries, flat.size).ravel()
    new = flat.at[jnp.asarray(places)].add(change.ravel(), mode="drop")
    self._leaves[leaf] = new.reshape(old.shape).astype(old.dtype)
