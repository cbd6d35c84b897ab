"""Joint sets: sets of merged axes, split into factors and put together again."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.sizes import are_static, runs
from fisherprune_jax._graph.spec import Axes, Axis, Factor, Pick, Prod, Sizes, Sum, factors_of
from fisherprune_jax._types import Size

Together = Mapping[tuple[int, ...], Set]
"""The set of some axes merged in an order."""
Tied = dict[tuple[Factor, ...], Set]
"""The same for factors."""
Singles = Mapping[Factor, Set]
"""Sets of single factors."""
LARGEST = 1 << 20
"""Joint sets with more positions are not tracked."""


def of_array(axes: Axes, box: Sequence[Set], together: Together, sizes: Sizes) -> Tied:
  found: Tied = {}
  for at, axis in enumerate(axes):
    if isinstance(axis, Prod):
      found |= _told([f for f in axis.parts if sizes[f] != 1], box[at], sizes)
  for places, s in together.items():
    for factors, one in _by_factors([(axes[at], box[at].size) for at in places], s, sizes):
      found |= _told(factors, one, sizes)
  return found


def _told(factors: Sequence[Factor], s: Set, sizes: Sizes) -> Iterator[tuple[tuple[Factor, ...], Set]]:
  """Joint sets that may imply more than one set per factor."""
  if not s.support:
    return
  for i, j in runs([part.size for part in s.factors], [sizes[f] for f in factors]):
    part, group = sets.outer(s.factors[i]), tuple(factors[j])
    if len(group) > 1 and part.support and is_followed(group, sizes):
      yield group, part


def is_followed(factors: Sequence[Factor], sizes: Sizes) -> bool:
  numbers = [sizes[f] for f in factors]
  return are_static(numbers) and math.prod(numbers) <= LARGEST


def _by_factors(
  axes: Sequence[tuple[Axis, Size]], s: Set, sizes: Sizes
) -> Iterator[tuple[tuple[Factor, ...], Set]]:
  """A joint set of axes, by their factors; one for each part of axes laid end to end."""
  shape = [n for _, n in axes]
  if not are_static(shape) or any(axis is None and n != 1 for axis, n in axes):
    return
  for choice in itertools.product(*(_parts_of(axis, n, sizes) for axis, n in axes)):
    factors = tuple(f for part in choice for f in part[0])
    full = [sizes[f] for f in factors]
    if not is_followed(factors, sizes):
      continue
    places = np.ravel_multi_index(np.ix_(*(part[1] for part in choice)), shape).reshape(-1)
    groups = _crossed([part[2] for part in choice], [part[3] for part in choice])
    yield factors, sets.any_of(sets.take(s, places), groups, math.prod(full))


def _parts_of(
  axis: Axis, n: int, sizes: Sizes
) -> list[tuple[tuple[Factor, ...], np.ndarray, np.ndarray, int]]:
  """The parts of an axis: factors, positions on the axis and on the factors, and the latter's size."""
  everywhere = np.arange(n)
  if isinstance(axis, Pick):
    return [((axis.factor,), everywhere, axis.index, sizes[axis.factor])]
  if not isinstance(axis, Sum):
    return [(factors_of(axis), everywhere, everywhere, n)]
  ends = np.cumsum([sizes[f] for f in axis.parts])
  return [
    ((f,), np.arange(end - sizes[f], end), np.arange(sizes[f]), sizes[f])
    for f, end in zip(axis.parts, ends, strict=True)
  ]


