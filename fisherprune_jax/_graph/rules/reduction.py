"""Primitives that run along axes: reductions, cumulative operations, sorting and windows."""

import math
from collections.abc import Sequence
from typing import Any

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.rules.taps import Slide, meets_all, met
from fisherprune_jax._graph.rules.weights import weight
from fisherprune_jax._graph.spec import Factor, Flops, Spec, names_of, register_rule

# Zeros add nothing to these; the others have to see them.
SUMS = ["reduce_sum", "reduce_or", "reduce_xor", "psum"]
# Of entries that are all zero, argmax and argmin give the first: position zero.
CHOICES = ["reduce_max", "reduce_min", "reduce_and", "reduce_prod", "argmax", "argmin", "pmax", "pmin"]
PLACES = ["argmax", "argmin"]
CUMULATIVE = ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"]
WINDOWS = ["reduce_window_sum", "reduce_window_max", "reduce_window_min"]


def reduction(node: Any, infos: Sequence[Any]) -> Spec:
  """``b c -> b``: reduced axes are contracted; only a sum can do without its zeros."""
  shape = node.ins[0].shape
  names = names_of(shape)
  reduced = frozenset(names[axis] for axis in node.params["axes"])
  outs = tuple(f for f in names if f not in reduced)
  terms = [shape[axis] for axis in node.params["axes"]]
  sums = node.name in SUMS
  return Spec(
    ins=(names,),
    outs=(outs,),
    sizes=dict(zip(names, shape, strict=True)),
    # Over nothing a sum is zero; a product is one, a maximum the least number that there is.
    alive=frozenset() if sums or not _has(terms, 0) else frozenset(outs),
    whole=frozenset() if sums else reduced,
    flops=(Flops(names, scale=weight(node)),),
    opaque="" if sums else f"{node.name} along the masked axis",
    # A sum of several terms starts at +0; one term alone may be passed on as it is.
    blind=frozenset({0})
    if (sums and any(not _is(n, 1) for n in terms)) or node.name in PLACES
    else frozenset(),
  )


def _is(size: Any, number: int) -> bool:
  return compat.is_static_size(size) and size == number


def _has(sizes: Sequence[Any], number: int) -> bool:
  return any(_is(size, number) for size in sizes)


def collective(node: Any, infos: Sequence[Any]) -> Spec | None:
  """``b c -> b``: a reduction over axes that ``vmap`` has put in the place of names."""
  plain = all(isinstance(axis, int) for axis in node.params["axes"])
  alone = len(node.ins) == 1 and node.params["axis_index_groups"] is None
  return reduction(node, infos) if plain and alone else None


def reduction_by(node: Any, infos: Sequence[Any]) -> Spec:
  """``b c, b c, 1, 1 -> b, b``: by a function of one's own, of which nothing is known."""
  shape, arrays = node.ins[0].shape, len(node.ins) // 2
  names = names_of(shape)
  reduced = frozenset(names[axis] for axis in node.params["dimensions"])
  outs = tuple(f for f in names if f not in reduced)
  return Spec(
    ins=(names,) * arrays + ((),) * arrays,
    outs=(outs,) * arrays,
    sizes=dict(zip(names, shape, strict=True)),
    alive=frozenset(outs),
    whole=reduced,
    flops=(Flops(names, scale=arrays * weight(node)),),
    opaque=f"{node.name} by an unknown function",
    sees=frozenset(range(len(node.ins))),
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
    flops=(Flops(names, scale=len(node.ins) * weight(node)),),
    opaque=f"{node.name} along the masked axis",
  )


def window(node: Any, infos: Sequence[Any]) -> Spec:
  """``a s -> a t``: axes that the window does not span are elementwise, the others whole."""
  keeps_zero = node.name == "reduce_window_sum" or not any(
    spans(node.params, axis) and _has_empty_window(node, axis) for axis in range(len(node.ins[0].shape))
  )
  return _windowed(node, 1, keeps_zero, f"{node.name} along the masked axis")


def _has_empty_window(node: Any, axis: int) -> bool:
  """Whether some window along an axis holds padding and gaps alone, of which a maximum is the least number."""
  slide = _slide(node, axis)
  return slide is None or not met(slide).all()


def _slide(node: Any, axis: int) -> Slide | None:
  """How a window goes along an axis; None where sizes are symbols."""
  size, places = node.ins[0].shape[axis], node.outs[0].shape[axis]
  if not (compat.is_static_size(size) and compat.is_static_size(places)):
    return None
  names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
  taps, stride, gap, step = (node.params[name][axis] for name in names)
  return Slide(places, stride, taps, step, size, gap, node.params["padding"][axis][0])


def window_by(node: Any, infos: Sequence[Any]) -> Spec:
  """``a s, a s, 1, 1 -> a t, a t``: by a function of one's own, of which nothing is known."""
  return _windowed(node, len(node.ins) // 2, False, f"{node.name} by an unknown function")


def _windowed(node: Any, arrays: int, keeps_zero: bool, reason: str) -> Spec:
  shape, out = node.ins[0].shape, node.outs[0].shape
  spanned = [spans(node.params, axis) for axis in range(len(shape))]
  ins = tuple(f"s{i}" if span else f"d{i}" for i, span in enumerate(spanned))
  outs = tuple(f"t{i}" if span else f"d{i}" for i, span in enumerate(spanned))
  return Spec(
    ins=(ins,) * arrays + ((),) * (len(node.ins) - arrays),
    outs=(outs,) * arrays,
    sizes={**dict(zip(ins, shape, strict=True)), **dict(zip(outs, out, strict=True))},
    whole=frozenset(f for f in (*ins, *outs) if not f.startswith("d")),
    alive=frozenset() if keeps_zero else frozenset(outs),
    flops=_of_windows(node, outs, arrays * weight(node)),
    opaque=reason,
    sees=frozenset(range(len(node.ins))) if node.name == "reduce_window" else frozenset(),
  )


def _of_windows(node: Any, outs: Sequence[Factor], scale: int) -> tuple[Flops, ...]:
  """One operation for each tap; those on padding, and between entries, count or do not."""
  taps = math.prod(node.params["window_dimensions"])
  slides = [_slide(node, axis) for axis, f in enumerate(outs) if f.startswith("t")]
  known = [slide for slide in slides if slide is not None]
  if len(known) < len(slides) or meets_all(known):
    return (Flops(tuple(outs), scale=scale * taps),)
  exact = math.prod(int(met(slide).sum()) for slide in known)
  free = tuple(f for f in outs if not f.startswith("t"))
  return (Flops(tuple(outs), scale=scale * taps, pads=True), Flops(free, scale=scale * exact, pads=False))


def spans(params: dict[str, Any], axis: int) -> bool:
  """Whether a window reaches over more than one entry along an axis, or changes its size."""
  plain = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
  return any(name in params and params[name][axis] != 1 for name in plain) or tuple(
    params["padding"][axis]
  ) != (0, 0)


def _register() -> None:
  for name in SUMS + CHOICES:
    register_rule(name, reduction)
  for name in ("psum", "pmax", "pmin"):
    register_rule(name, collective)
  register_rule("reduce", reduction_by)
  register_rule("reduce_window", window_by)
  for name in [*CUMULATIVE, "sort"]:
    register_rule(name, along_axis)
  for name in WINDOWS:
    register_rule(name, window)


_register()
