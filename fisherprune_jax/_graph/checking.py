"""Calls rules, and checks each spec against its node.

A wrong spec would give a wrong network, or an error far from its cause. So factors, axes and operands are checked, and
the error names the rule.
"""

import functools
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.registry import SpecRule, is_taught
from fisherprune_jax._graph.spec import Axes, Axis, Factor, Flops, Pick, Prod, Sizes, Spec, Sum, factors_of
from fisherprune_jax._types import Size

OF_OPERANDS = ("kills", "neutral", "sees", "blind")
"""Fields that hold operand numbers."""
OF_FACTORS = ("alive", "whole", "weak")
"""Fields that hold factors."""


class Said(str):
  """Text that is not quoted in messages."""

  __slots__ = ()


class Fault(NamedTuple):
  """A requirement, the value that breaks it, and a remedy."""

  requirement: str
  value: Any
  remedy: str = ""


def ask(rule: SpecRule, node: Node, infos: Sequence[Info]) -> Spec | None:
  """A rule's spec (or None); errors name the rule."""
  try:
    spec = rule(node, infos)
  except compat.UndecidedSize:
    raise  # the symbol's fault, not the rule's: an export reports it
  except Exception as error:
    said = Said(f"{type(error).__name__}: {error}, which it raised")
    raise _refusal(rule, node, Fault("must return a Spec or None", said)) from error
  if spec is None:
    return None
  if fault := _fault(spec, node):
    raise _refusal(rule, node, fault)
  return _guarded(rule, spec) if is_taught(node.name) else spec


def _refusal(rule: SpecRule, node: Node, fault: Fault) -> ValueError:
  where = f"The rule {_name_of(rule)} for the primitive `{node.name}` ({node.source})"
  got = fault.value if isinstance(fault.value, Said) else repr(fault.value)
  return ValueError(f"{where} {fault.requirement}, got {got}. {fault.remedy}".rstrip())


def _name_of(rule: Any) -> str:
  """A function as ``module.function``; a callable object by its class."""
  while isinstance(rule, functools.partial):
    rule = rule.func
  named = rule if hasattr(rule, "__qualname__") else type(rule)
  return f"{named.__module__}.{named.__qualname__}"


def _fault(spec: Any, node: Node) -> Fault | None:
  """The first fault; common cases come first, as this runs for every node."""
  if not isinstance(spec, Spec):
    return Fault(
      "must return a Spec or None", spec, "fp.rules.Spec makes one; None says that no rule is known."
    )
  return (
    _in_sizes(spec.sizes)
    or _in_arrays("ins", "operand", spec.ins, node.ins, spec.sizes)
    or _in_arrays("outs", "result", spec.outs, node.outs, spec.sizes)
    or _in_factors(spec)
    or _in_numbers(spec)
    or _in_flops(spec)
    or _in_moves(spec)
    or _in_words(spec)
  )


def _in_sizes(sizes: Any) -> Fault | None:
  if not isinstance(sizes, dict):
    return Fault("must give `sizes` as a dictionary from factors to their sizes", sizes)
  for factor, size in sizes.items():
    if type(factor) is not str or (type(size) is not int and not compat.is_size(size)) or size < 0:
      return Fault(
        "must give `sizes` as whole numbers by the names of factors",
        {factor: size},
        "Take them from node.ins[i].shape and node.outs[i].shape.",
      )
  return None


def _in_arrays(field: str, what: str, all_axes: Any, values: Sequence[Value], sizes: Sizes) -> Fault | None:
  if type(all_axes) is not tuple or len(all_axes) != len(values):
    remedy = "A tuple of one is written with a comma: (axes,)." if len(values) == 1 else ""
    return Fault(
      f"must give `{field}` one tuple of axes for each {what}, {len(values)} in all", all_axes, remedy
    )
  for at, value in enumerate(values):
    axes, shape = all_axes[at], value.shape
    if type(axes) is not tuple or len(axes) != len(shape):
      return Fault(
        f"must name an axis for each of the {len(shape)} axes of {what} {at}, of shape {shape}",
        axes,
        "An axis is a factor, Prod, Sum, Pick or None.",
      )
    for axis, n in zip(axes, shape, strict=True):
      if axis is None or (type(axis) is str and axis in sizes and sizes[axis] == n):
        continue
      if fault := _in_axis(axis, n, f"an axis of {what} {at}", sizes):
        return fault
  return None


