"""Finds the groups of one form in another, by variables and how their axes are cut."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fisherprune_jax._auto.atoms import SUM, Atom, cut, leaves
from fisherprune_jax._auto.blocks import Branch, branches
from fisherprune_jax._auto.forms import Form
from fisherprune_jax._auto.groups import BLOCK, Group, Place, stacks
from fisherprune_jax._graph.program import Value

Tree = int | tuple[str, tuple["Tree", ...]]
"""How an axis is cut: its size, or a kind and parts."""


def tree_of(atom: Atom) -> Tree:
  """How an atom is cut.

  >>> merged = Atom(6)
  >>> cut(merged, "product", [Atom(2), Atom(3)])
  >>> tree_of(merged)
  ('product', (2, 3))
  """
  atom = atom.root()
  return (atom.kind, tuple(map(tree_of, atom.parts))) if atom.kind else atom.size


Leaves = dict[Atom, tuple[Group, tuple[Atom, ...]]]
"""For each leaf its group, and the loops whose iterations are rows of the mask."""


class Matched(NamedTuple):
  """The leaves of groups in a form, and residual branches, each with an atom of one entry (also a leaf)."""

  leaves: Leaves
  branches: list[tuple[Branch, Atom]]


def match(
  form: Form,
  values: Sequence[Value | None],
  trees: Sequence[Sequence[Tree]],
  groups: Sequence[Group],
  places: Sequence[Sequence[Place]],
) -> Matched:
  """Find groups in another function of the same variables.

  Args:
    form: the function.
    values: its variables, in the order of the first function; None for missing ones.
    trees: how the first function cuts their axes.
    groups: the groups.
    places: their places.

  Raises:
    ValueError: if the form splits a group, ties two, or does not read one.
  """
  for value, axis_trees in zip(values, trees, strict=True):
    for atom, tree in zip(form.axes.of(value) if value else (), axis_trees, strict=False):
      _cut_like(atom, tree)
  rows, found = stacks(form.axes), Matched({}, [])
  read = {leaf for reader in form.axes.readers for leaf in leaves(reader.atom)}
  for group, own in zip(groups, places, strict=True):
    if group.kind == BLOCK:
      continue
    mine = {_leaf(form, values, place, trees, group) for place in own}
    if not mine & read:
      raise _lacking(group, "The function must sum over every group, but it reads none of")
    for leaf in mine:
      iterations = rows.get(leaf, ())
      if leaf in found.leaves:
        raise _misfit(group, f"ties it to {found.leaves[leaf][0].name!r}")
      _check_rows(group, iterations)
      found.leaves[leaf] = (group, iterations)
  if any(group.kind == BLOCK for group in groups):
    _match_blocks(form, values, groups, places, found)
  return found


def _match_blocks(
  form: Form,
  values: Sequence[Value | None],
  groups: Sequence[Group],
  places: Sequence[Sequence[Place]],
  found: Matched,
) -> None:
  """Add the residual branches of a form, found by their variables.

  Variables that only one of both forms uses in a branch do not count, such as batch norm averages in serving.
  """
  there = branches(form.axes)
  blocks = [
    (group, frozenset(values[at] for at, _, _ in own))
    for group, own in zip(groups, places, strict=True)
    if group.kind == BLOCK
  ]
  of_groups = frozenset[Value | None]().union(*(variables for _, variables in blocks))
  of_form = frozenset[Value | None]().union(*(branch.variables for branch in there))
  taken: dict[int, Group] = {}
  for group, variables in blocks:
    wanted = variables & of_form
    mine = [at for at, branch in enumerate(there) if wanted and branch.variables & of_groups == wanted]
    if not mine:
      raise _lacking(
        group, "The function must have every residual branch, but it has none of the variables of"
      )
    atom = Atom(1)
    found.leaves[atom] = (group, there[mine[0]].iterations)
    for at in mine:
      if at in taken:
        raise _misfit(group, f"has the branch of {taken[at].name!r} for it, too")
      taken[at] = group
      found.branches.append((there[at], atom))
      _check_rows(group, there[at].iterations)


def _check_rows(group: Group, iterations: Sequence[Atom]) -> None:
  if tuple(iteration.size for iteration in iterations) != group.rows:
    raise _misfit(
      group, f"runs it in loops of {[t.size for t in iterations]} iterations, for rows {list(group.rows)}"
    )


def _lacking(group: Group, what: str) -> ValueError:
  return ValueError(
    f"{what} {group.name!r} ({_members(group)}). Wrap a function that runs the whole model, or leave the group out: "
    "fp.auto_mask(..., select=...)."
  )


def _leaf(
  form: Form, values: Sequence[Value | None], place: Place, trees: Sequence[Sequence[Tree]], group: Group
) -> Atom:
  at, axis, part = place
  value = values[at]
  assert value is not None
  found = leaves(form.axes.of(value)[axis])
  if [leaf.size for leaf in found] != _sizes(trees[at][axis]):
    raise _misfit(group, "splits it")
  return found[part]


def _misfit(group: Group, what: str) -> ValueError:
  return ValueError(
    f"The function must have the groups of the one that auto_mask analysed, but it {what}: {group.name!r} "
    f"({_members(group)}). Call fp.auto_mask with the form that differs, or leave the group out: select=..."
  )


def _members(group: Group) -> str:
  shown = [f"{path}, axis {axis}" for path, axis in group.members[:3]]
  return "; ".join([*shown, "..."] if len(group.members) > 3 else shown)


def _cut_like(atom: Atom, tree: Tree) -> None:
  if isinstance(tree, tuple):
    kind, trees = tree
    parts = [Atom(_size(part)) for part in trees]
    for part, inner in zip(parts, trees, strict=True):
      _cut_like(part, inner)
    cut(atom, kind, parts)


def _sizes(tree: Tree) -> list[int]:
  return [size for part in tree[1] for size in _sizes(part)] if isinstance(tree, tuple) else [tree]


def _size(tree: Tree) -> int:
  if not isinstance(tree, tuple):
    return tree
  sizes = map(_size, tree[1])
  return sum(sizes) if tree[0] == SUM else math.prod(sizes)
