"""What is known of one array, and what one application of a primitive makes of it by its ``Spec``."""

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import compat, sets, together
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.spec import Axes, Factor, Pick, Spec, Sum, compose, factors_of, project
from fisherprune_jax._graph.together import Together
from fisherprune_jax._types import Shape

Box = tuple[Set, ...]
Factors = dict[Factor, Set]
LARGEST_KNOWN = 65_536
"""Arrays of integers and booleans up to this size are followed by value."""


class Info(NamedTuple):
  """What is known of an array before it is computed.

  Attributes:
    possible: per axis, where it can be non-zero.
    const: the value of all its entries, where they are one known number.
    mask: whether its entries are one wherever ``possible`` allows them to be non-zero.
    varies: whether it depends on the arguments, not on the variables alone.
    known: its value, if it is a small array of integers or booleans that no input decides.
    layers: what is known of each entry along the leading axis, where they differ: a stack of masks.
    together: where it can be non-zero by several axes merged, where that is less than ``possible`` says.
  """

  possible: Box
  const: Any = None
  mask: bool = False
  varies: bool = False
  known: np.ndarray | None = None
  layers: "tuple[Info, ...] | None" = None
  together: Together = MappingProxyType({})

  @property
  def is_zero(self) -> bool:
    """Whether it is a constant zero."""
    return self.const is not None and not self.const

  @property
  def is_masked(self) -> bool:
    """Whether masks decide where it can be non-zero."""
    return any(s.support for s in self.possible)


def whole_box(shape: Shape) -> Box:
  """The box that holds everything."""
  return tuple(sets.everything(n) for n in shape)


def weak_box(shape: Shape) -> Box:
  """The box of what could do without."""
  return tuple(map(sets.weak, shape))


def empty_box(shape: Shape) -> Box:
  """The box that holds nothing (along an axis of symbolic size, everything)."""
  return tuple(sets.nothing(n) if compat.is_static_size(n) else sets.everything(n) for n in shape)


def join(*boxes: Box) -> Box:
  """The smallest box that contains all of ``boxes``."""
  return tuple(sets.union(*column) for column in zip(*boxes, strict=True))


def join_merged(a: tuple[Box, Together], b: tuple[Box, Together]) -> tuple[Box, Together]:
  """The smallest box that contains both, with what both say of several axes merged."""
  box = join(a[0], b[0])
  return box, together.union(a, b, box)


def either(a: Info, b: Info) -> Info:
  """What is known of an array that is one or the other."""
  box, axes = join_merged((a.possible, a.together), (b.possible, b.together))
  return Info(box, varies=a.varies or b.varies, together=axes)


def meet(a: Box, b: Box) -> Box:
  """What two boxes share."""
  return tuple(map(sets.intersection, a, b))


def nonzero_box(info: Info) -> Box:
  """Where an array can be non-zero: nowhere if it is a constant zero."""
  return empty_box([s.size for s in info.possible]) if info.is_zero else info.possible


def box_of(axes: Axes, factors: Factors, shape: Shape) -> Box:
  """The box of an array from the sets of its factors."""
  return tuple(compose(axis, factors, n) for axis, n in zip(axes, shape, strict=True))


def constant(value: Any, shape: tuple[Any, ...]) -> Info:
  """What is known of an array that is written into the program."""
  known = shape == () and compat.is_concrete(value)
  return Info(whole_box(shape), value if known else None, known=_known(value))


def results(node: Node, spec: Spec, infos: Sequence[Info]) -> list[Info]:
  """The forward pass of one node: what is known of its results."""
  factors = {f: _can_be_nonzero(f, spec, infos) for f in spec.sizes}
  varies = any(info.varies for info in infos)
  tied = together.forward(spec, [(info.possible, info.together) for info in infos])
  found = [
    together.laid(spec, tied, axes, box_of(axes, factors, out.shape))
    for axes, out in zip(spec.outs, node.outs, strict=True)
  ]
  if (layer := _layer_taken(spec, infos)) is not None:
    return [layer]
  known = _fold(node, infos)
  if spec.moves:
    first = infos[0]
    ((box, axes),) = found
    return [Info(box, first.const, first.mask and _is_exact(spec, factors, first), varies, known, None, axes)]
  mask = all(info.mask for info in infos) if spec.same_as is not None else _are_masks_end_to_end(spec, infos)
  return [Info(box, mask=mask, varies=varies, known=known, together=axes) for box, axes in found]


def _are_masks_end_to_end(spec: Spec, infos: Sequence[Info]) -> bool:
  """Whether a node lays masks, and ones, end to end: each is one wherever its own box says, along one axis."""
  parts = [axes[0] for axes in spec.ins if len(axes) == 1 and isinstance(axes[0], str)]
  ends = len(parts) == len(infos) and spec.outs == ((Sum(tuple(parts)),),)
  return ends and all(info.mask or _is_one(info.const) for info in infos)


def _is_one(const: Any) -> bool:
  return compat.is_concrete(const) and const is not None and bool(const == 1)


