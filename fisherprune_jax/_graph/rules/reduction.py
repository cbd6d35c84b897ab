"""Reductions, cumulative operations, sorting and windows."""

import math
from collections.abc import Sequence

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.compat import Params
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.rules.naming import mixed_of, side, sized
from fisherprune_jax._graph.rules.taps import met
from fisherprune_jax._graph.rules.weights import weight
from fisherprune_jax._graph.spec import Flops, Spec, names_of
from fisherprune_jax._graph.windows import Slide, Window
from fisherprune_jax._types import Size

# Zeros add nothing to these; others need them.
SUMS = ["reduce_sum", "reduce_or", "reduce_xor"]
# Of entries that are all zero, argmax and argmin give the first: position zero.
CHOICES = ["reduce_max", "reduce_min", "reduce_and", "reduce_prod", "argmax", "argmin"]
COLLECTIVE_SUM = "psum"
COLLECTIVES = [COLLECTIVE_SUM, "pmax", "pmin"]
PLACES = ["argmax", "argmin"]
CUMULATIVE = ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"]
WINDOWS = ["reduce_window_sum", "reduce_window_max", "reduce_window_min"]


def reduction(node: Node, infos: Sequence[Info]) -> Spec:
  """``b c -> b``: only a sum can do without zeros."""
  shape = node.ins[0].shape
  names = names_of(shape)
  reduced = frozenset(names[axis] for axis in node.params["axes"])
  outs = tuple(f for f in names if f not in reduced)
  terms = [shape[axis] for axis in node.params["axes"]]
  sums = node.name in (*SUMS, COLLECTIVE_SUM)
  return Spec(
    ins=(names,),
    outs=(outs,),
    sizes=sized((names, shape)),
    kills=frozenset({0}) if sums else frozenset(),
    # An empty sum is zero; an empty product is one, an empty maximum the least number.
    alive=frozenset() if sums or not _has(terms, 0) else frozenset(outs),
    whole=frozenset() if sums else reduced,
    flops=(Flops(names, scale=weight(node)),),
    opaque="" if sums else f"{node.name} along the masked axis",
    # A sum of several terms starts at +0; a single term may be passed on.
    blind=frozenset({0})
    if (sums and any(not _is(n, 1) for n in terms)) or node.name in PLACES
    else frozenset(),
  )


def _is(size: Size, number: int) -> bool:
  return compat.is_static_size(size) and size == number


def _has(sizes: Sequence[Size], number: int) -> bool:
  return any(_is(size, number) for size in sizes)


def collective(node: Node, infos: Sequence[Info]) -> Spec | None:
  """``b c -> b``: over axes that vmap puts in place of names."""
  plain = all(isinstance(axis, int) for axis in node.params["axes"])
  alone = len(node.ins) == 1 and node.params["axis_index_groups"] is None
  return reduction(node, infos) if plain and alone else None


def reduction_by(node: Node, infos: Sequence[Info]) -> Spec:
  """``b c, b c, 1, 1 -> b, b``: by an unknown function."""
  shape, arrays = node.ins[0].shape, len(node.ins) // 2
  names = names_of(shape)
  reduced = frozenset(names[axis] for axis in node.params["dimensions"])
  outs = tuple(f for f in names if f not in reduced)
  return Spec(
    ins=(names,) * arrays + ((),) * arrays,
    outs=(outs,) * arrays,
    sizes=sized((names, shape)),
    alive=frozenset(outs),
    whole=reduced,
    flops=(Flops(names, scale=arrays * weight(node)),),
    opaque=f"{node.name} by an unknown function",
    sees=frozenset(range(len(node.ins))),
  )


def along_axis(node: Node, infos: Sequence[Info]) -> Spec:
  """Cumulative operations and sorting: one indivisible axis, the others elementwise."""
  shape = node.ins[0].shape
  names = names_of(shape)
  axis = names[node.params["axis"] if "axis" in node.params else node.params["dimension"]]
  keeps_zero = node.name != "cumlogsumexp"
  return Spec(
    ins=(names,) * len(node.ins),
    outs=(names,) * len(node.outs),
    sizes=sized((names, shape)),
    whole=frozenset({axis}),
    alive=frozenset() if keeps_zero else frozenset(names),
    flops=(Flops(names, scale=len(node.ins) * weight(node)),),
    opaque=f"{node.name} along the masked axis",
  )


def window(node: Node, infos: Sequence[Info]) -> Spec:
  """``a s -> a t``: axes that the window spans are indivisible."""
  keeps_zero = node.name == "reduce_window_sum" or not any(
    spans(node.params, axis) and _has_empty_window(node, axis) for axis in range(len(node.ins[0].shape))
  )
  return _windowed(node, 1, keeps_zero, f"{node.name} along the masked axis")


def _has_empty_window(node: Node, axis: int) -> bool:
  """Whether a window holds padding and gaps alone: its maximum is the least number."""
  slide = _slide(node, axis)
  return slide is None or not met(slide).all()


def _slide(node: Node, axis: int) -> Slide | None:
  size, places = node.ins[0].shape[axis], node.outs[0].shape[axis]
  if not (compat.is_static_size(size) and compat.is_static_size(places)):
    return None
  names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
  taps, stride, gap, step = (node.params[name][axis] for name in names)
  return Slide(places, stride, taps, step, size, gap, node.params["padding"][axis][0])


def window_by(node: Node, infos: Sequence[Info]) -> Spec:
  """``a s, a s, 1, 1 -> a t, a t``: by an unknown function."""
  return _windowed(node, len(node.ins) // 2, False, f"{node.name} by an unknown function")


def _windowed(node: Node, arrays: int, keeps_zero: bool, reason: str) -> Spec:
  shape, out = node.ins[0].shape, node.outs[0].shape
  spanned = [spans(node.params, axis) for axis in range(len(shape))]
  ins, outs = side("s", spanned), side("t", spanned)
  slides = {axis: _slide(node, axis) for axis, mixes in enumerate(spanned) if mixes}
  return Spec(
    ins=(ins,) * arrays + ((),) * (len(node.ins) - arrays),
    outs=(outs,) * arrays,
    sizes=sized((ins, shape), (outs, out)),
    whole=mixed_of((*ins, *outs)),
    windows=tuple(Window(ins[axis], outs[axis], slide) for axis, slide in slides.items() if slide),
    alive=frozenset() if keeps_zero else frozenset(outs),
    flops=(Flops(tuple(outs), scale=arrays * weight(node) * math.prod(node.params["window_dimensions"])),),
    opaque=reason,
    sees=frozenset(range(len(node.ins))) if node.name == "reduce_window" else frozenset(),
  )


def spans(params: Params, axis: int) -> bool:
  """Whether a window spans several entries along an axis, or resizes it."""
  plain = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
  return any(name in params and params[name][axis] != 1 for name in plain) or tuple(
    params["padding"][axis]
  ) != (0, 0)


def _register() -> None:
  for name in SUMS + CHOICES:
    built_in(name, reduction)
  for name in COLLECTIVES:
    built_in(name, collective)
  built_in("reduce", reduction_by)
  built_in("reduce_window", window_by)
  for name in [*CUMULATIVE, "sort"]:
    built_in(name, along_axis)
  for name in WINDOWS:
    built_in(name, window)


_register()
