"""Custom importance criteria."""

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
"""Checks of arguments of ``update``: ``check(value, masks, axis_name)``."""
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
Required: TypeAlias = dict[str, bool]
"""Parameter names in order; true without a default."""


@dataclasses.dataclass(frozen=True)
class Criterion:
  r"""A custom importance criterion, for ``fp.fisher_prune(cost, method=criterion)``.

  At every update ``importance`` estimates from one batch how much the loss grows without each feature. The score is the
  bias-corrected running mean,

  .. math:: s_t \leftarrow decay_t \, s_{t-1} + (1 - decay_t) \, importance_t, \qquad
    score_t = \frac{s_t}{1 - \prod_{i \le t} decay_i}

  The feature with the lowest score per cost is masked. A batch with importance that is not finite changes no score. A
  schedule of ``decay`` gives other means: ``decay=lambda n: (n - 1) / n`` weights all batches equally.

  Attributes:
    importance: a jit-able function that returns one number per feature, a tree like the masks. **Its parameter names
      select its arguments**, which are passed by keyword. Arguments of ``tx.update`` are available (``updates``,
      ``params``, ``mask_grads``, ``example_weights`` and others). So are the current ``masks``, ``step`` (from 1), and
      the options ``axis_name`` and ``name``. A missing argument is an error, unless the parameter has a default.
    name: its name in errors.
    averaged: whether the score is the running mean; if not, it is the latest importance, whatever the ``decay``.
    unit: the unit of the importance, for tables.
    rank: ``rank(scores, ...)`` returns the scores to prune by; further parameters are like those of ``importance``. It
      runs at pruning steps only, so it may be slow. Scores that are not finite prevent pruning. None: the scores as
      they are.

  Raises:
    TypeError: unless the functions are callable and name their parameters.

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
    _ = self._of_importance, self._of_rank  # raise now

  @property
  def uses(self) -> frozenset[str]:
    """The names of all arguments that it uses."""
    return frozenset({**self._of_importance, **self._of_rank})

  @functools.cached_property
  def _of_importance(self) -> Required:
    return _parameters_of(self.importance, "importance")

  @functools.cached_property
  def _of_rank(self) -> Required:
    """The parameters of ``rank``, except the scores."""
    if self.rank is None:
      return {}
    return dict(list(_parameters_of(self.rank, "rank").items())[1:])

  def importance_of(self, given: Mapping[str, Any]) -> PyTree:
    """The importance, from the arguments of one update and its masks; checks both."""
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
    """The scores to prune by; ``importance_of`` has checked the arguments."""
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
    how = "It is one number per feature."
    require_same_tree(importance, masks, f"The {field} of the criterion {self.name!r}", "the masks", how)
    what = f"The {field} of the criterion {self.name!r} must have the shape"
    require_shapes(importance, masks, lambda shape, path: f"{what} {shape} of the mask at {path}", how)


def _parameters_of(function: Any, field: str) -> Required:
  """The parameters of a function, except keywords bound by ``functools.partial``."""
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
