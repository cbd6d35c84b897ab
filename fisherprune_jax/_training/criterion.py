"""Importance criteria: functions whose parameters name what they need."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fisherprune_jax._errors import describe, require_same_tree, require_shapes
from fisherprune_jax._training.gradients import check_gradients, check_weights
from fisherprune_jax._types import AxisNames, Masks, PyTree

CHECKS: dict[str, Callable[[Any, Masks, AxisNames], None]] = {
  "mask_grads": check_gradients,
  "example_weights": lambda weights, masks, axis_name: check_weights(weights),
}
"""What is required of an argument of ``update``, whichever criterion it is for: ``check(value, masks, axis_name)``."""
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
Required: TypeAlias = dict[str, bool]
"""The names of parameters, in order, and whether they have no default."""


@dataclasses.dataclass(frozen=True)
class Criterion:
  r"""An importance criterion of your own, for ``fp.fisher_prune(cost, method=criterion)``.

  At every update ``importance`` estimates what the loss would lose without each feature, from what it finds in that
  batch. The score is the bias-corrected running mean,

  .. math:: s_t \leftarrow decay_t \, s_{t-1} + (1 - decay_t) \, importance_t, \qquad
    score_t = \frac{s_t}{1 - \prod_{i \le t} decay_i}

  and the feature with the lowest score per cost is masked. Importance that is not finite changes no score. Any other
  weighted mean is a schedule of ``decay``: that of all batches alike is ``decay=lambda n: (n - 1) / n``.

  Attributes:
    importance: a jit-able function that returns a tree like the masks, one number per feature. **The names of its
      parameters say what it needs.** It is called by keyword, with arguments of ``tx.update``: ``updates``, ``params``
      and whatever is passed by keyword, such as ``mask_grads`` or ``example_weights``; and with ``masks`` (as they are),
      ``step`` (from 1), ``axis_name`` and ``name`` (the options). Where an argument is missing, a parameter with a
      default keeps its default; without a default it is an error.
    name: its name in errors.
    averaged: whether the score is the running mean. If not, the score is the latest importance, whatever the ``decay``.
    unit: the unit of the importance, for tables.
    rank: ``rank(scores, ...)``, called with the scores and further arguments as above, at pruning steps only: the place
      for slow work, such as sorting. It returns the scores to prune by, a tree like the masks. If one of them is not
      finite, nothing is pruned. None to prune by the scores as they are.

  Raises:
    TypeError: for a function that cannot be called, or whose parameters have no names.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> ranking = {"m": jnp.array([2.0, 3.0, 1.0])}
  >>> mine = fp.Criterion(lambda: ranking, name="ranked by hand", averaged=False, unit="places")
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(3)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.fisher_prune(cost, prune_every=1, method=mine)
  >>> _, state = tx.update({}, tx.init({}))
  >>> fp.get_masks(state)["m"]
  Array([1., 1., 0.], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018

    Molchanov et al., `Pruning convolutional neural networks for resource efficient inference
    <https://arxiv.org/abs/1611.06440>`_, 2017, compares criteria
  """

  importance: Callable[..., PyTree]
  name: str = "of your own"
  averaged: bool = True
  unit: str = "importance"
  rank: Callable[..., PyTree] | None = None

  def __post_init__(self) -> None:
    _ = self._of_importance, self._of_rank  # raise where parameters cannot be read

  @property
  def uses(self) -> frozenset[str]:
    """The names of the arguments that it may be called with."""
    return frozenset({**self._of_importance, **self._of_rank})

  @functools.cached_property
  def _of_importance(self) -> Required:
    return _parameters_of(self.importance, "importance")

  @functools.cached_property
  def _of_rank(self) -> Required:
    """The parameters of ``rank`` after the scores."""
    if self.rank is None:
      return {}
    return dict(list(_parameters_of(self.rank, "rank").items())[1:])

  def importance_of(self, given: Mapping[str, Any]) -> PyTree:
    """The importance of one update, of which ``given`` has all arguments; the masks among them."""
    masks = given["masks"]
    for name, required in {**self._of_rank, **self._of_importance}.items():
      if required and given.get(name) is None:
        raise ValueError(self._missing(name))
    for name, check in CHECKS.items():
      if name in self.uses and given.get(name) is not None:
        check(given[name], masks, given["axis_name"])
    importance = self.importance(**_chosen(self._of_importance, given))
    self._check(importance, masks, "importance")
    return importance

  def ranked(self, scores: Masks, given: Mapping[str, Any]) -> PyTree:
    """The scores to prune by, from those of the criterion and the arguments that ``importance_of`` has checked."""
    if self.rank is None:
      return scores
    found = self.rank(scores, **_chosen(self._of_rank, given))
    self._check(found, given["masks"], "rank")
    return found

  def _missing(self, name: str) -> str:
    wrappers = (
      "If it was passed, a wrapper around it drops extra arguments, as optax.lookahead, optax.contrib.sam and "
      "MultiSteps' gradient_transformation() do: wrap the optimizer alone, optax.chain(wrapped, fp.fisher_prune(...))."
    )
    if name == "mask_grads":
      return (
        "fisher_prune needs the per-example gradients of the masks, got mask_grads=None. Pass mask_grads from "
        f"fp.value_and_mask_grads: tx.update(grads, state, params, mask_grads=mask_grads). {wrappers}"
      )
    if name == "axis_name":
      return f"The criterion {self.name!r} needs axis_name, got None. Pass it: fp.fisher_prune(..., axis_name=...)."
    how = "tx.update(grads, state, params)" if name == "params" else f"tx.update(..., {name}=...)"
    return f"The criterion {self.name!r} needs {name}, got {name}=None. Pass it: {how}. {wrappers}"

  def _check(self, importance: PyTree, masks: Masks, field: str) -> None:
    """Raises unless there is one number per feature."""
    how = "It is one number per feature."
    require_same_tree(importance, masks, f"The {field} of the criterion {self.name!r}", "the masks", how)
    what = f"The {field} of the criterion {self.name!r} must have the shape"
    require_shapes(importance, masks, lambda shape, path: f"{what} {shape} of the mask at {path}", how)


def _parameters_of(function: Any, field: str) -> Required:
  """The names of a function's parameters; those that ``functools.partial`` has bound are no longer parameters."""
  if not callable(function):
    raise TypeError(f"{field} of a Criterion must be a function, got {describe(function)}.")
  bound = function.keywords if isinstance(function, functools.partial) else {}
  try:
    found = [one for one in inspect.signature(function).parameters.values() if one.name not in bound]
  except ValueError:
    found = None
  if found is None or any(one.kind not in NAMED for one in found):
    raise TypeError(
      f"{field} of a Criterion must name its parameters, such as def {field}(mask_grads, masks), got {function!r}. The names "
      "say what it is called with."
    )
  return {one.name: one.default is one.empty for one in found}


def _chosen(parameters: Required, given: Mapping[str, Any]) -> dict[str, Any]:
  return {name: given[name] for name in parameters if given.get(name) is not None}
