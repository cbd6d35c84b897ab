"""Calls with a user's derivative rule, analysed as another program.

Liveness is about what a program computes, and holds for its true derivative. A rule may differ: it may read operands
that the function ignores, pass gradients to them, or mix features of a cotangent, which is *not* zero where the result
is. So

- a result may be non-zero where the rule's tangent may be (``custom_jvp``), or where its cotangent affects gradients of
  an operand that may be non-zero (``custom_vjp``);
- an operand is demanded where the rule reads it, or passes gradients to it.

Calls inside such a call or its rule are not differentiated by a first derivative. So only their values count; a second
derivative has their rules analysed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import compat, program, sets
from fisherprune_jax._graph.boxes import Box, Where, join, nowhere, whole_box
from fisherprune_jax._graph.facts import Info, info_of
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.structured import STRUCTURED, Cost, Counter, Link, costs_of

if TYPE_CHECKING:
  from fisherprune_jax._graph.execute import Arrays, Run

Call = Callable[..., Any]


class Thin(NamedTuple):
  """A call on live entries: those held of operands, and boxes of results.

  ``primal`` computes results; ``rule(k, given, wanted)`` is the rule's program k, on given inputs.
  """

  node: Node
  held: list[Box]
  boxes: list[Box]
  primal: Call
  rule: Callable[[int, list[Box], list[Box]], Call]


class Custom:
  """What both kinds share: a body, and rule programs whose inputs begin with the operands."""

  def rules(self, node: Node) -> list[Program]:
    """The rule's programs, traced at full shapes."""
    raise NotImplementedError

  def reach(self, node: Node, rules: Sequence[Program], infos: Sequence[Info], live: Liveness) -> list[Where]:
    """Per result, where the rule makes it count."""
    raise NotImplementedError

  def ask(self, node: Node, rules: Sequence[Program], live: Liveness) -> None:
    """Demands what the rule needs, beyond what its programs read of operands."""
    raise NotImplementedError

  def call(self, thin: Thin) -> Call:
    raise NotImplementedError

  def forward(self, node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
    """Where results, or their derivatives by the rule, may be non-zero."""
    if node not in live.subs:
      body = program.build(node.params["call_jaxpr"], (*node.callers, node.eqn))
      live.subs[node] = [body, *([] if _is_inner(node) else self._rules_if_any(node))]
    body, *rules = live.subs[node]
    outs = live.forward(body, infos)
    if not rules:
      return outs
    reached = self.reach(node, rules, infos, live)
    found = [join(out.where, where) for out, where in zip(outs, reached, strict=True)]
    return [
      out._replace(together=where.together)
      if (out.possible, out.when) == (where.box, where.when)
      else info_of(where, out.varies)
      for out, where in zip(outs, found, strict=True)
    ]

  def _rules_if_any(self, node: Node) -> list[Program]:
    # A function whose rule is missing or cannot be traced has no derivative.
    with contextlib.suppress(Exception):
      return self.rules(node)
    return []

  def backward(self, node: Node, live: Liveness) -> None:
    body, *rules = live.subs[node]
    live.backward(body, live.wheres(node.outs))
    if rules:
      self.ask(node, rules, live)
    for part in live.subs[node]:
      live.pass_on(node.ins, part.inputs)

  def costs(self, node: Node, live: Liveness, counter: Counter) -> Iterator[Cost]:
    return costs_of(live.subs[node][0], live, counter)

  def execute(self, run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
    body, *rules = run.live.subs[node]
    held, boxes = list(map(run.box, node.ins)), list(map(run.box, node.outs))

    def rule(at: int, given: list[Box], wanted: list[Box]) -> Call:
      if rules:
        return lambda *xs: run.call(rules[at], xs, given, wanted)
      late = run.again(self.rules(node)[at], [Info(box) for box in given], wanted)  # a second derivative
      return lambda *xs: late(xs, given, wanted)

    call = self.call(Thin(node, held, boxes, lambda *xs: run.call(body, xs, held, boxes), rule))
    return call(*(run.read(arrays, v, box) for v, box in zip(node.ins, held, strict=True))), boxes

  def links(self, node: Node, live: Liveness) -> list[Link]:
    """Body and rule read operands; all but reverse rules give results."""
    count = len(node.outs)
    return [
      Link(
        part,
        list(zip(node.ins, part.inputs, strict=False)),
        list(zip(node.outs, part.outputs, strict=False)) if at < 2 and len(part.outputs) >= count else [],
        [],
      )
      for at, part in enumerate(live.subs[node])
    ]


class CustomJvp(Custom):
  """A forward-mode rule: one program, linear in tangents."""

  def rules(self, node: Node) -> list[Program]:
    """``operands, tangents -> results, tangents``."""
    ins, outs = node.ins, node.outs

    def dense(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
      full = _spread(tangents, ins, lambda v: np.zeros(v.shape, jax.dtypes.float0))
      values, dots = jax.jvp(_original(node), tuple(primals), tuple(full))
      return values, _keep(dots, outs)

    return [_traced(node, dense, ins, _floats(ins))]

  def reach(self, node: Node, rules: Sequence[Program], infos: Sequence[Info], live: Liveness) -> list[Where]:
    """Where the rule's values and tangents may be non-zero."""
    tangents = [info_of(info.nonzero, info.varies) for info in _keep(infos, node.ins)]
    found = [info.where for info in live.forward(rules[0], [*infos, *tangents])]
    values, dots = found[: len(node.outs)], found[len(node.outs) :]
    return list(map(join, values, _spread(dots, node.outs, _nowhere)))

  def ask(self, node: Node, rules: Sequence[Program], live: Liveness) -> None:
    """Tangents are demanded like values."""
    demanded = live.wheres(node.outs)
    live.backward(rules[0], [*demanded, *_keep(demanded, node.outs)])
    live.pass_on(_floats(node.ins), rules[0].inputs[len(node.ins) :])

  def call(self, thin: Thin) -> Call:
    ins, outs = thin.node.ins, thin.node.outs

    def rule(primals: Any, tangents: Any) -> Any:
      given = [*thin.held, *_keep(thin.held, ins)]
      run = thin.rule(0, given, [*thin.boxes, *_keep(thin.boxes, outs)])
      found = run(*primals, *_keep(tangents, ins))
      values, dots = found[: len(outs)], iter(found[len(outs) :])
      return values, [
        next(dots) if _is_float(v) else np.zeros(np.shape(x), jax.dtypes.float0)
        for v, x in zip(outs, values, strict=True)
      ]

    call = jax.custom_jvp(thin.primal)
    call.defjvp(rule)
    return call


class CustomVjp(Custom):
  """A reverse-mode rule: results, and gradients from cotangents."""

  def rules(self, node: Node) -> list[Program]:
    """``operands -> results``, as under differentiation, and ``operands, cotangents -> gradients``."""
    ins, outs = node.ins, node.outs

    def forwards(primals: Sequence[Any]) -> Any:
      return jax.vjp(_original(node), *primals)[0]

    def backwards(primals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
      full = _spread(cotangents, outs, lambda v: np.zeros(v.shape, jax.dtypes.float0))
      return _keep(jax.vjp(_original(node), *primals)[1](list(full)), ins)

    return [_traced(node, forwards, ins), _traced(node, backwards, ins, _floats(outs))]

  def reach(self, node: Node, rules: Sequence[Program], infos: Sequence[Info], live: Liveness) -> list[Where]:
    """Where cotangents affect gradients that may be non-zero; those of dead entries are unknown, not zero."""
    forwards, backwards = rules
    values = live.forward(forwards, infos)
    live.forward(backwards, [*infos, *(Info(whole_box(v.shape), varies=True) for v in _floats(node.outs))])
    alone = replace(
      live, demanded={}, factors={}, demanded_layers={}, demanded_whole=set(), also={}, conditions={}
    )
    alone.backward(backwards, [info.nonzero for info in _keep(infos, node.ins)])
    cotangents = list(map(alone.stored, backwards.inputs[len(node.ins) :]))
    forwards_too = [info.where for info in values]
    return list(map(join, forwards_too, _spread(cotangents, node.outs, _nowhere)))

  def ask(self, node: Node, rules: Sequence[Program], live: Liveness) -> None:
    """Operands are demanded where the rule can pass gradients, though the function ignores them."""
    forwards, backwards = rules
    live.backward(forwards, live.wheres(node.outs))
    infos, outs = [live.info(value) for value in node.ins], _floats(node.outs)
    not_demanded = [info_of(_nowhere(out), True) for out in outs]
    given = zip(_keep(infos, node.ins), live.forward(backwards, [*infos, *not_demanded]), strict=True)
    of_nothing = [sets.every(a.nonzero.some, b.nonzero.some) for a, b in given]
    if any(when is not sets.NEVER for when in of_nothing):
      live.also[node] = sets.union(*of_nothing)  # a rule that makes gradients from no cotangent
    cotangents = [info_of(live.demanded.get(out, _nowhere(out)), True) for out in outs]
    gradients = live.forward(backwards, [*infos, *cotangents])
    live.backward(backwards, [info.nonzero for info in _keep(infos, node.ins)])
    for value, gradient in zip(_floats(node.ins), gradients, strict=True):
      if not gradient.is_zero:
        live.ask(value, gradient.where)

  def call(self, thin: Thin) -> Call:
    ins, outs = thin.node.ins, thin.node.outs

    def forward(*primals: Any) -> Any:
      return thin.rule(0, thin.held, thin.boxes)(*primals), primals

    def backward(primals: Any, cotangents: Any) -> tuple[Any, ...]:
      run = thin.rule(1, [*thin.held, *_keep(thin.boxes, outs)], _keep(thin.held, ins))
      return tuple(_spread(run(*primals, *_keep(cotangents, outs)), ins, lambda v: None))

    call = jax.custom_vjp(thin.primal)
    call.defvjp(forward, backward)
    return call


def _is_inner(node: Node) -> bool:
  return any(isinstance(STRUCTURED.get(eqn.primitive.name), Custom) for eqn in node.callers)


def _nowhere(value: Value) -> Where:
  return nowhere(value.shape)


def _traced(node: Node, dense: Call, *values: Sequence[Value]) -> Program:
  shapes = [[jax.ShapeDtypeStruct(v.shape, v.aval.dtype) for v in group] for group in values]
  return program.build(compat.trace(dense, *shapes)[0], (*node.callers, node.eqn))


def _original(node: Node) -> Call:
  return lambda *xs: compat.bind(node.eqn, xs)


def _is_float(value: Value) -> bool:
  return jnp.issubdtype(value.aval.dtype, jnp.inexact)


def _floats(values: Iterable[Value]) -> list[Value]:
  return [v for v in values if _is_float(v)]


def _keep(items: Iterable[Any], values: Iterable[Value]) -> list[Any]:
  """The items of values with derivatives."""
  return [item for item, v in zip(items, values, strict=True) if _is_float(v)]


def _spread(items: Iterable[Any], values: Iterable[Value], other: Callable[[Value], Any]) -> list[Any]:
  """The inverse of ``_keep``, with something else for the rest."""
  rest = iter(items)
  return [next(rest) if _is_float(v) else other(v) for v in values]


STRUCTURED["custom_jvp_call"] = CustomJvp()
STRUCTURED["custom_vjp_call"] = CustomVjp()