def _in_axis(axis: Any, n: Size, where: str, sizes: Sizes) -> Fault | None:
  if not isinstance(axis, str | Prod | Sum | Pick):
    return Fault(f"must make {where} of a factor, Prod, Sum, Pick or None", axis)
  if isinstance(axis, Prod | Sum) and (fault := _in_parts(axis, where)):
    return fault
  if unknown := [f for f in factors_of(axis) if f not in sizes]:
    return Fault(
      f"must give the size of every factor, those of {where} too", unknown, "Put them into `sizes`."
    )
  if isinstance(axis, Pick) and (fault := _in_index(axis, where, sizes)):
    return fault
  if compat.differ(size := _size(axis, sizes), n):
    return Fault(
      f"must give {where} its size, {n}",
      Said(f"{axis!r} of size {size}"),
      "Take sizes from node.ins[i].shape and node.outs[i].shape; an axis of size 1 that broadcasts is None.",
    )
  return None


def _in_parts(axis: Prod | Sum, where: str) -> Fault | None:
  parts = axis.parts
  if not (isinstance(parts, tuple) and parts and all(isinstance(f, str) for f in parts)):
    return Fault(f"must make {where} of a tuple of factors", axis, 'As in Prod(("h", "w")).')
  if len({*parts}) < len(parts):
    return Fault(f"must use a factor once in {where}", axis, "Give each part its own factor.")
  return None


def _in_index(axis: Pick, where: str, sizes: Sizes) -> Fault | None:
  index, size = axis.index, sizes[axis.factor]
  if not (isinstance(index, np.ndarray) and index.ndim == 1 and np.issubdtype(index.dtype, np.integer)):
    return Fault(f"must pick {where} by a NumPy vector of integers", index)
  largest = size if compat.is_static_size(size) else math.inf
  if index.size and not (index.min() >= -1 and index.max() < largest):
    return Fault(
      f"must pick {where} among the {size} entries of {axis.factor!r}, or -1 for a zero",
      Said(f"positions {index.min()} to {index.max()}"),
    )
  return None


def _size(axis: Axis, sizes: Sizes) -> Size:
  if isinstance(axis, Pick):
    return axis.index.size
  numbers = [sizes[f] for f in factors_of(axis)]
  return sum(numbers) if isinstance(axis, Sum) else math.prod(numbers)


def _in_factors(spec: Spec) -> Fault | None:
  """Factors that do not exist, or that no axis has."""
  known = spec.sizes.keys()
  for field in OF_FACTORS:
    found = getattr(spec, field)
    if found and not (isinstance(found, AbstractSet) and found <= known):
      return Fault(
        f"must say `{field}` as a set of factors that `sizes` has", found, f"Those are {[*known]}."
      )
  axes = {axis for axes in (*spec.ins, *spec.outs) for axis in axes if axis is not None}
  if axes == known:
    return None  # every axis is one factor, and every factor an axis
  on_axes = {f for axis in axes for f in factors_of(axis)}
  if strays := [f for f in known if f not in on_axes and f not in spec.whole]:
    return Fault(
      "must have every factor on an axis", strays, "What only counts is the `scale` or `taps` of a Flops."
    )
  return _in_picks(spec) if any(isinstance(axis, Pick) for axis in axes) else None


def _in_picks(spec: Spec) -> Fault | None:
  """A picked result is taken from operand 0 along its axes, whatever the primitive does."""
  if any(isinstance(axis, Pick) for axes in spec.ins for axis in axes):
    return Fault(
      "must use Pick in a result alone", spec.ins, "The operand has the factor, the result picks from it."
    )
  plain = tuple(axis.factor if isinstance(axis, Pick) else axis for axis in spec.outs[0])
  if len(spec.outs) > 1 or not spec.ins or plain != spec.ins[0]:
    return Fault(
      "must use Pick in the one result of a primitive that selects from operand 0 along axes in the same order",
      Said(f"{spec.ins} -> {spec.outs}"),
      "Transposed, merged or split as well, the axes have to be whole.",
    )
  if any(isinstance(axis, Pick) and axis.filled for axis in spec.outs[0]) and spec.ins[1:2] != ((),):
    return Fault("must have a number for operand 1 where a Pick is `filled` by it", Said(f"{spec.ins}"))
  if spec.moves and any(isinstance(axis, Pick) and (axis.index < 0).any() for axis in spec.outs[0]):
    return Fault("must not say `moves` where a Pick puts zeros in", True, "Those are not operand 0's.")
  return None


