"""Whole arrays put side by side, taken apart, repeated or passed along."""

from collections.abc import Sequence
from typing import Any

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.spec import Axis, Prod, Spec, names_of, register_rule


def stack(node: Any, infos: Sequence[Any]) -> Spec:
  """``a b, a b -> a n b``."""
  axis = node.params["axis"]
  shape = node.ins[0].shape
  names = names_of(shape)
  return Spec(
    ins=(names,) * len(node.ins),
    outs=((*names[:axis], "n", *names[axis:]),),
    sizes={**dict(zip(names, shape, strict=True)), "n": len(node.ins)},
    whole=frozenset({"n"}),
  )


def unstack(node: Any, infos: Sequence[Any]) -> Spec:
  """``a n b -> a b, a b``."""
  axis = node.params["axis"]
  names = names_of(node.ins[0].shape)
  rest = (*names[:axis], *names[axis + 1 :])
  return Spec(
    ins=(names,),
    outs=(rest,) * len(node.outs),
    sizes=dict(zip(names, node.ins[0].shape, strict=True)),
    whole=frozenset({names[axis]}),
    opaque="taking apart the masked axis",
  )


def tile(node: Any, infos: Sequence[Any]) -> Spec | None:
  """``a b -> (r a) b``."""
  shape, reps = node.ins[0].shape, node.params["reps"]
  if len(reps) != len(shape):
    return None
  names = names_of(shape)
  outs: tuple[Axis, ...] = tuple(Prod((f"r{i}", f)) for i, f in enumerate(names))
  sizes = {**dict(zip(names, shape, strict=True)), **{f"r{i}": n for i, n in enumerate(reps)}}
  return Spec(
    ins=(names,),
    outs=(outs,),
    sizes=sizes,
    moves=True,
    bind=lambda node, arrays, sizes: compat.bind(
      node.eqn, arrays, {**node.params, "reps": tuple(sizes[f"r{i}"] for i in range(len(reps)))}
    ),
  )


def pairwise(node: Any, infos: Sequence[Any]) -> Spec:
  """``a, b c -> a, b c``: each operand passes through on its own."""
  names = tuple(tuple(f"x{i}.{k}" for k in range(len(v.shape))) for i, v in enumerate(node.ins))
  return Spec(
    ins=names,
    outs=names,
    sizes={f: n for axes, v in zip(names, node.ins, strict=True) for f, n in zip(axes, v.shape, strict=True)},
    moves=len(node.ins) == 1,
  )


register_rule("stack", stack)
register_rule("unstack", unstack)
register_rule("tile", tile)
register_rule("optimization_barrier", pairwise)
register_rule("device_put", pairwise)
