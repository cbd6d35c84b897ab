"""Handing the pruned network back physically smaller, with the same outputs."""

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
from fisherprune_jax._cost.measures import cost_of
from fisherprune_jax._cost.meters import FlopsMeter
from fisherprune_jax._files import PathLike
from fisherprune_jax._graph.blockers import Blocker, Stays, check, what_stays
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.examples import batch_size
from fisherprune_jax._graph.traced import trace_apply
from fisherprune_jax._graph.variables import MaskSelector, VariableTree, abstract, vectors_of
from fisherprune_jax._tables import Shown, Table
from fisherprune_jax._training.state import make_inert
from fisherprune_jax._types import ApplyFn, BatchAxes, Picker, PyTree

METER = FlopsMeter()
"""What ``Compact.cost`` and the report count."""


class Compact(Shown):
  """A network without its dead entries; made by :func:`compact`.

  Attributes:
    variables: the variables in the tree that they came in, with smaller leaves and without the masks.
    masks: the masks that it was made with.
    cost: FLOPs per example.
    dense: FLOPs per example of the network that it all began with.
    state_from: picks from the output the new values of variables, or None.
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
  ) -> None:
    examples = batch_size(args, batch_axes)
    traced = trace_apply(apply_fn, tree, args, state_from)
    self._analysis = traced.analyse(keep_masks)
    given = [Evaluation(vectors_of(tree.mask_leaves))]
    check(self._analysis, tree, examples, METER, given if strict else ())
    self._plan = make_plan(
      traced,
      tree,
      keep_masks=keep_masks,
      batch_axes=batch_axes,
      examples=examples,
      state_from=state_from,
    )
    self._runner = Runner(apply_fn, self._plan, traced, args)
    self._cost_model = cost_of(self._analysis, tree, examples, METER)
    self.masks, self.state_from = tree.mask_tree, state_from
    self.cost: float = self._cost_model.exact(self.masks) / examples
    self.dense: float = parent.dense if parent else self._cost_model.dense
    self.variables = self._plan.present(jax.tree.map(Kept.slice, self._plan.kept, tree.variables))
    self._args = abstract(tuple(args))
    self._originals: PyTree = originals(self._plan.kept, parent._originals if parent else ())

  @functools.cached_property
  def _stays(self) -> Stays:
    plan = self._plan
    return what_stays(self._analysis, plan.tree, plan.ev, plan.examples, METER)

  @property
  def kept(self) -> PyTree:
    """Which entries of the network that it all began with are kept, as a tree like ``variables``.

    In the place of each leaf is a tuple with the original positions along each axis, of shape ``(n,)``; where every layer
    of a stack keeps entries of its own ``(L, n)``, with -1 for padding. They are those of the first network also
    after several compactions; see ``parent`` of :func:`compact`.

    >>> import jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> variables = {"w": jnp.ones((3, 4)), "masks": jnp.array([1.0, 0.0, 1.0, 0.0])}
    >>> fp.compact(lambda v, x: jnp.sum(x @ v["w"] * v["masks"], 1), variables, jnp.ones((1, 3))).kept
    {'w': (array([0, 1, 2]), array([0, 2]))}
    """
    return jax.tree.map(lambda original: original.index, self._plan.present(self._originals))

  @property
  def blockers(self) -> list[Blocker]:
    """Where dead entries had to stay, why, and how many FLOPs that keeps."""
    return self._stays.blockers

  def __call__(self, variables: PyTree, *args: PyTree) -> PyTree:
    """The outputs of ``apply_fn(full_variables, *args)``, from the compact ``variables``.

    Works at any batch size, and under ``jit``, ``grad`` and ``vmap``.

    Args:
      variables: a tree like ``self.variables``.
      *args: the other arguments, as ``apply_fn`` takes them.
    """
    return self._runner(variables, args)

  def shrink(self, tree: PyTree) -> PyTree:
    """Slices any tree shaped like the parameters, like all variables, or like another collection of them."""
    return self._plan.shrink(tree)

  def shrink_opt_state(
    self, tx: optax.GradientTransformation, opt_state: PyTree, of: Picker | None = None
  ) -> PyTree:
    """Slices what an optimizer remembers of the parameters, so that training goes on where it was.

    Args:
      tx: the Optax transformation that made the state.
      opt_state: its state, for the full parameters.
      of: picks what the optimizer is for, ``lambda variables: variables["adapters"]``; None to find it out.

    Returns:
      The state for the compact parameters. The pruning state in it becomes inert (``mask_grads=None`` is
      accepted from then on), unless masks were kept.

    References:
      Shazeer and Stern, `Adafactor: adaptive learning rates with sublinear memory cost
      <https://arxiv.org/abs/1804.04235>`_, 2018: the statistics that are factored, and start anew
    """
    plan = self._plan
    pruning: Callable[..., Any] = make_inert
    if plan.keep_masks:
      kept = VariableTree(plan.kept, plan.tree.masks).mask_tree
      pruning = functools.partial(shrink_pruning, kept=kept, given=plan.tree.mask_tree)
    return shrink_opt_state(tx, opt_state, self.variables, plan.present(plan.kept), of, pruning)

  def report(self) -> str:
    """A text table, layer by layer: widths before and after, and what could not be removed and why."""
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
    """Writes one file with all that :func:`load` needs to run the network and to train it on, without the model's code.

    It is written whole, or what was there stays as it was; the guide on saving has its format. The file holds the
    derivative too. Where there is none by the arguments, as behind a ``while_loop``, it holds that by the variables; where
    there is none by those either, it holds none. A warning says so.

    Args:
      path: the file.
      *args: example arguments, as in :meth:`export`; without any, those that the network was compacted with.
      variables: other values of ``self.variables``, as training has made them.
      history: the optimizer state from before compaction, to say when each feature went.
      platforms: what to lower for, such as ``("cpu", "cuda")``; None for the CPU and what runs here.
      batch: the name of the batch size in the program, which is free; None for the one size of the arguments.

    Raises:
      ImportError: without ``safetensors`` and ``flatbuffers``, which are in the extra ``save``.
      ValueError: if the function computes with its batch size so that a symbol does not do, or if ``variables`` or
        ``history`` are not of this network.
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
    state_from: picks from the output what replaces entries of ``variables``, which then comes back in compact
      shapes and keeps nothing alive: ``lambda out: out[1]`` for ``mutable=["batch_stats"]``.
    strict: raise where a dead feature cannot be removed, instead of keeping it.
    parent: the compact network that ``apply_fn`` runs, if it is none itself, or one under ``jax.jit``, ``auto_mask`` or
      ``functools.partial``: what is kept (``Compact.kept``) is then said of the network before that.

  Returns:
    The compact network: ``small(small.variables, *args)``.

  Raises:
    ValueError: if there are no masks, if they are not 0/1, or, if ``strict``,
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

  References:
    Shardy, `Propagation <https://openxla.org/shardy/propagation>`_: the factors by which operands and results of a
    primitive are related

    JAX, `The jaxpr language <https://docs.jax.dev/en/latest/jaxpr.html>`_
  """
  tree = VariableTree(variables, masks)
  check_masks(tree)
  return Compact(
    apply_fn,
    tree,
    args,
    batch_axes=batch_axes,
    keep_masks=keep_masks,
    state_from=state_from,
    strict=strict,
    parent=parent or inside(apply_fn, Compact),
  )
