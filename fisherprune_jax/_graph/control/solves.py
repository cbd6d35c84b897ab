"""Linear solves with a derivative rule, as in ``jnp.linalg.solve`` and ``cg``.

They run as traced, at full shapes: only the user's functions know which rows depend on which. They cost what the
solving program costs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fisherprune_jax._graph import compat, program
from fisherprune_jax._graph.boxes import Box, Where, whole_box
from fisherprune_jax._graph.facts import Info, results
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.rules.opaque import opaque
from fisherprune_jax._graph.spec import Spec
from fisherprune_jax._graph.structured import STRUCTURED, Cost, Counter, Link, costs_of

if TYPE_CHECKING:
  from fisherprune_jax._graph.execute import Arrays, Run


class LinearSolve:
  """The constants of four functions, then right-hand sides."""

  def forward(self, node: Node, infos: Sequence[Info], live: Liveness) -> list[Info]:
    """Every entry of the solution may be non-zero."""
    before, after = _constants(node)
    given = [*infos[before:after], *infos[sum(node.params["const_lengths"]) :]]
    build = functools.partial(program.build, node.params["jaxprs"].solve, (*node.callers, node.eqn))
    (body,) = live.programs(node, build)
    live.forward(body, [Info(whole_box(_shape(info)), varies=info.varies) for info in given])
    spec = live.specs[node] = live.spec(node, infos)
    return results(node, spec, infos)

  def backward(self, node: Node, live: Liveness) -> None:
    """Every entry of operands is needed."""
    (body,) = live.subs[node]
    live.backward_spec(node)
    when = live.when(node)
    live.backward(body, [Where(whole_box(out.shape), when=when) for out in body.outputs])

  def costs(self, node: Node, live: Liveness, counter: Counter) -> Iterator[Cost]:
    return costs_of(live.subs[node][0], live, counter)

  def execute(self, run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
    operands = [run.read(arrays, value, whole_box(value.shape)) for value in node.ins]
    return compat.bind(node.eqn, operands), [whole_box(out.shape) for out in node.outs]

  def links(self, node: Node, live: Liveness) -> list[Link]:
    """Nothing: it runs as traced."""
    del node, live
    return []


def _constants(node: Node) -> tuple[int, int]:
  """Where the solving function's constants lie among operands."""
  lengths = node.params["const_lengths"]
  before = lengths.matvec + lengths.vecmat
  return before, before + lengths.solve


def _shape(info: Info) -> list[Any]:
  return [s.size for s in info.possible]


def kept_whole(node: Node, infos: Sequence[Info]) -> Spec:
  """Its spec, where the engine does not look inside."""
  return opaque(node, f"{node.name} of masked entries")


built_in("custom_linear_solve", kept_whole)
STRUCTURED["custom_linear_solve"] = LinearSolve()
