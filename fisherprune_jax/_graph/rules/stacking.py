"""Arrays stacked, unstacked, tiled or passed on."""

from collections.abc import Sequence

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.rules.naming import apart, sized, sizes_in
from fisherprune_jax._graph.spec import Axis, Prod, Spec, names_of


def stack(node: Node, infos: Sequence[Info]) -> Spec:
  """``a b, a b -> a n b``."""
  axis = node.params["axis"]
  shape = node.ins[0].shape
  names = names_of(shape)
  return Spec(
    ins=(names,) * len(node.ins),
    outs=((*names[:axis], "n", *names[axis:]),),
    sizes={**sized((names, shape)), "n": len(node.ins)},
    whole=frozenset({"n"}),
  )


def unstack(node: Node, infos: Sequence[Info]) -> Spec:
  """``a n b -> a b, a b``."""
  axis = node.params["axis"]
  names = names_of(node.ins[0].shape)
  rest = (*names[:axis], *names[axis + 1 :])
  return Spec(
    ins=(names,),
    outs=(rest,) * len(node.outs),
    sizes=sized((names, node.ins[0].shape)),
    whole=frozenset({names[axis]}),
    opaque="taking apart the masked axis",
  )


def tile(node: Node, infos: Sequence[Info]) -> Spec | None:
  """``a b -> (r a) b``."""
  shape, reps = node.ins[0].shape, node.params["reps"]
  if len(reps) != len(shape):
    return None
  names = names_of(shape)
  outs: tuple[Axis, ...] = tuple(Prod((f"r{i}", f)) for i, f in enumerate(names))
  sizes = {**sized((names, shape)), **{f"r{i}": n for i, n in enumerate(reps)}}
  return Spec(
    ins=(names,),
    outs=(outs,),
    sizes=sizes,
    moves=True,
    bind=lambda node, arrays, sizes: compat.bind(
      node.eqn, arrays, {**node.params, "reps": tuple(sizes[f"r{i}"] for i in range(len(reps)))}
    ),
  )


def pairwise(node: Node, infos: Sequence[Info]) -> Spec:
  """``a, b c -> a, b c``."""
  names = apart("x", node.ins)
  return Spec(
    ins=names,
    outs=names,
    sizes=sizes_in(node, names, names),
    moves=len(node.ins) == 1,
  )


built_in("stack", stack)
built_in("unstack", unstack)
built_in("tile", tile)
built_in("optimization_barrier", pairwise)
built_in("device_put", pairwise)
