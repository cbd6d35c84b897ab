"""Conditions: whether an array has any entries, beside its box.

A result is empty if an operand that decides it (``Roles.deciding``) is empty along any axis, or if all added operands
are. Conditions leave out what sets imply, such as an empty axis that the result has too.
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
  """Conditions on operands for a result to have entries, beyond that its axes are not empty.

  ``factors`` has the terms of summed factors, and ``held`` sets that are not empty; ``but`` leaves out an operand.
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
  """The conditions that sets are not empty, unless held ones imply them."""
  for part in (part for s in found for part in s.factors):
    if part in held or (part.is_all and part.size != 0):
      continue
    inside = sets.nonempty(part)
    if not any(h.support & part.support and sets.nonempty(h) is inside for h in held):
      yield inside


class Result(NamedTuple):
  """A demanded result: its number, what is stored, and the demand's condition."""

  number: int
  stored: Where
  demanded: Set


def of_node(
  spec: Spec,
  infos: "Sequence[Info]",
  results: Iterable[Result],
  factors: Mapping[Factor, Set],
  held: Iterable[Set] = (),
  but: int | None = None,
) -> Set:
  """The condition that a node has anything to do, beyond that held sets are not empty.

  ``factors`` has the entries that it works on; ``but`` is the operand that needs this, and knows whether it is empty.
  """
  held = [part for s in held for part in s.factors]
  found = []
  for number, stored, demanded in results:
    of_sum = [stored.when] if spec.roles.adding and but not in spec.roles.adding else []
    operands = of_operands(spec, infos, number, factors, held, but)
    found.append(sets.every(demanded, *of_sum, *inhabited(stored.box, held), *operands))
  return sets.union(*found)
