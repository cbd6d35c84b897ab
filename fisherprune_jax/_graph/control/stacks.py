"""Scans over stacks of layers: each layer has widths of its own, so the loop is unrolled."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from fisherprune_jax._graph import compat, program, sets
from fisherprune_jax._graph.boxes import Box, hull, whole_box
from fisherprune_jax._graph.facts import Info, info_of
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.structured import Cost, Link, Meter, costs_of

if TYPE_CHECKING:
  from fisherprune_jax._graph.execute import Arrays, Run


def has_stack(node: Node, live: Liveness) -> bool:
  """Whether a scan runs over something that differs from turn to turn in what is live."""
  consts, carry = compat.scan_counts(node.params)
  return any(live.info(value).layers is not None for value in node.ins[consts + carry :])


def forward(node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
  """One body for each turn, each going on from the one before."""
  consts, carry = compat.scan_counts(node.params)
  length = node.params["length"]
  callers = (*node.callers, node.eqn)
  live.programs(node, *[functools.partial(program.build, node.params["jaxpr"], callers)] * length)
  carried = list(infos[consts : consts + carry])
  written: list[list[Info]] = [[] for _ in range(length)]
  for turn in _order(node):
    each = [_layer(info, turn) for info in infos[consts + carry :]]
    outs = live.forward(live.subs[node][turn], [*infos[:consts], *carried, *each])
    carried, written[turn] = outs[:carry], outs[carry:]
  return [*carried, *map(_stacked, zip(*written, strict=True))]


def backward(node: Node, live: Liveness) -> None:
  """From the last turn to the first."""
  consts, carry = compat.scan_counts(node.params)
  asked = live.wheres(node.outs)
  carried, written = asked[:carry], [where and where.in_a_turn() for where in asked[carry:]]
  for turn in reversed(_order(node)):
    body = live.subs[node][turn]
    live.backward(body, [*carried, *written])
    wanted = live.wheres(body.inputs)
    carried = wanted[consts : consts + carry]
    for value, where in zip(node.ins[:consts], wanted[:consts], strict=True):
      if where is not None:
        live.ask(value, where)
    for value, where in zip(node.ins[consts + carry :], wanted[consts + carry :], strict=True):
      if where is not None:
        live.ask_layer(value, turn, where)
  for value, where in zip(node.ins[consts : consts + carry], carried, strict=True):
    if where is not None:
      live.ask(value, where)


def costs(node: Node, live: Liveness, meter: Meter) -> Iterator[Cost]:
  """Every layer with its own widths."""
  for body in live.subs[node]:
    yield from costs_of(body, live, meter)


def execute(run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
  """The turns one after the other."""
  consts, carry = compat.scan_counts(node.params)
  boxes = [(*whole_box(out.shape[:1]), *run.box(out)[1:]) for out in node.outs[carry:]]  # of all turns
  fixed = list(map(run.box, node.ins[:consts]))
  shared = [run.read(arrays, value, box) for value, box in zip(node.ins, fixed, strict=False)]
  held = list(map(run.box, node.ins[consts : consts + carry]))
  carried = [run.read(arrays, value, box) for value, box in zip(node.ins[consts:], held, strict=False)]
  written: list[list[Any]] = [[] for _ in range(node.params["length"])]
  for turn in _order(node):
    body = run.live.subs[node][turn]
    layers = list(map(run.box, body.inputs[consts + carry :]))
    each = [
      run.read_layer(arrays, value, turn, box)
      for value, box in zip(node.ins[consts + carry :], layers, strict=True)
    ]
    after = list(map(run.box, body.outputs[:carry]))
    wanted = [*after, *(box[1:] for box in boxes)]
    outs = run.call(body, [*shared, *carried, *each], [*fixed, *held, *layers], wanted)
    carried, held, written[turn] = outs[:carry], after, outs[carry:]
  return [*carried, *(jnp.stack(column) for column in zip(*written, strict=True))], [*held, *boxes]


def links(node: Node, live: Liveness) -> list[Link]:
  """Every turn gives what it carried to the next one; they are listed from the last to the first."""
  consts, carry = compat.scan_counts(node.params)
  found, after = [], list(node.outs[:carry])
  for turn in reversed(_order(node)):
    body = live.subs[node][turn]
    ins = list(zip(node.ins, body.inputs, strict=True))
    outs = list(zip([*after, *node.outs[carry:]], body.outputs, strict=True))
    found.append(Link(body, ins, outs, []))
    after = body.inputs[consts : consts + carry]
  return found


def _order(node: Node) -> list[int]:
  turns = range(node.params["length"])
  return list(reversed(turns)) if node.params["reverse"] else list(turns)


def _layer(info: Info, turn: int) -> Info:
  return info_of(info.where.in_a_turn(), info.varies) if info.layers is None else info.layers[turn]


def _stacked(layers: Sequence[Info]) -> Info:
  """What is known of the results of all turns, stacked."""
  box = (*whole_box((len(layers),)), *hull(*(info.possible for info in layers)))
  when = sets.union(*(info.when for info in layers))
  return Info(box, varies=any(info.varies for info in layers), layers=tuple(layers), when=when)
