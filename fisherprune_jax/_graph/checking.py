"""Rules are asked here, and what they say is held against the node that they say it of.

A wrong ``Spec`` would come out as a wrong network, or as an error far from its cause. So every factor, axis and
operand that one names is looked up once, when it is made; the error names the rule, the primitive and the line.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.compat import Size
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.registry import SpecRule, is_taught
from fisherprune_jax._graph.spec import Axes, Axis, Factor, Flops, Pick, Prod, Sizes, Spec, Sum, factors_of

OF_OPERANDS = ("kills", "neutral", "sees", "blind")
"""What a ``Spec`` says of operands, by their numbers."""
OF_FACTORS = ("alive", "whole", "weak")
"""What it says of factors."""


class Fault(NamedTuple):
  """What a rule must do, what it did, and what to do about it."""

  requirement: str
  value: Any
  remedy: str = ""


def ask(rule: SpecRule, node: Node, infos: Sequence[Info]) -> Spec | None:
  """What a rule says of a node; raises if that cannot be, with the name of the rule."""
  try:
    spec = rule(node, infos)
  except compat.UndecidedSize:
    raise  # the fault of a symbol, not of the rule: an export says so
  except Exception as error:
    said = f"{type(error).__name__}: {error}"
    _refuse(rule, node, Fault("must return a Spec or None", said, "It raised that."), error)
  if spec is None:
    return None
  for fault in _faults(spec, node):
    _refuse(rule, node, fault)
  return _guarded(rule, spec) if is_taught(node.name) else spec


def _refuse(rule: SpecRule, node: Node, fault: Fault, error: Exception | None = None) -> None:
  where = f"The rule {_name_of(rule)} for the primitive `{node.name}` ({node.source})"
  got = fault.value if isinstance(fault.value, str) else repr(fault.value)
  raise ValueError(f"{where} {fault.requirement}, got {got}. {fault.remedy}".rstrip()) from error


def _name_of(rule: Any) -> str:
  """A function as ``module.function``; of an object that is called, its class."""
  while isinstance(rule, functools.partial):
    rule = rule.func
  named = rule if hasattr(rule, "__qualname__") else type(rule)
  return f"{named.__module__}.{named.__qualname__}"


def _faults(spec: Any, node: Node) -> Iterator[Fault]:
  """What is wrong with a ``Spec``, the first cause first; what comes after a fault may be a consequence of it."""
  if not isinstance(spec, Spec):
    yield Fault(
      "must return a Spec or None", spec, "fp.rules.Spec makes one; None says that no rule is known."
    )
  yield from _of_sizes(spec.sizes)
  yield from _of_arrays("ins", "operand", spec.ins, node.ins, spec.sizes)
  yield from _of_arrays("outs", "result", spec.outs, node.outs, spec.sizes)
  yield from _of_picks(spec)
  yield from _of_names(spec)
  yield from _of_flops(spec)
  yield from _of_moves(spec)


def _of_sizes(sizes: Any) -> Iterator[Fault]:
  if not isinstance(sizes, dict):
    yield Fault("must give `sizes` as a dictionary from factors to their sizes", sizes)
  for factor, size in sizes.items():
    if type(factor) is not str or not compat.is_size(size):
      yield Fault(
        "must give `sizes` as whole numbers by the names of factors",
        {factor: size},
        "Take them from node.ins[i].shape and node.outs[i].shape.",
      )


def _of_arrays(
  field: str, what: str, all_axes: Any, values: Sequence[Value], sizes: Sizes
) -> Iterator[Fault]:
  """Faults of the axes of all operands, or of all results."""
  if not isinstance(all_axes, tuple) or len(all_axes) != len(values):
    remedy = "A tuple of one is written with a comma: (axes,)." if len(values) == 1 else ""
    yield Fault(
      f"must give `{field}` one tuple of axes for each {what}, {len(values)} in all", all_axes, remedy
    )
  for at, (axes, value) in enumerate(zip(all_axes, values, strict=True)):
    shape = value.shape
    if not isinstance(axes, tuple) or len(axes) != len(shape):
      yield Fault(
        f"must name an axis for each of the {len(shape)} axes of {what} {at}, of shape {shape}",
        axes,
        "An axis is a factor, Prod, Sum, Pick or None.",
      )
    for axis, n in zip(axes, shape, strict=True):
      # The usual case first: this runs for every axis of every array of a network.
      if axis is not None and not (type(axis) is str and axis in sizes and sizes[axis] == n):
        yield from _of_axis(axis, n, f"an axis of {what} {at}", sizes)


def _of_axis(axis: Any, n: Size, where: str, sizes: Sizes) -> Iterator[Fault]:
  if not isinstance(axis, str | Prod | Sum | Pick):
    yield Fault(f"must make {where} of a factor, Prod, Sum, Pick or None", axis)
  if isinstance(axis, Prod | Sum):
    yield from _of_parts(axis, where)
  unknown = [f for f in factors_of(axis) if f not in sizes]
  if unknown:
    yield Fault(
      f"must give the size of every factor, those of {where} too", unknown, "Put them into `sizes`."
    )
  if isinstance(axis, Pick):
    yield from _of_index(axis, where, sizes)
  if compat.differ(size := _size(axis, sizes), n):
    yield Fault(
      f"must give {where} its size, {n}",
      f"{axis!r} of size {size}",
      "Take sizes from node.ins[i].shape and node.outs[i].shape; an axis of size 1 that broadcasts is None.",
    )


def _of_parts(axis: Prod | Sum, where: str) -> Iterator[Fault]:
  parts = axis.parts
  if not (isinstance(parts, tuple) and parts and all(isinstance(f, str) for f in parts)):
    yield Fault(f"must make {where} of a tuple of factors", axis, 'As in Prod(("h", "w")).')
  if len({*parts}) < len(parts):
    yield Fault(f"must use a factor once in {where}", axis, "Give each part a factor of its own.")


def _of_index(axis: Pick, where: str, sizes: Sizes) -> Iterator[Fault]:
  index, size = axis.index, sizes[axis.factor]
  if not (isinstance(index, np.ndarray) and index.ndim == 1 and np.issubdtype(index.dtype, np.integer)):
    yield Fault(f"must pick {where} by a NumPy vector of integers", index)
  largest = size if compat.is_static_size(size) else math.inf
  if index.size and not (index.min() >= -1 and index.max() < largest):
    yield Fault(
      f"must pick {where} among the {size} entries of {axis.factor!r}, or -1 for a zero",
      f"positions {index.min()} to {index.max()}",
    )


def _size(axis: Axis, sizes: Sizes) -> Size:
  if isinstance(axis, Pick):
    return axis.index.size
  numbers = [sizes[f] for f in factors_of(axis)]
  return sum(numbers) if isinstance(axis, Sum) else math.prod(numbers)


def _of_picks(spec: Spec) -> Iterator[Fault]:
  """A result that is picked is taken from operand 0 along its axes, whatever the primitive does."""
  if any(isinstance(axis, Pick) for axes in spec.ins for axis in axes):
    yield Fault(
      "must use Pick in a result alone", spec.ins, "The operand has the factor, the result picks from it."
    )
  if not any(isinstance(axis, Pick) for axes in spec.outs for axis in axes):
    return
  plain = tuple(axis.factor if isinstance(axis, Pick) else axis for axis in spec.outs[0])
  if len(spec.outs) > 1 or not spec.ins or plain != spec.ins[0]:
    yield Fault(
      "must use Pick in the one result of a primitive that selects from operand 0 along axes in the same order",
      f"{spec.ins} -> {spec.outs}",
      "Transposed, merged or split as well, the axes have to be whole.",
    )


def _of_names(spec: Spec) -> Iterator[Fault]:
  """What is said of operands and factors that there are not, and of factors that no axis has."""
  operands = range(len(spec.ins))
  for field in OF_OPERANDS:
    found = getattr(spec, field)
    if found and not (
      isinstance(found, AbstractSet) and all(type(i) is int and i in operands for i in found)
    ):
      yield Fault(
        f"must say `{field}` as a set of numbers of its {len(operands)} operands", found, "Counted from 0."
      )
  for field in OF_FACTORS:
    found = getattr(spec, field)
    if found and not (isinstance(found, AbstractSet) and found <= spec.sizes.keys()):
      yield Fault(
        f"must say `{field}` as a set of factors that `sizes` has", found, f"Those are {[*spec.sizes]}."
      )
  on_axes = {f for axes in (*spec.ins, *spec.outs) for axis in axes for f in factors_of(axis)}
  if strays := [f for f in spec.sizes if f not in on_axes and f not in spec.whole]:
    yield Fault(
      "must have every factor on an axis", strays, "What only counts is the `scale` or `terms` of a Flops."
    )


def _of_flops(spec: Spec) -> Iterator[Fault]:
  counts = spec.flops
  if not isinstance(counts, tuple) or not all(isinstance(count, Flops) for count in counts):
    yield Fault(
      "must give `flops` as a tuple of Flops", counts, "One is written with a comma: (Flops(axes),)."
    )
  for count in counts:
    named = (count.outer, () if count.inner is None else count.inner)
    if not all(isinstance(factors, tuple) and spec.sizes.keys() >= {*factors} for factors in named):
      yield Fault("must count by tuples of factors that `sizes` has", count, f"Those are {[*spec.sizes]}.")
    if not (compat.is_size(count.scale) and compat.is_size(count.terms)):
      yield Fault("must count with whole numbers for `scale` and `terms`", count)


def _of_moves(spec: Spec) -> Iterator[Fault]:
  if spec.moves and (len(spec.outs) != 1 or not spec.ins):
    yield Fault(
      "must say `moves` of a primitive with an operand and one result", f"{spec.ins} -> {spec.outs}"
    )
  if spec.moves and any(isinstance(axis, Pick) and (axis.index < 0).any() for axis in spec.outs[0]):
    yield Fault("must not say `moves` where a Pick puts zeros in", True, "The zeros are not operand 0's.")
  if spec.same_as is not None and (
    type(spec.same_as) is not int
    or not 0 <= spec.same_as < len(spec.ins)
    or spec.outs != (spec.ins[spec.same_as],)
  ):
    yield Fault(
      "must say `same_as` of an operand with the axes of the one result",
      f"{spec.same_as!r} of {spec.ins} -> {spec.outs}",
    )
  if not isinstance(spec.opaque, str):
    yield Fault("must give `opaque` as a reason in words", spec.opaque)
  if spec.bind is not None and not callable(spec.bind):
    yield Fault("must give `bind` as a function bind(node, arrays, sizes)", spec.bind)


def _guarded(rule: SpecRule, spec: Spec) -> Spec:
  """A user's ``Spec`` whose results are held against what it says of their shapes, when they are computed."""
  bind = spec.bind or (lambda node, arrays, sizes: compat.bind(node.eqn, arrays))

  def guarded(node: Node, arrays: Sequence[jax.Array], sizes: Sizes) -> Sequence[jax.Array]:
    found = bind(node, arrays, sizes)
    full = [value.shape for value in node.outs]
    wanted = [_live_shape(axes, shape, sizes) for axes, shape in zip(spec.outs, full, strict=True)]
    shapes = [np.shape(x) for x in found] if isinstance(found, list | tuple) else found
    if not isinstance(shapes, list) or len(shapes) != len(wanted) or any(map(_apart, shapes, wanted)):
      remedy = "A parameter that holds a size has to follow it: `bind` applies the primitive with other ones."
      _refuse(rule, node, Fault(f"must give results of the live shapes {wanted}, in a list", shapes, remedy))
    return found

  return replace(spec, bind=guarded)


def _live_shape(axes: Axes, full: Sequence[Size], sizes: dict[Factor, Size]) -> tuple[Size, ...]:
  return tuple(n if axis is None else _size(axis, sizes) for axis, n in zip(axes, full, strict=True))


def _apart(a: Sequence[Size], b: Sequence[Size]) -> bool:
  return len(a) != len(b) or any(map(compat.differ, a, b))
