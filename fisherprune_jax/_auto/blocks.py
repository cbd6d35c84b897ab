"""Residual branches: sums ``x + f(x)`` of which ``f(x)`` can go as a whole.

The *stream* of an array is what it is the sum of, moved or cast: of ``x + f(x)``, itself, ``x`` and ``f(x)``. A term of a
sum is a branch of the other one if it is computed from that one's stream, by variables of its own. Branches of the same
variables, as where layers are shared, are one block.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fisherprune_jax._auto.atoms import Atom
from fisherprune_jax._auto.axes import Axes
from fisherprune_jax._graph.program import Node, Program, Value

SUMS = ("add", "add_any")


class Branch(NamedTuple):
  """A term of a sum that goes as a whole.

  Attributes:
    node: the sum.
    operand: which of its terms.
    turns: the turns of loops that it has a row for.
    variables: what it alone is made of.
  """

  node: Node
  operand: int
  turns: tuple[Atom, ...]
  variables: frozenset[Value]


def branches(axes: Axes) -> list[Branch]:
  """All residual branches of a program, and of those that it runs."""
  return [branch for body in axes.bodies for branch in _of_program(axes, body.program, body.turns)]


def _of_program(axes: Axes, program: Program, turns: tuple[Atom, ...]) -> Iterator[Branch]:
  makers = {out: node for node in program.nodes for out in node.outs}
  before = _Ancestors(program)
  for node in program.nodes:
    if node.name not in SUMS or not all(_is_term(axes, value, node) for value in node.ins):
      continue
    for operand in (1, 0):
      branch, trunk = node.ins[operand], node.ins[1 - operand]
      if not any(before.has(branch, value) for value in _stream(trunk, makers, axes)):
        continue
      own = before.of(branch) & ~before.of(trunk)
      variables = frozenset(axes.learned[value] for value in before.values(own) if value in axes.learned)
      if variables:
        rows = {atom.root() for variable in variables for atom in axes.of(variable)}
        yield Branch(node, operand, tuple(turn.root() for turn in turns if turn.root() in rows), variables)
      break


def _is_term(axes: Axes, value: Value, node: Node) -> bool:
  return value.literal is None and axes.varies(value) and value.shape == node.outs[0].shape


def _stream(value: Value, makers: dict[Value, Node], axes: Axes) -> Iterator[Value]:
  """An array, and the terms that it is the sum of."""
  waiting, seen = [value], set()
  while waiting:
    value = waiting.pop()
    if value in seen or value.literal is not None or not axes.varies(value):
      continue
    seen.add(value)
    yield value
    node = makers.get(value)
    if node is not None and (node.name in SUMS or (node in axes.live.specs and axes.live.specs[node].moves)):
      waiting += node.ins if node.name in SUMS else node.ins[:1]


class _Ancestors:
  """What each array of a program is computed from, as sets of bits."""

  def __init__(self, program: Program) -> None:
    self._all = [*program.inputs, *(value for value, _ in program.consts)]
    self._all += [out for node in program.nodes for out in node.outs]
    self._bit = {value: 1 << at for at, value in enumerate(self._all)}
    self._sets = dict(self._bit)
    for node in program.nodes:
      together = functools.reduce(int.__or__, map(self.of, node.ins), 0)
      self._sets.update((out, together | self._bit[out]) for out in node.outs)

  def of(self, value: Value) -> int:
    """An array and all that it is computed from."""
    return self._sets.get(value, 0)

  def has(self, value: Value, other: Value) -> bool:
    """Whether an array is computed from another one."""
    return value is not other and bool(self.of(value) & self._bit[other])

  def values(self, bits: int) -> Iterable[Value]:
    """The arrays of a set."""
    while bits:
      lowest = bits & -bits
      yield self._all[lowest.bit_length() - 1]
      bits ^= lowest
