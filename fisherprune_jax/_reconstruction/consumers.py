"""Consumers: the products whose parameters can be refitted, and where what they add to is complete.

A product is refitted so that its *settling point* is what it was. That is the value after the additions that follow (bias,
residual, the affine map of a norm). It lies before anything that is not linear or that is read twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import Node, Value, build
from fisherprune_jax._reconstruction.flat import Flat
from fisherprune_jax._reconstruction.products import (
  PRODUCTS,
  is_supported,
  parameter_matrix,
)

MOVES = ("reshape", "transpose", "squeeze", "rev", "copy", "copy_p", "convert_element_type", "slice", "split")
"""What only moves entries; of parameters, each entry at most once."""
LINEAR = (*MOVES, "neg", "reduce_precision", "broadcast_in_dim", "add", "sub", "add_any", "mul", "div")
"""What a product's result may go through on its way to its settling point."""


class Use(NamedTuple):
  """A product with parameters.

  Attributes:
    at: the position of its node.
    side: which operand holds the parameters.
    path: the positions of the nodes that lead from its result to the settling point.
  """

  at: int
  side: int
  path: tuple[int, ...]

  @property
  def end(self) -> int:
    """The position of the node that makes the settling point."""
    return self.path[-1] if self.path else self.at


class Moved(NamedTuple):
  """A value that holds entries of one leaf of the variables.

  Attributes:
    leaf: which leaf.
    entries: their index in the leaf, of the shape of the value.
  """

  leaf: int
  entries: np.ndarray


class Bias(NamedTuple):
  """Parameters that are added on the way to the settling point.

  Attributes:
    leaf: which leaf of the variables holds them.
    at: the position of the addition.
    entries: their index in the leaf, of the shape of that operand.
  """

  leaf: int
  at: int
  entries: np.ndarray


@dataclass(eq=False)
class Consumer:
  """Parameters that are refitted, and all products that they are used in.

  Attributes:
    leaf: which leaf of the variables holds them.
    entries: their index in the leaf, ``(G, d, c)``.
    uses: the products.
    bias: what is added behind the first of them, if its entries are parameters.
  """

  leaf: int
  entries: np.ndarray
  uses: list[Use] = field(default_factory=list)
  bias: Bias | None = None


class LeftAlone(NamedTuple):
  """A product whose parameters are not refitted."""

  source: str
  reason: str


class Found(NamedTuple):
  """The consumers in program order, and those that are left alone."""

  consumers: list[Consumer]
  left_alone: list[LeftAlone]