def _crossed(indices: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
  """Positions along merged axes; -1 if any is."""
  found = np.zeros(1, int)
  for index, n in zip(indices, shape, strict=True):
    a, b = found[:, None], index[None, :]
    found = np.where((a < 0) | (b < 0), -1, a * n + b).reshape(-1)
  return found


def known(factors: Sequence[Factor], tied: Tied, ones: Singles, sizes: Sizes) -> Set:
  """The set of factors merged in an order, from joint sets and single ones."""
  parts, place = [], 0
  for start, end, said in _spans(factors, tied, sizes):
    parts += [_one(f, ones, sizes) for f in factors[place:start]]
    span, place = factors[start:end], end
    held = _told_alone(said, sizes)
    rest = [sets.unsaid(_one(f, ones, sizes), held.get(f, ())) for f in span]
    parts.append(
      sets.intersection(sets.outer(rest), *(_extended(s, names, span, sizes) for names, s in said))
    )
  return sets.outer([*parts, *(_one(f, ones, sizes) for f in factors[place:])])


def _one(factor: Factor, ones: Singles, sizes: Sizes) -> Set:
  return ones[factor] if factor in ones else sets.everything(sizes[factor])


def _spans(
  factors: Sequence[Factor], tied: Tied, sizes: Sizes
) -> list[tuple[int, int, list[tuple[tuple[Factor, ...], Set]]]]:
  """The shortest spans of factors that cover joint sets: start, end, sets."""
  found: list[tuple[int, int, list[tuple[tuple[Factor, ...], Set]]]] = []
  at = {f: place for place, f in enumerate(factors)}
  held = [
    (min(at[f] for f in names), max(at[f] for f in names) + 1, [(names, s)])
    for names, s in tied.items()
    if {*names} <= at.keys()
  ]
  for start, end, said in sorted(held, key=lambda one: one[:2]):
    if not is_followed(factors[start:end], sizes):
      continue
    if found and start < found[-1][1]:
      before = found.pop()
      start, end, said = before[0], max(end, before[1]), before[2] + said
    found.append((start, end, said))
  return found


def _told_alone(tied: Sequence[tuple[tuple[Factor, ...], Set]], sizes: Sizes) -> dict[Factor, list[Set]]:
  """Factors lie within the hulls of joint sets, and of their conjuncts."""
  found: dict[Factor, list[Set]] = {}
  for names, s in tied:
    for part in dict.fromkeys((s, *sets.conjuncts(s))):
      for f, one in zip(names, sets.split(part, [sizes[f] for f in names]), strict=True):
        found.setdefault(f, []).append(one)
  return found


def _extended(s: Set, before: Sequence[Factor], after: Sequence[Factor], sizes: Sizes) -> Set:
  """A set of merged factors in another order, with others among them."""
  if tuple(before) == tuple(after):
    return s
  places = np.arange(s.size).reshape([sizes[f] for f in before])
  inside = [f for f in after if f in before]
  places = places.transpose([list(before).index(f) for f in inside])
  places = places.reshape([sizes[f] if f in before else 1 for f in after])
  return sets.take(s, np.broadcast_to(places, [sizes[f] for f in after]).reshape(-1))


def merged(axes: Sequence[Axis], tied: Tied, ones: Singles, sizes: Sizes) -> Set:
  for at, axis in enumerate(axes):
    if isinstance(axis, Sum):
      parts = [[*axes[:at], part, *axes[at + 1 :]] for part in axis.parts]
      return _end_to_end(
        [merged(part, tied, ones, sizes) for part in parts],
        [[_size(a, sizes) for a in part] for part in parts],
        at,
      )
  s = known([f for axis in axes for f in factors_of(axis)], tied, ones, sizes)
  picks = [axis.index if isinstance(axis, Pick) else np.arange(_size(axis, sizes)) for axis in axes]
  full = [math.prod(sizes[f] for f in factors_of(axis)) for axis in axes]
  filled = [
    axis.index < 0 if isinstance(axis, Pick) and axis.filled else np.zeros(index.size, bool)
    for axis, index in zip(axes, picks, strict=True)
  ]
  taken = sets.take(s, _crossed(picks, full))
  if not any(map(np.any, filled)):
    return taken
  beside = [np.where(there, -1, 0) for there in filled]
  return sets.union(taken, sets.fixed(_crossed(beside, [1] * len(beside)) < 0))


def _size(axis: Axis, sizes: Sizes) -> int:
  return axis.index.size if isinstance(axis, Pick) else math.prod(sizes[f] for f in factors_of(axis))


def _end_to_end(parts: Sequence[Set], shapes: Sequence[Sequence[int]], axis: int) -> Set:
  ends = np.cumsum([s.size for s in parts])
  places = [
    np.arange(end - s.size, end).reshape(shape) for s, end, shape in zip(parts, ends, shapes, strict=True)
  ]
  return sets.take(sets.concat(parts), np.concatenate(places, axis).reshape(-1))
