"""The optimizer of ``Pruner.wrap``: the user's own, and pruning beside it."""

import functools
from typing import Any, NamedTuple

import jax
import optax

from fisherprune_jax._errors import describe
from fisherprune_jax._pruner.gradients import Gradients, joined, plain
from fisherprune_jax._training.finding import get_state
from fisherprune_jax._training.state import FisherPruneState
from fisherprune_jax._types import PyTree


class PrunerState(NamedTuple):
  """The state of a wrapped optimizer.

  Attributes:
    optimizer: the state of the user's optimizer.
    pruning: the pruning state.
  """

  optimizer: optax.OptState
  pruning: FisherPruneState


def wrapped(
  optimizer: optax.GradientTransformation, pruning: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
  """An optimizer that gets ordinary gradients, and a pruning transformation that gets those of the masks."""
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params: PyTree) -> PrunerState:
    return PrunerState(optimizer.init(params), pruning.init(params))

  def update(
    grads: PyTree, state: PrunerState, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, PrunerState]:
    if isinstance(state, PrunerState):
      grads = joined(grads, state.pruning.masks)
    _check(grads, state)
    extra = {name: _plain_argument(value) for name, value in extra.items()}
    own = {name: value for name, value in extra.items() if name != "example_weights"}
    updates, inner = optimizer.update(plain(grads), state.optimizer, params, **own)
    given = {**extra, "mask_grads": grads.mask_grads} if isinstance(grads, Gradients) else {}
    trained = params.fast if isinstance(params, optax.LookaheadParams) else params
    _, pruned = pruning.update(updates, state.pruning, trained, **given)
    return updates, PrunerState(inner, pruned)

  return optax.GradientTransformationExtraArgs(init, update)


def _plain_argument(value: Any) -> Any:
  """An extra argument without mask gradients; functions, such as those of line searches, return none either."""
  if not callable(value):
    return plain(value)
  return functools.wraps(value)(lambda *args, **kwargs: plain(value(*args, **kwargs)))


def _check(grads: PyTree, state: PrunerState) -> None:
  is_wrapped = isinstance(state, PrunerState)
  if is_wrapped and (isinstance(grads, Gradients) or not jax.tree.leaves(state.pruning.masks)):
    return  # a compact network has no masks, and is trained on with ordinary gradients
  if not is_wrapped:
    get_state(state)  # raises if there is no pruning state at all
    raise TypeError(
      f"The optimizer of pruner.wrap needs the state of its own init, got {describe(state)}. Initialize it with "
      "opt_state = tx.init(params)."
    )
  raise TypeError(
    f"The optimizer of pruner.wrap needs the gradients of pruner.value_and_grad, got {describe(grads)} without mask "
    "gradients. Replace jax.value_and_grad(loss_fn)(params, batch) by "
    "pruner.value_and_grad(loss_fn)(params, opt_state, batch)."
  )
