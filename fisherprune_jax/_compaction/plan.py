"""The plan of a compact network: kept entries, without weights."""

from dataclasses import dataclass

import jax
import numpy as np

from fisherprune_jax._compaction.kept import Kept, keep
from fisherprune_jax._errors import describe, path_name, require_same_tree, same_structure
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.traced import Analysis, Traced
from fisherprune_jax._graph.variables import VariableTree, vectors_of
from fisherprune_jax._masks import check_switches
from fisherprune_jax._types import BatchAxes, Picker, PyTree


@dataclass(frozen=True, eq=False)
class Plan:
  """The kept entries of every variable under given masks.

  Attributes:
    tree: the full variables: masks with values, others as shapes.
    kept: a tree of ``Kept`` like them.
    keep_masks: whether the compact variables include masks.
    ev: evaluates sets under the masks.
    batch_axes: the example axes of the arguments.
    examples: the number of examples in the first arguments.
    state_from: picks the new values of variables from the output, or None.
  """

  tree: VariableTree
  kept: PyTree
  keep_masks: bool
  ev: Evaluation
  batch_axes: BatchAxes
  examples: int
  state_from: Picker | None

  @property
  def left_out(self) -> list[bool]:
    """Per variable, whether it is a mask that the compact variables lack."""
    return [is_mask and not self.keep_masks for is_mask in self.tree.flags]

  def present(self, tree: PyTree) -> PyTree:
    """A tree like all variables, without masks unless they were kept."""
    return tree if self.keep_masks else self.tree.without_masks(tree)

  def complete(self, variables: PyTree) -> PyTree:
    """Compact variables with all masks."""
    how = "Pass small.variables, or small.shrink(...) of full ones."
    require_same_tree(variables, self.present(self.tree.variables), "variables", "small.variables", how)
    rest, masks = iter(jax.tree.leaves(variables)), iter(self.tree.mask_leaves)
    leaves = [next(masks if left_out else rest) for left_out in self.left_out]
    return jax.tree.unflatten(jax.tree.structure(self.tree.variables), leaves)

  def shrink(self, tree: PyTree) -> PyTree:
    """Slice a tree that is shaped like a part of the variables."""
    return jax.tree.map(Kept.slice, self._like(tree), tree)

  def _like(self, tree: PyTree) -> PyTree:
    """The part of the plan that a tree is shaped like."""
    parts = [self.kept["params"]] if isinstance(self.kept, dict) and "params" in self.kept else []
    parts += [self.kept, self.present(self.kept)]
    parts += self.kept.values() if isinstance(self.kept, dict) else ()
    found = [part for part in parts if same_structure(part, tree)]
    if not found:
      raise ValueError(
        "A tree to shrink must have the structure of the parameters, of all variables or of one collection, "
        f"got {describe(tree)} with structure {jax.tree.structure(tree)}."
      )
    return found[0]


def make_plan(
  traced: Traced,
  tree: VariableTree,
  *,
  keep_masks: bool,
  batch_axes: BatchAxes,
  examples: int,
  state_from: Picker | None,
) -> Plan:
  """The plan for variables with known masks."""
  ev = Evaluation(vectors_of(tree.mask_leaves))
  kept = _kept(traced.analyse(keep_masks), tree, ev)
  return Plan(tree.without_weights(), kept, keep_masks, ev, batch_axes, examples, state_from)


def _kept(analysis: Analysis, tree: VariableTree, ev: Evaluation) -> PyTree:
  returned = analysis.new_values
  leaves = [keep(value, analysis.live, ev, returned.get(at)) for at, value in enumerate(analysis.variables)]
  return jax.tree.unflatten(jax.tree.structure(tree.variables), leaves)


def check_masks(tree: VariableTree) -> None:
  """Raise unless the masks are concrete arrays of 0 and 1."""
  for path, leaf in tree.paths:
    if tree.is_mask(path):
      if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
        raise TypeError(
          f"compact needs concrete masks, got {describe(leaf)} at {path_name(path)}. Call it outside jit: shapes "
          "depend on the masks."
        )
      check_switches(path, leaf)
