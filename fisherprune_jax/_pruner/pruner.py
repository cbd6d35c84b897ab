"""The whole job in four lines."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax

from fisherprune_jax._auto.auto import Select, auto_mask
from fisherprune_jax._auto.groups import Group
from fisherprune_jax._compaction.compact import Compact, compact
from fisherprune_jax._errors import require
from fisherprune_jax._graph.variables import abstract
from fisherprune_jax._masks import COLLECTION, flatten
from fisherprune_jax._pruner.goal import Keep, check_options, check_reachable, cost_of, falling, targets_of
from fisherprune_jax._pruner.gradients import Gradients
from fisherprune_jax._pruner.inserting import Masked
from fisherprune_jax._pruner.monitoring import Monitor
from fisherprune_jax._pruner.one_shot import Network, Result, one_shot
from fisherprune_jax._pruner.wrapping import wrapped
from fisherprune_jax._training.criteria import DEFAULT
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.finding import get_masks
from fisherprune_jax._training.gradients import Reduction, value_and_mask_grads
from fisherprune_jax._training.options import Options
from fisherprune_jax._training.transform import fisher_prune
from fisherprune_jax._types import ApplyFn, BatchAxes, Masks, Progress, PyTree


class Pruner(Monitor):
  r"""Prunes a network while it trains; the model, the loss function and the optimizer stay as they are.

  The budget falls from the dense cost after step ``start`` to the target at step ``stop``:

  .. math:: budget_n = dense + (target - dense) \cdot \mathrm{clip}((n - start) / (stop - start), 0, 1)

  Every ``every`` steps the features with the lowest importance per cost are masked until the network fits the budget.

  Args:
    apply_fn: ``apply_fn(variables, *args)``, any JAX function: Linen's ``model.apply``, a Haiku ``apply``, a function
      of an Equinox model's arrays. Keyword arguments go in by closure.
    variables: its variables, arrays or ``jax.ShapeDtypeStruct``. If they hold a collection ``"masks"`` (models written with
      :class:`Mask`), these masks are used; otherwise :func:`auto_mask` finds what can be pruned.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    keep: the fraction of the dense cost to keep, in (0, 1]. :meth:`one_shot` takes a sequence of them too.
    target: the cost to come down to, in the unit of ``measure``. Give either ``keep`` or ``target``.
    start: no pruning up to and including this step.
    stop: the step at which the target is reached.
    every: steps between two pruning steps.
    measure: what the cost counts, as in :func:`cost_model`; or a :class:`CostModel` of the same masks.
    method: the importance criterion, as in :func:`fisher_prune`.
    select: which groups :func:`auto_mask` masks: a predicate on :class:`Group`, or names; None for all.
    blocks: whether :func:`auto_mask` masks whole residual branches too.
    rows: whether :func:`auto_mask` masks rows of tables too; measure the cost in ``"params"`` or ``"memory"`` then.
    batch_axes: the example axes of ``args``, like ``jax.vmap``'s ``in_axes``.
    **options: other options of :func:`fisher_prune`, such as ``min_features``, ``exclude``, ``axis_name``. ``depth=n`` keeps n
      of the residual blocks and needs ``blocks=True``; their number falls like the budget. With ``keep=1.0`` widths stay.

  Attributes:
    auto: the automatic masks; None if the variables hold masks.
    cost: the cost model.
    target: the cost at the end, in the unit of the cost; the smallest of several.

  Raises:
    ValueError, TypeError: for arguments out of their range, or a network without anything to prune.

  >>> import jax, jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> def model(variables, x):
  ...   return jnp.tanh(x @ variables["params"]["w"]) @ variables["params"]["v"]
  >>> def loss_fn(params, batch):
  ...   return jnp.mean((model({"params": params}, batch["x"]) - batch["y"]) ** 2)
  >>> rng = jax.random.split(jax.random.key(0), 3)
  >>> params = {"w": jax.random.normal(rng[0], (3, 8)), "v": jax.random.normal(rng[1], (8, 2))}
  >>> batch = {"x": jax.random.normal(rng[2], (16, 3)), "y": jnp.ones((16, 2))}
  >>> pruner = fp.Pruner(model, {"params": params}, batch["x"], keep=0.5, start=1, stop=5)
  >>> tx = pruner.wrap(optax.adam(1e-2))
  >>> opt_state = tx.init(params)
  >>> for _ in range(6):
  ...   loss, grads = pruner.value_and_grad(loss_fn)(params, opt_state, batch)
  ...   updates, opt_state = tx.update(grads, opt_state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> small = pruner.compact(params, opt_state)
  >>> small.variables["params"]["w"].shape
  (3, 4)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018

    Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017: a budget that falls while the
    network trains
  """

  def __init__(
    self,
    apply_fn: ApplyFn,
    variables: PyTree,
    *args: PyTree,
    keep: Keep = None,
    target: float | None = None,
    start: int = 0,
    stop: int | None = None,
    every: int = 1,
    measure: Any = "flops",
    method: str | Criterion = DEFAULT,
    select: Select = None,
    blocks: bool = False,
    rows: bool = False,
    batch_axes: BatchAxes = 0,
    **options: Any,
  ) -> None:
    check_options(keep, target, start, stop, options)
    self._args, self._batch_axes = abstract(args), batch_axes
    self.auto = None
    self._apply, found = apply_fn, variables
    if not (isinstance(variables, Mapping) and COLLECTION in variables):
      self.auto = auto_mask(
        apply_fn, variables, *args, select=select, blocks=blocks, rows=rows, batch_axes=batch_axes
      )
      self._apply, found = self.auto.apply, self.auto.variables
    self._masked, self._shapes = Masked(variables, self.auto), abstract(found)
    self.cost = cost_of(measure, self._apply, found, args, batch_axes)
    self._targets = targets_of(self.cost, keep, target)
    self.target, self._is_family = min(self._targets), isinstance(keep, Sequence)
    self._start, self._stop, self._every = start, stop, every
    self._method, self._options = method, options
    checked = Options(self.cost, method=method, **options)
    self._blocks = int(checked.rows.blocks.sum())
    check_reachable(self.cost, self.target, checked.floors)

  @property
  def groups(self) -> tuple[Group, ...]:
    """The groups that :func:`auto_mask` found; empty if the variables hold masks."""
    return self.auto.groups if self.auto else ()

  def wrap(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer with pruning beside it.

    Args:
      optimizer: any Optax transformation. It gets ordinary gradients, so clipping, ``optax.MultiSteps``,
        ``optax.contrib.sam`` and line searches belong inside.

    Returns:
      A transformation for the gradients of :meth:`value_and_grad`. ``update`` passes ``example_weights`` on to pruning and
      other extra arguments to the optimizer. Its state is a ``PrunerState``.

    Raises:
      ValueError: if the pruner has no ``stop``.
    """
    require(
      self._stop is not None, "Pruner.wrap needs the step at which the target is reached", self._stop, "Pass "
      "fp.Pruner(..., stop=number_of_steps)."
    )  # fmt: skip
    require(len(self._targets) == 1, "Pruner.wrap takes one keep", self._targets, "Several are for one_shot.")
    return wrapped(optimizer, self._pruning())

  def value_and_grad(
    self, loss_fn: Callable[..., Any], has_aux: bool = False, reduction: Reduction = "mean"
  ) -> Callable[..., Any]:
    """Replaces ``jax.value_and_grad``: the same value of the masked network, and gradients for :meth:`wrap`.

    Args:
      loss_fn: ``loss_fn(params, *rest)``, without a word about masks. ``params`` is what the optimizer trains: the
        parameters, or all variables. An argument with the structure of another collection of the variables
        (``batch_stats``) is that collection. The first other argument that is no random key is the batch, whose arrays lead
        with the example axis.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      reduction: how ``loss_fn`` adds up examples: ``"mean"``, ``"sum"``, or a factor, as in :func:`value_and_mask_grads`.

    Returns:
      ``f(params, opt_state, *rest) -> (value, grads)``, where ``grads`` are :class:`Gradients`.

    Raises:
      ValueError: when called, for parameters of another network, or without a batch.
    """

    def value_and_gradients(params: PyTree, opt_state: PyTree, *rest: Any) -> tuple[Any, Any]:
      masks = get_masks(opt_state)
      if not jax.tree.leaves(masks):
        raise ValueError(
          "pruner.value_and_grad needs an optimizer state with masks, got that of a compact network. Train it on "
          "with jax.value_and_grad."
        )
      places = self._masked.collections(rest)
      masked = self._masked.loss(loss_fn, params, places)
      at = self._masked.batch_of(rest, places)

      def loss(params: PyTree, masks: Masks, batch: PyTree, *others: Any) -> Any:
        return masked(params, masks, *others[:at], batch, *others[at:])

      others = (*rest[:at], *rest[at + 1 :])
      differentiate = value_and_mask_grads(loss, has_aux=has_aux, reduction=reduction)
      value, (grads, mask_grads) = differentiate(params, masks, rest[at], *others)
      return value, Gradients(grads, mask_grads)

    return value_and_gradients

  def one_shot(
    self,
    params: PyTree,
    batches: Iterable[PyTree],
    loss_fn: Callable[..., Any] | None = None,
    reconstruct: bool = True,
    candidates: int = 1,
    score_fn: Callable[[PyTree, Masks], float] | None = None,
    progress: Progress | None = None,
  ) -> Any:
    """Prune a trained network without training.

    Attention heads are first brought into a basis where few features hold most; outputs stay the same. Features are chosen
    by what their removal changes in the outputs once everything that reads them is refitted, over their cost. Residual blocks
    are measured by leaving them out, on the first batch. Then :func:`reconstruct` refits the network.

    Args:
      params: the parameters, if there are no other variables, or all variables.
      batches: an iterable of batches without labels: the arguments of ``apply_fn`` as a tuple, or its only argument. Tuples
        may hold more behind them.
      loss_fn: ``loss_fn(params, batch)``: importance comes from this loss and the pruner's ``method``. None takes it from the
        outputs, which is better for a network that has learnt the labels of the batches.
      reconstruct: whether to refit; otherwise parameters stay as they are, and features are chosen for that.
      candidates: how many ways of choosing features to try, at most 6; the best one is kept.
      score_fn: ``score_fn(params, masks)``, what is best: larger is better. None takes the error of the outputs on a quarter
        of the batches.
      progress: as of :func:`reconstruct`.

    Returns:
      ``(params, masks)``, for :meth:`apply` and :meth:`compact`; a list of them for a sequence of ``keep``.

    Raises:
      ValueError, TypeError: for batches that are none, or not those of ``apply_fn``.
    """
    dense = self._masked.complete(params, self.cost.masks)
    network = Network(
      self._apply, dense, len(self._args), self.cost, self._targets, self._method, self._options
    )

    def like(result: Result) -> tuple[PyTree, Masks]:
      return self._masked.like(params, result.variables), result.masks

    def loss(variables: PyTree, masks: Masks, batch: PyTree) -> Any:
      given = self._masked.like(params, variables)
      return self._masked.loss(loss_fn, given, {})(given, masks, batch)  # type: ignore[arg-type]

    def score(result: Result) -> float:
      return score_fn(*like(result))  # type: ignore[misc]

    found = one_shot(
      network, batches, loss_fn and loss, reconstruct, candidates, score_fn and score, progress
    )
    pruned = [like(result) for result in found]
    return pruned if self._is_family else pruned[0]

  def apply(self, variables: PyTree, opt_state: PyTree, *args: PyTree) -> PyTree:
    """The outputs of the masked network.

    Args:
      variables: the parameters, if there are no other variables, or all variables.
      opt_state: the state of the wrapped optimizer, or masks.
      *args: the arguments of ``apply_fn``.
    """
    apply_fn, complete = self._now(variables, opt_state)
    return apply_fn(complete, *args)

  def compact(self, variables: PyTree, opt_state: PyTree, **options: Any) -> Compact:
    """The network without its masked features.

    Args:
      variables: the parameters, if there are no other variables, or all variables.
      opt_state: the state of the wrapped optimizer, or masks.
      **options: those of :func:`compact`.
    """
    apply_fn, complete = self._now(variables, opt_state)
    return compact(apply_fn, complete, *self._args, batch_axes=self._batch_axes, **options)

  def _now(self, variables: PyTree, opt_state: PyTree) -> tuple[ApplyFn, PyTree]:
    """The network as a function, and all its variables with the masks of an optimizer state."""
    return self._apply, self._masked.complete(variables, self.masks(opt_state))

  def _pruning(self) -> optax.GradientTransformationExtraArgs:
    assert self._stop is not None
    options = dict(self._options)
    if isinstance(depth := options.get("depth"), int):
      options["depth"] = falling(self._blocks, depth, self._start, self._stop)
    return fisher_prune(
      self.cost,
      prune_every=self._every,
      burn_in=self._start,
      target=falling(self.cost.dense, self.target, self._start, self._stop),
      features_per_prune=flatten(self.cost.masks).size,
      method=self._method,
      **options,
    )
