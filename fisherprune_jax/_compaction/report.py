"""The compact network as a text table."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fisherprune_jax._graph.blockers import Blocker, lines
from fisherprune_jax._graph.model import VariableTree, keystr
from fisherprune_jax._tables import align


def table(
  tree: VariableTree, kept: Any, cost: float, dense: float, blockers: Sequence[Blocker], left: float
) -> str:
  """Masks, variables and totals before and after; what had to stay, and the FLOPs ``left`` by all of it."""
  leaves = zip(tree.paths, jax.tree.leaves(kept), strict=True)
  masks, rest = [], []
  for (path, leaf), k in leaves:
    if tree.is_mask(path):
      masks.append(
        (keystr(path), f"{np.size(leaf)}", f"{int(np.sum(leaf))}", _share(np.sum(leaf), np.size(leaf)))
      )
    else:
      after = k.compact_shape
      rest.append((keystr(path), _shape(k.shape), _shape(after), _share(np.prod(after), np.prod(k.shape))))
  before = sum(
    int(np.prod(k.shape))
    for (path, _), k in zip(tree.paths, jax.tree.leaves(kept), strict=True)
    if not tree.is_mask(path)
  )
  after = sum(
    int(np.prod(k.compact_shape))
    for (path, _), k in zip(tree.paths, jax.tree.leaves(kept), strict=True)
    if not tree.is_mask(path)
  )
  totals = [
    ("numbers in all variables", f"{before:,}", f"{after:,}", _share(after, before)),
    ("FLOPs per example", f"{dense:,.0f}", f"{cost:,.0f}", _share(cost, dense)),
  ]
  body = align([("layer", "before", "after", "kept"), *masks, *rest, *totals])
  return "\n".join([*body, *_what_stays(blockers, left)])


def _what_stays(blockers: Sequence[Blocker], left: float) -> list[str]:
  if not blockers:
    return []
  found = [line for b in blockers for line in lines(b)]
  return [
    "",
    "Kept, because dead entries cannot be removed there soundly, with the FLOPs that each source line alone keeps:",
    *found,
    f"All of these together leave {left:,.0f} FLOPs per example on the table.",
  ]


def _shape(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape)) or "1"


def _share(part: Any, whole: Any) -> str:
  return f"{100 * float(part) / float(whole):.1f} %" if whole else "-"
