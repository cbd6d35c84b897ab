"""Residual branches: sums ``x + f(x)`` in which ``f(x)`` can be removed as a whole.

The *stream* of an array is all that it sums up, moved, cast or multiplied. For ``x + g * f(x)`` it is that sum, ``x``,
``g`` and ``f(x)``. One term of a sum or difference is a branch if it alone combines some variables with the stream of
the other term. If none is, streams also pass through projections (products with a variable), as in shortcuts; the
branch is then the term that is no projection. Branches of the same variables, as in shared layers, are one block.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fisherprune_jax._auto.atoms import Atom
from fisherprune_jax._auto.axes import Axes
from fisherprune_jax._graph.program import Node, Program, Value

SUMS = ("add", "add_any", "sub")
SCALES = ("mul", "div")
PROJECTIONS = ("dot_general", "conv_general_dilated")


class Branch(NamedTuple):
  """A term of a sum that can be removed as a whole.

  Attributes:
    node: the sum.
    operand: the position of the term.
    iterations: the loops with a row of its mask per iteration.
    variables: the variables of this term alone.
  """

  node: Node
  operand: int
  iterations: tuple[Atom, ...]
  variables: frozenset[Value]


def branches(axes: Axes) -> list[Branch]:
  """All residual branches of a program and its sub-programs."""
  return [branch for body in axes.bodies for branch in _of_program(axes, body.program, body.iterations)]


def _of_program(axes: Axes, program: Program, iterations: tuple[Atom, ...]) -> Iterator[Branch]:
  makers = {out: node for node in program.nodes for out in node.outs}
  before = _Ancestors(program)
  for node in program.nodes:
    if node.name not in SUMS or not all(_is_term(axes, value, node) for value in node.ins):
      continue
    for projected, operand in itertools.product((False, True), (1, 0)):
      branch, trunk = node.ins[operand], node.ins[1 - operand]
      own = before.of(branch) & ~before.of(trunk)
      variables = frozenset(v for value in before.values(own) for v in axes.learned.get(value, ()))
      if not variables or not _is_branch(axes, before, makers, own, branch, trunk, projected):
        continue
      rows = {atom.root() for variable in variables for atom in axes.of(variable)}
      yield Branch(
        node,
        operand,
        tuple(iteration.root() for iteration in iterations if iteration.root() in rows),
        variables,
      )
      break


def _is_term(axes: Axes, value: Value, node: Node) -> bool:
  return value.literal is None and axes.varies(value) and value.shape == node.outs[0].shape


def _is_branch(
  axes: Axes,
  before: "_Ancestors",
  makers: dict[Value, Node],
  own: int,
  branch: Value,
  trunk: Value,
  projected: bool,
) -> bool:
  """Whether variables of this term alone are combined with the stream of the other term."""
  stream = set(_stream(trunk, makers, axes, projected))
  if projected:
    stream -= set(_stream(branch, makers, axes, projected))
  shared = functools.reduce(int.__or__, map(before.bit, stream), 0)
  mine = [value for value in before.values(own) if axes.varies(value) and value in makers]
  return any(
    any(v in axes.learned and before.of(v) & own for v in makers[value].ins)
    and any(before.of(v) & shared for v in makers[value].ins if v.literal is None and axes.varies(v))
    for value in mine
  )


def _stream(value: Value, makers: dict[Value, Node], axes: Axes, projected: bool) -> Iterator[Value]:
  """An array, and its terms and factors; with ``projected``, through projections too."""
  waiting, seen = [value], set()
  while waiting:
    value = waiting.pop()
    if value in seen or value.literal is not None or not axes.varies(value):
      continue
    seen.add(value)
    yield value
    node = makers.get(value)
    if node is None:
      continue
    if node.name in (*SUMS, *SCALES):
      waiting += node.ins
    elif node in axes.live.specs and axes.live.specs[node].moves:
      waiting += node.ins[:1]
    elif projected and node.name in PROJECTIONS and any(v in axes.learned for v in node.ins):
      waiting += node.ins


class _Ancestors:
  """The arrays that each array of a program is computed from, as bit sets."""

  def __init__(self, program: Program) -> None:
    self._all = [*program.inputs, *(value for value, _ in program.consts)]
    self._all += [out for node in program.nodes for out in node.outs]
    self._bit = {value: 1 << at for at, value in enumerate(self._all)}
    self._sets = dict(self._bit)
    for node in program.nodes:
      together = functools.reduce(int.__or__, map(self.of, node.ins), 0)
      self._sets.update((out, together | self._bit[out]) for out in node.outs)

  def of(self, value: Value) -> int:
    """An array and all its ancestors."""
    return self._sets.get(value, 0)

  def bit(self, value: Value) -> int:
    return self._bit[value]

  def values(self, bits: int) -> Iterable[Value]:
    while bits:
      lowest = bits & -bits
      yield self._all[lowest.bit_length() - 1]
      bits ^= lowest
