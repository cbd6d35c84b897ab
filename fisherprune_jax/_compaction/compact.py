"""The pruned network as a smaller one with the same outputs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax import export

from fisherprune_jax._compaction import exporting, report, saving
from fisherprune_jax._compaction.kept import Kept
from fisherprune_jax._compaction.opt_states import shrink_opt_state, shrink_pruning
from fisherprune_jax._compaction.originals import inside, originals
from fisherprune_jax._compaction.plan import check_masks, make_plan
from fisherprune_jax._compaction.runner import Runner
from fisherprune_jax._cost.counters import FlopsCounter
from fisherprune_jax._cost.measures import cost_of
from fisherprune_jax._errors import require
from fisherprune_jax._files import PathLike
from fisherprune_jax._freezing.freezing import Serving
from fisherprune_jax._graph.blockers import Blocker, Stays, check, what_stays
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.examples import batch_size
from fisherprune_jax._graph.traced import trace_apply
from fisherprune_jax._graph.variables import MaskSelector, VariableTree, abstract, vectors_of
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._tables import Shown, Table
from fisherprune_jax._training.state import make_inert
from fisherprune_jax._types import ApplyFn, BatchAxes, Picker, PyTree

COUNTER = FlopsCounter()
"""The counter of ``Compact.cost`` and the report."""


class Compact(Shown):
  """A network without its masked entries; made by :func:`compact`.

  Attributes:
    variables: the variables in their original tree, with smaller leaves and without the masks.
    masks: the masks that it was made with.
    cost: FLOPs per example.
    dense: FLOPs per example of the first network, before any compaction.
    state_from: picks the new values of variables from the output, or None.
  """

  def __init__(
    self,
    apply_fn: ApplyFn,
    tree: VariableTree,
    args: Sequence[PyTree],
    *,
    batch_axes: BatchAxes,
    keep_masks: bool,
    state_from: Picker | None,
    strict: bool,
    parent: "Compact | None",
    dense: float | None = None,
  ) -> None:
    examples = batch_size(args, batch_axes)
    traced = trace_apply(apply_fn, tree, args, state_from)
    self._analysis = traced.analyse(keep_masks)
    given = [Evaluation(vectors_of(tree.mask_leaves))]
    check(self._analysis, tree, examples, COUNTER, given if strict else ())
    self._plan = make_plan(
      traced,
      tree,
      keep_masks=keep_masks,
      batch_axes=batch_axes,
      examples=examples,
      state_from=state_from,
    )
    self._runner = Runner(apply_fn, self._plan, traced, args)
    self._cost_model = cost_of(self._analysis, tree, examples, COUNTER)
    self.masks, self.state_from = tree.mask_tree, state_from
    self.cost: float = self._cost_model.exact(self.masks) / examples
    self.dense: float = self._cost_model.dense if dense is None else dense
    self.variables = self._plan.present(jax.tree.map(Kept.slice, self._plan.kept, tree.variables))
    self._args = abstract(tuple(args))
    self._originals: PyTree = originals(self._plan.kept, parent._originals if parent else ())

  @functools.cached_property
  def _stays(self) -> Stays:
    plan = self._plan
    return what_stays(self._analysis, plan.tree, plan.ev, plan.examples, COUNTER)

  @property
  def kept(self) -> PyTree:
    """The kept entries of the first network, as a tree like ``variables``.

    Each leaf is a tuple with the original positions along each axis: ``(n,)``, or ``(L, n)`` padded with -1 if the
    layers of a stack keep different entries. They refer to the first network even after several compactions; see
    ``parent`` of :func:`compact`.

    >>> import jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> variables = {"w": jnp.ones((3, 4)), "masks": jnp.array([1.0, 0.0, 1.0, 0.0])}
    >>> fp.compact(lambda v, x: jnp.sum(x @ v["w"] * v["masks"], 1), variables, jnp.ones((1, 3))).kept
    {'w': (array([0, 1, 2]), array([0, 2]))}
    """
    return jax.tree.map(lambda original: original.index, self._plan.present(self._originals))

  @property
  def blockers(self) -> list[Blocker]:
    """Where masked entries could not be removed, why, and the FLOPs of keeping them."""
    return self._stays.blockers

  def __call__(self, variables: PyTree, *args: PyTree) -> PyTree:
    """The outputs of ``apply_fn(full_variables, *args)``; it works under ``jit``, ``grad`` and ``vmap``.

    Args:
      variables: a tree like ``self.variables``.
      *args: the other arguments, at any batch size.
    """
    return self._runner(variables, args)

  def shrink(self, tree: PyTree) -> PyTree:
    """Slice a tree shaped like the parameters, like all variables, or like another collection of them."""
    return self._plan.shrink(tree)

  def shrink_opt_state(
    self, tx: optax.GradientTransformation, opt_state: PyTree, of: Picker | None = None
  ) -> PyTree:
    """Slice an optimizer state for the compact parameters, so that training continues.

    Args:
      tx: the Optax transformation that made the state.
      opt_state: its state, for the full parameters.
      of: picks the variables of the optimizer, ``lambda variables: variables["adapters"]``; None to infer them.

    Returns:
      The state for the compact parameters. Without kept masks its pruning state is inert: it accepts
      ``mask_grads=None``.

    References:
      Shazeer and Stern, `Adafactor: adaptive learning rates with sublinear memory cost
      <https://arxiv.org/abs/1804.04235>`_, 2018: factored statistics, which are reset
    """
    plan = self._plan
    pruning: Callable[..., Any] = make_inert
    if plan.keep_masks:
      kept = VariableTree(plan.kept, plan.tree.masks).mask_tree
      pruning = functools.partial(shrink_pruning, kept=kept, given=plan.tree.mask_tree)
    return shrink_opt_state(tx, opt_state, self.variables, plan.present(plan.kept), of, pruning)

  def report(self) -> str:
    """A text table: widths before and after by layer, and what could not be removed, with reasons."""
    return str(self)

  def tables(self) -> list[Table | str]:
    table = report.widths(self._plan, self.cost, self._cost_model.dense)
    stays = report.what_stays(self._stays)
    return [table, *(["\n".join(stays)] if stays else [])]

  def __repr__(self) -> str:
    before, after = report.parameters_of(self._plan)
    dense = self._cost_model.dense
    return f"Compact({self.cost:,.0f} of {dense:,.0f} FLOPs per example, {after:,} of {before:,} parameters)"

  def export(
    self, *args: PyTree, platforms: Sequence[str] | None = None, batch: str | None = "batch"
  ) -> export.Exported:
    """Export ``args -> outputs`` as StableHLO, with the weights inside and a symbolic batch size.

    Args:
      *args: example arguments, arrays or ``jax.ShapeDtypeStruct``, of any batch size. Other sizes, such as a sequence
        length, may be symbols (``jax.export.symbolic_shape``).
      platforms: target platforms, such as ``("cpu", "cuda")``; None for the current one.
      batch: the name of the symbol; None for fixed sizes, if the model computes with its batch size.

    Returns:
      A ``jax.export.Exported``. ``.call(*args)`` runs it. ``.serialize()`` (needs ``flatbuffers``) gives bytes that
      ``jax.export.deserialize`` loads without this library; ``.serialize(vjp_order=1)`` includes the derivative.

    Raises:
      ValueError: if the function cannot compute with a symbolic batch size.

    References:
      JAX, `jax.export <https://docs.jax.dev/en/latest/jax.export.html>`_

      JAX, `Shape polymorphism <https://docs.jax.dev/en/latest/export/shape_poly.html>`_
    """
    shapes = exporting.shapes_of(args, self._plan.batch_axes, batch)
    return exporting.export(lambda *xs: self(self.variables, *xs), shapes, platforms, abstract(args))

  def save(
    self,
    path: PathLike,
    *args: PyTree,
    variables: PyTree = None,
    history: optax.OptState = None,
    platforms: Sequence[str] | None = None,
    batch: str | None = "batch",
  ) -> None:
    """Write one file from which :func:`load` runs and trains the network, without the model's code.

    Writing is atomic; the guide on saving has the format. The file holds the derivative too. If the network cannot be
    differentiated by its arguments (as behind a ``while_loop``), the file holds the derivative by the variables, or
    none; a warning says so.

    Args:
      path: the file.
      *args: example arguments, as in :meth:`export`; by default those of :func:`compact`.
      variables: other values of ``self.variables``, such as trained ones.
      history: the optimizer state before compaction, to save the pruning history.
      platforms: target platforms, such as ``("cpu", "cuda")``; None for the CPU and the current one.
      batch: the name of the symbolic batch size; None for that of the arguments.

    Raises:
      ImportError: without ``safetensors`` and ``flatbuffers``, which the extra ``save`` installs.
      ValueError: if the function cannot compute with a symbolic batch size, or if ``variables`` or ``history`` belong
        to another network.
      OSError: if the file cannot be written.

    >>> import os, tempfile, jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> variables = {"w": jnp.ones((3, 4)), "masks": jnp.array([1.0, 0.0, 1.0, 0.0])}
    >>> small = fp.compact(lambda v, x: jnp.sum(x @ v["w"] * v["masks"], 1), variables, jnp.ones((1, 3)))
    >>> small.save(os.path.join(tempfile.mkdtemp(), "small.safetensors"))
    """
    fixed = args or self._args
    shapes = exporting.shapes_of(fixed, self._plan.batch_axes, batch)
    dense = self.dense, self._cost_model.dense
    known = saving.known_of(self._plan, self._originals, self.cost, *dense, self._stays)
    variables = self.variables if variables is None else variables
    saving.save(path, self, variables, shapes, abstract(fixed), known, history, platforms)

  def __reduce__(self) -> Any:
    raise TypeError(
      "A Compact cannot be pickled, as it holds the function that it was made of. small.save(path) writes a file for "
      "fp.load; or save small.variables (with Orbax, say) and the masks, and call fp.compact again with the same function."
    )


def compact(
  apply_fn: ApplyFn,
  variables: PyTree,
  *args: PyTree,
  masks: MaskSelector = "masks",
  batch_axes: BatchAxes = 0,
  keep_masks: bool = False,
  state_from: Picker | None = None,
  strict: bool = False,
  parent: Compact | None = None,
  freeze: bool = False,
) -> Compact:
  """Remove masked features: a smaller network with the same outputs.

  Every array is sliced to the entries that may be non-zero and are needed. Entries that cannot be removed soundly are
  kept; ``report()`` lists them with reasons.

  Args:
    apply_fn: ``apply_fn(variables, *args)``, such as ``model.apply``. For keyword arguments use
      ``functools.partial(model.apply, train=False)``.
    variables: the variables, including concrete 0/1 masks.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    masks: the collection of the masks, or a predicate on tree paths.
    batch_axes: the example axes of ``args``, like ``jax.vmap``'s ``in_axes``; if all are None, ``cost`` is per call.
    keep_masks: keep all-ones masks, so that pruning can continue.
    state_from: picks new values of ``variables`` from the output, ``lambda out: out[1]`` for
      ``mutable=["batch_stats"]``. They come back in compact shapes, and do not prevent removal.
    strict: raise if a masked feature cannot be removed.
    freeze: for serving. What depends on variables alone is computed once (weight norm, spectral norm, weight standardisation,
      learned queries), and so are tables of constants (rotary angles). Affine maps behind a product or convolution are
      folded into it (batch norm, layer scale). ``variables`` holds the computed arrays.
    parent: the compact network that ``apply_fn`` runs; ``Compact.kept`` then refers to the network before it. It is
      found if ``apply_fn`` is that network, or wraps it in ``jax.jit``, ``auto_mask`` or ``functools.partial``.

  Returns:
    The compact network: ``small(small.variables, *args)``.

  Raises:
    ValueError: without masks, for masks that are not 0/1, or, if ``strict``, for features that cannot be removed.
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

  References:
    Shardy, `Propagation <https://openxla.org/shardy/propagation>`_: factors that relate operands and results

    JAX, `The jaxpr language <https://docs.jax.dev/en/latest/jaxpr.html>`_
  """
  tree = VariableTree(variables, masks)
  check_masks(tree)
  parent = parent or inside(apply_fn, Compact)
  dense = parent.dense if parent else None
  if freeze:
    require(
      state_from is None,
      "freeze=True is for serving, so the network keeps no state: state_from must be None",
      state_from,
    )
    serving = Serving(apply_fn, tree, args, batch_axes)
    if dense is None:
      analysis, examples = trace_apply(apply_fn, tree, args).analyse(), batch_size(args, batch_axes)
      dense = cost_of(analysis, tree, examples, COUNTER).dense
    apply_fn, tree, parent = serving, VariableTree(serving.variables, COLLECTION), None
  return Compact(
    apply_fn,
    tree,
    args,
    batch_axes=batch_axes,
    keep_masks=keep_masks,
    state_from=state_from,
    strict=strict,
    parent=parent,
    dense=dense,
  )
