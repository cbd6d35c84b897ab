"""The protocols of primitives that run programs, and of cost counters."""

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
  """What one node costs; the label is its name in a breakdown.

  If that is unknown, the term is zero and not counted. Terms have ``scale``, ``sets`` and ``under``, as in terms.py.
  """

  node: Node
  label: str
  term: Any
  counted: bool = True


Pairs = list[tuple[Value, Value]]


class Link(NamedTuple):
  """How the values of a program are linked to those of its node.

  Attributes:
    program: the program.
    ins: operands with their inputs.
    outs: results with their outputs.
    iterations: inputs with the outputs that become them in the next iteration.
  """

  program: Program
  ins: Pairs
  outs: Pairs
  iterations: Pairs


class Counter(Protocol):
  """A counter: what one node costs, in some unit."""

  @property
  def unit(self) -> str:
    """The unit, for tables."""

  def __call__(self, node: Node, live: "Liveness") -> Iterable[Any] | None:
    """What a node that runs no program costs when it runs; None if unknown."""

  def of_scalar(self, primitive: str) -> Iterable[Term]:
    """What a primitive costs on a number, where the compact program adds it."""


class Structured(Protocol):
  """A primitive that runs programs: call, conditional or loop."""

  def forward(self, node: Node, infos: Sequence[Info], live: "Liveness") -> list[Info] | None:
    """What is known of results; None if it must be kept whole."""

  def backward(self, node: Node, live: "Liveness") -> None:
    """Demands what is needed of operands."""

  def costs(self, node: Node, live: "Liveness", counter: Counter) -> Iterator[Cost]:
    """What it costs."""

  def execute(self, run: "Run", node: Node, arrays: "Arrays") -> tuple[Sequence[Any], Sequence[Box]]:
    """Its results, and the entries that they hold."""

  def links(self, node: Node, live: "Liveness") -> list[Link]:
    """The programs that it runs, and how their values are linked."""


STRUCTURED: dict[str, Structured] = {}


def costs_of(program: Program, live: "Liveness", counter: Counter) -> Iterator[Cost]:
  """What nodes cost when they run, without those that depend on variables alone."""
  for node in program.nodes:
    if not any(out in live.demanded and live.infos[out].varies for out in node.outs):
      continue
    if node in live.subs:
      yield from STRUCTURED[node.name].costs(node, live, counter)
    elif (terms := counter(node, live)) is None:
      yield Cost(node, node.name, Term(0, ()), counted=False)
    else:
      yield from (Cost(node, node.name, term.under(live.when(node, term.sets))) for term in terms)


def links(node: Node, live: "Liveness") -> list[Link]:
  """How the programs that a node runs are linked to it."""
  return STRUCTURED[node.name].links(node, live) if node in live.subs else []
