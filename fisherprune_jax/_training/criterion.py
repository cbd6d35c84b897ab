"""What says how much each feature matters: criteria, of which Fisher's is the first."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fisherprune_jax._errors import describe, require_same_tree, require_shapes
from fisherprune_jax._training.gradients import check_gradients, check_weights
from fisherprune_jax._types import AxisNames, Masks, PyTree

CHECKS: dict[str, Callable[[Any, Masks, AxisNames], None]] = {
  "mask_grads": check_gradients,
  "example_weights": lambda weights, masks, axis_name: check_weights(weights),
}
"""What is required of an argument of ``update``, whichever criterion it is for: ``check(value, masks, axis_name)``."""


@dataclasses.dataclass(frozen=True)
class Criterion:
  r"""How much each feature matters, for ``fp.fisher_prune(cost, method=criterion)``.

  At every update ``signal`` says of each feature what the loss would lose with it, by what it finds in that batch.
  The score is the bias-corrected running mean of these signals,

  .. math:: s_t \leftarrow decay_t \, s_{t-1} + (1 - decay_t) \, signal_t, \qquad
    score_t = \frac{s_t}{1 - \prod_{i \le t} decay_i}

  and the feature goes whose score is smallest for its cost. A signal that is not finite changes no score. Any other
  weighted mean is a schedule of ``decay``: that of all batches alike is ``decay=lambda n: (n - 1) / n``.

  Attributes:
    signal: ``signal(**arguments)``, called by keyword with the arguments that ``needs`` and ``takes`` name; returns a tree
      like the masks, one number per feature. It must be jit-able.
    name: what it is called in errors.
    needs: names of arguments that must not be None. They are those of ``tx.update``: ``"updates"``, ``"params"``, and
      whatever is passed to it by keyword, as ``"mask_grads"``; or ``"masks"`` (as they stand), ``"step"`` (from 1),
      ``"axis_name"`` and ``"name"`` (the options).
    takes: names of arguments that may be missing; they are None then.
    averaged: whether the score is the running mean; else it is the last signal, whatever the ``decay``.
    unit: of the signal, as tables show it.
    rank: ``rank(scores, **arguments)``, called with the scores and the arguments of that update where features are pruned,
      and at no other step: the place for what takes long, such as sorting. It returns the scores to prune by, a tree like
      the masks. If one of them is not finite, nothing is pruned. None to prune by the scores as they are.

  Raises:
    TypeError: for a ``signal`` that cannot be called, or names that are no tuple of strings.

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

  signal: Callable[..., PyTree]
  name: str = "of your own"
  needs: tuple[str, ...] = ()
  takes: tuple[str, ...] = ()
  averaged: bool = True
  unit: str = "signal"
  rank: Callable[..., PyTree] | None = None

  def __post_init__(self) -> None:
    for field in ("signal", "rank"):
      function = getattr(self, field)
      if not callable(function) and (field == "signal" or function is not None):
        raise TypeError(f"{field} of a Criterion must be a function, got {describe(function)}.")
    for field in ("needs", "takes"):
      names = getattr(self, field)
      if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(
          f"{field} of a Criterion must be a tuple of names, such as ('params',), got {names!r}."
        )

  @property
  def asks_for(self) -> tuple[str, ...]:
    """The names of all that ``signal`` is called with."""
    return (*self.needs, *self.takes)

  def signal_of(self, given: Mapping[str, Any]) -> PyTree:
    """The signal of one update, of which ``given`` has all arguments; the masks among them."""
    masks = given["masks"]
    for name in self.needs:
      if given.get(name) is None:
        raise ValueError(self._missing(name))
    arguments = self._arguments(given)
    for name, check in CHECKS.items():
      if arguments.get(name) is not None:
        check(arguments[name], masks, given["axis_name"])
    signal = self.signal(**arguments)
    self._check(signal, masks, "signal")
    return signal

  def ranked(self, scores: Masks, given: Mapping[str, Any]) -> PyTree:
    """The scores to prune by, from those of the criterion and what the update is given, as ``signal_of`` has checked it."""
    if self.rank is None:
      return scores
    found = self.rank(scores, **self._arguments(given))
    self._check(found, given["masks"], "rank")
    return found

  def _arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given.get(name) for name in self.asks_for}

  def _missing(self, name: str) -> str:
    wrappers = (
      "If it was passed, a wrapper around it drops extra arguments, as optax.lookahead, optax.contrib.sam and "
      "MultiSteps' gradient_transformation() do: wrap the optimizer alone, optax.chain(wrapped, fp.fisher_prune(...))."
    )
    if name == "mask_grads":
      return (
        "fisher_prune needs the per-example gradients of the masks, got mask_grads=None. Pass mask_grads from "
        f"fp.value_and_grads: tx.update(grads, state, params, mask_grads=mask_grads). {wrappers}"
      )
    if name == "axis_name":
      return f"The criterion {self.name!r} needs axis_name, got None. Pass it: fp.fisher_prune(..., axis_name=...)."
    how = "tx.update(grads, state, params)" if name == "params" else f"tx.update(..., {name}=...)"
    return f"The criterion {self.name!r} needs {name}, got {name}=None. Pass it: {how}. {wrappers}"

  def _check(self, signal: PyTree, masks: Masks, field: str) -> None:
    """Raises unless there is one number per feature."""
    how = "It is one number per feature."
    require_same_tree(signal, masks, f"The {field} of the criterion {self.name!r}", "the masks", how)
    what = f"The {field} of the criterion {self.name!r} must have the shape"
    require_shapes(signal, masks, lambda shape, path: f"{what} {shape} of the mask at {path}", how)
