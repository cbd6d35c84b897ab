"""Ties axes to the factors of a ``Spec``."""

from collections.abc import Sequence

import numpy as np

from fisherprune_jax._auto.atoms import PRODUCT, SUM, Atom, block, cut, tie
from fisherprune_jax._graph.compat import is_static_size
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.spec import Axis, Factor, Pick, Prod

MOST_RUNS = 16
"""The most runs of neighbours that a selection is split into."""


def tie_axes(atoms: Sequence[Atom], axes: Sequence[Axis], factors: dict[Factor, Atom], node: Node) -> None:
  """Tie the axes of an array, as a node reads or writes it, to their factors."""
  for atom, axis in zip(atoms, axes, strict=True):
    _tie_axis(atom, axis, factors, node)


def _tie_axis(atom: Atom, axis: Axis, factors: dict[Factor, Atom], node: Node) -> None:
  if isinstance(axis, str):
    tie(atom, factors[axis])
  elif isinstance(axis, Pick):
    _tie_pick(atom, axis.index, factors[axis.factor], f"{node.name} picks from it, at {node.source}")
  elif axis is not None:
    cut(atom, PRODUCT if isinstance(axis, Prod) else SUM, [factors[part] for part in axis.parts])
  elif not (is_static_size(atom.size) and atom.size == 1):
    block(atom, f"{node.name} works along it, at {node.source}")


def _tie_pick(atom: Atom, index: np.ndarray, source: Atom, why: str) -> None:
  """Tie an axis to the entries that it picks from another: runs of neighbours, or every n-th entry."""
  size = source.root().size
  step = int(index[1] - index[0]) if index.size > 1 else 1
  if (
    step > 1
    and size % step == 0
    and index.size == size // step
    and (np.diff(index) == step).all()
    and index[0] >= 0
  ):
    outer = Atom(index.size)
    cut(source, PRODUCT, (outer, Atom(step, why)))
    tie(atom, outer)
    return
  goes_on = np.where(index[:-1] < 0, index[1:] < 0, np.diff(index) == 1)
  runs = np.split(index, np.flatnonzero(~goes_on) + 1) if index.size else []
  if len(runs) > MOST_RUNS:
    block(source, why)
    block(atom, why)
    return
  pieces = [Atom(run.size) for run in runs]
  if pieces:
    cut(atom, SUM, pieces)
  for piece, run in zip(pieces, runs, strict=True):
    first, last = int(run[0]), int(run[-1]) + 1
    if first >= 0:
      cut(source, SUM, (Atom(first), piece, Atom(size - last)))
