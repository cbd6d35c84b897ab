"""Data movement: axes renamed, laid end to end or picked from."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.rules.naming import sized
from fisherprune_jax._graph.spec import Axis, Bind, Pick, Sizes, Spec, Sum, names_of


def transpose(node: Node, infos: Sequence[Info]) -> Spec:
  """``a b -> b a``."""
  names = names_of(node.ins[0].shape)
  out = tuple(names[axis] for axis in node.params["permutation"])
  return Spec((names,), (out,), sized((names, node.ins[0].shape)), kills=frozenset({0}), moves=True)


def squeeze(node: Node, infos: Sequence[Info]) -> Spec:
  """``a 1 b -> a b``."""
  gone = node.params["dimensions"]
  ins = tuple(None if i in gone else f for i, f in enumerate(names_of(node.ins[0].shape)))
  sizes = sized((ins, node.ins[0].shape))
  return Spec((ins,), (tuple(sizes),), sizes, kills=frozenset({0}), moves=True)


def broadcast_in_dim(node: Node, infos: Sequence[Info]) -> Spec:
  """``a -> b a c``: new axes are full."""
  shape = node.params["shape"]
  names = names_of(shape)
  ins = tuple(
    names[at] if n == shape[at] else None
    for n, at in zip(node.ins[0].shape, node.params["broadcast_dimensions"], strict=True)
  )
  return Spec(
    ins=(ins, *((),) * (len(node.ins) - 1)),
    outs=(names,),
    sizes=sized((names, shape)),
    kills=frozenset({0}),
    moves=True,
    bind=_bind_with_sizes("shape"),
  )


def iota(node: Node, infos: Sequence[Info]) -> Spec:
  """``-> a b``: the counted axis is indivisible."""
  shape = node.params["shape"]
  names = names_of(shape)
  return Spec(
    ins=((),) * len(node.ins),
    outs=(names,),
    sizes=sized((names, shape)),
    whole=frozenset({names[node.params["dimension"]]}),
    bind=_bind_with_sizes("shape"),
  )


def _bind_with_sizes(param: str) -> Bind:
  def bind(node: Node, arrays: Sequence[jax.Array], sizes: Sizes) -> list[jax.Array]:
    shape = tuple(sizes[f"d{i}"] for i in range(len(node.params[param])))
    # Operands of a dynamic shape are not needed: arrays give the sizes.
    return compat.bind(node.eqn, arrays, {**node.params, param: shape})

  return bind


def concatenate(node: Node, infos: Sequence[Info]) -> Spec:
  """``b x, b y -> b (x + y)``."""
  axis = node.params["dimension"]
  names = names_of(node.outs[0].shape)
  parts = tuple(f"x{i}" for i in range(len(node.ins)))
  return Spec(
    ins=tuple((*names[:axis], part, *names[axis + 1 :]) for part in parts),
    outs=((*names[:axis], Sum(parts), *names[axis + 1 :]),),
    sizes={
      **{f: n for i, (f, n) in enumerate(zip(names, node.outs[0].shape, strict=True)) if i != axis},
      **{part: value.shape[axis] for part, value in zip(parts, node.ins, strict=True)},
    },
  )


def split(node: Node, infos: Sequence[Info]) -> Spec:
  """``b (x + y) -> b x, b y``."""
  axis = node.params["axis"]
  names = names_of(node.ins[0].shape)
  parts = tuple(f"x{i}" for i in range(len(node.outs)))
  return Spec(
    ins=((*names[:axis], Sum(parts), *names[axis + 1 :]),),
    outs=tuple((*names[:axis], part, *names[axis + 1 :]) for part in parts),
    sizes={
      **{f: n for i, (f, n) in enumerate(zip(names, node.ins[0].shape, strict=True)) if i != axis},
      **{part: int(n) for part, n in zip(parts, node.params["sizes"], strict=True)},
    },
    bind=lambda node, arrays, sizes: compat.bind(
      node.eqn, arrays, {**node.params, "sizes": tuple(sizes[part] for part in parts)}
    ),
  )


def slice_(node: Node, infos: Sequence[Info]) -> Spec:
  """``a -> (a picked)``."""
  bounds = zip(
    node.params["start_indices"],
    node.params["limit_indices"],
    node.params["strides"] or (1,) * len(node.ins[0].shape),
    strict=True,
  )
  picks = [
    None if start == 0 and limit == n and stride == 1 else np.arange(int(start), int(limit), int(stride))
    for (start, limit, stride), n in zip(bounds, node.ins[0].shape, strict=True)
  ]
  return picked(node, picks)


def rev(node: Node, infos: Sequence[Info]) -> Spec:
  """``a -> a reversed``."""
  shape = node.ins[0].shape
  turned = node.params["dimensions"]
  return picked(node, [np.arange(n)[::-1] if i in turned else None for i, n in enumerate(shape)])


def pad(node: Node, infos: Sequence[Info]) -> Spec:
  """``a -> (v + a + v)``, also with values inside, or cut where padding is negative."""
  picks: list[np.ndarray | None] = []
  for n, (low, high, interior) in zip(node.ins[0].shape, node.params["padding_config"], strict=True):
    if (low, high, interior) == (0, 0, 0):
      picks.append(None)
      continue
    spread = np.full(max(n + (n - 1) * interior, 0), -1)
    spread[:: interior + 1] = np.arange(n)
    index = np.pad(spread, (max(low, 0), max(high, 0)), constant_values=-1)
    picks.append(index[max(-low, 0) : index.size - max(-high, 0)])
  zeros = infos[1].const is not None and infos[1].const == 0
  return picked(node, picks) if zeros else _filled(node, picks)


def _filled(node: Node, picks: Sequence[np.ndarray | None]) -> Spec:
  """A selection filled with non-zeros, beside which other axes are full."""
  spec = picked(node, picks)
  fills = [i for i, index in enumerate(picks) if index is not None and (index < 0).any()]
  outs = (replace(axis, filled=True) if isinstance(axis, Pick) else axis for axis in spec.outs[0])
  return replace(
    spec,
    kills=frozenset(),
    ins=(spec.ins[0], ()),
    outs=(tuple(outs),),
    alive=frozenset(f for i, f in enumerate(names_of(node.ins[0].shape)) if {*fills} - {i}),
    opaque="padding with something other than zero" if fills else "",
  )


def picked(node: Node, picks: Sequence[np.ndarray | None]) -> Spec:
  """A static selection along axes of operand 0; None takes all, -1 gives zeros."""
  names = names_of(node.ins[0].shape)
  outs: tuple[Axis, ...] = tuple(
    f if index is None else Pick(f, index) for f, index in zip(names, picks, strict=True)
  )
  return Spec(
    ins=(names, *((None,) * len(value.shape) for value in node.ins[1:])),
    outs=(outs,),
    sizes=sized((names, node.ins[0].shape)),
    kills=frozenset({0}),
    neutral=frozenset(range(1, len(node.ins))),
    moves=all(index is None or (index >= 0).all() for index in picks),
    bind=lambda node, arrays, sizes: [arrays[0]],  # without picks, all is taken
  )


def _register() -> None:
  built_in("transpose", transpose)
  built_in("squeeze", squeeze)
  built_in("broadcast_in_dim", broadcast_in_dim)
  built_in("iota", iota)
  built_in("concatenate", concatenate)
  built_in("split", split)
  built_in("slice", slice_)
  built_in("rev", rev)
  built_in("pad", pad)


_register()
