"""The compact network as a text table."""

import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from fisherprune_jax._compaction.kept import Kept
from fisherprune_jax._compaction.plan import Plan
from fisherprune_jax._errors import path_name
from fisherprune_jax._graph.blockers import Stays, lines
from fisherprune_jax._tables import Table
from fisherprune_jax._types import Array

Line = tuple[str, str, str, str]


def widths(plan: Plan, cost: float, dense: float) -> Table:
  """A table of masks, variables and totals before and after."""
  masks = [_mask_line(name, leaf) for name, leaf, _, is_mask in _leaves(plan) if is_mask]
  rest = [(name, kept) for name, _, kept, is_mask in _leaves(plan) if not is_mask]
  before, after = parameters_of(plan)
  totals = [
    ("parameters", f"{before:,}", f"{after:,}", share(after, before)),
    ("FLOPs per example", f"{dense:,.0f}", f"{cost:,.0f}", share(cost, dense)),
  ]
  return Table(("layer", "before", "after", "kept"), [*masks, *(_variable_line(*r) for r in rest), *totals])


def _leaves(plan: Plan) -> Iterator[tuple[str, Array, Kept, bool]]:
  """For every variable: name, shape or value, kept entries, and whether it is a mask."""
  for (path, leaf), kept in zip(plan.tree.paths, jax.tree.leaves(plan.kept), strict=True):
    yield path_name(path), leaf, kept, plan.tree.is_mask(path)


def _mask_line(name: str, mask: Array) -> Line:
  return name, f"{np.size(mask)}", f"{int(np.sum(mask))}", share(np.sum(mask), np.size(mask))


def _variable_line(name: str, kept: Kept) -> Line:
  before, after = kept.shape, kept.compact_shape
  return name, times(before), times(after), share(math.prod(after), math.prod(before))


def what_stays(stays: Stays) -> list[str]:
  """Lines on what could not be removed, with its FLOPs; empty if everything was removed."""
  if not stays.blockers:
    return []
  return [
    "Kept, because dead entries cannot be removed there soundly, with the FLOPs that each source line alone keeps:",
    *(line for blocker in stays.blockers for line in lines(blocker)),
    f"All of these together leave {stays.flops:,.0f} FLOPs per example on the table{_parameters(stays)}.",
  ]


def _parameters(stays: Stays) -> str:
  kept = sum(blocker.parameters for blocker in stays.blockers)
  return f", and {kept:,} parameters" if kept else ""


def parameters_of(plan: Plan) -> tuple[int, int]:
  """The number of entries of all variables except masks, before and after."""
  found = [kept for _, _, kept, is_mask in _leaves(plan) if not is_mask]
  return sum(math.prod(kept.shape) for kept in found), sum(math.prod(kept.compact_shape) for kept in found)


def times(shape: Sequence[int]) -> str:
  """A shape as text, such as ``3x4``."""
  return "x".join(map(str, shape)) or "1"


def share(part: float, whole: float) -> str:
  return f"{100 * float(part) / float(whole):.1f} %" if whole else "-"
