"""Axes of variables that are no group, with reasons."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from fisherprune_jax._auto.atoms import Atom, leaves
from fisherprune_jax._auto.axes import KERNEL, OUTPUT, Axes
from fisherprune_jax._auto.data import ARGUMENT
from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import Value
from fisherprune_jax._graph.spec import Pick, Sum

ALONE = "it has one entry"
WHOLE = "variables alone are summed over along it"
FOLDED = (KERNEL, ARGUMENT, OUTPUT, ALONE)
"""Beginnings of less informative reasons, in order; tables fold each into one line."""
Place = tuple[int, int, int]


class Skipped(NamedTuple):
  """An axis of a variable, or a part of it with ``size`` entries, that cannot be pruned, and why."""

  path: str
  axis: int
  size: int
  why: str


def skipped_of(
  axes: Axes,
  variables: Sequence[Value],
  names: Sequence[str],
  places: Mapping[Atom, Sequence[Place]],
  groups: AbstractSet[Atom],
  makers: AbstractSet[Atom],
  whole: Mapping[tuple[int, Atom], str],
) -> list[Skipped]:
  """All leaves that are no group, with reasons, the most informative first.

  ``makers`` are the leaves that a variable makes; ``whole`` has the line that needs all entries of a group's leaf.
  """
  used, cut = _where(axes)
  read = {leaf for reader in axes.readers for leaf in leaves(reader.atom)}
  found = set[Skipped]()
  single: dict[tuple[int, int, str], int] = defaultdict(int)
  for leaf, own in places.items():
    for at, axis, _ in own if leaf not in groups else ():
      why = _why(leaf, variables[at].shape[axis] == 1, leaf in makers, leaf in read, used, cut)
      if compat.is_static_size(leaf.size) and leaf.size == 1:
        single[at, axis, why] += 1
      else:
        found.add(Skipped(names[at], axis, leaf.size, why))
  found.update(Skipped(names[at], axis, size, why) for (at, axis, why), size in single.items())
  for leaf in groups:
    for at, axis, _ in places[leaf]:
      if (at, leaf) in whole:
        found.add(Skipped(names[at], axis, leaf.size, f"{WHOLE}, at {whole[at, leaf]}"))
  order = {name: at for at, name in enumerate(names)}
  return sorted(found, key=lambda one: (rank(one), order[one.path], one.axis, one.size, one.why))


def rank(one: Skipped) -> int:
  """The position of a reason in ``FOLDED``, from 1; 0 for others."""
  return next((at for at, start in enumerate(FOLDED, 1) if one.why.startswith(start)), 0)


def folded(skipped: Sequence[Skipped]) -> list[tuple[str, int, str]]:
  """``(where, size, why)`` of skipped axes; for reasons in ``FOLDED``, the first axis and a count."""
  rows, seen = [], set[int]()
  for one in skipped:
    kind = rank(one)
    if kind not in seen:
      more = sum(rank(other) == kind for other in skipped) - 1 if kind else 0
      rows.append((f"{one.path}, axis {one.axis}" + (f" and {more} more" if more else ""), one.size, one.why))
    if kind:
      seen.add(kind)
  return rows


def _where(axes: Axes) -> tuple[dict[Atom, str], dict[Atom, str]]:
  """For each leaf, the line of the first node that reads it, and of the first that splits its axis."""
  used, cut = dict[Atom, str](), dict[Atom, str]()
  for body in axes.bodies:
    for node in body.program.nodes:
      spec = axes.live.specs.get(node)
      cuts = spec and any(isinstance(axis, Pick | Sum) for own in (*spec.ins, *spec.outs) for axis in own)
      for value in (*node.ins, *node.outs) if spec else ():
        for leaf in (leaf for atom in axes.of(value) for leaf in leaves(atom)) if value in axes.made else ():
          used.setdefault(leaf, node.source)
          if cuts:
            cut.setdefault(leaf, node.source)
  return used, cut


def _why(
  leaf: Atom, alone: bool, made: bool, read: bool, used: Mapping[Atom, str], cut: Mapping[Atom, str]
) -> str:
  if alone:
    return ALONE
  if leaf not in used and not leaf.why:
    return "the function does not use it"
  if leaf.why:
    why = leaf.why
  elif compat.is_static_size(leaf.size) and leaf.size == 1:
    why = "single entries of it are used in different ways"
  else:
    why = "nothing that depends on the arguments sums over it" if made or not read else "no variable makes it"
  says_where = ", at " in why or why in (ARGUMENT, OUTPUT) or leaf not in used
  return why if says_where else f"{why}, at {cut.get(leaf, used[leaf])}"
