"""Which axes of a program are one: every ``Spec`` ties the axes that share a factor, and says what sums over what.

Where a primitive runs programs, their values are tied to its own (``structured.links``). The axes of arguments and
outputs, and what a primitive needs whole in an operand, are blocked. (What is whole in a result alone, as random bits
are, can be sliced.) Data ties only data: what computes with variables takes a slice of its own of it (``data.py``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp

from fisherprune_jax._auto.atoms import Atom, block, leaves, tie
from fisherprune_jax._auto.data import hand_on
from fisherprune_jax._auto.tying import tie_axes
from fisherprune_jax._graph.control.custom import Custom, CustomJvp
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.spec import Factor, Spec, factors_of
from fisherprune_jax._graph.structured import STRUCTURED, Link, links

TURNS = "the turns of a loop"
KERNEL = "it is the size of a kernel"
OUTPUT = "it reaches an output"


class Reader(NamedTuple):
  """A node that sums over a factor, and the places (operand, axis) where it could be masked, the best first."""

  node: Node
  atom: Atom
  places: list[tuple[int, int]]


class Body(NamedTuple):
  """A program that a node runs, and the turns of the loops that it is in, as far as arrays have an entry for each."""

  program: Program
  turns: tuple[Atom, ...]


@dataclass(eq=False)
class Axes:
  """The atoms of all axes in a program, and of the programs that it runs.

  Attributes:
    live: its forward analysis.
    made: the arrays in which a variable has a part; the others are data.
    readers: what sums over what.
    produced: atoms that a variable brings into an array that depends on the arguments, with that variable.
    bodies: the programs that it runs.
    learned: arrays that depend on variables but not on arguments, each with the first variable that it is made of.
    turns: what runs along the turns of a loop that reads or writes an entry of an array in each.
  """

  live: Liveness
  made: set[Value]
  atoms: dict[Value, tuple[Atom, ...]] = field(default_factory=dict)
  learned: dict[Value, Value] = field(default_factory=dict)
  readers: list[Reader] = field(default_factory=list)
  produced: list[tuple[Atom, Value]] = field(default_factory=list)
  bodies: list[Body] = field(default_factory=list)
  turns: dict[Node, Atom] = field(default_factory=dict)
  _operands: dict[tuple[Node, int], tuple[Atom, ...]] = field(default_factory=dict)
  _slices: list[tuple[Atom, Atom]] = field(default_factory=list)

  def of(self, value: Value) -> tuple[Atom, ...]:
    """The atoms of an array's axes."""
    if value not in self.atoms:
      self.atoms[value] = tuple(map(Atom, value.shape))
    return self.atoms[value]

  def operand(self, node: Node, at: int) -> tuple[Atom, ...]:
    """The atoms of an operand's axes, as its node reads it: of data a slice of its own."""
    value = node.ins[at]
    if value in self.made or not self._computes(node):
      return self.of(value)
    if (node, at) not in self._operands:
      self._operands[node, at] = self._slice(value)
    return self._operands[node, at]

  def hand_on(self, examples: Atom, arguments: Sequence[Value]) -> None:
    """Says of all slices of data which of their axes are examples, and which are an argument's; after ``walk``."""
    given = {leaf for value in arguments for atom in self.of(value) for leaf in leaves(atom)}
    rows = set(leaves(examples))
    for use, atom in self._slices:
      hand_on(use, atom, rows, given)

  def varies(self, value: Value) -> bool:
    """Whether an array depends on the arguments."""
    return self.live.info(value).varies

  def walk(self, program: Program, turns: tuple[Atom, ...] = ()) -> None:
    """Ties the axes of everything in a program that runs in each of ``turns``."""
    self.bodies.append(Body(program, turns))
    for node in used(program):
      self._learn(node.ins, node.outs)
      if node in self.live.specs:
        self._node(node, self.live.specs[node])
      found = links(node, self.live)
      if found:
        self._links(node, found, turns)

  def block_all(self, values: Iterable[Value], why: str) -> None:
    """Blocks every axis of arrays."""
    for value in values:
      if value.literal is None:
        for atom in self.of(value):
          block(atom, why)

  def _computes(self, node: Node) -> bool:
    """Whether a variable has a part in what a node computes."""
    return not self.made.isdisjoint(node.outs)

  def _slice(self, value: Value) -> tuple[Atom, ...]:
    """Atoms of the axes of a slice of data."""
    atoms = tuple(map(Atom, value.shape))
    self._slices += zip(atoms, self.of(value), strict=True)
    return atoms

  def _node(self, node: Node, spec: Spec) -> None:
    factors = {name: Atom(size) for name, size in spec.sizes.items()}
    for at, (value, axes) in enumerate(zip(node.ins, spec.ins, strict=True)):
      if value.literal is None:
        tie_axes(self.operand(node, at), axes, factors, node)
    for value, axes in zip(node.outs, spec.outs, strict=True):
      tie_axes(self.of(value), axes, factors, node)
    if not self._computes(node):
      return
    # In order: names of groups are the same in all processes.
    given = dict.fromkeys(name for axes in spec.ins for axis in axes for name in factors_of(axis))
    made = {name for axes in spec.outs for axis in axes for name in factors_of(axis)}
    for name in (name for name in given if name in spec.whole):
      block(factors[name], f"{_reason(node, spec, name)}, at {node.source}")
    for name in (name for name in given if name not in spec.whole):
      if name not in made:
        self._sum(node, spec, name, factors[name])
      elif any(map(self.varies, node.outs)):
        self.produced += [(factors[name], variable) for variable in self._brought(node, spec, name)]

  def _learn(self, ins: Sequence[Value], outs: Sequence[Value]) -> None:
    """Notes which results variables alone make."""
    made = [self.learned[value] for value in ins if value in self.learned]
    if made:
      self.learned.update((out, made[0]) for out in outs if not self.varies(out))

  def _brought(self, node: Node, spec: Spec, name: Factor) -> list[Value]:
    """The variables of which operands with a factor are made."""
    return [
      self.learned[value]
      for value, axes in zip(node.ins, spec.ins, strict=True)
      if value in self.learned and any(name in factors_of(axis) for axis in axes)
    ]

  def _sum(self, node: Node, spec: Spec, name: Factor, atom: Atom) -> None:
    places = [
      (operand, at)
      for operand, (value, axes) in enumerate(zip(node.ins, spec.ins, strict=True))
      if self._can_be_masked(value)
      for at, axis in enumerate(axes)
      if name in factors_of(axis)
    ]
    if places:
      self.readers.append(Reader(node, atom, places))
    elif any(map(self.varies, node.outs)):
      block(atom, f"{node.name} sums over it in nothing that could be masked, at {node.source}")

  def _links(self, node: Node, found: Sequence[Link], outer_turns: tuple[Atom, ...]) -> None:
    turns: Atom | None = None
    for link in found:
      for outer, inner in (*link.ins, *link.outs, *link.turns):
        turns = self._tie_values(outer, inner, turns)
      self.learned.update((inner, self.learned[outer]) for outer, inner in link.ins if outer in self.learned)
    if turns is not None:
      self.turns[node] = turns
      block(turns, TURNS)
    ruled = isinstance(STRUCTURED[node.name], Custom)
    for link in found:
      start = len(self.readers)
      self.walk(link.program, outer_turns if turns is None else (*outer_turns, turns))
      if ruled:
        self._inside_rule(node, link, start)
      for outer, inner in link.outs:
        self._learn([inner], [outer])

  def _tie_values(self, outer: Value, inner: Value, turns: Atom | None) -> Atom | None:
    """Ties an array to one inside; where it has one entry for each turn, its first axis is that of the turns."""
    if outer.literal is not None or inner.literal is not None:
      return turns
    data = outer not in self.made
    apart = data != (inner not in self.made)  # then the one is a slice of the other
    axes = self._slice(outer) if data and apart else self.of(outer)
    own = self._slice(inner) if apart and not data else self.of(inner)
    more = len(axes) - len(own)
    for atom in (self._slice(outer) if data else axes)[:more]:
      turns = turns or Atom(atom.size)
      tie(atom, turns)
    for one, other in zip(axes[more:], own, strict=True):
      tie(one, other)
    return turns

  def _inside_rule(self, node: Node, link: Link, start: int) -> None:
    """What a function with a derivative rule sums over is masked where it is called, if it is given it as it is."""
    inside, self.readers[start:] = self.readers[start:], []
    given = {inner: at for at, (_, inner) in enumerate(link.ins)}
    if isinstance(STRUCTURED[node.name], CustomJvp):
      floats = [at for at, value in enumerate(node.ins) if _is_float(value)]
      given |= dict(zip(link.program.inputs[len(node.ins) :], floats, strict=False))  # their tangents
      cotangents: set[Value] = set()
    else:
      cotangents = _vanishing(link.program, link.program.inputs[len(link.ins) :], self.live)
    for reader in inside:
      if any(reader.node.ins[at] in cotangents for at, _ in reader.places):
        continue  # zero where the result is not read: the masks behind the call see to that
      handed = [_origin(reader.node.ins[at], link.program, self.live) for at, _ in reader.places]
      operands = sorted({given[value] for value in handed if value in given})
      places = [
        (operand, axis)
        for operand in operands
        if self._can_be_masked(node.ins[operand])
        for axis in range(len(node.ins[operand].shape))
      ]
      if places:
        self.readers.append(Reader(node, reader.atom, places))
      else:
        block(
          reader.atom, f"{reader.node.name} sums over it under a derivative rule of its own, at {node.source}"
        )

  def _can_be_masked(self, value: Value) -> bool:
    return value.literal is None and self.varies(value) and _is_float(value)


