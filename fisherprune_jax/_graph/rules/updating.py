"""Writing into arrays: scatters, dynamic updates, and the derivatives of max pooling."""

import math
from collections.abc import Sequence
from typing import Any

from fisherprune_jax._graph.rules.reduction import spans
from fisherprune_jax._graph.rules.weights import weight
from fisherprune_jax._graph.spec import Axes, Factor, Flops, Spec, register_rule


def dynamic_update_slice(node: Any, infos: Sequence[Any]) -> Spec:
  """``a b, a b' -> a b``: axes that the update spans are elementwise, the others whole."""
  (operand, update), starts = (value.shape for value in node.ins[:2]), node.ins[2:]
  full = [n == m for n, m in zip(operand, update, strict=True)]
  outs = tuple(f"d{i}" if same else f"s{i}" for i, same in enumerate(full))
  ins = tuple(f"d{i}" if same else f"u{i}" for i, same in enumerate(full))
  sizes = {**dict(zip(outs, operand, strict=True)), **dict(zip(ins, update, strict=True))}
  return Spec(
    ins=(outs, ins, *((),) * len(starts)),
    outs=(outs,),
    sizes=sizes,
    neutral=frozenset(range(2, len(node.ins))),
    whole=frozenset(f for f in sizes if not f.startswith("d")),
    opaque="a dynamic update along the masked axis",
  )


def scatter(node: Any, infos: Sequence[Any]) -> Spec:
  """``v c, i, i c -> v c``: axes that every update spans are elementwise, the others whole."""
  numbers = node.params["dimension_numbers"]
  operand, indices, update = (value.shape for value in node.ins)
  gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
  outs: list[Factor] = [f"s{i}" for i in range(len(operand))]
  ins: list[Factor] = [f"u{i}" for i in range(len(update))]
  kept = [axis for axis in range(len(operand)) if axis not in gone]
  for axis, at in zip(kept, numbers.update_window_dims, strict=True):
    if operand[axis] == update[at] and axis not in numbers.scatter_dims_to_operand_dims:
      outs[axis] = ins[at] = f"d{axis}"
  sizes = {**dict(zip(outs, operand, strict=True)), **dict(zip(ins, update, strict=True))}
  return Spec(
    ins=(tuple(outs), (None,) * len(indices), tuple(ins)),
    outs=(tuple(outs),),
    sizes=sizes,
    neutral=frozenset({1}),
    whole=frozenset(f for f in sizes if not f.startswith("d")),
    flops=() if node.name == "scatter" else (Flops(tuple(ins), scale=weight(node)),),
    opaque="a scatter along the masked axis",
  )


def top_k(node: Any, infos: Sequence[Any]) -> Spec:
  """``a s -> a t, a t``: both whole; positions are among the results, so no zero of them is known."""
  shape = node.ins[0].shape
  axis = node.params["reduction_dimension" if node.name == "approx_top_k" else "axis"] % len(shape)
  ins = tuple(f"s{i}" if i == axis else f"d{i}" for i in range(len(shape)))
  outs = tuple(f"t{i}" if i == axis else f"d{i}" for i in range(len(shape)))
  sizes = {**dict(zip(ins, shape, strict=True)), **dict(zip(outs, node.outs[0].shape, strict=True))}
  return Spec(
    ins=(ins,),
    outs=(outs, outs),
    sizes=sizes,
    alive=frozenset(outs),
    whole=frozenset({ins[axis], outs[axis]}),
    flops=(Flops(ins),),
    opaque=f"{node.name} gives positions",
    sees=frozenset({0}),  # it takes +0 before -0
  )


def select_and(node: Any, infos: Sequence[Any]) -> Spec:
  """``a t, a s -> a s`` or ``a s, a s -> a t``: moved by where operand 1, whose zeros are mute, has its maxima."""
  spanned = [spans(node.params, axis) for axis in range(len(node.ins[1].shape))]

  def axes(letter: str) -> Axes:
    return tuple(f"{letter}{i}" if span else f"d{i}" for i, span in enumerate(spanned))

  scatters = node.name.startswith("select_and_scatter")
  ins = (axes("t"), axes("s")) if scatters else (axes("s"), axes("s"))
  outs = axes("s") if scatters else axes("t")
  shaped = [*zip(ins, node.ins, strict=True), (outs, node.outs[0])]
  sizes = {str(f): n for names, value in shaped for f, n in zip(names, value.shape, strict=True)}
  window = math.prod(node.params["window_dimensions"])
  return Spec(
    ins=ins,
    outs=(outs,),
    sizes=sizes,
    neutral=frozenset({1}),
    whole=frozenset(f for f in sizes if not f.startswith("d")),
    flops=(Flops(tuple(map(str, axes("t"))), scale=window),),
    opaque=f"{node.name} along the masked axis",
  )


def select_and_scatter(node: Any, infos: Sequence[Any]) -> Spec:
  """``a s, a t, 1 -> a s``: by functions of one's own, of which nothing is known."""
  shape, source = node.ins[0].shape, node.ins[1].shape
  spanned = [spans(node.params, axis) for axis in range(len(shape))]
  outs = tuple(f"s{i}" if span else f"d{i}" for i, span in enumerate(spanned))
  ins = tuple(f"t{i}" if span else f"d{i}" for i, span in enumerate(spanned))
  sizes = {**dict(zip(outs, shape, strict=True)), **dict(zip(ins, source, strict=True))}
  return Spec(
    ins=(outs, ins, ()),
    outs=(outs,),
    sizes=sizes,
    alive=frozenset(outs),
    whole=frozenset(f for f in sizes if not f.startswith("d")),
    flops=(Flops(ins, scale=math.prod(node.params["window_dimensions"])),),
    opaque=f"{node.name} by an unknown function",
    sees=frozenset({0, 1}),
  )


for name in ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"):
  register_rule(name, scatter)
register_rule("dynamic_update_slice", dynamic_update_slice)
register_rule("top_k", top_k)
register_rule("approx_top_k", top_k)
register_rule("select_and_scatter", select_and_scatter)
register_rule("select_and_scatter_add", select_and)
register_rule("select_and_gather_add", select_and)
