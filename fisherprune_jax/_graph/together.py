"""Joint axes: sets of several axes that are no product of one set per axis.

A mask over heads times depth keeps any merged positions. Once the axis is split, one set per axis only tells which
heads and which depths have anything live. So the merged set is carried beside the boxes, by factors, until axes are
merged again, in both passes. It only adds to what boxes imply, and is dropped where it gets complicated.
"""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.joint import (
  LARGEST,
  Singles,
  Tied,
  Together,
  is_followed,
  known,
  merged,
  of_array,
)
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.sizes import are_static
from fisherprune_jax._graph.spec import Axes, Factor, Prod, Spec, compose, factors_of, has_others, project


def _of_each(spec: Spec, axes: Axes, box: Sequence[Set]) -> dict[Factor, Set]:
  pairs = [(axis, s) for axis, s in zip(axes, box, strict=True) if axis is not None]
  return {f: project(axis, s, f, spec.sizes) for axis, s in pairs for f in factors_of(axis)}


def forward(spec: Spec, arrays: Sequence[tuple[Sequence[Set], Together]]) -> Tied:
  """The joint sets where results may be non-zero."""
  said = [of_array(axes, *array, spec.sizes) for axes, array in zip(spec.ins, arrays, strict=True)]
  candidates = {f: None for at, tied in enumerate(said) if at not in spec.neutral for f in tied}
  loose = beside_others(spec)
  if not candidates and not loose:
    return {}
  ones = [_of_each(spec, axes, box) for axes, (box, _) in zip(spec.ins, arrays, strict=True)]
  candidates |= _laid_beside(spec, ones, loose) if loose else {}
  found = {}
  for factors in candidates:
    if {*factors} & spec.whole:
      continue
    seen = [known(factors, tied, one, spec.sizes) for tied, one in zip(said, ones, strict=True)]
    by_one = [seen[at] for at in spec.kills]
    if spec.alive.isdisjoint(factors):  # otherwise zeros of single entries become non-zero
      by_one += [
        sets.union(*(seen[at] for at in spec.roles.givers[f])) for f in factors if f in spec.roles.keeping
      ]
    if by_one:
      found[factors] = sets.intersection(*by_one)
  return found


def _laid_beside(
  spec: Spec, ones: Sequence[Singles], loose: AbstractSet[Factor]
) -> dict[tuple[Factor, ...], None]:
  """Factors along which parts laid end to end differ, each with the part."""
  shared = {f: {one[f] for one in ones if f in one} for f in spec.sizes if f not in loose}
  differing = [f for f, of_parts in shared.items() if len(of_parts) > 1]
  pairs = [(f, part) for one in ones for part in loose & one.keys() for f in differing if f in one]
  return {pair: None for pair in pairs if is_followed(pair, spec.sizes)}


def backward(
  spec: Spec,
  arrays: Sequence[tuple[Sequence[Set], Together]],
  results: Sequence[tuple[Axes, Sequence[Set], Together]],
  factors: Singles,
) -> Tied:
  """The joint demand on factors: by demanded results, and by terms of sums."""
  found = {}
  said = [of_array(*result, spec.sizes) for result in results]
  for parts in dict.fromkeys(parts for tied in said for parts in tied):
    demanded = (
      known(parts, tied, {**factors, **_of_each(spec, axes, box)}, spec.sizes)
      for tied, (axes, box, _) in zip(said, results, strict=True)
    )
    found[parts] = sets.union(*demanded)
  if len(spec.roles.summed) > 1:
    found |= _of_terms(spec, arrays)
  return {
    parts: s
    for parts, s in found.items()
    if not {*parts} & spec.whole and s is not sets.outer([factors[f] for f in parts])
  }


def _of_terms(spec: Spec, arrays: Sequence[tuple[Sequence[Set], Together]]) -> Tied:
  summed = spec.roles.summed
  said = [of_array(axes, *array, spec.sizes) for axes, array in zip(spec.ins, arrays, strict=True)]
  found = {}
  for parts in dict.fromkeys(parts for tied in said for parts in tied if summed.issuperset(parts)):
    offered = (
      known(parts, tied, _of_each(spec, axes, box), spec.sizes)
      for tied, axes, (box, _) in zip(said, spec.ins, arrays, strict=True)
    )
    terms = sets.intersection(*offered)
    found[parts] = terms if spec.weak.isdisjoint(parts) else sets.intersection(sets.weak(terms.size), terms)
  return found