def _reason(node: Node, spec: Spec, name: Factor) -> str:
  """Why a node needs a factor whole."""
  if node.name == "conv_general_dilated" and any(name in factors_of(axis) for axis in spec.ins[1]):
    return KERNEL
  return spec.opaque or f"{node.name} works along it"


def _is_float(value: Value) -> bool:
  return bool(jnp.issubdtype(value.aval.dtype, jnp.inexact))


def _vanishing(program: Program, cotangents: Sequence[Value], live: Liveness) -> set[Value]:
  """What is zero wherever cotangents are."""
  found = set(cotangents)
  for node in program.nodes if found else ():
    spec = live.specs.get(node)
    zero = {at for at, value in enumerate(node.ins) if value in found}
    if (
      spec
      and zero
      and (zero & spec.kills or (not spec.alive and zero | spec.neutral >= set(range(len(node.ins)))))
    ):
      found.update(node.outs)
  return found


def used(program: Program) -> list[Node]:
  """The nodes that an output hangs on; the others say nothing of what belongs together."""
  wanted, found = set(program.outputs), []
  for node in reversed(program.nodes):
    if node.acts or any(out in wanted for out in node.outs):
      wanted.update(node.ins)
      found.append(node)
  return found[::-1]


def _origin(value: Value, program: Program, live: Liveness) -> Value:
  """The value that a value is, moved."""
  makers = {out: node for node in program.nodes for out in node.outs}
  while value in makers and makers[value] in live.specs and live.specs[makers[value]].moves:
    value = makers[value].ins[0]
  return value
