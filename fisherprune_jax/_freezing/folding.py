"""Affine maps behind products and convolutions, folded into their parameters.

.. math:: (x * W) s + t = x * (W s) + t

Here s and t may vary along axes that W has in the result: those of its output features, not those of x.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherprune_jax._freezing.known import Known
from fisherprune_jax._graph.program import Node, Program, Value

PRODUCTS = ("dot_general", "conv_general_dilated")
AFFINE = ("add", "add_any", "sub", "mul", "div")
MOVES = ("transpose", "reshape", "convert_element_type", "squeeze", "broadcast_in_dim", "copy")
"""Cheap nodes: of a variable, they run at each call, so that no second copy of it is stored."""
Env = Mapping[Value, Any]
Places = tuple[int | None, ...]
Order = tuple[int, ...]


class Step(NamedTuple):
  """An affine node behind a product.

  Attributes:
    node: the node.
    known: its known operand.
    order: the axes of the product, in the order that they have here.
  """

  node: Node
  known: Value
  order: Order

  @property
  def is_scaling(self) -> bool:
    return self.node.name in ("mul", "div")

  @property
  def is_reversed(self) -> bool:
    """Whether the product is subtracted from what is known."""
    return self.node.name == "sub" and self.node.ins[0] is self.known


class Fold(NamedTuple):
  """A product, and the affine nodes and transpositions behind it.

  Attributes:
    node: the product.
    side: the operand that is known, W.
    places: for each axis of W, its axis in the product; None for summed ones.
    steps: the affine nodes, in order.
    nodes: these and the transpositions, in order.
    order: the axes of the product, in the order of the result.
    features: the axes of the product along which s or t vary.
  """

  node: Node
  side: int
  places: Places
  steps: tuple[Step, ...]
  nodes: tuple[Node, ...]
  order: Order
  features: frozenset[int]

  @property
  def parameters(self) -> Value:
    return self.node.ins[self.side]

  @property
  def product(self) -> Value:
    return self.node.outs[0]

  @property
  def result(self) -> Value:
    return self.nodes[-1].outs[0]

  @property
  def shifts(self) -> bool:
    return not all(step.is_scaling for step in self.steps)

  @property
  def scales(self) -> bool:
    return any(step.is_scaling or step.is_reversed for step in self.steps)

  def terms(self, env: Env) -> tuple[jax.Array, jax.Array]:
    """W s and t, in their dtypes; t has axes of size 1 where it does not vary."""
    dtype = jnp.promote_types(self.product.aval.dtype, jnp.float32)
    ones = (1,) * len(self.order)
    scale, shift = jnp.ones(ones, dtype), jnp.zeros(ones, dtype)
    for step in self.steps:
      x = self._as_product(step, env).astype(dtype)
      if step.node.name == "mul":
        scale, shift = scale * x, shift * x
      elif step.node.name == "div":
        scale, shift = scale / x, shift / x
      elif step.is_reversed:
        scale, shift = -scale, x - shift
      else:
        shift = shift - x if step.node.name == "sub" else shift + x
    w = env[self.parameters]
    places = [place for place in self.places if place is not None]
    rest = [at for at in range(len(ones)) if at not in places]
    scale = jnp.transpose(scale, (*places, *rest)).reshape([scale.shape[place] for place in places])
    scale = jnp.expand_dims(scale, [at for at, place in enumerate(self.places) if place is None])
    return (w.astype(dtype) * scale).astype(w.dtype), shift.astype(self.product.aval.dtype)

  def _as_product(self, step: Step, env: Env) -> jax.Array:
    """What a step scales by or adds, in the order of the product's axes."""
    value = step.known
    x = jnp.asarray(value.literal if value.literal is not None else env[value])
    if x.ndim == 0:
      return x
    x = jnp.transpose(x, sorted(range(x.ndim), key=step.order.__getitem__))
    return x[tuple(slice(None) if at in self.features else slice(1) for at in range(x.ndim))]


