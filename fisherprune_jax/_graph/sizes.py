"""Arithmetic on axis sizes, which may be symbols."""

import itertools
import operator
from collections.abc import Sequence

from fisherprune_jax._graph import compat
from fisherprune_jax._types import Size


def are_static(sizes: Sequence[Size]) -> bool:
  return all(map(compat.is_static_size, sizes))


def quotient(a: Size, b: Size) -> Size | None:
  """``a / b`` if it is whole for all values of symbols; else None.

  >>> quotient(24, 8), quotient(24, 7)
  (3, None)
  """
  try:
    found = a // b
    return found if found * b == a else None
  except (compat.UndecidedSize, ZeroDivisionError):
    return None


def runs(a: Sequence[Size], b: Sequence[Size]) -> list[tuple[slice, slice]]:
  """The shortest runs of two shapes with equal products, in order; the last takes the rest.

  >>> runs([2, 3, 4], [6, 2, 2])
  [(slice(0, 2, None), slice(0, 1, None)), (slice(2, 3, None), slice(1, 3, None))]
  """
  others = list(itertools.accumulate(b, operator.mul))
  ends = [(0, 0)]
  for i, product in enumerate(itertools.accumulate(a, operator.mul)):
    if found := [j + 1 for j in range(ends[-1][1], len(others)) if others[j] == product]:
      ends.append((i + 1, found[0]))
  ends[-1 if len(ends) > 1 else len(ends) :] = [(len(a), len(b))]
  return [(slice(i, k), slice(j, m)) for (i, j), (k, m) in itertools.pairwise(ends)]
