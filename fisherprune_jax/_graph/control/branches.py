"""Conditionals: each branch has its liveness; the most expensive one counts."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jax import lax

from fisherprune_jax._graph import program
from fisherprune_jax._graph.boxes import Box, Where, whole_box
from fisherprune_jax._graph.facts import Info, either, info_of
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.structured import STRUCTURED, Cost, Counter, Link, costs_of
from fisherprune_jax._graph.terms import MostExpensive

if TYPE_CHECKING:
  from fisherprune_jax._graph.execute import Arrays, Run


class Cond:
  """An index, then the operands of all branches."""

  def forward(self, node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
    """Results may be non-zero where any branch's may be."""
    callers = (*node.callers, node.eqn)
    builders = [functools.partial(program.build, branch, callers) for branch in node.params["branches"]]
    branches = live.programs(node, *builders)
    varies = any(info.varies for info in infos)
    found = [live.forward(branch, infos[1:]) for branch in branches]
    outs = [functools.reduce(either, results) for results in zip(*found, strict=True)]
    return [info_of(out.where, varies) for out in outs]

  def backward(self, node: Node, live: Liveness) -> None:
    live.ask(node.ins[0], Where(whole_box(node.ins[0].shape), when=live.when(node)))
    for branch in live.subs[node]:
      live.backward(branch, live.wheres(node.outs))
      live.pass_on(node.ins[1:], branch.inputs)

  def costs(self, node: Node, live: Liveness, counter: Counter) -> Iterator[Cost]:
    """The most expensive branch."""
    costs = [list(costs_of(branch, live, counter)) for branch in live.subs[node]]
    branches = [tuple(cost.term for cost in found if cost.counted) for found in costs]
    yield from (cost for found in costs for cost in found if not cost.counted)
    if len(branches) > 2:
      yield from (
        Cost(node, "clamp", term.under(live.when(node))) for term in counter.of_scalar("clamp")
      )  # lax.switch clamps its index
    if any(branches):
      yield Cost(node, "cond (its most expensive branch)", MostExpensive(tuple(branches)))

  def execute(self, run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
    boxes, held = list(map(run.box, node.outs)), list(map(run.box, node.ins[1:]))
    operands = [run.read(arrays, value, box) for value, box in zip(node.ins[1:], held, strict=True)]

    def runner(branch: program.Program) -> Callable[..., list[Any]]:
      return lambda *xs: run.call(branch, xs, held, boxes)

    index = run.read(arrays, node.ins[0], ())
    branches = [runner(branch) for branch in run.live.subs[node]]
    if len(branches) == 2:
      return lax.cond(index.astype(bool), branches[1], branches[0], *operands), boxes
    return lax.switch(index, branches, *operands), boxes

  def links(self, node: Node, live: Liveness) -> list[Link]:
    return [
      Link(
        branch,
        list(zip(node.ins[1:], branch.inputs, strict=True)),
        list(zip(node.outs, branch.outputs, strict=True)),
        [],
      )
      for branch in live.subs[node]
    ]


STRUCTURED["cond"] = Cond()
