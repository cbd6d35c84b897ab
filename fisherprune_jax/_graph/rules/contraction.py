"""Inner products: ``dot_general``, ``ragged_dot_general`` and ``conv_general_dilated``."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.rules.naming import sized
from fisherprune_jax._graph.rules.taps import histogram
from fisherprune_jax._graph.rules.weights import inner_product
from fisherprune_jax._graph.spec import Axes, Axis, Factor, Flops, Prod, Sizes, Spec, factors_of
from fisherprune_jax._graph.windows import Slide, Window
from fisherprune_jax._types import Size

BOTH = frozenset({0, 1})


def dot_general(node: Node, infos: Sequence[Info]) -> Spec:
  """``b m k, b n k -> b m n``, in any order."""
  return _product(node, node.params["dimension_numbers"])


def ragged_dot_general(node: Node, infos: Sequence[Info]) -> Spec | None:
  """``m k, g k n, g -> m n``: only sizes tell which rows meet which group, so ``m`` and ``g`` are indivisible."""
  numbers = node.params["ragged_dot_dimension_numbers"]
  (contracted, _), (batch, _) = numbers.dot_dimension_numbers
  rows = numbers.lhs_ragged_dimensions
  if len(rows) != 1 or rows[0] in (*contracted, *batch) or len(node.ins[2].shape) != 1:
    return None
  (group,) = numbers.rhs_group_dimensions
  plain = _product(node, numbers.dot_dimension_numbers, group)
  return replace(
    plain,
    ins=(*plain.ins, (plain.ins[1][group],)),
    whole=frozenset({str(plain.ins[0][rows[0]]), str(plain.ins[1][group])}),
    opaque=f"{node.name} of masked rows or groups",
  )


def _product(node: Node, numbers: Any, group: int | None = None) -> Spec:
  """Axes: batch, free ones of the left, then of the right (not the group)."""
  (left_contract, right_contract), (left_batch, right_batch) = numbers
  left, right = (value.shape for value in node.ins[:2])
  left_axes: list[Factor] = [f"m{i}" for i in range(len(left))]
  right_axes: list[Factor] = [f"n{i}" for i in range(len(right))]
  for i, j in [*zip(left_batch, right_batch, strict=True), *zip(left_contract, right_contract, strict=True)]:
    right_axes[j] = left_axes[i]
  contracted = tuple(left_axes[i] for i in left_contract)
  batch = [left_axes[i] for i in left_batch]
  gone = {*contracted, *batch, None if group is None else right_axes[group]}
  free = [f for f in (*left_axes, *right_axes) if f not in gone]
  out = (*batch, *free)
  return Spec(
    ins=(tuple(left_axes), tuple(right_axes)),
    outs=(out,),
    sizes=sized((tuple(left_axes), left), (tuple(right_axes), right)),
    kills=BOTH,
    flops=(Flops(out, contracted, *inner_product(*node.ins[:2])),),
    blind=_blind([left[i] for i in left_contract]),
  )


def _blind(terms: Sequence[Size]) -> frozenset[int]:
  """A sum of several products starts at +0 and hides signs of zeros; one product shows them."""
  return frozenset() if all(compat.is_static_size(n) and n == 1 for n in terms) else BOTH


def conv_general_dilated(node: Node, infos: Sequence[Info]) -> Spec:
  """``(h n) (g i) s.., (h g o) i k.. -> n (h g o) t..``: groups are factors, windows indivisible."""
  numbers = node.params["dimension_numbers"]
  (left, right), out = (value.shape for value in node.ins), node.outs[0].shape
  groups, batch_groups = node.params["feature_group_count"], node.params["batch_group_count"]
  channels = {
    "h": batch_groups,
    "g": groups,
    "i": right[numbers.rhs_spec[1]],
    "o": right[numbers.rhs_spec[0]] // (groups * batch_groups),
  }
  inputs, features = _merge("gi", channels), _merge("hgo", channels)
  terms = ("i",) if "i" in factors_of(inputs) else ()
  used = {*factors_of(inputs), *factors_of(features)}
  examples = Prod(("h", "n")) if batch_groups > 1 else "n"
  space, taps, places = (
    {f"{letter}{k}": shape[axis] for k, axis in enumerate(layout[2:])}
    for letter, shape, layout in (
      ("s", left, numbers.lhs_spec),
      ("k", right, numbers.rhs_spec),
      ("t", out, numbers.out_spec),
    )
  )
  slides = _slides(node, space, taps, places)
  return Spec(
    ins=(
      _order(numbers.lhs_spec, examples, inputs, space),
      _order(numbers.rhs_spec, features, terms[0] if terms else None, taps),
    ),
    outs=(_order(numbers.out_spec, "n", features, places),),
    sizes={
      "n": out[numbers.out_spec[0]],
      **{f: n for f, n in channels.items() if f in used},
      **space,
      **taps,
      **places,
    },
    kills=BOTH,
    whole=frozenset((*space, *taps, *places)),
    windows=tuple(map(Window, space, places, slides)),
    flops=_products(node, slides, taps, places, ("n", *factors_of(features)), terms),
    blind=_blind([*taps.values(), channels["i"]]),
    bind=_bind_conv,
  )


def _products(
  node: Node,
  slides: Sequence[Slide],
  taps: Sizes,
  places: Sizes,
  outer: tuple[Factor, ...],
  inner: tuple[Factor, ...],
) -> tuple[Flops, ...]:
  """An inner product at every place, over the taps that count.

  All do, also over the border, unless the input is dilated (a transposed convolution, or a strided one's gradient).
  Then taps on entries count: each entry times each tap that lands in the result.
  """
  scale, twice = inner_product(*node.ins)
  whole = Flops((*outer, *places), inner, scale, math.prod(taps.values()) * twice)
  if max(node.params["lhs_dilation"], default=1) == 1 or len(slides) < len(places):
    return (whole,)
  return tuple(
    Flops(outer, inner, n * scale, taken * twice) for taken, n in sorted(histogram(slides).items())
  )


def _slides(node: Node, space: Sizes, taps: Sizes, places: Sizes) -> list[Slide]:
  sizes, params = (places.values(), taps.values(), space.values()), node.params
  if not all(compat.is_static_size(n) for found in sizes for n in found):
    return []
  strides, steps, gaps = params["window_strides"], params["rhs_dilation"], params["lhs_dilation"]
  before = [low for low, _ in params["padding"]]
  return list(map(Slide, sizes[0], strides, sizes[1], steps, sizes[2], gaps, before))


def _merge(parts: str, sizes: Sizes) -> Axis:
  rest = tuple(f for f in parts if sizes[f] > 1)
  if len(rest) > 1:
    return Prod(rest)
  return rest[0] if rest else parts[-1]


def _order(layout: Sequence[int], first: Axis, second: Axis, window: Sizes) -> Axes:
  place = dict(zip(layout, (first, second, *window), strict=True))
  return tuple(place[i] for i in range(len(layout)))


def _bind_conv(node: Node, arrays: Sequence[jax.Array], sizes: Sizes) -> list[jax.Array]:
  groups = {"feature_group_count": sizes.get("g", 1), "batch_group_count": sizes.get("h", 1)}
  if 0 in (sizes.get("i"), sizes.get("g"), sizes.get("h")):
    # Nothing to add up; XLA lacks convolutions over no channels.
    numbers = node.params["dimension_numbers"]
    shape = list(node.outs[0].shape)
    shape[numbers.out_spec[0]] = sizes["n"]
    shape[numbers.out_spec[1]] = arrays[1].shape[numbers.rhs_spec[0]]
    return [jnp.zeros(shape, node.outs[0].aval.dtype)]
  return compat.bind(node.eqn, arrays, {**node.params, **groups})


built_in("dot_general", dot_general)
built_in("ragged_dot_general", ragged_dot_general)
built_in("conv_general_dilated", conv_general_dilated)
