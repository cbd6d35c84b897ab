"""Calls that stay calls in the compact program: custom derivative rules and checkpoints.

Their primal part runs like any other program. Their derivative rule was written for full shapes, so it is
traced at full shapes and then run on live entries in its turn.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax.graph import compat, program
from fisherprune_jax.graph.facts import Box, Info
from fisherprune_jax.graph.liveness import STRUCTURED, Cost, Liveness
from fisherprune_jax.graph.program import Node, Value

Call = Callable[..., Any]


@dataclass(frozen=True)
class KeptCall:
  """A call whose body is seen through; ``rebuild(run, node, body)`` makes the call of a smaller body."""

  param: str
  rebuild: Callable[[Any, Node, Call], Call]

  def forward(self, node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
    """What the body makes of the operands."""
    body = program.build(node.params[self.param], (*node.callers, node.eqn))
    live.subs[node] = [body]
    return live.forward(body, infos)

  def backward(self, node: Node, live: Liveness) -> None:
    """What the body needs."""
    (body,) = live.subs[node]
    live.backward(body, [live.stored(out) if out in live.asked else None for out in node.outs])
    for value, inner in zip(node.ins, body.inputs, strict=True):
      if inner in live.asked:
        live.ask(value, live.stored(inner))

  def costs(self, node: Node, live: Liveness, counted: Callable[[str], bool]) -> Iterator[Cost]:
    """What the body costs."""
    return live.costs(live.subs[node][0], counted)

  def execute(self, run: Any, node: Node, arrays: Any) -> tuple[Sequence[Any], Sequence[Box]]:
    """The call, of a body that runs on live entries."""
    (body,) = run.live.subs[node]
    inputs = [
      run.show(arrays, value, run.live.stored(inner))
      for value, inner in zip(node.ins, body.inputs, strict=True)
    ]
    boxes = [run.live.stored(out) for out in node.outs]
    return self.rebuild(run, node, lambda *xs: run.run(body, xs, boxes))(*inputs), boxes


def custom_jvp(run: Any, node: Node, primal: Call) -> Call:
  """The call with its custom forward-mode rule, on live entries."""
  ins, outs = _inputs(run, node), node.outs

  def dense(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    full = _spread(tangents, ins, lambda v: np.zeros(v.shape, jax.dtypes.float0))
    values, dots = jax.jvp(_original(node), tuple(primals), tuple(full))
    return values, _keep(dots, outs)

  def rule(primals: Any, tangents: Any) -> Any:
    given = [(ins, primals), (_floats(ins), _keep(tangents, ins))]
    arrays = _derive(run, dense, given, [*outs, *_floats(outs)])
    values, dots = arrays[: len(outs)], iter(arrays[len(outs) :])
    zeros = [np.zeros(jnp.shape(x), jax.dtypes.float0) for x in values]
    return values, [next(dots) if _is_float(v) else z for v, z in zip(outs, zeros, strict=True)]

  call = jax.custom_jvp(primal)
  call.defjvp(rule)
  return call


def custom_vjp(run: Any, node: Node, primal: Call) -> Call:
  """The call with its custom reverse-mode rule, on live entries."""
  ins, outs = _inputs(run, node), node.outs

  def dense(primals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    full = _spread(cotangents, outs, lambda v: np.zeros(v.shape, jax.dtypes.float0))
    return _keep(jax.vjp(_original(node), *primals)[1](list(full)), ins)

  def forward(*primals: Any) -> Any:
    return primal(*primals), primals

  def backward(primals: Any, cotangents: Any) -> tuple[Any, ...]:
    given = [(ins, primals), (_floats(outs), _keep(cotangents, outs))]
    found = iter(_derive(run, dense, given, _floats(ins)))
    return tuple(next(found) if _is_float(v) else None for v in ins)

  call = jax.custom_vjp(primal)
  call.defvjp(forward, backward)
  return call


def remat(run: Any, node: Node, primal: Call) -> Call:
  """The call under ``jax.checkpoint``, with its own policy."""
  return jax.checkpoint(primal, policy=node.params["policy"], prevent_cse=node.params["prevent_cse"])


def _derive(
  run: Any, dense: Call, given: Sequence[tuple[Sequence[Value], Any]], wanted: Sequence[Value]
) -> Any:
  """Runs a derivative rule on live entries; the boxes are those of the values it belongs to."""
  shapes = [[jax.ShapeDtypeStruct(v.shape, v.aval.dtype) for v in values] for values, _ in given]
  derivative, _ = program.trace(dense, *shapes)
  held: list[Box] = [run.live.stored(v) for values, _ in given for v in values]
  boxes = [run.live.stored(v) for v in wanted]
  arrays = [x for _, xs in given for x in xs]
  return run.again(derivative, [Info(box) for box in held], boxes)(arrays, held, boxes)


def _inputs(run: Any, node: Node) -> list[Value]:
  return run.live.subs[node][0].inputs


def _original(node: Node) -> Call:
  return lambda *xs: compat.bind(node.eqn, xs)


def _is_float(value: Value) -> bool:
  return jnp.issubdtype(value.aval.dtype, jnp.inexact)


def _floats(values: Iterable[Value]) -> list[Value]:
  return [v for v in values if _is_float(v)]


def _keep(items: Iterable[Any], values: Iterable[Value]) -> list[Any]:
  """The items that belong to values which have derivatives."""
  return [item for item, v in zip(items, values, strict=True) if _is_float(v)]


def _spread(items: Iterable[Any], values: Iterable[Value], other: Callable[[Value], Any]) -> list[Any]:
  """The inverse of ``_keep``; ``other`` makes what belongs to the rest."""
  rest = iter(items)
  return [next(rest) if _is_float(v) else other(v) for v in values]


STRUCTURED["custom_jvp_call"] = KeptCall("call_jaxpr", custom_jvp)
STRUCTURED["custom_vjp_call"] = KeptCall("call_jaxpr", custom_vjp)
for name in ("remat", "remat2", "checkpoint"):
  STRUCTURED[name] = KeptCall("jaxpr", remat)