def laid(
  spec: Spec, tied: Tied, axes: Axes, box: Sequence[Set], ones: Singles
) -> tuple[tuple[Set, ...], dict[tuple[int, ...], Set]]:
  """Lays joint sets of factors out on an array: on merged axes, joint axes, and each axis."""
  if not tied:
    return tuple(box), {}
  tied, ones = _projected(tied, ones, axes, spec)
  found = [compose(axis, {**ones}, s.size) for axis, s in zip(axes, box, strict=True)]
  for at, axis in enumerate(axes):
    if isinstance(axis, Prod):
      found[at] = known(axis.parts, tied, ones, spec.sizes)
  together = {}
  for places in dict.fromkeys(_places(names, axes) for names in tied):
    sizes = [box[at].size for at in places]
    if len(places) > 1 and are_static(sizes) and math.prod(sizes) <= LARGEST:
      joint = merged([axes[at] for at in places], tied, ones, spec.sizes)
      for at, one in zip(places, sets.split(joint, sizes), strict=True):
        found[at] = sets.intersection(found[at], one)
      together[places] = joint
  return tuple(found), {
    places: s for places, s in together.items() if s is not sets.outer([found[at] for at in places])
  }


def _projected(tied: Tied, ones: Singles, axes: Axes, spec: Spec) -> tuple[Tied, dict[Factor, Set]]:
  """Joint and single sets for an array's factors.

  A factor laid end to end with others, or with a filling, implies nothing for their entries.
  """
  held = {f for axis in axes for f in factors_of(axis)}
  alone = {f for axis in axes if not has_others(axis) for f in factors_of(axis)}
  loose = beside_others(spec) - alone
  left, each = Tied(), dict(ones)
  for names, s in tied.items():
    shape, inside = [spec.sizes[f] for f in names], tuple(f for f in names if f in held)
    for f, one in zip(names, sets.split(s, shape), strict=True):
      if loose.isdisjoint({*names} - {f}):
        each[f] = sets.intersection(each[f], one)
    if len(inside) == len(names):
      left[names] = s
    elif len(inside) > 1 and loose.isdisjoint({*names} - {*inside}):
      full = [n if f in held else 1 for f, n in zip(names, shape, strict=True)]
      groups = np.broadcast_to(np.arange(math.prod(full)).reshape(full), shape).reshape(-1)
      projected = sets.any_of(s, groups, math.prod(full))
      left[inside] = sets.intersection(left[inside], projected) if inside in left else projected
  return left, each


def beside_others(spec: Spec) -> frozenset[Factor]:
  """The factors that some axis has beside entries of others, or a filling."""
  all_axes = (axis for axes in (*spec.ins, *spec.outs) for axis in axes)
  return frozenset(f for axis in all_axes if has_others(axis) for f in factors_of(axis))


def _places(names: Sequence[Factor], axes: Axes) -> tuple[int, ...]:
  """The axes that hold factors; empty if some have none."""
  held = {f: at for at, axis in enumerate(axes) for f in factors_of(axis)}
  return tuple(sorted({held[f] for f in names})) if {*names} <= held.keys() else ()


def meet(a: tuple[Sequence[Set], Together], b: tuple[Sequence[Set], Together]) -> dict[tuple[int, ...], Set]:
  """The intersection of two boxes along joint axes."""
  return {
    places: sets.intersection(_demanded(*a, places), _demanded(*b, places)) for places in {**a[1], **b[1]}
  }


def union(
  a: tuple[Sequence[Set], Together, Set], b: tuple[Sequence[Set], Together, Set], joined: Sequence[Set]
) -> dict[tuple[int, ...], Set]:
  """What two readers demand of joint axes, each under a condition, if less than the joined box."""
  found = {}
  for places in {**a[1], **b[1], **_differing(a[0], b[0], joined)}:
    parts = (sets.gated(_demanded(box, together, places), when) for box, together, when in (a, b))
    demanded = sets.union(*parts)
    if demanded is not sets.outer([joined[at] for at in places]):
      found[places] = demanded
  return found


def _differing(a: Sequence[Set], b: Sequence[Set], joined: Sequence[Set]) -> dict[tuple[int, ...], None]:
  """The axes along which boxes differ, if neither contains the other."""
  places = tuple(at for at, (s, t) in enumerate(zip(a, b, strict=True)) if s is not t)
  sizes = [joined[at].size for at in places]
  held = any(all(box[at] is joined[at] for at in places) for box in (a, b))
  weak = any(box[at].is_weak for at in places for box in (a, b))
  follows = len(places) > 1 and not held and not weak and are_static(sizes) and math.prod(sizes) <= LARGEST
  return {places: None} if follows else {}


def in_an_iteration(tied: Together) -> dict[tuple[int, ...], Set]:
  return {tuple(at - 1 for at in places): s for places, s in tied.items() if 0 not in places}


def in_all_iterations(tied: Together) -> dict[tuple[int, ...], Set]:
  return {tuple(at + 1 for at in places): s for places, s in tied.items()}


def _demanded(box: Sequence[Set], together: Together, places: tuple[int, ...]) -> Set:
  if places in together:
    return together[places]
  return sets.outer([box[at] for at in places])
