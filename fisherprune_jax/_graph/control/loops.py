"""Loops: a fixpoint over carried values gives what is live in all iterations."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

from fisherprune_jax._graph import compat, program, sets
from fisherprune_jax._graph.align import align
from fisherprune_jax._graph.boxes import Box, Where, join, nowhere, whole_box
from fisherprune_jax._graph.control import fixpoint, stacks
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.facts import Info, info_of
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.structured import STRUCTURED, Cost, Counter, Link, Pairs, costs_of

if TYPE_CHECKING:
  from fisherprune_jax._graph.execute import Arrays, Run


class Scan:
  """Constants, carried values, and arrays read and written one entry per iteration."""

  def forward(self, node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
    """Carried values may be non-zero where they are at first, or after any iteration."""
    consts, carry = compat.scan_counts(node.params)
    if any(info.layers is not None for info in infos[consts + carry :]):
      return stacks.forward(node, infos, live)
    (body,) = live.programs(
      node, functools.partial(program.build, node.params["jaxpr"], (*node.callers, node.eqn))
    )
    each = [info_of(info.where.in_an_iteration(), info.varies) for info in infos[consts + carry :]]
    before, outs = fixpoint.forward(
      body, infos[:consts], infos[consts : consts + carry], each, live, _again(node)
    )
    carried = outs[:carry] if _runs(node) else before
    iterations = _writing_iterations(body, [*infos[:consts], *before], infos[consts + carry :], each, live)
    stacked = [
      info_of(_in_iterations(out.where.in_all_iterations(v.shape), at), out.varies)
      for v, out, at in zip(node.outs[carry:], outs[carry:], iterations[carry:], strict=True)
    ]
    return [*carried, *stacked]

  def backward(self, node: Node, live: Liveness) -> None:
    """Earlier iterations must give what later ones demand of carried values."""
    if stacks.has_stack(node, live):
      stacks.backward(node, live)
      return
    consts, carry = compat.scan_counts(node.params)
    (body,) = live.subs[node]
    demanded = live.wheres(node.outs)
    demanded = [*demanded[:carry], *(where and where.in_an_iteration() for where in demanded[carry:])]
    fixpoint.backward(body, consts, carry, demanded, live, _again(node))
    for value, inner in zip(node.ins[:consts], body.inputs, strict=False):
      live.ask_entries(value, live.entries(inner))
    for value, where in zip(node.ins[consts:], self._varying(node, body, live), strict=True):
      live.ask(value, where)

  def costs(self, node: Node, live: Liveness, counter: Counter) -> Iterator[Cost]:
    """Every iteration counts."""
    if stacks.has_stack(node, live):
      yield from stacks.costs(node, live, counter)
      return
    for cost in _of_iterations(node, live.subs[node][0], live, counter):
      yield cost._replace(term=cost.term._replace(scale=cost.term.scale * node.params["length"]))

  def execute(self, run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
    if stacks.has_stack(node, run.live):
      return stacks.execute(run, node, arrays)
    consts, carry = compat.scan_counts(node.params)
    (body,) = run.live.subs[node]
    varying = list(map(run.ev.box, self._varying(node, body, run.live)))
    fixed, kept = list(map(run.held, body.inputs[:consts])), varying[:carry]
    read = list(map(_every_iteration, varying[carry:]))
    inner = [*fixed, *kept, *(box[1:] for box in read)]
    boxes = [_every_iteration(run.box(out)) for out in node.outs[carry:]]  # every iteration writes
    outer = zip(node.ins, [*fixed, *kept, *read], strict=True)
    inputs = [run.read_held(arrays, value, held) for value, held in outer]

    def iteration(carried: list[Any], each: list[Any]) -> tuple[list[Any], list[Any]]:
      wanted = [*kept, *(box[1:] for box in boxes)]
      outs = run.call(body, [*inputs[:consts], *carried, *each], inner, wanted)
      return outs[:carry], outs[carry:]

    options = {name: node.params[name] for name in ("length", "reverse", "unroll")}
    carried, stacked = lax.scan(
      iteration, inputs[consts : consts + carry], inputs[consts + carry :], **options
    )
    return [*carried, *stacked], [*kept, *boxes]

  def links(self, node: Node, live: Liveness) -> list[Link]:
    if stacks.has_stack(node, live):
      return stacks.links(node, live)
    consts, carry = compat.scan_counts(node.params)
    (body,) = live.subs[node]
    iterations = (
      list(zip(body.inputs[consts : consts + carry], body.outputs, strict=False)) if _again(node) else []
    )
    return [Link(body, _pairs(node.ins, body.inputs), _pairs(node.outs, body.outputs), iterations)]

  def _varying(self, node: Node, body: Program, live: Liveness) -> list[Where]:
    """What is stored of carried values, and of arrays that are read one entry per iteration."""
    consts, carry = compat.scan_counts(node.params)
    each = zip(node.ins[consts + carry :], body.inputs[consts + carry :], strict=True)
    carried = fixpoint.carried(node, body, consts, carry, live)
    return [*carried, *(live.stored(inner).in_all_iterations(value.shape) for value, inner in each)]


class While:
  """Constants of the condition, of the body, and carried values."""

  def forward(self, node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
    first, consts = node.params["cond_nconsts"], node.params["body_nconsts"]
    cond, body = live.programs(
      node,
      *(
        functools.partial(program.build, node.params[f"{name}_jaxpr"], (*node.callers, node.eqn))
        for name in ("cond", "body")
      ),
    )
    carried, _ = fixpoint.forward(body, infos[first : first + consts], infos[first + consts :], [], live)
    (go_on,) = live.forward(cond, [*infos[:first], *carried])
    return [info._replace(varies=info.varies or go_on.varies) for info in carried]

  def backward(self, node: Node, live: Liveness) -> None:
    first, consts = node.params["cond_nconsts"], node.params["body_nconsts"]
    cond, body = live.subs[node]
    each = whole_box(cond.outputs[0].shape)  # under vmap, each example has one
    live.backward(cond, [Where(each, when=live.when(node))])
    demanded = [
      _alone(join(live.stored(out), live.stored(inner)))
      if out in live.demanded or inner in live.demanded
      else None
      for out, inner in zip(node.outs, cond.inputs[first:], strict=True)
    ]
    fixpoint.backward(body, consts, len(node.outs), demanded, live)
    constants = self._constants(node, live)
    for value, inner in zip(node.ins, constants, strict=False):
      entries = live.entries(inner)
      live.ask_entries(value, entries if isinstance(entries, list) else _alone(entries))
    for value, where in zip(node.ins[len(constants) :], self._carried(node, live), strict=True):
      live.ask(value, _alone(where))

  def costs(self, node: Node, live: Liveness, counter: Counter) -> Iterator[Cost]:
    """One iteration counts, as their number is unknown."""
    for part in live.subs[node]:
      for cost in _of_iterations(node, part, live, counter):
        yield cost._replace(label=f"{cost.label} (one iteration of a while loop)")

  def execute(self, run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
    first, consts = node.params["cond_nconsts"], node.params["body_nconsts"]
    cond, body = run.live.subs[node]
    kept, each = list(map(run.ev.box, self._carried(node, run.live))), whole_box(cond.outputs[0].shape)
    held = [*map(run.held, self._constants(node, run.live)), *kept]
    inputs = [run.read_held(arrays, value, box) for value, box in zip(node.ins, held, strict=True)]

    def go_on(carried: list[Any]) -> Any:
      return run.call(cond, [*inputs[:first], *carried], [*held[:first], *kept], [each])[0]

    def iteration(carried: list[Any]) -> list[Any]:
      after = run.call(body, [*inputs[first : first + consts], *carried], held[first:], kept)
      return _where(go_on(carried), each, after, carried, kept, run.ev) if each else after

    any_goes_on = (lambda carried: jnp.any(go_on(carried))) if each else go_on
    return lax.while_loop(any_goes_on, iteration, inputs[first + consts :]), kept

  def links(self, node: Node, live: Liveness) -> list[Link]:
    first, consts = node.params["cond_nconsts"], node.params["body_nconsts"]
    cond, body = live.subs[node]
    carried = node.ins[first + consts :]
    return [
      Link(
        body,
        _pairs([*node.ins[first : first + consts], *carried], body.inputs),
        _pairs(node.outs, body.outputs),
        [
          *zip(body.inputs[consts:], body.outputs, strict=True),
          *zip(cond.inputs[first:], body.outputs, strict=True),
        ],
      ),
      Link(cond, _pairs([*node.ins[:first], *carried], cond.inputs), [], []),
    ]

  def _constants(self, node: Node, live: Liveness) -> list[Value]:
    cond, body = live.subs[node]
    return [*cond.inputs[: node.params["cond_nconsts"]], *body.inputs[: node.params["body_nconsts"]]]

  def _carried(self, node: Node, live: Liveness) -> list[Where]:
    first, consts = node.params["cond_nconsts"], node.params["body_nconsts"]
    cond, body = live.subs[node]
    carried = fixpoint.carried(node, body, consts, len(node.outs), live)
    return list(map(join, carried, map(live.stored, cond.inputs[first:])))


def _writing_iterations(
  body: Program, fixed: Sequence[Info], read: Sequence[Info], each: Sequence[Info], live: Liveness
) -> list[Set]:
  """The iterations in which each output of a body may be non-zero, by what it reads.

  It runs the body with zeros, and restores the analysis at the end. An iteration reads an entry of ``read``, known as
  ``each``.
  """
  masked = [at for at, info in enumerate(read) if info.possible[0].support]
  found: list[list[Set]] = [[] for _ in body.outputs]
  for gone in ([*([at] for at in masked), masked] if len(masked) > 1 else [masked]) if masked else ():
    given = [_zero(info) if at in gone else info for at, info in enumerate(each)]
    iterations = sets.union(*(read[at].possible[0] for at in gone))
    for out, of_out in zip(live.forward(body, [*fixed, *given]), found, strict=True):
      if out.where.some.is_empty:
        of_out.append(iterations)
  if masked:
    live.forward(body, [*fixed, *each])
  return [sets.intersection(*of_out) if of_out else sets.ALWAYS for of_out in found]


def _zero(info: Info) -> Info:
  shape = [s.size for s in info.possible]
  return info_of(nowhere(shape), info.varies)


def _in_iterations(where: Where, iterations: Set) -> Where:
  return where if iterations is sets.ALWAYS else where._replace(box=(iterations, *where.box[1:]))


def _of_iterations(node: Node, iteration: Program, live: Liveness, counter: Counter) -> Iterator[Cost]:
  """Carried values may be demanded without the node's condition (fixpoint.py), so costs are put under it."""
  for cost in costs_of(iteration, live, counter):
    yield cost._replace(term=cost.term.under(live.when(node, cost.term.sets)))


def _again(node: Node) -> bool:
  """Whether a scan has an iteration that reads what another carried."""
  return bool(node.params["length"] != 1)


def _runs(node: Node) -> bool:
  """Whether a scan has an iteration, which then gives its results."""
  length = node.params["length"]
  return compat.is_static_size(length) and length > 0


def _pairs(outer: Sequence[Value], inner: Sequence[Value]) -> Pairs:
  return list(zip(outer, inner, strict=True))


def _where(
  go_on: Any, each: Box, after: list[Any], before: list[Any], kept: list[Box], ev: Evaluation
) -> list[Any]:
  """Changes only the examples that go on, along leading axes."""
  chosen = []
  for new, old, box in zip(after, before, kept, strict=True):
    here = align(go_on, each, box[: len(each)], ev)
    chosen.append(jnp.where(here.reshape(*here.shape, *(1,) * (new.ndim - here.ndim)), new, old))
  return chosen


def _alone(where: Where) -> Where:
  """Without joint sets."""
  return Where(where.box, when=where.when)


def _every_iteration(box: Box) -> Box:
  return (*whole_box([box[0].size]), *box[1:])


STRUCTURED["scan"] = Scan()
STRUCTURED["while"] = While()
