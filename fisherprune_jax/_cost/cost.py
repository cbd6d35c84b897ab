"""The cost of a masked network in FLOPs per example, and what each feature contributes to it."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._cost.budget import ExactCost
from fisherprune_jax._cost.meters import FlopsMeter
from fisherprune_jax._errors import require_same_tree
from fisherprune_jax._graph import exact as whole_numbers
from fisherprune_jax._graph.blockers import check, sample_masks
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.examples import batch_size
from fisherprune_jax._graph.prices import Prices
from fisherprune_jax._graph.structured import Meter, costs_of
from fisherprune_jax._graph.terms import collect, total
from fisherprune_jax._graph.traced import Analysis, trace_apply
from fisherprune_jax._graph.variables import MaskSelector, VariableTree, sizes_of, vectors_of
from fisherprune_jax._masks import flatten, unflatten
from fisherprune_jax._types import ApplyFn, Array, BatchAxes, Masks, PyTree


class NotCounted(float):
  """What nobody knows the cost of: nothing in a sum, and shown as ``not counted``, not as a zero."""

  def __repr__(self) -> str:
    return "not counted"

  def __format__(self, spec: str) -> str:
    return "not counted"

  __str__ = __repr__


class Row(NamedTuple):
  """One line of a cost breakdown, in FLOPs per example.

  Attributes:
    where: the user's source line.
    primitive: its name; with ``(not counted)`` behind it if no rule says what it costs.
    dense: with every feature alive.
    now: under the masks; as ``dense``, zero in a sum and shown as ``not counted`` if that is so.
  """

  where: str
  primitive: str
  dense: float
  now: float


class CostModel:
  """What a network costs under given masks.

  Made by :func:`cost_model`, or by :meth:`from_functions` for a cost of your own (latency, bytes, energy).

  Attributes:
    masks: the tree of all-ones masks.
    dense: the cost per example with every feature alive.
  """

  def __init__(
    self,
    masks: Masks,
    total: Callable[[Masks], jax.Array],
    per_feature: Callable[[Masks], Masks],
    exact: Callable[[Masks], Masks] | None = None,
    breakdown: Callable[[Masks], list[Row]] | None = None,
    dense: float | None = None,
    exact_cost: ExactCost | None = None,
  ) -> None:
    with jax.ensure_compile_time_eval():  # it may be made inside a function that is traced
      self.masks = jax.tree.map(lambda m: jnp.ones(m.shape, jnp.float32), masks)
      self.dense = float(total(self.masks)) if dense is None else dense
    self._total = jax.jit(total)
    self._per_feature = per_feature
    self._exact = exact
    self._breakdown = breakdown
    self._exact_cost = None if exact_cost is None else exact_cost._replace(digits=jax.jit(exact_cost.digits))

  @classmethod
  def from_functions(
    cls, masks: Masks, total: Callable[[Masks], Masks], per_feature: Callable[[Masks], Masks]
  ) -> "CostModel":
    """A cost model of your own.

    Args:
      masks: a tree of masks; only shapes matter.
      total: ``total(masks)``, a scalar: the cost per example. Must be jit-able.
      per_feature: ``per_feature(masks)``, a tree like ``masks``: the drop in cost if that one feature also
        went. Must be jit-able.

    Returns:
      A cost model with no breakdown, whose ``exact`` rounds ``total``.

    >>> import jax, jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> masks = {"a": jnp.ones(3)}
    >>> cost = fp.CostModel.from_functions(
    ...   masks, total=lambda m: 7.0 * jnp.sum(m["a"]), per_feature=lambda m: jax.tree.map(lambda x: 7.0 * x, m))
    >>> cost.dense
    21.0
    """
    return cls(masks, lambda m: jnp.asarray(total(m), jnp.float32), jax.jit(per_feature))

  def __call__(self, masks: Masks) -> jax.Array:
    """The cost per example under ``masks``, a float32 scalar; jit-able."""
    self._check(masks)
    return self._total(masks)

  def per_feature(self, masks: Masks) -> Masks:
    """The drop in cost per example if one feature also went: a float32 tree like ``masks``; jit-able."""
    self._check(masks)
    return self._per_feature(masks)

  def exact(self, masks: Masks) -> int:
    """The cost of one traced batch, as an integer computed on the host."""
    self._check(masks)
    if self._exact is None:
      return round(float(self._total(masks)))
    return self._exact(masks)

  def exceeds(self, masks: Masks, target: float | Array) -> jax.Array:
    """Whether the cost is above a target per example, a boolean scalar; jit-able.

    It is decided on whole numbers, the FLOPs of the traced batch and the target times its examples, which
    ``cost(masks) > target`` cannot be: float32 is off by 3 at 50 million. A cost of your own is compared as it is.

    Args:
      masks: a tree of masks.
      target: a number, of a Python float the nearest quotient, or an array, of which every bit counts.

    >>> import jax, jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> apply = lambda v, x: (x @ v["w"]) * v["masks"]
    >>> variables = {"w": jax.ShapeDtypeStruct((500_001, 50), jnp.float32), "masks": jnp.ones(50)}
    >>> cost = fp.cost_model(apply, variables, jax.ShapeDtypeStruct((1, 500_001), jnp.float32))
    >>> cost.dense, float(cost(cost.masks))
    (50000050.0, 50000048.0)
    >>> bool(cost.exceeds(cost.masks, 50_000_049)), bool(cost.exceeds(cost.masks, 50_000_050))
    (True, False)
    """
    self._check(masks)
    if self._exact_cost is None:
      return self._total(masks) > target
    return self._exact_cost.exceeds(masks, target)

  def breakdown(self, masks: Masks) -> list[Row]:
    """Where the FLOPs are: one row per source line and primitive, dense and under ``masks``."""
    self._check(masks)
    return [] if self._breakdown is None else self._breakdown(masks)

  def _check(self, masks: Masks) -> None:
    if isinstance(masks, int | np.integer) or (hasattr(masks, "ndim") and masks.ndim == 0):
      raise TypeError(
        "A cost model takes a tree of masks, got a scalar. If this came from optax.inject_hyperparams, which "
        "calls every callable argument with the step: use fp.inject_hyperparams, or pass "
        "static_args=('cost', 'prune_every', 'burn_in', 'features_per_prune', 'min_features') and "
        "hyperparam_dtype=jnp.float32."
      )
    require_same_tree(
      masks, self.masks, "masks", "the cost model's masks", "Build the cost model for this model."
    )
    for given, ours in zip(jax.tree.leaves(masks), jax.tree.leaves(self.masks), strict=True):
      if given.shape != ours.shape:
        raise ValueError(
          f"A mask must have the shape {ours.shape} that the cost model was built for, got {given.shape}. "
          "Build the cost model for this model."
        )


def cost_model(
  apply_fn: ApplyFn,
  variables: PyTree,
  *args: PyTree,
  masks: MaskSelector = "masks",
  batch_axes: BatchAxes = 0,
  primitives: Sequence[str] | None = None,
  pad_taps: bool = True,
  strict: bool = False,
) -> CostModel:
  r"""Counts the FLOPs of ``apply_fn(variables, *args)`` as a function of its masks.

  The function is traced once. An inner product of ``K`` terms costs ``2 K - 1``, elementwise arithmetic and
  comparisons 1 per element, reductions 1 per element read, data movement 0; see the README. Only
  live entries count: the cost is that of the program that :func:`compact` builds for the same masks, so it is

  .. math:: cost(m) = \sum_{primitives} c \prod_{axes} |\text{live}_{axis}(m)|

  Args:
    apply_fn: ``apply_fn(variables, *args)``, such as ``model.apply``.
    variables: the variables, arrays or ``jax.ShapeDtypeStruct``, with the masks among them.
    *args: the other arguments, likewise.
    masks: the collection that holds the masks, or a predicate on tree paths.
    batch_axes: where the example axes of ``args`` are, like ``jax.vmap``'s ``in_axes``: ``(None, 0)`` for a key
      before the batch, 1 for time-major input. With None alone (graphs padded to one size) FLOPs are per call.
    primitives: names of the primitives to count, such as ``("dot_general",)``; None counts all.
    pad_taps: whether the taps of convolutions and windows that fall on padding count, as most counters have it; False
      counts what is multiplied and added alone, as XLA does for convolutions.
    strict: raise where a dead feature cannot be removed, instead of keeping it.

  Returns:
    The cost model: ``cost(masks)`` is in FLOPs per example.

  Raises:
    ValueError: without masks, without an example axis where ``batch_axes`` says that there is one, or, if
      ``strict``, where something cannot be removed.

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
  tree = VariableTree(variables, masks)
  examples = batch_size(args, batch_axes)
  analysis = trace_apply(apply_fn, tree, args).analyse()
  names, everything = None if primitives is None else frozenset(primitives), FlopsMeter()
  check(analysis, tree, examples, everything, sample_masks(tree.mask_leaves) if strict else ())
  meter = everything._replace(primitives=names, pad_taps=pad_taps)
  return cost_of(analysis, tree.mask_tree, examples, meter)


