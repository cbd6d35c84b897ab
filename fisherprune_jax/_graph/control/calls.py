"""Checkpoints stay calls in the compact program, around a smaller body."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from fisherprune_jax._graph import program
from fisherprune_jax._graph.boxes import Box
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.structured import STRUCTURED, Cost, Counter, Link, costs_of

if TYPE_CHECKING:
  from fisherprune_jax._graph.execute import Arrays, Run


class Checkpoint:
  """Its body is analysed, and recomputed under the same policy."""

  def forward(self, node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
    build = functools.partial(program.build, node.params["jaxpr"], (*node.callers, node.eqn))
    (body,) = live.programs(node, build)
    return live.forward(body, infos)

  def backward(self, node: Node, live: Liveness) -> None:
    (body,) = live.subs[node]
    live.backward(body, live.wheres(node.outs))
    live.pass_on(node.ins, body.inputs)

  def costs(self, node: Node, live: Liveness, counter: Counter) -> Iterator[Cost]:
    return costs_of(live.subs[node][0], live, counter)

  def execute(self, run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
    (body,) = run.live.subs[node]
    held, boxes = list(map(run.held, body.inputs)), list(map(run.box, node.outs))
    inputs = [run.read_held(arrays, value, each) for value, each in zip(node.ins, held, strict=True)]
    options = {name: node.params[name] for name in ("policy", "prevent_cse")}
    return jax.checkpoint(lambda *xs: run.call(body, xs, held, boxes), **options)(*inputs), boxes

  def links(self, node: Node, live: Liveness) -> list[Link]:
    (body,) = live.subs[node]
    ins, outs = zip(node.ins, body.inputs, strict=True), zip(node.outs, body.outputs, strict=True)
    return [Link(body, list(ins), list(outs), [])]


for name in ("remat", "remat2", "checkpoint"):
  STRUCTURED[name] = Checkpoint()
