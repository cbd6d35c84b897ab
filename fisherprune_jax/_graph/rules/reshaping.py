"""``reshape``: the finest factors that both shapes are products of."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.spec import Axis, Factor, Prod, Sizes, Spec
from fisherprune_jax._types import Size


@dataclass
class _Factors:
  """Factors found so far, each listed with the axes that it is a part of."""

  ins: list[list[Factor]]
  outs: list[list[Factor]]
  sizes: Sizes = field(default_factory=dict)
  whole: set[Factor] = field(default_factory=set)

  def add(self, size: Size, i: int | None, j: int | None) -> None:
    """Adds a factor of operand axis ``i`` and result axis ``j``; one of a single side stays whole."""
    name = f"f{len(self.sizes)}"
    self.sizes[name] = size
    if i is not None:
      self.ins[i].append(name)
    if j is not None:
      self.outs[j].append(name)
    if i is None or j is None:
      self.whole.add(name)


def reshape(node: Node, infos: Sequence[Info]) -> Spec:
  """``a b c d -> a (b c) d`` and back, of axes in the order that it reads them."""
  shape = node.ins[0].shape
  order = node.params.get("dimensions") or range(len(shape))
  found = factorise([shape[axis] for axis in order], node.outs[0].shape)
  ins = dict(zip(order, map(_axis, found.ins), strict=True))
  return Spec(
    ins=(tuple(ins[axis] for axis in range(len(shape))), *((),) * (len(node.ins) - 1)),
    outs=(tuple(map(_axis, found.outs)),),
    sizes=found.sizes,
    kills=frozenset({0}),
    whole=frozenset(found.whole),
    moves=not found.whole,
    opaque="a reshape of shapes without common factors" if found.whole else "",
    bind=lambda node, arrays, sizes: [
      arrays[0].transpose(order).reshape([math.prod(sizes[f] for f in parts) for parts in found.outs])
    ],
  )


def _axis(parts: list[Factor]) -> Axis:
  if not parts:
    return None
  return parts[0] if len(parts) == 1 else Prod(tuple(parts))


def factorise(before: Sequence[Size], after: Sequence[Size]) -> _Factors:
  """The common factors of two shapes of one size, outermost first."""
  found = _Factors([[] for _ in before], [[] for _ in after])
  rows, columns = list(range(len(before))), list(range(len(after)))
  last: list[tuple[int, int]] = []
  while rows and columns and before[rows[-1]] == after[columns[-1]]:
    last.append((rows.pop(), columns.pop()))
  while rows and columns and before[rows[0]] == after[columns[0]]:
    found.add(before[rows[0]], rows.pop(0), columns.pop(0))
  rows = [i for i in rows if not _is_one(before[i])]
  columns = [j for j in columns if not _is_one(after[j])]
  _middle(found, rows, columns, before, after)
  for i, j in reversed(last):
    found.add(before[i], i, j)
  return found


def _is_one(n: Size) -> bool:
  return compat.is_static_size(n) and n == 1


def _holds_nothing(shape: Sequence[Size]) -> bool:
  """Whether a size is 0: then the others say nothing of each other."""
  return any(compat.is_static_size(n) and n == 0 for n in shape)


def _middle(
  found: _Factors, rows: list[int], columns: list[int], before: Sequence[Size], after: Sequence[Size]
) -> None:
  left, right = [before[i] for i in rows], [after[j] for j in columns]
  if _holds_nothing(before) and math.prod(left) != math.prod(right):
    _keep_whole(found, [(i, before[i]) for i in rows], [(j, after[j]) for j in columns])
  elif not left or not right:
    return  # nothing but axes of size 1
  elif len(left) == 1:
    for j in columns:
      found.add(after[j], rows[0], j)
  elif len(right) == 1:
    for i in rows:
      found.add(before[i], i, columns[0])
  elif all(map(compat.is_static_size, left + right)) and 0 not in left:
    _refine(found, rows, columns, _suffixes(left), _suffixes(right))
  else:
    _keep_whole(found, [(i, before[i]) for i in rows], [(j, after[j]) for j in columns])


def _suffixes(shape: Sequence[int]) -> list[int]:
  return [math.prod(shape[i:]) for i in range(len(shape) + 1)]


def _refine(found: _Factors, rows: list[int], columns: list[int], left: list[int], right: list[int]) -> None:
  """Cuts both shapes wherever either does; between two cuts of both, only if the pieces divide."""
  common = sorted({*left} & {*right}, reverse=True)
  for outer, inner in itertools.pairwise(common):
    cuts = sorted({c for c in (*left, *right) if inner <= c <= outer}, reverse=True)
    pieces = list(itertools.pairwise(cuts))
    if all(a % b == 0 for a, b in pieces):
      for a, b in pieces:
        found.add(a // b, rows[_holder(left, a)], columns[_holder(right, a)])
    else:
      _keep_whole(found, _within(rows, left, outer, inner), _within(columns, right, outer, inner))


def _holder(suffixes: list[int], cut: int) -> int:
  """The axis that a piece starting at ``cut`` lies in."""
  return max(i for i, c in enumerate(suffixes[:-1]) if c >= cut)


def _within(axes: list[int], suffixes: list[int], outer: int, inner: int) -> list[tuple[int, int]]:
  spans = zip(axes, suffixes, suffixes[1:], strict=False)
  return [(axis, a // b) for axis, a, b in spans if inner <= b and a <= outer]


def _keep_whole(found: _Factors, ins: list[tuple[int, Size]], outs: list[tuple[int, Size]]) -> None:
  for i, n in ins:
    found.add(n, i, None)
  for j, n in outs:
    found.add(n, None, j)


built_in("reshape", reshape)