def cost_of(analysis: Analysis, masks: Masks, examples: int, meter: Meter) -> CostModel:
  """The cost model of an analysed function."""
  costs = list(costs_of(analysis.program, analysis.live, meter))
  terms = collect(cost.term for cost in costs)
  # Made when it is asked for: who wants the count of given masks alone can do without.
  prices = functools.cache(lambda: Prices(terms, sizes_of(jax.tree.leaves(masks))))

  def per_example(masks: Masks) -> jax.Array:
    return prices().total(_alive(masks)) / examples

  drops = jax.jit(lambda masks: prices().drops(_alive(masks)) / examples)

  def per_feature(masks: Masks) -> Masks:
    return unflatten(drops(masks), masks)

  def exact(masks: Masks) -> int:
    return total(terms, _evaluation(masks))

  def digits(masks: Masks) -> whole_numbers.Digits:
    sizes = functools.partial(prices().sizes, _alive(masks))
    return whole_numbers.total(terms, sizes, whole_numbers.digits_for(dense))

  def breakdown(masks: Masks) -> list[Row]:
    ones = jax.tree.map(lambda m: np.ones(m.shape), masks)
    states = [_evaluation(ones), _evaluation(masks)]
    rows: dict[tuple[str, str], list[float]] = {}
    for cost in costs:
      if not cost.counted:
        rows[cost.node.source, f"{cost.label} (not counted)"] = [NotCounted()] * 2
        continue
      row = rows.setdefault((cost.node.source, cost.label), [0.0, 0.0])
      for i, ev in enumerate(states):
        row[i] += total([cost.term], ev) / examples
    return [Row(*where, *counts) for where, counts in rows.items()]

  dense = exact(jax.tree.map(lambda m: np.ones(m.shape), masks))
  exact_cost = ExactCost(digits, dense, examples)
  return CostModel(masks, per_example, per_feature, exact, breakdown, dense / examples, exact_cost)


def _evaluation(masks: Masks) -> Evaluation:
  return Evaluation(vectors_of(jax.tree.leaves(masks)))


def _alive(masks: Masks) -> jax.Array:
  return flatten(masks) != 0
