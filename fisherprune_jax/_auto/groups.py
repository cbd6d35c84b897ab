"""Groups: the leaves of variables' axes that can be pruned, with their names; and the same groups in another function."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fisherprune_jax._auto.atoms import Atom, leaves
from fisherprune_jax._auto.axes import Axes
from fisherprune_jax._auto.blocks import Branch, branches
from fisherprune_jax._auto.forms import Form
from fisherprune_jax._auto.naming import WIDTH, block_names, unique_names
from fisherprune_jax._auto.roles import roles_of
from fisherprune_jax._auto.skipping import Skipped, skipped_of
from fisherprune_jax._auto.staying import staying
from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import Program, Value

BLOCK = "block"
NO_AXIS = -1
"""The place of a variable that has none."""

Place = tuple[int, int, int]
"""Which variable, which of its axes, which of the leaves that this is made of."""


@dataclass(frozen=True)
class Group:
  """Axes of variables that shrink together.

  Attributes:
    name: how its mask is called.
    size: how many features it has.
    members: ``(path, axis)`` of every variable that shrinks with it, as in ``("params/Conv_0/kernel", 3)``.
    kind: ``"features"``, or ``"block"`` for a residual branch that goes as a whole.
    rows: the leading axes of its mask, one row for each layer of a stack; mostly none.
  """

  name: str
  size: int
  members: tuple[tuple[str, int], ...]
  kind: str = "features"
  rows: tuple[int, ...] = ()


class Found(NamedTuple):
  """What was found in a form: groups, what was skipped, and per group its places (of a block, its variables)."""

  groups: list[Group]
  skipped: list[Skipped]
  places: list[list[Place]]


def find_blocks(form: Form, paths: Sequence[tuple[str, ...]]) -> tuple[list[Group], list[list[Place]]]:
  """The residual branches of a form, as groups of one entry, each with all axes of its variables."""
  position = {value: at for at, value in enumerate(form.variables)}
  found: dict[frozenset[Value], Branch] = {}
  for branch in branches(form.axes):
    found.setdefault(branch.variables, branch)
  places = [
    [
      (at, axis, 0)
      for at in sorted(position[value] for value in key)
      for axis in range(len(form.variables[at].shape)) or (NO_AXIS,)
    ]
    for key in found
  ]
  by_size = [
    sorted({at for at, _, _ in own}, key=lambda at: -math.prod(form.variables[at].shape)) for own in places
  ]
  names = block_names(by_size, paths)
  groups = [
    Group(
      name,
      1,
      tuple(("/".join(paths[at]), axis) for at, axis, _ in own if axis != NO_AXIS),
      BLOCK,
      tuple(turn.size for turn in branch.turns),
    )
    for name, own, branch in zip(names, places, found.values(), strict=True)
  ]
  return groups, places


def find(form: Form, paths: Sequence[tuple[str, ...]]) -> Found:
  """The groups of a form, in the order in which it makes them.

  Args:
    form: the function.
    paths: the path of every variable.
  """
  axes, names = form.axes, ["/".join(path) for path in paths]
  places: dict[Atom, list[Place]] = {}
  for at, value in enumerate(form.variables):
    for axis, atom in enumerate(axes.of(value)):
      for part, leaf in enumerate(leaves(atom)):
        places.setdefault(leaf, []).append((at, axis, part))
  position = {value: at for at, value in enumerate(form.variables)}
  makers: dict[Atom, int] = {}
  for atom, variable in axes.produced:
    for leaf in leaves(atom):
      makers.setdefault(leaf, position[variable])
  read = {leaf for reader in axes.readers for leaf in leaves(reader.atom)}
  good = [leaf for leaf in makers if leaf in places and leaf in read and _is_free(leaf)]
  rows = stacks(axes)
  whole = staying(axes, form.program, form.variables)
  roles = roles_of(axes, set(good))
  called = unique_names(
    [(makers[leaf], places[leaf]) for leaf in good], paths, [roles.get(leaf, WIDTH) for leaf in good]
  )
  groups = [
    Group(
      name,
      leaf.size,
      tuple(dict.fromkeys((names[at], axis) for at, axis, _ in places[leaf] if (at, leaf) not in whole)),
      rows=tuple(label.size for label in rows.get(leaf, ())),
    )
    for leaf, name in zip(good, called, strict=True)
  ]
  skipped = skipped_of(axes, form.variables, names, places, set(good), makers.keys(), whole)
  return Found(groups, skipped, [places[leaf] for leaf in good])


def _is_free(leaf: Atom) -> bool:
  return not leaf.why and compat.is_static_size(leaf.size) and leaf.size > 1


def stacks(axes: Axes) -> dict[Atom, tuple[Atom, ...]]:
  """Of each leaf the turns of which every array that has it belongs to one, or has an entry for each."""
  turns = list(dict.fromkeys(turn.root() for body in axes.bodies for turn in body.turns))
  found: dict[Atom, set[Atom]] = {}
  if not turns:
    return {}
  for program, around in axes.bodies:
    inside = {turn.root() for turn in around}
    for value in _values(program):
      own = [leaves(atom) for atom in axes.of(value)]
      covered = inside | {leaf for parts in own for leaf in parts if leaf in turns}
      for parts in own:
        for leaf in parts:
          found[leaf] = found[leaf] & covered if leaf in found else covered
  return {leaf: tuple(t for t in turns if t in covered) for leaf, covered in found.items() if covered}


def _values(program: Program) -> Iterable[Value]:
  yield from program.inputs
  yield from (value for value, _ in program.consts)
  for node in program.nodes:
    yield from node.outs
