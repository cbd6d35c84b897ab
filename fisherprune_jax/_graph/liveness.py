"""Which entries of every array in a program can matter: two passes, one forward and one backward.

Forward, *can be non-zero*: masks are inputs with known zeros, and every primitive's ``Spec`` says what its
zeros come to. Backward, *is asked for*. What is stored of an array is the intersection of both, one set per
axis. An entry that is not stored is zero, or nobody asks for it; so showing it as zero is always right, and
that is all that execution relies on.
"""

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from fisherprune_jax._graph import flops, signs, together
from fisherprune_jax._graph.facts import (
  Box,
  Factors,
  Info,
  box_of,
  constant,
  empty_box,
  join,
  join_merged,
  meet,
  needed,
  results,
  whole_box,
)
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.spec import Spec
from fisherprune_jax._graph.together import Together

Rules = Callable[[Node, Sequence[Info]], Spec]


class MaskPolicy(enum.Enum):
  """What becomes of masks in the compact program."""

  DROP = "drop"
  """Nothing is multiplied by them: they are one on all that is left."""
  MULTIPLY = "multiply"
  """Multiplied, by the masks that the program was made with: some dead features stay."""
  KEEP = "keep"
  """Multiplied, by masks among the variables: pruning can go on."""

  @property
  def multiplies(self) -> bool:
    """Whether the program multiplies by masks."""
    return self is not MaskPolicy.DROP


