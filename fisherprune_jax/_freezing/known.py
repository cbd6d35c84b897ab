"""Which arrays of a program depend on variables alone, and along which axes they vary."""

from collections.abc import Sequence
from typing import NamedTuple

from fisherprune_jax._graph.boxes import whole_box
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.rules import spec_of
from fisherprune_jax._graph.spec import Axis, Factor, Pick, Prod, Spec, Sum, factors_of
from fisherprune_jax._graph.structured import STRUCTURED

COSTLY = frozenset("sin cos tan tanh exp exp2 expm1 log log1p pow logistic erf erfc".split())
"""Functions whose tables are stored: XLA would compute them at each call, and for each example."""


class Known(NamedTuple):
  """An array that depends on no argument and on no mask.

  Attributes:
    leaves: the variables that it depends on; none for constants.
    varies: for each axis, whether entries along it may differ. A broadcast array is stored once.
    stacked: in the body of a loop, whether it differs between iterations.
    is_costly: whether it takes more than moving and comparing, as tables of angles do.
  """

  leaves: frozenset[Value]
  varies: tuple[bool, ...]
  stacked: bool = False
  is_costly: bool = False

  @property
  def is_stored(self) -> bool:
    """Whether to store it: cheap constants are made at each call."""
    return bool(self.leaves) or self.is_costly

  @property
  def rank(self) -> int:
    """The number of axes of the largest variable that it depends on; 0 for constants."""
    return max(((leaf.aval.size, len(leaf.shape)) for leaf in self.leaves), default=(0, 0))[1]


def constant(value: Value) -> Known:
  return Known(frozenset(), _everywhere(value))


def results(node: Node, operands: Sequence[Known], cautious: bool) -> list[Known] | None:
  """What is known of a node's results if all operands are known; None if they must be computed at each call.

  Args:
    node: the node.
    operands: what is known of its operands.
    cautious: leave out what may have one entry per example.
  """
  varies = _varies(node, operands, cautious)
  if varies is None:
    return None
  leaves = frozenset().union(*(operand.leaves for operand in operands))
  stacked = any(operand.stacked for operand in operands)
  costly = node.name in COSTLY or any(operand.is_costly for operand in operands)
  return [Known(leaves, found, stacked, costly and any(found)) for found in varies]


def _varies(node: Node, operands: Sequence[Known], cautious: bool) -> list[tuple[bool, ...]] | None:
  if cautious and node.name == "iota":
    return None
  spec = None if node.name in STRUCTURED else spec_of(node, [_info(value) for value in node.ins])
  varying = frozenset[Factor]() if spec is None else _varying_factors(spec, operands)
  if spec is not None and _keeps_constants(node, spec, varying):
    return [
      tuple(long and _differs(axis, varying) for axis, long in zip(axes, _everywhere(out), strict=True))
      for axes, out in zip(spec.outs, node.outs, strict=True)
    ]
  pairs = zip(operands, node.ins, strict=True)
  if not cautious or all(operand.varies == _everywhere(value) for operand, value in pairs):
    return [_everywhere(out) for out in node.outs]
  return None


def _keeps_constants(node: Node, spec: Spec, varying: frozenset[Factor]) -> bool:
  """Whether results are constant along each factor along which all operands are, and do not depend on its size."""
  if spec.opaque or spec.windows or node.name.startswith("cum"):
    return False
  shown = set[Factor]()
  for axis in (axis for axes in spec.outs for axis in axes):
    factors = set(factors_of(axis))
    shown |= factors
    if isinstance(axis, Prod) and varying & factors and any(spec.sizes[f] != 1 for f in factors - varying):
      return False
  constant = spec.sizes.keys() - varying
  return not any(spec.sizes[factor] != 1 for factor in constant - shown)


def _varying_factors(spec: Spec, operands: Sequence[Known]) -> frozenset[Factor]:
  """The factors along which an operand varies, or which are counted or mixed."""
  pairs = zip(operands, spec.ins, strict=True)
  axes = [pair for operand, axes in pairs for pair in zip(operand.varies, axes, strict=False)]
  return spec.whole.union(*(factors_of(axis) for varies, axis in axes if varies))


def _differs(axis: Axis, varying: frozenset[Factor]) -> bool:
  if axis is None or isinstance(axis, Sum) or (isinstance(axis, Pick) and axis.filled):
    return True
  return not varying.isdisjoint(factors_of(axis))


def _everywhere(value: Value) -> tuple[bool, ...]:
  return tuple(n != 1 for n in value.shape)


def _info(value: Value) -> Info:
  return Info(whole_box(value.shape))
