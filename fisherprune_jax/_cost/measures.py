"""Measures of the cost of an apply function: FLOPs, multiply-accumulates, parameters, bytes, memory."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from fractions import Fraction

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.counted import Counted, Entry
from fisherprune_jax._cost.counters import BytesCounter, FlopsCounter, MacsCounter, Roofline, RooflineCounter
from fisherprune_jax._cost.owned import owned
from fisherprune_jax._errors import path_name, require
from fisherprune_jax._graph.blockers import check, sample_masks
from fisherprune_jax._graph.boxes import whole
from fisherprune_jax._graph.examples import batch_size
from fisherprune_jax._graph.program import INLINED
from fisherprune_jax._graph.registry import known
from fisherprune_jax._graph.structured import STRUCTURED, Counter, costs_of
from fisherprune_jax._graph.terms import sized
from fisherprune_jax._graph.traced import Analysis, trace_apply
from fisherprune_jax._graph.variables import MaskSelector, VariableTree
from fisherprune_jax._types import ApplyFn, BatchAxes, Picker, PyTree

COUNTERS: dict[str, Callable[[frozenset[str] | None], Counter]] = {
  "flops": FlopsCounter,
  "macs": MacsCounter,
  "bytes": BytesCounter,
}
"""Counters of nodes."""
MEASURES = ("flops", "macs", "params", "bytes", "memory")
"""All named measures."""


def cost_model(
  apply_fn: ApplyFn,
  variables: PyTree,
  *args: PyTree,
  masks: MaskSelector = "masks",
  batch_axes: BatchAxes = 0,
  measure: str | Roofline = "flops",
  primitives: Sequence[str] | None = None,
  strict: bool = False,
  state_from: Picker | None = None,
) -> CostModel:
  r"""Measure the cost of ``apply_fn(variables, *args)`` as a function of its masks; by default, its FLOPs.

  The function is traced once. An inner product of ``K`` terms costs ``2 K - 1``, elementwise arithmetic and comparisons
  1 per element, reductions 1 per element read, data movement 0; see the page on counting. Only live entries count, as
  in the program that :func:`compact` builds for the same masks:

  .. math:: cost(m) = \sum_{primitives} c \prod_{axes} |\text{live}_{axis}(m)|

  Args:
    apply_fn: ``apply_fn(variables, *args)``, such as ``model.apply``.
    variables: the variables, arrays or ``jax.ShapeDtypeStruct``, including the masks.
    *args: the other arguments, likewise.
    masks: the collection of the masks, or a predicate on tree paths.
    batch_axes: the example axes of ``args``, like ``jax.vmap``'s ``in_axes``: ``(None, 0)`` for a key before the batch,
      1 for time-major input. If all are None (graphs padded to one size), the cost is per call.
    measure: ``"flops"``; ``"macs"``, multiply-accumulates; ``"params"``, live entries of all variables except masks, in
      total; ``"memory"``, the bytes that these take, caches and other state among them; ``"bytes"``, operands and results
      of every node; or a :class:`Roofline`, for seconds.
    primitives: names of the primitives to count, such as ``("dot_general", "conv_general_dilated")``; None for all.
    strict: raise if a masked feature cannot be removed.
    state_from: as in :func:`compact`: picks new values of variables from the output, such as a cache, which shrinks.

  Returns:
    The cost model: ``cost(masks)`` is per example.

  Raises:
    TypeError: for ``primitives`` that are no list of names.
    ValueError: for an unknown measure or primitive, without masks, without the example axes of ``batch_axes``, or, if
      ``strict``, for features that cannot be removed.

  >>> import jax, jax.numpy as jnp
  >>> import flax.linen as nn
  >>> import fisherprune_jax as fp
  >>> model = nn.Sequential([nn.Dense(8), fp.Mask(), nn.Dense(3)])
  >>> x = jnp.ones((2, 4))
  >>> variables = model.init(jax.random.key(0), x)
  >>> cost = fp.cost_model(model.apply, variables, x)
  >>> cost.dense  # 8 (2*4 - 1) + 8 for the bias, 3 (2*8 - 1) + 3
  112.0

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018

    Golub and Van Loan, *Matrix Computations*, for the counts of linear algebra

    JAX, `The jaxpr language <https://docs.jax.dev/en/latest/jaxpr.html>`_
  """
  known = isinstance(measure, Roofline) or measure in MEASURES
  require(known, f"measure must be one of {', '.join(MEASURES)}, or an fp.Roofline", measure)
  names = _names(primitives)
  analysis, tree, examples = analysed(apply_fn, variables, args, masks, batch_axes, strict, state_from)
  if measure in ("params", "memory"):
    require(primitives is None, "primitives must be None where variables are counted", primitives)
    return variables_of(analysis, tree, measure == "memory")
  _check_names(names or (), {node.name for node in analysis.live.specs})
  if isinstance(measure, Roofline):
    counter = RooflineCounter(FlopsCounter(names), BytesCounter(names), measure.weights)
    return cost_of(analysis, tree, examples, counter, measure.seconds)
  return cost_of(analysis, tree, examples, COUNTERS[measure](names))


def _names(primitives: Iterable[str] | None) -> frozenset[str] | None:
  """A checked set of names; None for all primitives."""
  if primitives is None:
    return None
  names = () if isinstance(primitives, str) or not isinstance(primitives, Iterable) else tuple(primitives)
  if not names or not all(isinstance(name, str) for name in names):
    raise TypeError(
      f"primitives must be a list of names, such as ('dot_general',), or None for all, got {primitives!r}."
    )
  return frozenset(names)


def _check_names(names: Iterable[str], here: Set[str]) -> None:
  """Raise for a primitive that runs a program, or that is unknown: not in the network, and without a rule."""
  for name in sorted(names):
    if name in STRUCTURED or name in INLINED:
      raise ValueError(
        f"primitives must name what computes, got {name!r}, which runs a program. Name the primitives in that program: "
        f"this network has {', '.join(sorted(here))}."
      )
    if name not in here | known():
      near = difflib.get_close_matches(name, sorted(here | known())) or sorted(here)
      raise ValueError(
        f"primitives must be names of JAX's primitives, got {name!r}. The nearest are {', '.join(near)}. jax.make_jaxpr of a "
        "function shows those that it uses."
      )


def analysed(
  apply_fn: ApplyFn,
  variables: PyTree,
  args: tuple[PyTree, ...],
  masks: MaskSelector,
  batch_axes: BatchAxes,
  strict: bool = False,
  state_from: Picker | None = None,
) -> tuple[Analysis, VariableTree, int]:
  """The analysis of a function under its masks, its variables, and the number of examples in ``args``."""
  tree = VariableTree(variables, masks)
  examples = batch_size(args, batch_axes)
  analysis = trace_apply(apply_fn, tree, args, state_from).analyse()
  check(analysis, tree, examples, FlopsCounter(), sample_masks(tree.mask_leaves) if strict else ())
  return analysis, tree, examples


def cost_of(
  analysis: Analysis, tree: VariableTree, examples: int, counter: Counter, one: Fraction = Fraction(1)
) -> CostModel:
  """The cost model of an analysed function; ``one`` converts the counter's unit to that of the cost."""
  costs = costs_of(analysis.program, analysis.live, counter)
  entries = (Entry(cost.node.source, cost.label, counter.unit, cost.term, cost.counted) for cost in costs)
  counted = Counted(tuple(entries), tree.mask_tree, one / examples, examples)
  return CostModel.of(counted, counter.unit, owned(analysis, tree))


def variables_of(analysis: Analysis, tree: VariableTree, in_bytes: bool = False) -> CostModel:
  """The cost model of the number of parameters, or of the bytes of all variables, in total."""
  unit = "bytes" if in_bytes else "parameters"
  counted = Counted(tuple(_entries(analysis, tree, unit)), tree.mask_tree, Fraction(1), 1)
  return CostModel.of(counted, unit, owned(analysis, tree))


def _entries(analysis: Analysis, tree: VariableTree, unit: str) -> Iterator[Entry]:
  """The kept part of each variable; all of it, if it is not needed."""
  live, returned = analysis.live, analysis.new_values
  for at, (value, (path, _), is_mask) in enumerate(
    zip(analysis.variables, tree.paths, tree.flags, strict=True)
  ):
    if is_mask:
      continue
    each, label = (value.aval.dtype.itemsize, "memory") if unit == "bytes" else (1, "parameters")
    kept = returned.get(at) or (live.entries(value) if value in live.demanded else whole(value.shape))
    for box, _, when in kept if isinstance(kept, list) else [kept]:
      yield Entry(path_name(path), label, unit, sized(each, box).under(when))
