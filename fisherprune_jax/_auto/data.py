"""Data: arrays in which no variable has a part, such as arguments, tables of positions and constants.

Data ties nothing together. Whatever computes with variables takes a slice of its own of the data that it reads, so each
use of an array has atoms of its own. Two things are still true of all slices: where the examples are, and which axes are
those of an argument.
"""

from collections.abc import Iterable

from fisherprune_jax._auto.atoms import Atom, block, cut, leaves, tie
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Program, Value
from fisherprune_jax._graph.structured import Link, links

ARGUMENT = "it reaches an argument"


def made_of(program: Program, variables: Iterable[Value], live: Liveness) -> set[Value]:
  """All arrays, also inside of loops and calls, in which one of ``variables`` has a part; the others are data."""
  found = set(variables)
  _spread(program, found, live)
  return found


def _spread(program: Program, found: set[Value], live: Liveness) -> None:
  """Adds the results of every node that has an operand among ``found``."""
  for node in program.nodes:
    inside = links(node, live)
    for link in inside:
      _spread_inside(link, found, live)
    if not inside and not found.isdisjoint(node.ins):
      found.update(node.outs)


def _spread_inside(link: Link, found: set[Value], live: Liveness) -> None:
  given = {inner for _, inner in link.ins}
  found.update(inner for outer, inner in link.ins if outer in found)
  found.update(value for value in link.program.inputs if value not in given)  # cotangents: of anything
  _spread(link.program, found, live)
  while more := {inner for inner, out in link.turns if out in found and inner not in found}:
    found.update(more)
    _spread(link.program, found, live)
  found.update(outer for outer, inner in link.outs if inner in found)


def hand_on(use: Atom, atom: Atom, examples: set[Atom], arguments: set[Atom]) -> None:
  """Says of a slice of data what is true of the data: which of its parts are examples, and which are an argument's.

  Args:
    use: what runs along an axis of the slice.
    atom: what runs along that axis of the data.
    examples: the leaves that run along examples.
    arguments: the leaves that run along axes of arguments.
  """
  parts = leaves(atom)
  if arguments.issuperset(parts) and examples.isdisjoint(parts):
    block(use, ARGUMENT)
  elif not (arguments | examples).isdisjoint(parts):
    tie(use, _copy(atom, examples, arguments))


def _copy(atom: Atom, examples: set[Atom], arguments: set[Atom]) -> Atom:
  """An atom that is cut in the same way; only the examples are the same ones."""
  atom = atom.root()
  if atom in examples:
    return atom
  copy = Atom(atom.size, ARGUMENT if atom in arguments else "")
  if atom.kind:
    cut(copy, atom.kind, [_copy(part, examples, arguments) for part in atom.parts])
  return copy
