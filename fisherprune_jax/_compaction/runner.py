"""Runs a plan at any shapes of the arguments."""

from collections.abc import Sequence

import jax
import numpy as np

from fisherprune_jax._compaction.kept import Kept, keep
from fisherprune_jax._compaction.plan import Plan
from fisherprune_jax._errors import Path
from fisherprune_jax._graph.blockers import not_covered
from fisherprune_jax._graph.boxes import whole_box
from fisherprune_jax._graph.execute import Run
from fisherprune_jax._graph.stack import Held
from fisherprune_jax._graph.traced import Analysis, Traced, trace_apply
from fisherprune_jax._graph.variables import VariableTree, dtype_of, signature
from fisherprune_jax._types import ApplyFn, Array, PyTree


class Runner:
  """The function of a plan, ``runner(variables, args)`` on compact variables; ``traced`` is its trace with ``args``."""

  def __init__(self, apply_fn: ApplyFn, plan: Plan, traced: Traced, args: Sequence[PyTree]) -> None:
    self._apply_fn, self._plan = apply_fn, plan
    self._first = traced.analyse(plan.keep_masks)
    # Tracing a new shape adds an entry. Entries depend on shapes alone and hold nothing of that trace, so other traces
    # of the same shape (for a gradient, say) reuse them.
    self._analyses = {signature((plan.tree.variables, args)): self._first}
    self._call = jax.jit(self._run)

  def __call__(self, variables: PyTree, args: Sequence[PyTree]) -> PyTree:
    return self._call(variables, args)

  def _run(self, variables: PyTree, args: Sequence[PyTree]) -> PyTree:
    plan = self._plan
    full = plan.complete(variables)
    kept = jax.tree_util.tree_map_with_path(self._as_given, plan.kept, full)
    analysis = self._analysis(full, kept, args)
    given, leaves = jax.tree.leaves(full), jax.tree.leaves(args)
    boxes = [k.held for k in jax.tree.leaves(kept)]
    held: list[Held] = [
      whole_box(np.shape(x)) if left_out else box
      for x, box, left_out in zip(given, boxes, plan.left_out, strict=True)
    ]
    held += [whole_box(np.shape(x)) for x in leaves]
    run = Run(analysis.program, analysis.live, plan.ev)
    outputs = run([*given, *leaves], held, _wanted(analysis, boxes))
    return jax.tree.unflatten(jax.tree.structure(analysis.traced.out_tree), outputs)

  def _as_given(self, path: Path, kept: Kept, leaf: Array) -> Kept:
    """The kept entries of a variable as given: masks may be per example."""
    per_example = self._plan.keep_masks and self._plan.tree.is_mask(path)
    return kept.per_example(leaf) if per_example else kept

  def _analysis(self, full: PyTree, kept: PyTree, args: Sequence[PyTree]) -> Analysis:
    """The analysis for these shapes; traces the function if they are new."""
    shapes = jax.tree.map(lambda k, x: jax.ShapeDtypeStruct(k.shape, dtype_of(x)), kept, full)
    key = signature((shapes, args))
    if key not in self._analyses:
      tree = VariableTree(shapes, self._plan.tree.masks)
      ranks = [np.ndim(mask) for mask in self._plan.tree.mask_leaves]
      traced = trace_apply(self._apply_fn, tree, args, self._plan.state_from, ranks)
      self._analyses[key] = self._checked(traced.analyse(self._plan.keep_masks), kept)
    return self._analyses[key]

  def _checked(self, analysis: Analysis, kept: PyTree) -> Analysis:
    """Raise if the program for another shape needs entries that were removed."""
    leaves = jax.tree_util.tree_leaves_with_path(kept)
    for value, left_out, (path, have) in zip(analysis.variables, self._plan.left_out, leaves, strict=True):
      needed = value in analysis.live.demanded and not left_out
      if needed and not have.covers(keep(value, analysis.live, self._plan.ev)):
        raise ValueError(not_covered(path, analysis, self._first))
    return analysis


def _wanted(analysis: Analysis, boxes: Sequence[Held]) -> list[Held]:
  """The entries of every output to return; of new values of a variable, its kept entries."""
  updates = analysis.traced.updates
  return [
    boxes[updates[at]] if at in updates else whole_box(value.shape)
    for at, value in enumerate(analysis.program.outputs)
  ]