class Cost(NamedTuple):
  """What one node costs; ``node`` says where it is, ``label`` what it is called in a breakdown.

  Where nobody knows what it costs, ``counted`` is False, and the term is zero.
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

  def __call__(self, node: Node, live: "Liveness") -> Iterable[flops.Term] | None:
    """What a node that runs no program costs; None where nobody knows."""

  def of_scalar(self, primitive: str) -> Iterable[flops.Term]:
    """What a primitive costs on one number, which the compact program has beside those that were traced."""


class Structured(Protocol):
  """A primitive that runs programs: calls, conditionals, loops."""

  def forward(self, node: Node, infos: Sequence[Info], live: "Liveness") -> list[Info] | None:
    """What is known of the results; None where the primitive has to be kept whole."""

  def backward(self, node: Node, live: "Liveness") -> None:
    """Asks for what is needed of the operands."""

  def costs(self, node: Node, live: "Liveness", meter: "Meter") -> Iterator[Cost]:
    """What it costs."""

  def execute(self, run: Any, node: Node, arrays: Any) -> tuple[Sequence[Any], Sequence[Box]]:
    """Its results, and the entries that they hold."""

  def links(self, node: Node, live: "Liveness") -> list[Link]:
    """The programs that it runs, and how their values are tied to its own."""


STRUCTURED: dict[str, Structured] = {}


@dataclass
class Liveness:
  """The facts found about one program, and about the programs that it runs (``subs``).

  ``signed`` are the values of which the sign of a zero shows in some result: they are computed as they were.
  """

  rules: Rules
  policy: MaskPolicy = MaskPolicy.DROP
  signed: AbstractSet[Value] = frozenset()
  infos: dict[Value, Info] = field(default_factory=dict)
  asked: dict[Value, Box] = field(default_factory=dict)
  specs: dict[Node, Spec] = field(default_factory=dict)
  factors: dict[Node, Factors] = field(default_factory=dict)
  subs: dict[Node, list[Program]] = field(default_factory=dict)
  asked_together: dict[Value, Together] = field(default_factory=dict)
  asked_rows: dict[Value, dict[int, Box]] = field(default_factory=dict)
  asked_whole: set[Value] = field(default_factory=set)

  def forward(self, program: Program, inputs: Sequence[Info]) -> list[Info]:
    """Finds what is known of every value of a program; returns it for the outputs."""
    self.infos.update(zip(program.inputs, inputs, strict=True))
    self.infos.update((value, constant(const, value.shape)) for value, const in program.consts)
    for node in program.nodes:
      infos = [self.info(value) for value in node.ins]
      handler = STRUCTURED.get(node.name)
      outs = handler.forward(node, infos, self) if handler else None
      if outs is None:
        self.subs.pop(node, None)
        spec = self.specs[node] = self.spec(node, infos)
        outs = results(node, spec, infos)
      self.infos.update(zip(node.outs, outs, strict=True))
    return [self.info(value) for value in program.outputs]

  def spec(self, node: Node, infos: Sequence[Info]) -> Spec:
    """How a node relates axes, by the rules; its zeros as they were where their sign shows."""
    spec = self.rules(node, infos)
    if not any(out in self.signed for out in node.outs):
      return spec
    reason = spec.opaque or f"{node.name}, the sign of whose zeros shows in a result"
    return replace(spec, alive=frozenset(spec.sizes), kills=frozenset(), same_as=None, opaque=reason)

  def programs(self, node: Node, *builders: Callable[[], Program]) -> list[Program]:
    """The programs that a node runs, built when they are first asked for."""
    if len(self.subs.get(node, [])) != len(builders):
      self.subs[node] = [build() for build in builders]
    return self.subs[node]

  def backward(
    self, program: Program, asked: Sequence[Box | None], merged: Sequence[Together] | None = None
  ) -> None:
    """Asks for the outputs (of several axes merged, too), and for everything that they need in turn."""
    merged = merged or [{}] * len(asked)
    for value, box, axes in zip(program.outputs, asked, merged, strict=True):
      if box is not None:
        self.ask(value, box, axes)
    for node in reversed(program.nodes):
      if not self.runs(node):
        continue
      if node in self.subs:
        STRUCTURED[node.name].backward(node, self)
      else:
        self.backward_spec(node)

  def backward_spec(self, node: Node) -> None:
    """Asks for what a node needs of its operands, by how it relates axes."""
    spec = self.specs[node]
    factors = needed(
      node, spec, lambda v: self.info(v).box, lambda v: self.stored(v) if v in self.asked else None
    )
    self.factors[node] = factors
    results = [
      (axes, self.stored(out), self.asked_together.get(out, {}))
      for out, axes in zip(node.outs, spec.outs, strict=True)
      if out in self.asked
    ]
    tied = together.backward(spec, results, factors)
    for operand, (value, axes) in enumerate(zip(node.ins, spec.ins, strict=True)):
      if spec.same_as in (None, operand) or self.policy.multiplies:
        self.ask(value, *together.laid(spec, tied, axes, box_of(axes, factors, value.shape)))

  def boxes(self, values: Sequence[Value]) -> list[Box | None]:
    """What is stored of arrays; None of those that nobody asks for."""
    return [self.stored(value) if value in self.asked else None for value in values]

  def merged(self, values: Sequence[Value]) -> list[Together]:
    """What is asked of several axes of these arrays merged."""
    return [self.asked_together.get(value, {}) for value in values]

  def pass_on(self, values: Sequence[Value], inputs: Sequence[Value]) -> None:
    """Asks of some operands what a program asks of the inputs that they are."""
    for value, inner in zip(values, inputs, strict=False):
      if inner in self.asked:
        self.ask(value, self.stored(inner), self.asked_together[inner])

  def runs(self, node: Node) -> bool:
    """Whether a node has to run: somebody asks for a result, or it acts on the world outside."""
    return node.acts or any(out in self.asked for out in node.outs)

  def info(self, value: Value) -> Info:
    """What is known of a value."""
    return self.infos[value] if value.literal is None else constant(value.literal, value.shape)

  def stored(self, value: Value) -> Box:
    """Per axis, the entries of an array that are kept."""
    box = self.info(value).box
    if value.literal is not None:
      return box
    return meet(box, self.asked[value]) if value in self.asked else empty_box(value.shape)

  def ask(self, value: Value, box: Box, merged: Together = MappingProxyType({})) -> None:
    """Adds to what is asked of an array, and of several of its axes merged."""
    self.asked_whole.add(value)
    self._add(value, box, merged)

  def ask_row(self, value: Value, row: int, box: Box) -> None:
    """Adds to what is asked of one entry along the leading axis of an array."""
    rows = self.asked_rows.setdefault(value, {})
    rows[row] = join(rows[row], box) if row in rows else box
    self._add(value, (*whole_box(value.shape[:1]), *box))

  def _add(self, value: Value, box: Box, merged: Together = MappingProxyType({})) -> None:
    if value.literal is not None:
      return
    if value not in self.asked:
      self.asked[value], self.asked_together[value] = box, merged
      return
    before = self.asked[value], self.asked_together[value]
    self.asked[value], self.asked_together[value] = join_merged(before, (box, merged))

  def rows(self, value: Value) -> list[Box] | None:
    """What is stored of each entry along the leading axis, if entries are all that anybody asks for."""
    if value not in self.asked_rows or value in self.asked_whole:
      return None
    info, asked = self.infos[value], self.asked_rows[value]
    boxes = [info.box[1:] if info.rows is None else info.rows[row].box for row in range(value.shape[0])]
    return [
      meet(box, asked[row]) if row in asked else empty_box(value.shape[1:]) for row, box in enumerate(boxes)
    ]

  def costs(self, program: Program, meter: "Meter") -> Iterator[Cost]:
    """What the nodes of a program cost; nothing where results depend on the variables alone."""
    for node in program.nodes:
      if not any(out in self.asked and self.infos[out].varies for out in node.outs):
        continue
      if node in self.subs:
        yield from STRUCTURED[node.name].costs(node, self, meter)
      elif (terms := meter(node, self)) is None:
        yield Cost(node, node.name, flops.Term(0, ()), counted=False)
      else:
        yield from (Cost(node, node.name, term) for term in terms)


def analyse(
  program: Program,
  inputs: Sequence[Info],
  asked: Sequence[Box | None],
  rules: Rules,
  policy: MaskPolicy = MaskPolicy.DROP,
  subs: dict[Node, list[Program]] | None = None,
) -> Liveness:
  """Runs both passes.

  Args:
    program: what to analyse.
    inputs: what is known of each input.
    asked: what is asked of each output; None if nothing is.
    rules: ``rules(node, infos)`` gives the ``Spec`` of a node that runs no program.
    policy: what becomes of masks.
    subs: the programs that nodes run, where another analysis has built them: then both speak of the same values.
  """
  live = Liveness(rules, policy, subs=dict(subs or {}))
  live.forward(program, inputs)
  live.signed = signs.shown(program, live.specs, lambda node: links(node, live))
  if live.signed:
    live.forward(program, inputs)
  live.backward(program, asked)
  return live


def links(node: Node, live: Liveness) -> list[Link]:
  """How the programs that a node runs are tied to it; none if it runs none."""
  return STRUCTURED[node.name].links(node, live) if node in live.subs else []