def _in_numbers(spec: Spec) -> Fault | None:
  count = len(spec.ins)
  for field in OF_OPERANDS:
    found = getattr(spec, field)
    if found and not (
      isinstance(found, AbstractSet) and all(type(i) is int and 0 <= i < count for i in found)
    ):
      return Fault(
        f"must say `{field}` as a set of numbers of its {count} operands", found, "Counted from 0."
      )
  return None


def _in_flops(spec: Spec) -> Fault | None:
  counts, known = spec.flops, spec.sizes.keys()
  if type(counts) is not tuple or not all(type(count) is Flops for count in counts):
    return Fault(
      "must give `flops` as a tuple of Flops", counts, "One is written with a comma: (Flops(axes),)."
    )
  for count in counts:
    outer, inner = count.outer, count.inner or ()
    if type(outer) is not tuple or type(inner) is not tuple or not known >= {*outer, *inner}:
      return Fault("must count by tuples of factors that `sizes` has", count, f"Those are {[*known]}.")
    if not (compat.is_size(count.scale) and compat.is_size(count.taps)):
      return Fault("must count with whole numbers for `scale` and `taps`", count)
  return None


def _in_moves(spec: Spec) -> Fault | None:
  if spec.moves and (len(spec.outs) != 1 or not spec.ins):
    arrays = Said(f"{spec.ins} -> {spec.outs}")
    return Fault("must say `moves` of a primitive with an operand and one result", arrays)
  same = spec.same_as
  if same is not None and not (
    type(same) is int and 0 <= same < len(spec.ins) and spec.outs == (spec.ins[same],)
  ):
    got = Said(f"{same!r} of {spec.ins} -> {spec.outs}")
    return Fault("must say `same_as` of an operand with the axes of the one result", got)
  return None


def _in_words(spec: Spec) -> Fault | None:
  if not isinstance(spec.opaque, str):
    return Fault("must give `opaque` as a reason in words", spec.opaque)
  if spec.bind is not None and not callable(spec.bind):
    return Fault("must give `bind` as a function bind(node, arrays, sizes)", spec.bind)
  return None


def _guarded(rule: SpecRule, spec: Spec) -> Spec:
  """Checks the shapes of results when they are computed."""
  bind = spec.bind or (lambda node, arrays, sizes: compat.bind(node.eqn, arrays))

  def guarded(node: Node, arrays: Sequence[jax.Array], sizes: Sizes) -> Sequence[jax.Array]:
    found = bind(node, arrays, sizes)
    full = [value.shape for value in node.outs]
    wanted = [_live_shape(axes, shape, sizes) for axes, shape in zip(spec.outs, full, strict=True)]
    shapes = [np.shape(x) for x in found] if isinstance(found, list | tuple) else found
    if not isinstance(shapes, list) or len(shapes) != len(wanted) or any(map(_apart, shapes, wanted)):
      remedy = "A parameter that holds a size has to follow it: `bind` applies the primitive with other ones."
      raise _refusal(
        rule, node, Fault(f"must give results of the live shapes {wanted}, in a list", shapes, remedy)
      )
    return found

  return replace(spec, bind=guarded)


def _live_shape(axes: Axes, full: Sequence[Size], sizes: dict[Factor, Size]) -> tuple[Size, ...]:
  return tuple(n if axis is None else _size(axis, sizes) for axis, n in zip(axes, full, strict=True))


def _apart(a: Sequence[Size], b: Sequence[Size]) -> bool:
  return len(a) != len(b) or any(map(compat.differ, a, b))