def folds(program: Program, known: Mapping[Value, Known]) -> list[Fold]:
  """All products of a program that absorb something."""
  chains = _Chains(program, known)
  found = []
  for node in program.nodes:
    if node.name not in PRODUCTS or node.outs[0] in known:
      continue
    for side, places in _sides(node):
      if node.ins[side] in known and known[node.ins[side]].leaves:
        fold = chains.fold(node, side, places)
        if fold is not None:
          found.append(fold)
        break
  return found


def _sides(node: Node) -> list[tuple[int, Places]]:
  """The operands that may be W, and for each of their axes its axis in the product."""
  if node.name == "conv_general_dilated":
    numbers = node.params["dimension_numbers"]
    count, features = len(node.ins[1].shape), numbers.rhs_spec[0]
    return [(1, tuple(numbers.out_spec[1] if at == features else None for at in range(count)))]
  contracted, batched = node.params["dimension_numbers"]
  sides, start = [], len(batched[0])
  for side in (0, 1):
    places: list[int | None] = [None] * len(node.ins[side].shape)
    for at, axis in enumerate(batched[side]):
      places[axis] = at
    for axis in range(len(places)):
      if axis not in (*contracted[side], *batched[side]):
        places[axis], start = start, start + 1
    sides.append((side, tuple(places)))
  return sides


class _Chains:
  """What follows products, as long as nothing else reads what is between."""

  def __init__(self, program: Program, known: Mapping[Value, Known]) -> None:
    self._known, self._outputs = known, set(program.outputs)
    self._makers = {out: node for node in program.nodes for out in node.outs}
    self._readers: dict[Value, list[Node]] = {}
    for node in program.nodes:
      for value in node.ins:
        self._readers.setdefault(value, []).append(node)

  def fold(self, product: Node, side: int, places: Places) -> Fold | None:
    """What a product absorbs, if it is worth it: a bias stays as it is, and so do parameters that others read too."""
    order: Order = tuple(range(len(product.outs[0].shape)))
    features = {place for place in places if place is not None}
    fold = Fold(product, side, places, (), (), order, frozenset())
    best, value = fold, product.outs[0]
    while (node := self._only_reader(value)) is not None:
      if node.name == "transpose":
        order = tuple(order[at] for at in node.params["permutation"])
        fold = fold._replace(nodes=(*fold.nodes, node), order=order)
      elif step := self._step(node, value, order, features):
        along = {order[at] for at, varies in enumerate(self._varies(step.known)) if varies}
        fold = fold._replace(
          steps=(*fold.steps, step), nodes=(*fold.nodes, node), features=fold.features | along
        )
        best = fold
      else:
        break
      value = node.outs[0]
    if not best.steps or not (self._is_read_once(best.parameters) if best.scales else len(best.steps) > 1):
      return None
    return best

  def _only_reader(self, value: Value) -> Node | None:
    readers = self._readers.get(value, ())
    return readers[0] if len(readers) == 1 and value not in self._outputs else None

  def _step(self, node: Node, value: Value, order: Order, features: set[int]) -> Step | None:
    """A node as an affine map of a value, if what it scales by or adds is along features of W."""
    others = [other for other in node.ins if other is not value]
    if node.name not in AFFINE or len(others) != 1 or node.outs[0].aval.dtype != value.aval.dtype:
      return None
    (other,) = others
    if (node.name == "div" and node.ins[1] is value) or (other.literal is None and other not in self._known):
      return None
    along = all(order[at] in features for at, varies in enumerate(self._varies(other)) if varies)
    return Step(node, other, order) if along else None

  def _varies(self, value: Value) -> Sequence[bool]:
    return () if value.literal is not None else self._known[value].varies

  def _is_read_once(self, value: Value) -> bool:
    """Whether nothing else reads some parameters, nor what they were moved from."""
    while self._only_reader(value) is not None:
      if value not in self._makers or self._makers[value].name not in MOVES:
        return True
      value = self._makers[value].ins[0]
    return False