def _layer_taken(spec: Spec, infos: Sequence[Info]) -> Info | None:
  """What is known of one entry of a stack, where a slice takes just that."""
  layers = infos[0].layers if infos else None
  if layers is None or not spec.outs or spec.alive or len(spec.outs[0]) != len(infos[0].possible):
    return None
  first, *rest = spec.outs[0]
  if not isinstance(first, Pick) or first.index.size != 1 or any(isinstance(axis, Pick) for axis in rest):
    return None
  layer = layers[int(first.index[0])]
  return layer._replace(possible=(*whole_box((1,)), *layer.possible), varies=infos[0].varies, layers=None)


def _known(x: Any) -> np.ndarray | None:
  """A small concrete array of integers, such as indices, or of booleans, such as which of these are negative."""
  if not compat.is_concrete(x) or np.size(x) > LARGEST_KNOWN:
    return None
  return np.asarray(x) if _is_followed(compat.dtype_of(x)) else None


def _is_followed(dtype: Any) -> bool:
  """Whether arrays of a type are followed by value."""
  return bool(jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_))


def _fold(node: Node, infos: Sequence[Info]) -> np.ndarray | None:
  """The value of a node that computes small integers from known ones, as indexing does."""
  if node.acts or len(node.outs) != 1:
    return None
  (out,) = node.outs
  small = all(map(compat.is_static_size, out.shape)) and math.prod(out.shape) <= LARGEST_KNOWN
  if not infos and node.name != "iota":
    return None  # such as the value of a symbolic size
  known = [info.known for info in infos if info.known is not None]
  if not small or not _is_followed(out.aval.dtype) or len(known) < len(infos):
    return None
  return compat.evaluate(node.eqn, known)


def _is_exact(spec: Spec, factors: Factors, info: Info) -> bool:
  """Whether an array moved by ``spec`` is non-zero exactly where its new box says, as its old one did."""
  return all(compose(axis, factors, s.size) is s for axis, s in zip(spec.ins[0], info.possible, strict=True))


# The soundness lemma, first half: outside of the boxes that follow from this, an array is zero, whatever the variables
# and the arguments are. By induction along the program, as a rule promises of every factor that is neither `alive`
# nor `whole`: where all operands that have it are zero, but for `neutral` ones, so is the result; and where one that
# `kills` is zero, whatever the others are. An array that is a constant zero adds nothing to what others make possible.
# docs/design.md has the whole argument, and where it ends: rules for derivatives, signs of zero, NaN and infinity.
def _can_be_nonzero(factor: Factor, spec: Spec, infos: Sequence[Info]) -> Set:
  everything = sets.everything(spec.sizes[factor])
  if factor in spec.whole:
    return everything
  seen = [
    (operand, project(axis, s, factor, spec.sizes))
    for operand, (axes, info) in enumerate(zip(spec.ins, infos, strict=True))
    for axis, s in zip(axes, info.possible, strict=True)
    if factor in factors_of(axis) and operand not in spec.neutral
  ]
  free = factor in spec.alive or not seen
  some = [s for operand, s in seen if not infos[operand].is_zero] or [s for _, s in seen]
  base = everything if free else sets.union(*some)
  return sets.intersection(base, *(s for operand, s in seen if operand in spec.kills))


# The second half: what is stored of the results hangs on the operands at the entries that follow from this alone. A
# factor of a result is needed where the result is stored. One that no result has is summed over: there a term is zero
# unless all operands that have the factor can be non-zero, so those entries are enough. An entry that is not stored is
# then outside of the first half's box, and zero, or nobody asks for it: shown as zero, an array is what it was for
# everyone who reads it.
def needed(
  node: Node, spec: Spec, box: Callable[[Value], Box], stored: Callable[[Value], Box | None]
) -> Factors:
  """The backward pass of one node: the entries of its factors that it has to work on.

  Args:
    node: the node.
    spec: how it relates axes.
    box: where an operand can be non-zero.
    stored: what is stored of a result, None if nothing asks for it.
  """
  return {f: _needed(f, node, spec, box, stored) for f in spec.sizes}


def _needed(factor: Factor, node: Node, spec: Spec, box: Any, stored: Any) -> Set:
  if factor in spec.whole:
    return sets.everything(spec.sizes[factor])

  def found(values: Sequence[Value], all_axes: Sequence[Axes], boxes: Any) -> list[Set]:
    return [
      project(axis, s, factor, spec.sizes)
      for value, axes in zip(values, all_axes, strict=True)
      if any(factor in factors_of(axis) for axis in axes) and (shown := boxes(value)) is not None
      for axis, s in zip(axes, shown, strict=True)
      if factor in factors_of(axis)
    ]

  if not any(factor in factors_of(axis) for axes in spec.outs for axis in axes):
    offered = sets.intersection(*found(node.ins, spec.ins, box))  # contracted: what all operands offer
    return sets.intersection(sets.weak(offered.size), offered) if factor in spec.weak else offered
  asked = found(node.outs, spec.outs, stored)
  return sets.union(*asked) if asked else sets.nothing(spec.sizes[factor])
