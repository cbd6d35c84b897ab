"""Reshapes: the finest common factors of both shapes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.sizes import quotient, runs
from fisherprune_jax._graph.spec import Axis, Factor, Prod, Sizes, Spec
from fisherprune_jax._types import Size


@dataclass
class _Factors:
  """Factors found so far, by axis."""

  ins: list[list[Factor]]
  outs: list[list[Factor]]
  sizes: Sizes = field(default_factory=dict)
  whole: set[Factor] = field(default_factory=set)

  def add(self, size: Size, i: int | None, j: int | None) -> None:
    """Adds a factor of operand axis i and result axis j; indivisible if on one side only."""
    name = f"f{len(self.sizes)}"
    self.sizes[name] = size
    if i is not None:
      self.ins[i].append(name)
    if j is not None:
      self.outs[j].append(name)
    if i is None or j is None:
      self.whole.add(name)


def reshape(node: Node, infos: Sequence[Info]) -> Spec:
  """``a b c d -> a (b c) d`` and back, with axes in reading order."""
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
  """Common factors of two shapes, outermost first."""
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
  """Whether a size is 0: then others say nothing of each other."""
  return any(compat.is_static_size(n) and n == 0 for n in shape)


def _middle(
  found: _Factors, rows: list[int], columns: list[int], before: Sequence[Size], after: Sequence[Size]
) -> None:
  left, right = [before[i] for i in rows], [after[j] for j in columns]
  if _holds_nothing(before) and math.prod(left) != math.prod(right):
    _keep_whole(found, [(i, before[i]) for i in rows], [(j, after[j]) for j in columns])
  elif not left or not right:
    return  # only axes of size 1
  elif len(left) == 1:
    for j in columns:
      found.add(after[j], rows[0], j)
  elif len(right) == 1:
    for i in rows:
      found.add(before[i], i, columns[0])
  elif _holds_nothing(left):
    _keep_whole(found, [(i, before[i]) for i in rows], [(j, after[j]) for j in columns])
  else:
    for a, b in runs(left, right):
      _refine(found, [(i, before[i]) for i in rows[a]], [(j, after[j]) for j in columns[b]])


def _refine(found: _Factors, rows: list[tuple[int, Size]], columns: list[tuple[int, Size]]) -> None:
  """Cuts two shapes wherever either is cut, if pieces divide."""
  pieces: list[tuple[Size, int, int]] = []
  ins, outs = rows[::-1], columns[::-1]  # from the end
  while ins and outs:
    (i, a), (j, b) = ins.pop(), outs.pop()
    beyond_a, beyond_b = quotient(a, b), quotient(b, a)
    if beyond_a is None and beyond_b is None:
      return _keep_whole(found, rows, columns)
    pieces.append((a if beyond_a is None else b, i, j))
    ins += [(i, beyond_a)] if a != b and beyond_a is not None else []
    outs += [(j, beyond_b)] if a != b and beyond_b is not None else []
  for piece in pieces:
    found.add(*piece)
  return None


def _keep_whole(found: _Factors, ins: list[tuple[int, Size]], outs: list[tuple[int, Size]]) -> None:
  for i, n in ins:
    found.add(n, i, None)
  for j, n in outs:
    found.add(n, None, j)


built_in("reshape", reshape)
