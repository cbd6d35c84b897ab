"""Primitives that run along axes: reductions, cumulative operations, sorting and windows."""

import math
from collections.abc import Sequence
from typing import Any

from fisherprune_jax.graph.spec import Flops, Spec, names_of, register_rule

# Zeros add nothing to these; the others have to see them.
SUMS = ["reduce_sum", "reduce_or", "reduce_xor"]
CHOICES = ["reduce_max", "reduce_min", "reduce_and", "reduce_prod"]
CUMULATIVE = ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"]
WINDOWS = ["reduce_window_sum", "reduce_window_max", "reduce_window_min"]


def reduction(node: Any, infos: Sequence[Any]) -> Spec:
  """``b c -> b``: reduced axes are contracted; only a sum can do without its zeros."""
  shape = node.ins[0].shape
  names = names_of(shape)
  reduced = frozenset(names[axis] for axis in node.params["axes"])
  return Spec(
    ins=(names,),
    outs=(tuple(f for f in names if f not in reduced),),
    sizes=dict(zip(names, shape, strict=True)),
    whole=frozenset() if node.name in SUMS else reduced,
    flops=(Flops(names),),
    opaque="" if node.name in SUMS else f"{node.name} along the masked axis",
  )


def arg_reduction(node: Any, infos: Sequence[Any]) -> Spec:
  """As a reduction, but the result is a position, and no zero of it is a zero of the operand."""
  spec = reduction(node, infos)
  return Spec(
    ins=spec.ins,
    outs=spec.outs,
    sizes=spec.sizes,
    whole=spec.whole,
    alive=frozenset(f for f in spec.outs[0] if isinstance(f, str)),
    flops=spec.flops,
    opaque=f"{node.name} gives a position",
  )


def along_axis(node: Any, infos: Sequence[Any]) -> Spec:
  """Cumulative operations and ``sort``: one axis whole, the others elementwise."""
  shape = node.ins[0].shape
  names = names_of(shape)
  axis = names[node.params["axis"] if "axis" in node.params else node.params["dimension"]]
  keeps_zero = node.name != "cumlogsumexp"
  return Spec(
    ins=(names,) * len(node.ins),
    outs=(names,) * len(node.outs),
    sizes=dict(zip(names, shape, strict=True)),
    whole=frozenset({axis}),
    alive=frozenset() if keeps_zero else frozenset(names),
    flops=(Flops(names, scale=len(node.ins)),),
    opaque=f"{node.name} along the masked axis",
  )


def window(node: Any, infos: Sequence[Any]) -> Spec:
  """Pooling: axes that the window does not span are elementwise, the others whole."""
  shape, out = node.ins[0].shape, node.outs[0].shape
  spanned = [spans(node.params, axis) for axis in range(len(shape))]
  ins = tuple(f"s{i}" if span else f"d{i}" for i, span in enumerate(spanned))
  outs = tuple(f"t{i}" if span else f"d{i}" for i, span in enumerate(spanned))
  keeps_zero = node.name == "reduce_window_sum" or all(
    max(pads) < size
    for pads, size in zip(node.params["padding"], node.params["window_dimensions"], strict=True)
    if any(pads)
  )
  return Spec(
    ins=(ins,),
    outs=(outs,),
    sizes={**dict(zip(ins, shape, strict=True)), **dict(zip(outs, out, strict=True))},
    whole=frozenset(f for f in (*ins, *outs) if not f.startswith("d")),
    alive=frozenset() if keeps_zero else frozenset(outs),
    flops=(Flops(outs, scale=math.prod(node.params["window_dimensions"])),),
    opaque=f"{node.name} along the masked axis",
  )


def spans(params: dict[str, Any], axis: int) -> bool:
  """Whether a window reaches over more than one entry along an axis, or changes its size."""
  plain = (
    params["window_dimensions"][axis],
    params["window_strides"][axis],
    params["base_dilation"][axis],
    params["window_dilation"][axis],
  )
  return plain != (1, 1, 1, 1) or tuple(params["padding"][axis]) != (0, 0)


def _register() -> None:
  for name in SUMS + CHOICES:
    register_rule(name, reduction)
  for name in ("argmax", "argmin"):
    register_rule(name, arg_reduction)
  for name in [*CUMULATIVE, "sort"]:
    register_rule(name, along_axis)
  for name in WINDOWS:
    register_rule(name, window)


_register()
