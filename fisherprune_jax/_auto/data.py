"""Data: arrays that depend on no variable, such as arguments, tables of positions and constants.

Data ties nothing: computations with variables read slices of it, with new atoms. All slices share example axes and axes
of arguments.
"""

from collections.abc import Iterable

from fisherprune_jax._auto.atoms import Atom, block, cut, leaves, tie
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Program, Value
from fisherprune_jax._graph.structured import Link, links

ARGUMENT = "it reaches an argument"


def made_of(program: Program, variables: Iterable[Value], live: Liveness) -> set[Value]:
  """All arrays that depend on ``variables``, also inside of loops and calls; the others are data."""
  found = set(variables)
  _spread(program, found, live)
  return found


def _spread(program: Program, found: set[Value], live: Liveness) -> None:
  for node in program.nodes:
    inside = links(node, live)
    for link in inside:
      _spread_inside(link, found, live)
    if not inside and not found.isdisjoint(node.ins):
      found.update(node.outs)


def _spread_inside(link: Link, found: set[Value], live: Liveness) -> None:
  given = {inner for _, inner in link.ins}
  found.update(inner for outer, inner in link.ins if outer in found)
  found.update(value for value in link.program.inputs if value not in given)  # cotangents depend on anything
  _spread(link.program, found, live)
  while more := {inner for inner, out in link.iterations if out in found and inner not in found}:
    found.update(more)
    _spread(link.program, found, live)
  found.update(outer for outer, inner in link.outs if inner in found)


def hand_on(use: Atom, atom: Atom, examples: set[Atom], arguments: set[Atom]) -> None:
  """Mark ``examples`` and axes of ``arguments`` in a slice of data, from the atom of the data to ``use``."""
  parts = leaves(atom)
  if arguments.issuperset(parts) and examples.isdisjoint(parts):
    block(use, ARGUMENT)
  elif not (arguments | examples).isdisjoint(parts):
    tie(use, _copy(atom, examples, arguments))


def _copy(atom: Atom, examples: set[Atom], arguments: set[Atom]) -> Atom:
  """An atom cut alike, with the same example leaves and new others."""
  atom = atom.root()
  if atom in examples:
    return atom
  copy = Atom(atom.size, ARGUMENT if atom in arguments else "")
  if atom.kind:
    cut(copy, atom.kind, [_copy(part, examples, arguments) for part in atom.parts])
  return copy
