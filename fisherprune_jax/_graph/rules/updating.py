"""Scatters, dynamic updates, and derivatives of max pooling."""

import math
from collections.abc import Sequence

from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.rules.naming import mixed_of, side, sized, sizes_in
from fisherprune_jax._graph.rules.reduction import spans
from fisherprune_jax._graph.rules.weights import weight
from fisherprune_jax._graph.spec import Factor, Flops, Spec


def dynamic_update_slice(node: Node, infos: Sequence[Info]) -> Spec:
  """``a b, a b' -> a b``: axes that it does not span are indivisible."""
  (operand, update), starts = (value.shape for value in node.ins[:2]), node.ins[2:]
  partly = [n != m for n, m in zip(operand, update, strict=True)]
  outs, ins = side("s", partly), side("u", partly)
  return Spec(
    ins=(outs, ins, *((),) * len(starts)),
    outs=(outs,),
    sizes=sized((outs, operand), (ins, update)),
    neutral=frozenset(range(2, len(node.ins))),
    whole=mixed_of((*outs, *ins)),
    opaque="a dynamic update along the masked axis",
  )


def scatter(node: Node, infos: Sequence[Info]) -> Spec:
  """``b v c, b i, b i c -> b v c``: batches and axes that all updates span are elementwise."""
  numbers = node.params["dimension_numbers"]
  operand, indices, update = (value.shape for value in node.ins)
  gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
  outs: list[Factor] = [f"s{i}" for i in range(len(operand))]
  ins: list[Factor] = [f"u{i}" for i in range(len(update))]
  kept = [axis for axis in range(len(operand)) if axis not in gone]
  for axis, at in zip(kept, numbers.update_window_dims, strict=True):
    if operand[axis] == update[at]:  # an index there can only be 0
      outs[axis] = ins[at] = f"d{axis}"
  of_indices: list[Factor | None] = [None] * len(indices)
  rest = [at for at in range(len(update)) if at not in numbers.update_window_dims]
  for axis, at in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
    outs[axis] = ins[rest[at]] = of_indices[at] = f"d{axis}"
  return Spec(
    ins=(tuple(outs), tuple(of_indices), tuple(ins)),
    outs=(tuple(outs),),
    sizes=sized((tuple(outs), operand), (tuple(ins), update)),
    neutral=frozenset({1}),
    whole=mixed_of((*outs, *ins)),
    flops=() if node.name == "scatter" else (Flops(tuple(ins), scale=weight(node)),),
    opaque="a scatter along the masked axis",
  )


def top_k(node: Node, infos: Sequence[Info]) -> Spec:
  """``a s -> a t, a t``: as positions are results, no zero of them is known."""
  shape = node.ins[0].shape
  axis = node.params["reduction_dimension" if node.name == "approx_top_k" else "axis"] % len(shape)
  ordered = [i == axis for i in range(len(shape))]
  ins, outs = side("s", ordered), side("t", ordered)
  return Spec(
    ins=(ins,),
    outs=(outs, outs),
    sizes=sized((ins, shape), (outs, node.outs[0].shape)),
    alive=frozenset(outs),
    whole=mixed_of((*ins, *outs)),
    flops=(Flops(ins),),
    opaque=f"{node.name} gives positions",
    sees=frozenset({0}),  # it takes +0 before -0
  )


def select_and(node: Node, infos: Sequence[Info]) -> Spec:
  """``a t, a s -> a s`` or ``a s, a s -> a t``: moved by the maxima of operand 1, whose zeros do not matter."""
  spanned = [spans(node.params, axis) for axis in range(len(node.ins[1].shape))]
  entries, places = side("s", spanned), side("t", spanned)
  scatters = node.name.startswith("select_and_scatter")
  ins, outs = ((places, entries), entries) if scatters else ((entries, entries), places)
  window = math.prod(node.params["window_dimensions"])
  return Spec(
    ins=ins,
    outs=(outs,),
    sizes=sizes_in(node, ins, (outs,)),
    neutral=frozenset({1}),
    whole=mixed_of((*entries, *places)),
    flops=(Flops(places, scale=window),),
    opaque=f"{node.name} along the masked axis",
  )


def select_and_scatter(node: Node, infos: Sequence[Info]) -> Spec:
  """``a s, a t, 1 -> a s``: by unknown functions."""
  shape, source = node.ins[0].shape, node.ins[1].shape
  spanned = [spans(node.params, axis) for axis in range(len(shape))]
  outs, ins = side("s", spanned), side("t", spanned)
  return Spec(
    ins=(outs, ins, ()),
    outs=(outs,),
    sizes=sized((outs, shape), (ins, source)),
    alive=frozenset(outs),
    whole=mixed_of((*outs, *ins)),
    flops=(Flops(ins, scale=math.prod(node.params["window_dimensions"])),),
    opaque=f"{node.name} by an unknown function",
    sees=frozenset({0, 1}),
  )


for name in ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"):
  built_in(name, scatter)
built_in("dynamic_update_slice", dynamic_update_slice)
built_in("top_k", top_k)
built_in("approx_top_k", top_k)
built_in("select_and_scatter", select_and_scatter)
built_in("select_and_scatter_add", select_and)
built_in("select_and_gather_add", select_and)
