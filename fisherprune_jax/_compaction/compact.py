"""Handing the pruned network back physically smaller, with the same outputs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from fisherprune_jax._compaction import exporting, report
from fisherprune_jax._compaction.kept import Kept, keep
from fisherprune_jax._compaction.opt_states import shrink_opt_state, shrink_pruning
from fisherprune_jax._compaction.rounding import round_up, widths_of
from fisherprune_jax._cost.cost import cost_of
from fisherprune_jax._errors import describe
from fisherprune_jax._graph.blockers import (
  Blocker,
  blockers,
  check_read,
  check_strict,
  left_by_lines,
  not_covered,
  warn_of_unknown,
)
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.examples import batch_size
from fisherprune_jax._graph.execute import Run
from fisherprune_jax._graph.facts import whole_box
from fisherprune_jax._graph.model import (
  MaskSelector,
  Model,
  VariableTree,
  keystr,
  leaves_of,
  rows_of,
  signature,
  trace_model,
)
from fisherprune_jax._graph.program import Value
from fisherprune_jax._masks import check_switches
from fisherprune_jax._training.state import make_inert


class Compact:
  """A network without its dead entries; made by :func:`compact`.

  Attributes:
    variables: the variables in the tree that they came in, with smaller leaves and without the masks.
    masks: the masks of what is kept: those given, and with ``round_to`` a few more features.
    cost: FLOPs per example.
    updates: picks from the output what replaces variables, or None.
  """

  def __init__(
    self,
    apply_fn: Callable[..., Any],
    tree: VariableTree,
    args: Sequence[Any],
    *,
    batch_axes: Any,
    keep_masks: bool,
    updates: Callable[[Any], Any] | None,
    round_to: int,
    strict: bool,
  ) -> None:
    self._apply_fn = apply_fn
    self.updates = updates
    self._tree = tree
    self._batch_axes = batch_axes
    self._keep_masks = keep_masks
    self._drop_masks = not keep_masks
    self._examples = batch_size(args, batch_axes)
    model = self._trace(tree.variables, args)
    check_read(model, tree)
    warn_of_unknown(model, tree.mask_leaves, self._examples)
    rows = rows_of(tree.mask_leaves, np)
    if strict:
      check_strict(model, tree, [Evaluation(rows)], self._examples)
    if round_to > 1:
      rows = round_up(rows, widths_of(self._parameters(model), model.live), round_to)
      # The dead features among them are zero only because they are multiplied by their masks.
      self._drop_masks = False
      model = self._trace(tree.variables, args)
    self._ev = Evaluation(rows)
    self._model = model
    self._kept = self._find_kept(model)
    self._models = {signature((tree.variables, args)): model}
    self._call = jax.jit(self._execute)
    self.masks = jax.tree.unflatten(jax.tree.structure(tree.mask_tree), leaves_of(rows, tree.mask_leaves))
    self._cost_model = cost_of(model, tree.mask_tree, self._examples)
    self.cost: float = self._cost_model.exact(self.masks) / self._examples
    self.variables = self._present(jax.tree.map(Kept.slice, self._kept, tree.variables))

  @functools.cached_property
  def blockers(self) -> list[Blocker]:
    """Where dead entries had to stay, why, and how many FLOPs that keeps."""
    return blockers(self._model, self._tree, self._ev, self._examples)

  def __call__(self, variables: Any, *args: Any) -> Any:
    """The outputs of ``apply_fn(full_variables, *args)``, from the compact ``variables``.

    Works at any batch size, and under ``jit``, ``grad`` and ``vmap``.

    Args:
      variables: a tree like ``self.variables``.
      *args: the other arguments, as ``apply_fn`` takes them.
    """
    return self._call(variables, args)

  def shrink(self, tree: Any) -> Any:
    """Slices any tree shaped like the parameters, like all variables, or like another collection of them."""
    return jax.tree.map(Kept.slice, self._kept_like(tree), tree)

  def shrink_opt_state(self, tx: Any, opt_state: Any, of: Callable[[Any], Any] | None = None) -> Any:
    """Slices what an optimizer remembers of the parameters, so that training goes on where it was.

    Args:
      tx: the Optax transformation that made the state.
      opt_state: its state, for the full parameters.
      of: picks what the optimizer is for, ``lambda variables: variables["adapters"]``; None to find it out.

    Returns:
      The state for the compact parameters. The pruning state in it becomes inert (``mask_grads=None`` is
      accepted from then on), unless masks were kept.
    """
    masks = {"kept": VariableTree(self._kept, self._tree.masks).mask_tree, "given": self._tree.mask_tree}
    pruning = functools.partial(shrink_pruning, **masks) if self._keep_masks else make_inert
    return shrink_opt_state(tx, opt_state, self.variables, self._present(self._kept), of, pruning)

  def report(self) -> str:
    """A text table, layer by layer: widths before and after, and what could not be removed and why."""
    lines = {b.where for b in self.blockers}
    left = left_by_lines(self._model, lines, self._ev, self._examples) if lines else 0.0
    return report.table(self._tree, self._kept, self.cost, self._cost_model.dense, self.blockers, left)

  def export(
    self, *args: Any, platforms: Sequence[str] | None = None, batch: str | None = "batch"
  ) -> export.Exported:
    """``args -> outputs`` as StableHLO, with the weights inside and a symbolic batch size.

    Args:
      *args: example arguments, arrays or ``jax.ShapeDtypeStruct``; their batch size does not matter. Other sizes may
        be symbols of the caller's own (``jax.export.symbolic_shape``): a sequence length, say.
      platforms: what to lower for, such as ``("cpu", "cuda")``; None for what runs here.
      batch: the name of the symbol; None leaves all sizes as they are, for models that compute with their batch
        size and for what takes numbers alone.

    Returns:
      A ``jax.export.Exported``: ``.call(*args)`` runs it, ``.serialize()`` (which needs ``flatbuffers``) gives
      bytes that ``jax.export.deserialize`` loads without this library; ``.serialize(vjp_order=1)`` with the derivative.

    Raises:
      ValueError: if the function computes with its batch size so that a symbol does not do.
    """
    return exporting.export(self, args, self._batch_axes, platforms, batch)

  def __reduce__(self) -> Any:
    raise TypeError(
      "A Compact cannot be pickled, as it holds the function that it was made of. Save small.variables (with "
      "Orbax, say) and the masks, and call fp.compact again with the same function; or keep small.export(...).serialize()."
    )

  def _execute(self, variables: Any, args: Sequence[Any]) -> Any:
    full = self._full_tree(variables)
    kept = jax.tree_util.tree_map_with_path(self._kept_given, self._kept, full)
    shapes = jax.tree.map(lambda k, x: jax.ShapeDtypeStruct(k.shape, x.dtype), kept, full)
    key = signature((shapes, args))
    if key not in self._models:
      self._models[key] = self._checked(self._trace(shapes, args), kept)
    model = self._models[key]
    given, leaves = jax.tree.leaves(full), jax.tree.leaves(args)
    boxes = [k.held for k in jax.tree.leaves(kept)]
    held = [
      whole_box(np.shape(x)) if is_mask and not self._keep_masks else box
      for x, box, is_mask in zip(given, boxes, self._tree.flags, strict=True)
    ]
    wanted = [
      boxes[model.replaced[at]] if at in model.replaced else whole_box(value.shape)
      for at, value in enumerate(model.program.outputs)
    ]
    run = Run(model.program, model.live, self._ev)
    outputs = run([*given, *leaves], [*held, *(whole_box(np.shape(x)) for x in leaves)], wanted)
    return jax.tree.unflatten(jax.tree.structure(model.out_tree), outputs)

  def _kept_given(self, path: Any, kept: Kept, leaf: Any) -> Kept:
    """What is kept of a variable as it is given: masks may come per example."""
    return kept.per_example(leaf) if self._keep_masks and self._tree.is_mask(path) else kept

  def _trace(self, variables: Any, args: Sequence[Any]) -> Model:
    tree = VariableTree(variables, self._tree.masks)
    ranks = [np.ndim(mask) for mask in self._tree.mask_leaves]
    return trace_model(self._apply_fn, tree, args, self._drop_masks, self.updates, ranks)

  def _parameters(self, model: Model) -> list[Value]:
    """The variables that are no masks."""
    return [value for value, is_mask in zip(model.variables, self._tree.flags, strict=True) if not is_mask]

  def _find_kept(self, model: Model) -> Any:
    """What is kept of each variable."""
    shown = {model.replaced[at]: box for at, box in model.shown.items()}
    leaves = [keep(value, model.live, self._ev, shown.get(at)) for at, value in enumerate(model.variables)]
    return jax.tree.unflatten(jax.tree.structure(self._tree.variables), leaves)

  def _checked(self, model: Model, kept: Any) -> Model:
    """Raises if the program for another shape needs what was removed for the first one."""
    leaves = jax.tree_util.tree_leaves_with_path(kept)
    for value, (path, have) in zip(model.variables, leaves, strict=True):
      dropped = self._tree.is_mask(path) and not self._keep_masks
      if value in model.live.asked and not dropped and not have.covers(keep(value, model.live, self._ev)):
        raise ValueError(not_covered(path, model, self._model))
    return model

  def _present(self, tree: Any) -> Any:
    """The variables as users see them."""
    return tree if self._keep_masks else self._tree.without_masks(tree)

  def _full_tree(self, variables: Any) -> Any:
    """The variables as the traced function takes them: masks put back if they had been dropped."""
    expected = jax.tree.structure(self.variables)
    if jax.tree.structure(variables) != expected:
      raise ValueError(
        f"variables must have the structure of small.variables, {expected}; "
        f"got {jax.tree.structure(variables)}. Pass small.variables, or small.shrink(...) of full ones."
      )
    rest = iter(jax.tree.leaves(variables))
    masks = iter(self._tree.mask_leaves)
    dropped = [is_mask and not self._keep_masks for is_mask in self._tree.flags]
    leaves = [np.asarray(next(masks)) if drop else next(rest) for drop in dropped]
    return jax.tree.unflatten(jax.tree.structure(self._tree.variables), leaves)

  def _kept_like(self, tree: Any) -> Any:
    """The part of the variables that a tree is shaped like."""
    parts = [self._kept["params"]] if isinstance(self._kept, dict) and "params" in self._kept else []
    parts += [self._kept, self._present(self._kept)]
    parts += self._kept.values() if isinstance(self._kept, dict) else ()
    found = [part for part in parts if jax.tree.structure(part) == jax.tree.structure(tree)]
    if not found:
      raise ValueError(
        "A tree to shrink must have the structure of the parameters, of all variables or of one collection, "
        f"got {describe(tree)} with structure {jax.tree.structure(tree)}."
      )
    return found[0]


def compact(
  apply_fn: Callable[..., Any],
  variables: Any,
  *args: Any,
  masks: MaskSelector = "masks",
  batch_axes: Any = 0,
  keep_masks: bool = False,
  updates: Callable[[Any], Any] | None = None,
  round_to: int = 1,
  strict: bool = False,
) -> Compact:
  """Removes what the masks switched off: a smaller network with the same outputs.

  Every array is sliced to the entries that can be non-zero and that are asked for. An entry that cannot be
  removed soundly stays; ``report()`` says where and why.

  Args:
    apply_fn: ``apply_fn(variables, *args)``, such as ``model.apply``. Keyword arguments go in by closure:
      ``functools.partial(model.apply, train=False)``.
    variables: the variables, with concrete 0/1 masks among them.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    masks: the collection that holds the masks, or a predicate on tree paths.
    batch_axes: where the example axes of ``args`` are, like ``jax.vmap``'s ``in_axes``; with None alone ``cost`` is
      per call.
    keep_masks: leave all-ones masks in, so that pruning can go on.
    updates: picks from the output what replaces entries of ``variables``, which then comes back in compact
      shapes and keeps nothing alive: ``lambda out: out[1]`` for ``mutable=["batch_stats"]``.
    round_to: keep just enough dead features for every width to be a multiple of this, or whole: hardware
      likes 8. They are still multiplied by their masks, so outputs and gradients are the same.
    strict: raise where a dead feature cannot be removed, instead of keeping it.

  Returns:
    The compact network: ``small(small.variables, *args)``.

  Raises:
    ValueError: if there are no masks, if they are not 0/1, if ``round_to`` is below 1, or, if ``strict``,
      where something stays.
    TypeError: if the masks are tracers.

  >>> import jax, jax.numpy as jnp
  >>> import flax.linen as nn
  >>> import fisherprune_jax as fp
  >>> model = nn.Sequential([nn.Dense(4), nn.relu, fp.Mask(), nn.Dense(3)])
  >>> x = jnp.ones((2, 5))
  >>> variables = model.init(jax.random.key(0), x)
  >>> masks = {"layers_2": {"mask": jnp.array([1.0, 0.0, 0.0, 1.0])}}
  >>> small = fp.compact(model.apply, variables | {"masks": masks}, x)
  >>> jax.tree.map(jnp.shape, small.variables["params"]["layers_0"])
  {'bias': (2,), 'kernel': (5, 2)}
  >>> small(small.variables, x).shape
  (2, 3)
  """
  tree = VariableTree(variables, masks)
  _check(tree, round_to)
  return Compact(
    apply_fn,
    tree,
    args,
    batch_axes=batch_axes,
    keep_masks=keep_masks,
    updates=updates,
    round_to=round_to,
    strict=strict,
  )


def _check(tree: VariableTree, round_to: int) -> None:
  """Raises unless the masks are arrays of 0 and 1, and widths can be rounded so."""
  if round_to < 1:
    raise ValueError(f"round_to must be at least 1, got {round_to}. 8 suits most hardware; 1 rounds nothing.")
  for path, leaf in tree.paths:
    if tree.is_mask(path):
      if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
        raise TypeError(
          f"compact needs concrete masks, got {describe(leaf)} at {keystr(path)}. Call it outside jit: shapes "
          "depend on the masks."
        )
      check_switches(path, leaf)
