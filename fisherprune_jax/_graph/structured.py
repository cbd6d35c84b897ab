"""Primitives that run programs: what the engine asks of them, and what it makes of the answers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fisherprune_jax._graph.boxes import Box
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.terms import Term

if TYPE_CHECKING:
  from fisherprune_jax._graph.execute import Arrays, Run
  from fisherprune_jax._graph.liveness import Liveness


class Cost(NamedTuple):
  """What one node costs; ``node`` says where it is, ``label`` what it is called in a breakdown.

  Where nobody knows what it costs, ``counted`` is False, and the term is zero. Terms are those of the meter: ``Term`` and
  ``Dearest``, or a kind of its own that has their ``scale``, ``sets`` and ``under``.
  """

  node: Node
  label: str
  term: Any
  counted: bool = True


Pairs = list[tuple[Value, Value]]


class Link(NamedTuple):
  """How the values of a program are tied to those of the node that runs it.

  Attributes:
    program: the program.
    ins: operands of the node, each with the input that it is given as.
    outs: results of the node, each with the output that gives it.
    turns: inputs, each with the output of one turn that gives it to the next.
  """

  program: Program
  ins: Pairs
  outs: Pairs
  turns: Pairs


class Meter(Protocol):
  """What one node costs, in some unit."""

  @property
  def unit(self) -> str:
    """What it counts, for tables."""

  def __call__(self, node: Node, live: "Liveness") -> Iterable[Any] | None:
    """What a node that runs no program costs when it runs; None where nobody knows."""

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """What a primitive costs on one number, which the compact program has beside those that were traced."""


class Structured(Protocol):
  """A primitive that runs programs: calls, conditionals, loops."""

  def forward(self, node: Node, infos: Sequence[Info], live: "Liveness") -> list[Info] | None:
    """What is known of the results; None where the primitive has to be kept whole."""

  def backward(self, node: Node, live: "Liveness") -> None:
    """Asks for what is needed of the operands."""

  def costs(self, node: Node, live: "Liveness", meter: Meter) -> Iterator[Cost]:
    """What it costs."""

  def execute(self, run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
    """Its results, and the entries that they hold."""

  def links(self, node: Node, live: "Liveness") -> list[Link]:
    """The programs that it runs, and how their values are tied to its own."""


STRUCTURED: dict[str, Structured] = {}


def costs_of(program: Program, live: "Liveness", meter: Meter) -> Iterator[Cost]:
  """What the nodes of a program cost where they run; nothing where results depend on the variables alone."""
  for node in program.nodes:
    if not any(out in live.asked and live.infos[out].varies for out in node.outs):
      continue
    if node in live.subs:
      yield from STRUCTURED[node.name].costs(node, live, meter)
    elif (terms := meter(node, live)) is None:
      yield Cost(node, node.name, Term(0, ()), counted=False)
    else:
      yield from (Cost(node, node.name, term.under(live.when(node, term.sets))) for term in terms)


def links(node: Node, live: "Liveness") -> list[Link]:
  """How the programs that a node runs are tied to it; none if it runs none."""
  return STRUCTURED[node.name].links(node, live) if node in live.subs else []
