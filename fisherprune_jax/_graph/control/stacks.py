"""Scans over stacks of layers: each layer has its widths, so the loop is unrolled."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fisherprune_jax._graph import compat, program
from fisherprune_jax._graph.boxes import Box, Where, whole_box
from fisherprune_jax._graph.facts import Info, info_of, stack_of
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.stack import Stack, padded
from fisherprune_jax._graph.structured import Cost, Counter, Link, costs_of

if TYPE_CHECKING:
  from fisherprune_jax._graph.execute import Arrays, Run


def has_stack(node: Node, live: Liveness) -> bool:
  """Whether iterations of a scan differ in what is live."""
  consts, carry = compat.scan_counts(node.params)
  return any(live.info(value).layers is not None for value in node.ins[consts + carry :])


def forward(node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
  """One body per iteration, each after the one before."""
  consts, carry = compat.scan_counts(node.params)
  length = node.params["length"]
  callers = (*node.callers, node.eqn)
  live.programs(node, *[functools.partial(program.build, node.params["jaxpr"], callers)] * length)
  carried = list(infos[consts : consts + carry])
  written: list[list[Info]] = [[] for _ in range(length)]
  for iteration in _order(node):
    each = [_layer(info, iteration) for info in infos[consts + carry :]]
    outs = live.forward(live.subs[node][iteration], [*infos[:consts], *carried, *each])
    carried, written[iteration] = outs[:carry], outs[carry:]
  return [*carried, *map(stack_of, zip(*written, strict=True))]


def backward(node: Node, live: Liveness) -> None:
  consts, carry = compat.scan_counts(node.params)
  carried = live.wheres(node.outs[:carry])
  written = [_demanded(out, live) for out in node.outs[carry:]]
  for iteration in reversed(_order(node)):
    body = live.subs[node][iteration]
    live.backward(body, [*carried, *(layers[iteration] for layers in written)])
    wanted = live.wheres(body.inputs)
    carried = wanted[consts : consts + carry]
    live.pass_on(node.ins[:consts], body.inputs)
    for value, where in zip(node.ins[consts + carry :], wanted[consts + carry :], strict=True):
      if where is not None:
        live.ask_layer(value, iteration, where)
  for value, where in zip(node.ins[consts : consts + carry], carried, strict=True):
    if where is not None:
      live.ask(value, where)


def written(node: Node, live: Liveness, out: Value) -> list[Value] | None:
  """What each iteration writes into a result of a scan over stacks of layers."""
  if node.name != "scan" or not has_stack(node, live):
    return None
  _, carry = compat.scan_counts(node.params)
  at = node.outs.index(out)
  return None if at < carry else [body.outputs[at] for body in live.subs[node]]


def _demanded(out: Value, live: Liveness) -> Sequence[Where | None]:
  """What is demanded of each layer of a result."""
  if out not in live.demanded:
    return [None] * out.shape[0]
  return live.layers(out) or [live.stored(out).in_an_iteration()] * out.shape[0]


def costs(node: Node, live: Liveness, counter: Counter) -> Iterator[Cost]:
  for body in live.subs[node]:
    yield from costs_of(body, live, counter)


def execute(run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
  """The iterations in order; as a loop if all do the same."""
  consts, carry = compat.scan_counts(node.params)
  boxes = [(*whole_box(out.shape[:1]), *run.box(out)[1:]) for out in node.outs[carry:]]  # all iterations
  apart = [run.layers(out) if run.needs(out) else None for out in node.outs[carry:]]
  fixed = list(map(run.box, node.ins[:consts]))
  shared = [run.read(arrays, value, box) for value, box in zip(node.ins, fixed, strict=False)]
  held = list(map(run.box, node.ins[consts : consts + carry]))
  carried = [run.read(arrays, value, box) for value, box in zip(node.ins[consts:], held, strict=False)]
  each_wanted = [
    layers or [box[1:]] * node.params["length"] for layers, box in zip(apart, boxes, strict=True)
  ]
  iterations = _iterations(run, node, fixed, held, each_wanted)
  layers = run.stacks(arrays, node.ins[consts + carry :], [iterations[at].layers for at in _order(node)])
  if layers is not None and _are_alike(iterations, shared, carried, layers):

    def step(carried: list[Any], layer: list[Any]) -> tuple[list[Any], list[Any]]:
      outs = iterations[0](shared, carried, layer)
      return outs[:carry], outs[carry:]

    carried, rows = lax.scan(step, carried, layers, len(iterations), node.params["reverse"])
    stacks = [Stack(x, each) if each else x for x, each in zip(rows, apart, strict=True)]
    return [*carried, *stacks], [*held, *boxes]
  columns: list[list[Any]] = [[] for _ in iterations]
  for at, iteration in zip(_order(node), iterations, strict=True):
    xs = zip(node.ins[consts + carry :], iteration.layers, strict=True)
    each = [run.read_layer(arrays, value, at, box) for value, box in xs]
    outs = iteration(shared, carried, each)
    carried, columns[at] = outs[:carry], outs[carry:]
  stacks = [
    Stack(padded(x), each) if each else jnp.stack(x)
    for x, each in zip(zip(*columns, strict=True), apart, strict=True)
  ]
  return [*carried, *stacks], [*(iterations[-1].after if iterations else held), *boxes]


class Iteration(NamedTuple):
  """One iteration: ``turn(shared, carried, layer)`` gives what is carried, then what is written.

  Attributes:
    run: runs it.
    body: its program.
    before: what shared and carried inputs hold.
    layers: what layers hold.
    after: what carried results hold.
    wanted: what all results hold.
  """

  run: "Run"
  body: program.Program
  before: list[Box]
  layers: list[Box]
  after: list[Box]
  wanted: list[Box]

  def __call__(self, shared: list[Any], carried: list[Any], layer: list[Any]) -> list[Any]:
    return self.run.call(self.body, [*shared, *carried, *layer], [*self.before, *self.layers], self.wanted)


def _iterations(
  run: "Run", node: Node, fixed: list[Box], held: list[Box], written: list[list[Box]]
) -> list[Iteration]:
  consts, carry = compat.scan_counts(node.params)
  found = []
  for at in _order(node):
    body = run.live.subs[node][at]
    layers = list(map(run.box, body.inputs[consts + carry :]))
    after = list(map(run.box, body.outputs[:carry]))
    wanted = [*after, *(boxes[at] for boxes in written)]
    found.append(Iteration(run, body, [*fixed, *held], layers, after, wanted))
    held = after
  return found


def _are_alike(iterations: list[Iteration], shared: list[Any], carried: list[Any], layers: list[Any]) -> bool:
  """Whether all iterations compute the same, on arrays of the same shapes."""
  ends, seen = (len(shared), len(shared) + len(carried)), None
  for iteration in iterations:
    before = iteration.before[len(shared) :]
    if not all(map(iteration.run.is_same, before, iteration.after)):
      return False  # the carried width changes

    def run(*xs: Any, iteration: Iteration = iteration) -> list[Any]:
      return iteration([*xs[: ends[0]]], [*xs[ends[0] : ends[1]]], [x[0] for x in xs[ends[1] :]])

    traced = jax.make_jaxpr(run)(*shared, *carried, *layers)
    if seen is not None and not _are_same(traced, seen):
      return False
    seen = traced
  return True


def _are_same(a: Any, b: Any) -> bool:
  """Whether functions are traced alike, with equal constants."""
  if str(a) != str(b):
    return False
  ours, others = [*_constants(a)], [*_constants(b)]
  return len(ours) == len(others) and all(map(np.array_equal, ours, others))


def _constants(traced: Any) -> Iterator[Any]:
  """Arrays in a jaxpr and in inner ones, which its text may shorten or omit."""
  jaxpr, consts = compat.open_jaxpr(traced)
  yield from consts
  for eqn in jaxpr.eqns:
    yield from (atom.val for atom in eqn.invars if isinstance(atom, compat.Literal))
    yield from (value for value in eqn.params.values() if isinstance(value, np.ndarray))
    for inner in compat.sub_jaxprs(eqn.params):
      yield from _constants(inner)


def links(node: Node, live: Liveness) -> list[Link]:
  """Iterations give carried values to the next; the last is first."""
  consts, carry = compat.scan_counts(node.params)
  found, after = [], list(node.outs[:carry])
  for iteration in reversed(_order(node)):
    body = live.subs[node][iteration]
    ins = list(zip(node.ins, body.inputs, strict=True))
    outs = list(zip([*after, *node.outs[carry:]], body.outputs, strict=True))
    found.append(Link(body, ins, outs, []))
    after = body.inputs[consts : consts + carry]
  return found


def _order(node: Node) -> list[int]:
  iterations = range(node.params["length"])
  return list(reversed(iterations)) if node.params["reverse"] else list(iterations)


def _layer(info: Info, iteration: int) -> Info:
  return info_of(info.where.in_an_iteration(), info.varies) if info.layers is None else info.layers[iteration]
