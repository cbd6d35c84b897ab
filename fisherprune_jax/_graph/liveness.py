"""Which entries of a program can matter: a forward and a backward pass.

Forward: where arrays may be non-zero. Masks are inputs with known zeros; specs tell what becomes of zeros. Backward:
what is demanded. The *stored* entries of an array are the intersection, a set per axis. Other entries are zero or not
demanded. So showing them as zero is always right, and execution relies on nothing else.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from fisherprune_jax._graph import layered, presence, sets, signs, together
from fisherprune_jax._graph.boxes import Entries, Where, hull, join, meet, nowhere, whole_box
from fisherprune_jax._graph.facts import (
  Factors,
  Info,
  box_of,
  constant,
  demanded_of_operands,
  needed,
  results,
)
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.spec import Spec
from fisherprune_jax._graph.spelled import spell_out
from fisherprune_jax._graph.structured import STRUCTURED, links

Rules = Callable[[Node, Sequence[Info]], Spec]
Condition = Callable[..., Set]
"""``condition(held, operand)``: when a node must run, beyond that sets are not empty (``presence.of_node``)."""


@dataclass
class Liveness:
  """The facts about a program, and the programs that it runs (``subs``).

  ``signed`` are values with zeros whose sign shows; they are computed as traced. ``also`` has conditions under which
  nodes run with nothing stored of their results. ``layered`` has factors per layer, of nodes that work layer by layer.
  """

  rules: Rules
  keep_masks: bool = False
  signed: AbstractSet[Value] = frozenset()
  infos: dict[Value, Info] = field(default_factory=dict)
  demanded: dict[Value, Where] = field(default_factory=dict)
  specs: dict[Node, Spec] = field(default_factory=dict)
  factors: dict[Node, Factors] = field(default_factory=dict)
  subs: dict[Node, list[Program]] = field(default_factory=dict)
  demanded_layers: dict[Value, dict[int, Where]] = field(default_factory=dict)
  demanded_whole: set[Value] = field(default_factory=set)
  demanded_alone: dict[Value, list[tuple[int, Where]]] = field(default_factory=dict)
  layered: dict[Node, list[Factors | None]] = field(default_factory=dict)
  also: dict[Node, Set] = field(default_factory=dict)
  conditions: "dict[Node, Condition]" = field(default_factory=dict)

  def forward(self, program: Program, inputs: Sequence[Info]) -> list[Info]:
    """Finds what is known of every value, and returns it for outputs."""
    spell_out(program, inputs)
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
    """The spec by the rules; zeros of signed results stay as traced."""
    spec = self.rules(node, infos)
    if not any(out in self.signed for out in node.outs):
      return spec
    reason = spec.opaque or f"{node.name}, the sign of whose zeros shows in a result"
    return replace(spec, alive=frozenset(spec.sizes), kills=frozenset(), same_as=None, opaque=reason)

  def programs(self, node: Node, *builders: Callable[[], Program]) -> list[Program]:
    """The programs that a node runs, built on first use."""
    if len(self.subs.get(node, [])) != len(builders):
      self.subs[node] = [build() for build in builders]
    return self.subs[node]

  def backward(self, program: Program, demanded: Sequence[Entries | None]) -> None:
    """Demands the outputs, and all that they need."""
    for value, where in zip(program.outputs, demanded, strict=True):
      if where is not None:
        self.ask_entries(value, where)
    for node in reversed(program.nodes):
      if not self.runs(node):
        continue
      self.conditions.pop(node, None)  # an earlier pass of a loop may have demanded less
      if node in self.subs:
        STRUCTURED[node.name].backward(node, self)
      else:
        self.backward_spec(node)

  def backward_spec(self, node: Node) -> None:
    spec, infos = self.specs[node], [self.info(value) for value in node.ins]
    stored = self.wheres(node.outs)
    factors = self.factors[node] = needed(spec, infos, stored)
    self.conditions[node] = self._condition(node)
    self.layered.pop(node, None)
    layers = layered.axis_of(node, self)
    if layers is not None:
      self.layered[node] = layered.backward(node, self, layers)
      return
    taken = layered.taken(spec)
    for operand, value, where in self.demands(node, infos, factors, stored):
      self.ask(value, where, taken if operand == 0 else None)

  def demands(
    self, node: Node, infos: Sequence[Info], factors: Factors, stored: Sequence[Where | None]
  ) -> Iterator[tuple[int, Value, Where]]:
    """What a node demands of each operand, where results are stored and factors needed."""
    spec, when = self.specs[node], self.conditions[node]
    results = [
      (axes, where.box, where.together) for axes, where in zip(spec.outs, stored, strict=True) if where
    ]
    tied = together.backward(spec, [(info.possible, info.together) for info in infos], results, factors)
    demanded = demanded_of_operands(spec, factors, stored)
    for operand, (value, axes) in enumerate(zip(node.ins, spec.ins, strict=True)):
      if value.literal is None and (spec.same_as in (None, operand) or self.keep_masks):
        box, merged = together.laid(spec, tied, axes, box_of(axes, demanded, value.shape), demanded)
        yield operand, value, Where(box, merged, when(box, operand))

  def demanded_by(self, node: Node) -> Factors:
    return demanded_of_operands(self.specs[node], self.factors[node], self.wheres(node.outs))

  def wheres(self, values: Iterable[Value]) -> list[Where | None]:
    """What is stored of arrays; None if not demanded."""
    return [self.stored(value) if value in self.demanded else None for value in values]

  def pass_on(self, values: Sequence[Value], inputs: Sequence[Value]) -> None:
    """Demands of values what a program demands of the inputs that they become."""
    for value, inner in zip(values, inputs, strict=False):
      if inner in self.demanded:
        self.ask_entries(value, self.entries(inner))

  def runs(self, node: Node) -> bool:
    """Whether a node may have to run: a result is demanded, or it has outside effects."""
    return node.acts or node in self.also or any(out in self.demanded for out in node.outs)

  def when(self, node: Node, held: Iterable[Set] = ()) -> Set:
    """The condition that a node must run, beyond that held sets are not empty."""
    if node not in self.conditions:
      self.conditions[node] = self._condition(node)
    return self.conditions[node](held)

  def _condition(self, node: Node) -> "Condition":
    demanded = [(at, out) for at, out in enumerate(node.outs) if out in self.demanded]
    if node.acts:
      return lambda held=(), operand=None: sets.ALWAYS
    if node in self.also or node not in self.factors:
      some = sets.union(*(self.stored(out).some for _, out in demanded), self.also.get(node, sets.NEVER))
      return lambda held=(), operand=None: some
    results = [presence.Result(at, self.stored(out), self.demanded[out].when) for at, out in demanded]
    infos = [self.info(value) for value in node.ins]
    return functools.partial(presence.of_node, self.specs[node], infos, results, self.factors[node])

  def info(self, value: Value) -> Info:
    return self.infos[value] if value.literal is None else constant(value.literal, value.shape)

  def stored(self, value: Value) -> Where:
    info = self.info(value)
    if value.literal is not None:
      return info.where
    if value not in self.demanded:
      return nowhere(value.shape)
    box, merged, when = self.demanded[value]
    merged = together.meet((info.possible, info.together), (box, merged))
    return Where(meet(info.possible, box), merged, sets.every(info.when, when))

  def ask(self, value: Value, where: Where, layer: int | None = None) -> None:
    """Demands entries; if they are all of one ``layer`` of a stack, loops may still read it by layers."""
    if value.literal is not None:
      return
    if layer is None:
      self.demanded_whole.add(value)
    else:
      self.demanded_alone.setdefault(value, []).append((layer, where.in_an_iteration()))
    before = self.demanded.get(value)
    self.demanded[value] = where if before is None else join(before, where, self.infos[value].possible)

  def ask_entries(self, value: Value, entries: Entries) -> None:
    if isinstance(entries, list):
      for layer, where in enumerate(entries):
        self.ask_layer(value, layer, where)
    else:
      self.ask(value, entries)

  def ask_layer(self, value: Value, layer: int, where: Where) -> None:
    if value.literal is not None:
      return
    layers = self.demanded_layers.setdefault(value, {})
    layers[layer] = join(layers[layer], where) if layer in layers else where
    # The array gets the hull of all layers' demands; the precise ones are in layers.
    box, when = (*whole_box(value.shape[:1]), *where.box), where.when
    if value in self.demanded:
      before = self.demanded[value]
      box, when = hull(before.box, box), sets.union(before.when, when)
    self.demanded[value] = Where(box, when=when)

  def layers(self, value: Value) -> list[Where] | None:
    """What is stored of each layer, if only layers are demanded."""
    is_stack = value in self.demanded_layers and value not in self.demanded_whole
    return self.by_layer(value) if is_stack else None

  def entries(self, value: Value) -> Entries:
    """What is stored: of each layer, if only layers are demanded."""
    layers = self.layers(value)
    return self.stored(value) if layers is None else layers

  def by_layer(self, value: Value) -> list[Where]:
    """What is stored of each layer, where layers are demanded."""
    info, demanded = self.infos[value], dict(self.demanded_layers.get(value, {}))
    for layer, where in self.demanded_alone.get(value, ()):
      demanded[layer] = join(demanded[layer], where) if layer in demanded else where
    possible = [
      info.where.in_an_iteration() if info.layers is None else info.layers[layer].where
      for layer in range(value.shape[0])
    ]
    return [
      Where(meet(where.box, demanded[layer].box), when=sets.every(where.when, demanded[layer].when))
      if layer in demanded
      else nowhere(value.shape[1:])
      for layer, where in enumerate(possible)
    ]


def analyse(
  program: Program,
  inputs: Sequence[Info],
  demanded: Sequence[Entries | None],
  rules: Rules,
  keep_masks: bool = False,
  subs: dict[Node, list[Program]] | None = None,
) -> Liveness:
  """Runs both passes.

  Args:
    program: the program.
    inputs: what is known of each input.
    demanded: the demand on each output, or None.
    rules: gives specs of nodes that run no program.
    keep_masks: whether masks are multiplied; otherwise they are one on stored entries.
    subs: the programs of nodes by another analysis, so that values are the same.
  """
  live = Liveness(rules, keep_masks, subs=dict(subs or {}))
  live.forward(program, inputs)
  live.signed = signs.shown(program, live.specs, lambda node: links(node, live))
  if live.signed:
    live.forward(program, inputs)
  live.backward(program, demanded)
  return live
