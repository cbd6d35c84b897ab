"""What is known of several axes together: a set that is no product of one set for each.

A mask over heads times depth keeps any of the merged positions. While the axis is split into heads and depth, one
set for each axis says less: that a head has anything alive, and a depth. What the merged axis said is carried beside
the boxes, by the factors that it is about, until the axes are merged again, forwards (can be non-zero) and
backwards (is asked for). It only ever adds to what the boxes say, and is dropped wherever it gets complicated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fisherprune_jax._graph import compat, sets
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.spec import Axes, Factor, Prod, Spec

Together = Mapping[tuple[int, ...], Set]
"""For some axes of an array, in an order, what is known of them merged in that order."""
Tied = dict[tuple[Factor, ...], Set]
"""The same of factors."""


def of_array(axes: Axes, box: Sequence[Set], together: Together) -> Tied:
  """What one array says of factors together."""
  found = {axis.parts: s for axis, s in zip(axes, box, strict=True) if isinstance(axis, Prod) and _tells(s)}
  for places, s in together.items():
    factors = tuple(axes[at] for at in places)
    if all(isinstance(f, str) for f in factors):
      found[factors] = s  # type: ignore[index]
  return found


def _tells(s: Set) -> bool:
  """Whether a set of merged axes may say more than one set for each."""
  return bool(s.support) and len(s.factors) == 1


def forward(spec: Spec, arrays: Sequence[tuple[Sequence[Set], Together]]) -> Tied:
  """Where the results can be non-zero, by factors together."""
  said = [of_array(axes, *array) for axes, array in zip(spec.ins, arrays, strict=True)]
  candidates = dict.fromkeys(f for at, tied in enumerate(said) if at not in spec.neutral for f in tied)
  found = {}
  for factors in candidates:
    if {*factors} & spec.whole or not _are_static(factors, spec):
      continue
    seen = {
      at: _read(factors, spec, axes, box, tied)
      for at, (axes, (box, _), tied) in enumerate(zip(spec.ins, arrays, said, strict=True))
      if at not in spec.neutral
    }
    by_one = [s for at, s in seen.items() if at in spec.kills]
    if not {*factors} & spec.alive:
      by_one.append(sets.union(*seen.values()))
    if by_one:
      found[factors] = sets.intersection(*by_one)
  return found


def _are_static(factors: Iterable[Factor], spec: Spec) -> bool:
  return all(compat.is_static_size(spec.sizes[f]) for f in factors)


def _read(factors: tuple[Factor, ...], spec: Spec, axes: Axes, box: Sequence[Set], tied: Tied) -> Set:
  """What one operand says of these factors in this order; everything if it says nothing."""
  for parts, s in tied.items():
    if sorted(parts) == sorted(factors):
      return reordered(s, parts, factors, spec.sizes)
  if all(f in axes for f in factors):
    return sets.outer([box[axes.index(f)] for f in factors])
  return sets.everything(math.prod(spec.sizes[f] for f in factors))


def backward(
  spec: Spec, results: Sequence[tuple[Axes, Sequence[Set], Together]], factors: Mapping[Factor, Set]
) -> Tied:
  """What is asked of factors together, by the only result that is asked for."""
  if len(results) != 1:
    return {}
  (result,) = results
  return {
    parts: s
    for parts, s in of_array(*result).items()
    if not {*parts} & spec.whole
    and _are_static(parts, spec)
    and s is not sets.outer([factors[f] for f in parts])
  }


def laid(
  spec: Spec, tied: Tied, axes: Axes, box: Sequence[Set]
) -> tuple[tuple[Set, ...], dict[tuple[int, ...], Set]]:
  """What factors say together, laid out on an array: on a merged axis, or on several."""
  found, together = list(box), {}
  for factors, s in tied.items():
    if all(f in axes for f in factors):
      together[tuple(axes.index(f) for f in factors)] = s
    for at, axis in enumerate(axes):
      if isinstance(axis, Prod) and sorted(axis.parts) == sorted(factors):
        found[at] = _within(reordered(s, factors, axis.parts, spec.sizes), found[at], axis, spec)
  return tuple(found), together


def _within(s: Set, box: Set, axis: Prod, spec: Spec) -> Set:
  """What is in a set of merged factors and in a product of one set for each."""
  hull = sets.outer(sets.split(s, [spec.sizes[f] for f in axis.parts]))
  return s if hull is box else sets.intersection(box, s)  # it lies within its own hull


def reordered(s: Set, before: Sequence[Factor], after: Sequence[Factor], sizes: Mapping[Factor, Any]) -> Set:
  """A set of factors merged in one order, as they are merged in another."""
  if tuple(before) == tuple(after):
    return s
  places = np.arange(s.size).reshape([sizes[f] for f in before])
  return sets.take(s, places.transpose([list(before).index(f) for f in after]).reshape(-1))


def union(
  a: tuple[Sequence[Set], Together, Set], b: tuple[Sequence[Set], Together, Set], joined: Sequence[Set]
) -> dict[tuple[int, ...], Set]:
  """What two readers ask of axes together, each under a condition, where that is less than the box of both."""
  found = {}
  for places in {**a[1], **b[1]}:
    parts = (sets.gated(_asked(box, together, places), when) for box, together, when in (a, b))
    asked = sets.union(*parts)
    if asked is not sets.outer([joined[at] for at in places]):
      found[places] = asked
  return found


def in_a_turn(tied: Together) -> dict[tuple[int, ...], Set]:
  """The same of one entry along the leading axis."""
  return {tuple(at - 1 for at in places): s for places, s in tied.items() if 0 not in places}


def in_all_turns(tied: Together) -> dict[tuple[int, ...], Set]:
  """The same of an array with one more axis in front."""
  return {tuple(at + 1 for at in places): s for places, s in tied.items()}


def _asked(box: Sequence[Set], together: Together, places: tuple[int, ...]) -> Set:
  if places in together:
    return together[places]
  return sets.outer([box[at] for at in places])
