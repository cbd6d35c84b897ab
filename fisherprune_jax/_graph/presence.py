"""Whether there is anything at all of an array: the conditions beside its box.

A result is nothing where an operand that it is a multiple of is (``Roles.deciding``), along whichever axis; and where all
operands are that it is a sum of. A node of whose results nothing is stored asks for nothing. What sets say themselves
is no part of a condition: an operand that has an axis of the result need not be told that it is empty.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.boxes import Where
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.spec import Factor, Spec, factors_of

if TYPE_CHECKING:
  from fisherprune_jax._graph.facts import Info


def of_operands(
  spec: Spec,
  infos: "Sequence[Info]",
  result: int,
  factors: Mapping[Factor, Set],
  held: Collection[Set] = (),
  but: int | None = None,
) -> Iterator[Set]:
  """What has to hold of the operands for a result to be anything, beyond that none of its axes is empty.

  Args:
    spec: how the node relates axes.
    infos: what is known of the operands.
    result: which one.
    factors: of those that are summed over, the terms that there are.
    held: sets that are known not to be empty.
    but: an operand of which nothing need be said.
  """
  roles = spec.roles
  told, deciding, summed = roles.told[result] - spec.whole, roles.deciding[result], roles.summed
  for k in sorted(deciding - {but}):
    yield infos[k].when
    own = told if k in spec.kills else {f for f in told if roles.givers.get(f) == (k,)}
    for axis, s in zip(spec.ins[k], infos[k].possible, strict=True):
      parts = factors_of(axis)
      if own.isdisjoint(parts) and not (parts and summed.issuperset(parts)):
        yield from inhabited([s], held)
  if summed:
    found = {f for k in deciding for axis in spec.ins[k] for f in factors_of(axis)} & summed
    yield from inhabited((factors[f] for f in spec.sizes if f in found), held)


def inhabited(found: Iterable[Set], held: Collection[Set] = ()) -> Iterator[Set]:
  """The conditions that sets are not empty, but for those that follow from ``held`` not being so."""
  for part in (part for s in found for part in s.factors):
    if part in held or (part.is_all and part.size != 0):
      continue
    inside = sets.nonempty(part)
    if not any(h.support & part.support and sets.nonempty(h) is inside for h in held):
      yield inside


class Result(NamedTuple):
  """A result that somebody asks for: which it is, what is stored of it, and the condition under which it is asked for."""

  number: int
  stored: Where
  asked: Set


def of_node(
  spec: Spec,
  infos: "Sequence[Info]",
  results: Iterable[Result],
  factors: Mapping[Factor, Set],
  held: Iterable[Set] = (),
  but: int | None = None,
) -> Set:
  """The condition that a node has anything to do, beyond that some sets are not empty.

  Args:
    spec: how it relates axes.
    infos: what is known of its operands.
    results: those that are asked for.
    factors: the entries of its factors that it works on.
    held: the sets.
    but: the operand that wants to know; whether that is anything it sees for itself.
  """
  held = [part for s in held for part in s.factors]
  found = []
  for number, stored, asked in results:
    of_sum = [stored.when] if spec.roles.adding and but not in spec.roles.adding else []
    operands = of_operands(spec, infos, number, factors, held, but)
    found.append(sets.every(asked, *of_sum, *inhabited(stored.box, held), *operands))
  return sets.union(*found)
