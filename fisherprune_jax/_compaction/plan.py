"""What a compact network keeps: a small immutable thing that holds no weights."""

from dataclasses import dataclass

import jax
import numpy as np

from fisherprune_jax._compaction.kept import Kept, keep
from fisherprune_jax._compaction.rounding import round_up, widths_of
from fisherprune_jax._errors import describe, path_name, require_same_tree, same_structure
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.policy import MaskPolicy
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.traced import Analysis, Traced
from fisherprune_jax._graph.variables import VariableTree, leaves_from, vectors_of
from fisherprune_jax._masks import check_switches
from fisherprune_jax._types import BatchAxes, Masks, Picker, PyTree


@dataclass(frozen=True, eq=False)
class Plan:
  """What is kept of every variable under given masks, and what is needed to run on that.

  Attributes:
    tree: the variables as they were before, the masks with their values, all others as shapes.
    kept: a tree of ``Kept`` like them.
    masks: the masks of what is kept, a tree like those given.
    policy: what becomes of masks.
    ev: the same masks, for reading sets.
    batch_axes: where the example axes of the arguments are.
    examples: how many examples the first arguments held.
    updates: picks from the output what replaces variables, or None.
  """

  tree: VariableTree
  kept: PyTree
  masks: Masks
  policy: MaskPolicy
  ev: Evaluation
  batch_axes: BatchAxes
  examples: int
  updates: Picker | None

  @property
  def left_out(self) -> list[bool]:
    """Per variable, whether it is a mask that the compact variables lack."""
    return [is_mask and self.policy is not MaskPolicy.KEEP for is_mask in self.tree.flags]

  def present(self, tree: PyTree) -> PyTree:
    """A tree like all variables, as users see it: without masks, unless they were kept."""
    return tree if self.policy is MaskPolicy.KEEP else self.tree.without_masks(tree)

  def complete(self, variables: PyTree) -> PyTree:
    """Compact variables as the function takes them: masks are put back if they were left out."""
    how = "Pass small.variables, or small.shrink(...) of full ones."
    require_same_tree(variables, self.present(self.tree.variables), "variables", "small.variables", how)
    rest, masks = iter(jax.tree.leaves(variables)), iter(self.tree.mask_leaves)
    leaves = [next(masks if left_out else rest) for left_out in self.left_out]
    return jax.tree.unflatten(jax.tree.structure(self.tree.variables), leaves)

  def shrink(self, tree: PyTree) -> PyTree:
    """Slices a tree that is shaped like some part of the variables."""
    return jax.tree.map(Kept.slice, self._like(tree), tree)

  def _like(self, tree: PyTree) -> PyTree:
    """The part of what is kept that a tree is shaped like."""
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
  policy: MaskPolicy,
  round_to: int,
  batch_axes: BatchAxes,
  examples: int,
  updates: Picker | None,
) -> Plan:
  """Finds what is kept of the variables ``tree``, of whose masks the values are known."""
  vectors = vectors_of(tree.mask_leaves)
  if round_to > 1:
    vectors = round_up(vectors, _widths(traced.analyse(policy), tree), round_to)
    # The dead features among them are zero only because they are multiplied by their masks.
    policy = MaskPolicy.MULTIPLY if policy is MaskPolicy.DROP else policy
  ev = Evaluation(vectors)
  masks = jax.tree.unflatten(jax.tree.structure(tree.mask_tree), leaves_from(vectors, tree.mask_leaves))
  kept = _kept(traced.analyse(policy), tree, ev)
  return Plan(tree.without_weights(), kept, masks, policy, ev, batch_axes, examples, updates)


def _widths(analysis: Analysis, tree: VariableTree) -> list[Set]:
  """The widths of the variables that are no masks."""
  values = zip(analysis.variables, tree.flags, strict=True)
  return widths_of([value for value, is_mask in values if not is_mask], analysis.live)


def _kept(analysis: Analysis, tree: VariableTree, ev: Evaluation) -> PyTree:
  """What is kept of each variable."""
  returned = {analysis.traced.updates[at]: box for at, box in analysis.returned.items()}
  leaves = [keep(value, analysis.live, ev, returned.get(at)) for at, value in enumerate(analysis.variables)]
  return jax.tree.unflatten(jax.tree.structure(tree.variables), leaves)


def check_request(tree: VariableTree, round_to: int) -> None:
  """Raises unless the masks are arrays of 0 and 1, and widths can be rounded so."""
  if round_to < 1:
    raise ValueError(f"round_to must be at least 1, got {round_to}. 8 suits most hardware; 1 rounds nothing.")
  for path, leaf in tree.paths:
    if tree.is_mask(path):
      if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
        raise TypeError(
          f"compact needs concrete masks, got {describe(leaf)} at {path_name(path)}. Call it outside jit: shapes "
          "depend on the masks."
        )
      check_switches(path, leaf)
