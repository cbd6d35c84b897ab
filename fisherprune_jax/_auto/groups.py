"""Groups: the leaves of variables' axes that can be pruned, with their names."""

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

BLOCK, ROWS = "block", "rows"
NO_AXIS = -1
"""The axis of a variable that has none."""

Place = tuple[int, int, int]
"""A variable, an axis of it, and a leaf of that axis, by position."""


@dataclass(frozen=True)
class Group:
  """Axes of variables that shrink together.

  Attributes:
    name: the name of its mask.
    size: the number of features.
    members: ``(path, axis)`` of every variable that shrinks with it, such as ``("params/Conv_0/kernel", 3)``.
    kind: ``"features"``; ``"block"`` for a residual branch that is removed as a whole; ``"rows"`` for rows of a table that is
      read by number.
    rows: the leading axes of its mask, with one row per layer of a stack; empty without a stack.
  """

  name: str
  size: int
  members: tuple[tuple[str, int], ...]
  kind: str = "features"
  rows: tuple[int, ...] = ()


class Found(NamedTuple):
  """The groups of a form, skipped axes, and the places of each group (for a block, its variables)."""

  groups: list[Group]
  skipped: list[Skipped]
  places: list[list[Place]]


def find_blocks(form: Form, paths: Sequence[tuple[str, ...]]) -> tuple[list[Group], list[list[Place]]]:
  """The residual branches of a form, as groups of one entry with all axes of their variables."""
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
      tuple(iteration.size for iteration in branch.iterations),
    )
    for name, own, branch in zip(names, places, found.values(), strict=True)
  ]
  return groups, places


def find(form: Form, paths: Sequence[tuple[str, ...]]) -> Found:
  """The groups of a form, in the order of the program, with variables' ``paths`` for names."""
  axes, names = form.axes, ["/".join(path) for path in paths]
  places: dict[Atom, list[Place]] = {}
  for at, value in enumerate(form.variables):
    for axis, atom in enumerate(axes.of(value)):
      for part, leaf in enumerate(leaves(atom)):
        places.setdefault(leaf, []).append((at, axis, part))
  position = {value: at for at, value in enumerate(form.variables)}
  owners = {(leaf, at) for leaf, own in places.items() for at, _, _ in own}
  makers: dict[Atom, int] = {}
  for atom, variables in axes.produced:
    for leaf in leaves(atom):
      # A variable without the axis is broadcast along it, as a bias is along positions.
      own = [position[value] for value in variables if (leaf, position[value]) in owners]
      if own:
        makers.setdefault(leaf, own[0])
  read = {leaf for reader in axes.readers for leaf in leaves(reader.atom)}
  good = [leaf for leaf in makers if leaf in places and leaf in read and _is_free(leaf)]
  rows = stacks(axes)
  whole = staying(axes, form.program, form.variables)
  roles = roles_of(axes, set(good))
  tables = {leaf for reader in axes.readers if reader.picker is not None for leaf in leaves(reader.atom)}
  called: dict[Atom, str] = {}
  for mine in ([leaf for leaf in good if leaf not in tables], [leaf for leaf in good if leaf in tables]):
    made = [(makers[leaf], places[leaf]) for leaf in mine]
    called |= zip(mine, unique_names(made, paths, [roles.get(leaf, WIDTH) for leaf in mine]), strict=True)
  groups = [
    Group(
      f"{called[leaf]}.{ROWS}" if leaf in tables else called[leaf],
      leaf.size,
      tuple(dict.fromkeys((names[at], axis) for at, axis, _ in places[leaf] if (at, leaf) not in whole)),
      kind=ROWS if leaf in tables else "features",
      rows=tuple(label.size for label in rows.get(leaf, ())),
    )
    for leaf in good
  ]
  skipped = skipped_of(axes, form.variables, names, places, set(good), makers.keys(), whole)
  return Found(groups, skipped, [places[leaf] for leaf in good])


def _is_free(leaf: Atom) -> bool:
  return not leaf.why and compat.is_static_size(leaf.size) and leaf.size > 1


def stacks(axes: Axes) -> dict[Atom, tuple[Atom, ...]]:
  """For each leaf, the loops in which all its arrays are inside of an iteration, or have an entry per iteration."""
  iterations = list(dict.fromkeys(iteration.root() for body in axes.bodies for iteration in body.iterations))
  found: dict[Atom, set[Atom]] = {}
  if not iterations:
    return {}
  for program, around in axes.bodies:
    inside = {iteration.root() for iteration in around}
    for value in _values(program):
      own = [leaves(atom) for atom in axes.of(value)]
      covered = inside | {leaf for parts in own for leaf in parts if leaf in iterations}
      for parts in own:
        for leaf in parts:
          found[leaf] = found[leaf] & covered if leaf in found else covered
  return {leaf: tuple(t for t in iterations if t in covered) for leaf, covered in found.items() if covered}


def _values(program: Program) -> Iterable[Value]:
  yield from program.inputs
  yield from (value for value, _ in program.consts)
  for node in program.nodes:
    yield from node.outs
