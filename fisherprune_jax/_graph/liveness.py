"""Which entries of every array in a program can matter: two passes, one forward and one backward.

Forward, *can be non-zero*: masks are inputs with known zeros, and every primitive's ``Spec`` says what its
zeros come to. Backward, *is asked for*. What is stored of an array is the intersection of both, one set per
axis. An entry that is not stored is zero, or nobody asks for it; so showing it as zero is always right, and
that is all that execution relies on.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fisherprune_jax._graph import signs, together
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
from fisherprune_jax._graph.policy import MaskPolicy
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.spec import Spec
from fisherprune_jax._graph.structured import STRUCTURED, links
from fisherprune_jax._graph.together import Together

Rules = Callable[[Node, Sequence[Info]], Spec]


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
  asked_layers: dict[Value, dict[int, Box]] = field(default_factory=dict)
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
      node, spec, lambda v: self.info(v).possible, lambda v: self.stored(v) if v in self.asked else None
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
    box = self.info(value).possible
    if value.literal is not None:
      return box
    return meet(box, self.asked[value]) if value in self.asked else empty_box(value.shape)

  def ask(self, value: Value, box: Box, merged: Together = MappingProxyType({})) -> None:
    """Adds to what is asked of an array, and of several of its axes merged."""
    self.asked_whole.add(value)
    self._add(value, box, merged)

  def ask_layer(self, value: Value, layer: int, box: Box) -> None:
    """Adds to what is asked of one entry along the leading axis of an array."""
    layers = self.asked_layers.setdefault(value, {})
    layers[layer] = join(layers[layer], box) if layer in layers else box
    self._add(value, (*whole_box(value.shape[:1]), *box))

  def _add(self, value: Value, box: Box, merged: Together = MappingProxyType({})) -> None:
    if value.literal is not None:
      return
    if value not in self.asked:
      self.asked[value], self.asked_together[value] = box, merged
      return
    before = self.asked[value], self.asked_together[value]
    self.asked[value], self.asked_together[value] = join_merged(before, (box, merged))

  def layers(self, value: Value) -> list[Box] | None:
    """What is stored of each entry along the leading axis, if entries are all that anybody asks for."""
    if value not in self.asked_layers or value in self.asked_whole:
      return None
    info, asked = self.infos[value], self.asked_layers[value]
    boxes = [
      info.possible[1:] if info.layers is None else info.layers[layer].possible
      for layer in range(value.shape[0])
    ]
    return [
      meet(box, asked[layer]) if layer in asked else empty_box(value.shape[1:])
      for layer, box in enumerate(boxes)
    ]


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
