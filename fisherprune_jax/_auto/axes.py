"""Ties the axes of a program that share a factor of a ``Spec``, and finds the sums over factors.

Values of sub-programs are tied to those of their node (``structured.links``). Axes of arguments and outputs, and axes
that a primitive needs whole in an operand, are blocked. Axes that are whole in a result alone, as random bits are, can
be sliced. Data ties only data: computations with variables take slices of it (``data.py``).
"""

import itertools
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

ITERATIONS = "the iterations of a loop"
KERNEL = "it is the size of a kernel"
OUTPUT = "it reaches an output"


class Reader(NamedTuple):
  """A node that sums over a factor.

  Attributes:
    node: the node.
    atom: the atom of the factor.
    places: the operands and axes for its mask, the best first.
    picker: the operand that picks rows of the only place, if that is a table.
  """

  node: Node
  atom: Atom
  places: list[tuple[int, int]]
  picker: int | None = None


class Body(NamedTuple):
  """A program that a node runs, and the loops around it, as far as arrays have an entry per iteration."""

  program: Program
  iterations: tuple[Atom, ...]


@dataclass(eq=False)
class Axes:
  """The atoms of all axes in a program and its sub-programs.

  Attributes:
    live: the forward analysis.
    made: arrays that depend on a variable; the others are data.
    readers: the sums over atoms.
    produced: atoms that variables bring into an array that depends on the arguments, with these variables.
    bodies: the sub-programs.
    learned: arrays that depend on variables but not on arguments, with these variables.
    rows: whether rows of tables, which are read by number, may be masked.
    iterations: for a loop that reads or writes an entry of an array per iteration, the atom of its iterations.
  """

  live: Liveness
  made: set[Value]
  rows: bool = False
  atoms: dict[Value, tuple[Atom, ...]] = field(default_factory=dict)
  learned: dict[Value, tuple[Value, ...]] = field(default_factory=dict)
  readers: list[Reader] = field(default_factory=list)
  produced: list[tuple[Atom, tuple[Value, ...]]] = field(default_factory=list)
  bodies: list[Body] = field(default_factory=list)
  iterations: dict[Node, Atom] = field(default_factory=dict)
  _operands: dict[tuple[Node, int], tuple[Atom, ...]] = field(default_factory=dict)
  _slices: list[tuple[Atom, Atom]] = field(default_factory=list)

  def of(self, value: Value) -> tuple[Atom, ...]:
    if value not in self.atoms:
      self.atoms[value] = tuple(map(Atom, value.shape))
    return self.atoms[value]

  def operand(self, node: Node, at: int) -> tuple[Atom, ...]:
    """The atoms of an operand, as its node reads it: data is sliced."""
    value = node.ins[at]
    if value in self.made or not self._computes(node):
      return self.of(value)
    if (node, at) not in self._operands:
      self._operands[node, at] = self._slice(value)
    return self._operands[node, at]

  def hand_on(self, examples: Atom, arguments: Sequence[Value]) -> None:
    """Mark example axes and axes of arguments in all slices of data; after ``walk``."""
    given = {leaf for value in arguments for atom in self.of(value) for leaf in leaves(atom)}
    rows = set(leaves(examples))
    for use, atom in self._slices:
      hand_on(use, atom, rows, given)

  def varies(self, value: Value) -> bool:
    return self.live.info(value).varies

  def walk(self, program: Program, iterations: tuple[Atom, ...] = ()) -> None:
    """Tie the axes of a program that runs in each iteration of some loops."""
    self.bodies.append(Body(program, iterations))
    for node in used(program):
      self._learn(node.ins, node.outs)
      if node in self.live.specs:
        self._node(node, self.live.specs[node])
      found = links(node, self.live)
      if found:
        self._links(node, found, iterations)

  def block_all(self, values: Iterable[Value], why: str) -> None:
    for value in values:
      if value.literal is None:
        for atom in self.of(value):
          block(atom, why)

  def _computes(self, node: Node) -> bool:
    return not self.made.isdisjoint(node.outs)

  def _slice(self, value: Value) -> tuple[Atom, ...]:
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
    # Ordered, so that group names are the same in all processes.
    given = dict.fromkeys(name for axes in spec.ins for axis in axes for name in factors_of(axis))
    made = {name for axes in spec.outs for axis in axes for name in factors_of(axis)}
    for name in (name for name in given if name in spec.whole):
      block(factors[name], f"{_reason(node, spec, name)}, at {node.source}")
    for name in (name for name in given if name not in spec.whole):
      if name == spec.indexed:
        self._look_up(node, spec, name, factors[name])
      elif name not in made:
        self._sum(node, spec, name, factors[name])
      elif any(map(self.varies, node.outs)):
        self.produced.append((factors[name], self._brought(node, spec, name)))

  def _learn(self, ins: Sequence[Value], outs: Sequence[Value]) -> None:
    """Note which results depend on variables alone."""
    variables = self._of_variables(ins)
    if variables:
      self.learned.update((out, variables) for out in outs if not self.varies(out))

  def _of_variables(self, values: Iterable[Value]) -> tuple[Value, ...]:
    """All variables of some arrays, in order."""
    found = [self.learned[value] for value in dict.fromkeys(values) if value in self.learned]
    return found[0] if len(found) == 1 else tuple(dict.fromkeys(itertools.chain(*found)))

  def _brought(self, node: Node, spec: Spec, name: Factor) -> tuple[Value, ...]:
    """The variables of operands with a factor."""
    operands = zip(node.ins, spec.ins, strict=True)
    return self._of_variables(
      value for value, axes in operands if any(name in factors_of(axis) for axis in axes)
    )

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

  def _look_up(self, node: Node, spec: Spec, name: Factor, atom: Atom) -> None:
    """Rows of a variable that are read by number can be masked; those of other arrays cannot."""
    table = node.ins[0]
    if not self.rows or table not in self.learned or self.varies(table) or not _is_float(table):
      block(atom, f"{spec.opaque}, at {node.source}")
      return
    self.readers.append(Reader(node, atom, [(0, spec.ins[0].index(name))], picker=1))
    if self.varies(node.outs[0]):
      self.produced.append((atom, self.learned[table]))

  def _links(self, node: Node, found: Sequence[Link], outer_iterations: tuple[Atom, ...]) -> None:
    iterations: Atom | None = None
    for link in found:
      for outer, inner in (*link.ins, *link.outs, *link.iterations):
        iterations = self._tie_values(outer, inner, iterations)
      self.learned.update((inner, self.learned[outer]) for outer, inner in link.ins if outer in self.learned)
    if iterations is not None:
      self.iterations[node] = iterations
      block(iterations, ITERATIONS)
    ruled = isinstance(STRUCTURED[node.name], Custom)
    for link in found:
      start = len(self.readers)
      self.walk(link.program, outer_iterations if iterations is None else (*outer_iterations, iterations))
      if ruled:
        self._inside_rule(node, link, start)
      for outer, inner in link.outs:
        self._learn([inner], [outer])

  def _tie_values(self, outer: Value, inner: Value, iterations: Atom | None) -> Atom | None:
    """Tie an array to one inside; if it has an entry per iteration, its first axis is that of the iterations."""
    if outer.literal is not None or inner.literal is not None:
      return iterations
    data = outer not in self.made
    apart = data != (inner not in self.made)  # one is a slice of the other
    axes = self._slice(outer) if data and apart else self.of(outer)
    own = self._slice(inner) if apart and not data else self.of(inner)
    more = len(axes) - len(own)
    for atom in (self._slice(outer) if data else axes)[:more]:
      iterations = iterations or Atom(atom.size)
      tie(atom, iterations)
    for one, other in zip(axes[more:], own, strict=True):
      tie(one, other)
    return iterations

  def _inside_rule(self, node: Node, link: Link, start: int) -> None:
    """Mask sums inside of a function with a derivative rule where it is called, if they read its operands."""
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
        continue  # zero where the result is not read: masks after the call ensure that
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
        block(reader.atom, f"{reader.node.name} sums over it under its own derivative rule, at {node.source}")

  def _can_be_masked(self, value: Value) -> bool:
    return value.literal is None and self.varies(value) and _is_float(value)


def _reason(node: Node, spec: Spec, name: Factor) -> str:
  if node.name == "conv_general_dilated" and any(name in factors_of(axis) for axis in spec.ins[1]):
    return KERNEL
  return spec.opaque or f"{node.name} works along it"


def _is_float(value: Value) -> bool:
  return bool(jnp.issubdtype(value.aval.dtype, jnp.inexact))


def _vanishing(program: Program, cotangents: Sequence[Value], live: Liveness) -> set[Value]:
  """The values that are zero wherever cotangents are."""
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
  """The nodes that an output depends on; the others tie nothing."""
  wanted, found = set(program.outputs), []
  for node in reversed(program.nodes):
    if node.acts or any(out in wanted for out in node.outs):
      wanted.update(node.ins)
      found.append(node)
  return found[::-1]


def _origin(value: Value, program: Program, live: Liveness) -> Value:
  """The value before it was moved."""
  makers = {out: node for node in program.nodes for out in node.outs}
  while value in makers and makers[value] in live.specs and live.specs[makers[value]].moves:
    value = makers[value].ins[0]
  return value