def find(flat: Flat, trained: Sequence[bool], masked: set[Value]) -> Found:
  """Finds the products of parameters and of what masks can change.

  Args:
    flat: the network.
    trained: whether a leaf of the variables is a parameter.
    masked: the values that masks can change.
  """
  moved = _moved(flat)
  finder = _Finder(flat, moved, trained)
  left: list[LeftAlone] = []
  consumers: list[Consumer] = []
  taken: dict[int, np.ndarray] = {}
  for at, node in enumerate(flat.nodes):
    if not any(value in masked for value in node.ins):
      continue
    reason = finder.reason(node) if node.name in PRODUCTS else finder.inside(node) or ""
    if reason:
      left.append(LeftAlone(node.source, reason))
    if reason is not None:
      continue
    side = finder.side(node)
    leaf, entries = moved[node.ins[side]]
    matrix = np.asarray(parameter_matrix(node, side, jnp.asarray(entries)))
    use = Use(at, side, tuple(finder.path(node.outs[0])))
    used = taken.setdefault(leaf, np.zeros(flat.variables[leaf].aval.size, bool))
    if used[matrix].any():
      same = next((c for c in consumers if c.leaf == leaf and np.array_equal(c.entries, matrix)), None)
      if same is not None:
        same.uses.append(use)
        continue
      left.append(LeftAlone(node.source, "its parameters are used in another product in another way"))
      consumers = [c for c in consumers if c.leaf != leaf or not _overlap(c.entries, matrix)]
      continue
    used[matrix] = True
    consumers.append(Consumer(leaf, matrix, [use], finder.bias(use)))
  for consumer in list(consumers):
    if reason := finder.elsewhere(consumer.leaf, consumer.entries, {use.at for use in consumer.uses}):
      consumers.remove(consumer)
      left.append(LeftAlone(flat.nodes[consumer.uses[0].at].source, reason))
  return Found(sorted(consumers, key=lambda c: max(use.end for use in c.uses)), left)


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two sets of entries have one in common."""
  if not a.size or not b.size or a.max() < b.min() or b.max() < a.min():  # all layers of a stack
    return False
  found = np.zeros(max(a.max(), b.max()) + 1, bool)
  found[a] = True
  return bool(found[b].any())


def _moved(flat: Flat) -> dict[Value, Moved]:
  """The values that hold entries of one leaf of the variables, moved and repeated at most."""
  found = {}
  for leaf, value in enumerate(flat.variables):
    size = int(np.prod(value.shape, dtype=np.int64))
    found[value] = Moved(leaf, np.arange(size, dtype=np.int32).reshape(value.shape))
  for node in flat.nodes:
    source = node.ins[0] if node.ins else None
    if source not in found or source in flat.varies or node.name not in (*MOVES, "broadcast_in_dim"):
      continue
    leaf, entries = found[source]
    if node.name in ("convert_element_type", "copy", "copy_p"):
      outs = [entries]
    elif node.name == "split":
      edges = np.cumsum(node.params["sizes"])[:-1]
      outs = np.split(entries, edges, node.params["axis"])
    else:
      outs = [compat.evaluate(node.eqn, [entries])]
    for value, out in zip(node.outs, outs, strict=True):
      found[value] = Moved(leaf, out)
  return found


class _Finder:
  """Answers questions about the products of a network."""

  def __init__(self, flat: Flat, moved: dict[Value, Moved], trained: Sequence[bool]) -> None:
    self.flat, self.moved, self.trained = flat, moved, trained
    self.outputs = set(flat.program.outputs)

  def side(self, node: Node) -> int:
    """Which operand of a product holds parameters."""
    return 0 if node.ins[0] not in self.flat.varies else 1

  def reason(self, node: Node) -> str | None:
    """Why the parameters of a product cannot be refitted; empty if it has none, None if they can."""
    varying = [value in self.flat.varies for value in node.ins]
    if all(varying) or not any(varying):
      return ""
    side = self.side(node)
    value = node.ins[side]
    if value not in self.moved:
      if not self._comes_of_parameters(value):
        return ""
      return f"its parameters are computed, by {self.flat.nodes[self.flat.made[value]].name!r}"
    leaf, entries = self.moved[value]
    if not self.trained[leaf]:
      return ""
    if np.bincount(entries.ravel(), minlength=1).max(initial=0) > 1:
      return "it reads parameters several times"
    if not is_supported(node):
      return f"a {node.name!r} of this kind is not refitted"
    if node.name == "conv_general_dilated" and side == 0:
      return "its parameters are convolved"
    if not jnp.issubdtype(node.outs[0].aval.dtype, jnp.floating):
      return "its results are no real floating-point numbers"
    return None

  def _comes_of_parameters(self, value: Value) -> bool:
    _, read = self.flat.before([value], self.flat.variables)
    return any(v in self.moved and self.trained[self.moved[v].leaf] for v in read)

  def path(self, value: Value) -> Iterator[int]:
    """The positions of the nodes from a product's result to its settling point."""
    while value not in self.outputs and len(self.flat.readers[value]) == 1:
      (at,) = self.flat.readers[value]
      node = self.flat.nodes[at]
      if node.name not in LINEAR or node.ins.count(value) != 1 or len(node.outs) != 1:
        return
      others = [other for other in node.ins if other is not value]
      if node.name in ("mul", "div") and any(other in self.flat.varies for other in others):
        return
      if node.name == "div" and node.ins[0] is not value:
        return
      if not jnp.issubdtype(node.outs[0].aval.dtype, jnp.floating):
        return
      yield at
      (value,) = node.outs

  def bias(self, use: Use) -> Bias | None:
    """The last parameters that are added on a path, if there are any."""
    found = None
    reached = self.flat.nodes[use.at].outs[0]
    for at in use.path:
      node = self.flat.nodes[at]
      if node.name in ("add", "add_any"):
        held = self.moved.get(node.ins[1 - node.ins.index(reached)])
        if held is not None and self.trained[held.leaf] and not self.elsewhere(*held, {at}):
          found = Bias(held.leaf, at, held.entries)
      (reached,) = node.outs
    return found

  def elsewhere(self, leaf: int, entries: np.ndarray, known: set[int]) -> str | None:
    """What reads some parameters, other than the nodes at known positions."""
    for value, (other, places) in self.moved.items():
      if other != leaf or not _overlap(entries, places):
        continue
      if value in self.outputs:
        return "its parameters are an output"
      for at in self.flat.readers[value]:
        if at not in known and not all(out in self.moved for out in self.flat.nodes[at].outs):
          return f"its parameters are read by {self.flat.nodes[at].name!r} too"
    return None

  def inside(self, node: Node) -> str | None:
    """Why products inside of a node, such as a loop, cannot be refitted; None if there are none of parameters."""
    reads_parameters = any(value in self.moved and self.trained[self.moved[value].leaf] for value in node.ins)
    return f"it is inside of a {node.name!r}" if reads_parameters and _holds_products(node) else None


def _holds_products(node: Node) -> bool:
  inner = (each for jaxpr in compat.sub_jaxprs(node.params) for each in build(jaxpr).nodes)
  return any(each.name in PRODUCTS or _holds_products(each) for each in inner)
