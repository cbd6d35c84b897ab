"""Loops, branches and calls written out, so that every product of a network is a node of one flat program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import CALLS, Node, Program, Value, build, trace
from fisherprune_jax._types import PyTree

MOST_NODES = 20_000
"""A loop that would become more nodes than this stays a loop, and nothing inside of it is refitted."""


def unrolled(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """The same function, traced without ``scan``, ``cond``, ``remat`` and functions with a derivative rule."""

  def run(*args: PyTree) -> PyTree:
    program, out_tree = trace(fn, *args)
    return jax.tree.unflatten(jax.tree.structure(out_tree), _run(program, jax.tree.leaves(args)))

  return run


def _run(program: Program, inputs: Sequence[Any]) -> list[Any]:
  env: dict[Value, Any] = dict(zip(program.inputs, inputs, strict=True))
  env.update(program.consts)

  def read(value: Value) -> Any:
    return env[value] if value.literal is None else value.literal

  for node in program.nodes:
    arrays = [read(value) for value in node.ins]
    with compat.located(node.eqn, node.callers):
      outs = _WRITTEN_OUT.get(node.name, _as_it_is)(node, arrays)
    env.update(zip(node.outs, outs, strict=True))
  return [read(value) for value in program.outputs]


def _as_it_is(node: Node, arrays: Sequence[Any]) -> list[Any]:
  return compat.bind(node.eqn, arrays)


def _scan(node: Node, arrays: Sequence[Any]) -> list[Any]:
  (jaxpr,) = compat.sub_jaxprs(node.params)
  consts, count = compat.scan_counts(node.params)
  length = node.params["length"]
  body = build(jaxpr, (*node.callers, node.eqn))
  if not length or length * len(body.nodes) > MOST_NODES:
    return _as_it_is(node, arrays)
  fixed, carry, stacked = arrays[:consts], arrays[consts : consts + count], arrays[consts + count :]
  rows: list[list[Any]] = []
  order = range(length)
  for at in reversed(order) if node.params["reverse"] else order:
    each = [lax.index_in_dim(x, at, keepdims=False) for x in stacked]
    outs = _run(body, [*fixed, *carry, *each])
    carry = outs[:count]
    rows.append(outs[count:])
  if node.params["reverse"]:
    rows.reverse()
  return [*carry, *(jax.numpy.stack(column) for column in zip(*rows, strict=True))]


def _cond(node: Node, arrays: Sequence[Any]) -> list[Any]:
  """All branches, and the choice among their results."""
  index, *operands = arrays
  jaxprs = compat.sub_jaxprs(node.params)
  branches = [build(jaxpr, (*node.callers, node.eqn)) for jaxpr in jaxprs]
  if any(inner.acts or inner.name == "while" for branch in branches for inner in branch.nodes):
    return _as_it_is(node, arrays)
  results = [_run(branch, operands) for branch in branches]
  index = jax.numpy.clip(index.astype("int32"), 0, len(branches) - 1)
  return [lax.select_n(index, *cases) if cases else None for cases in zip(*results, strict=True)]


def _call(node: Node, arrays: Sequence[Any]) -> list[Any]:
  """The function itself, without its derivative rule or what is recomputed for it."""
  found = compat.sub_jaxprs(node.params)
  if len(found) != 1:
    return _as_it_is(node, arrays)
  return _run(build(found[0], (*node.callers, node.eqn)), arrays)


_WRITTEN_OUT: dict[str, Callable[[Node, Sequence[Any]], list[Any]]] = {
  "scan": _scan,
  "cond": _cond,
  **dict.fromkeys(CALLS, _call),
}
