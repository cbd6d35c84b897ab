"""``fp.Pruner`` for modules."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._pruner import pruner
from fisherprune_jax._pruner.gradients import MASK_GRADS, Gradients
from fisherprune_jax._training.finding import get_masks
from fisherprune_jax._training.gradients import Reduction
from fisherprune_jax._types import Masks, Progress, PyTree
from fisherprune_jax.nnx._modules import Call, functional, split
from fisherprune_jax.nnx._training import value_and_mask_grads


class Pruner(pruner.Pruner):
  """``fp.Pruner`` for a ``flax.nnx`` module and ``nnx.Optimizer``; model, loss function and optimizer stay unchanged.

  Args:
    model: the module. Its :class:`Mask` layers are used, or else automatic masks. For the cost at inference, call
      ``model.eval()`` first.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    call: ``call(model, *args)`` instead of ``model(*args)``.
    **options: options of ``fp.Pruner``.

  Methods of ``fp.Pruner`` take the module in place of variables, and the ``nnx.Optimizer`` in place of its state.
  ``apply`` and ``compact`` run the module in its current mode (``train()``, ``eval()``). For the compact network as a
  module, use ``fp.nnx.module(small, model)``.

  >>> import jax, jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
  >>> x = jax.random.normal(jax.random.key(0), (16, 2))
  >>> pruner = fp.nnx.Pruner(model, x, keep=0.5, stop=4)
  >>> optimizer = nnx.Optimizer(model, pruner.wrap(optax.adam(1e-2)), wrt=nnx.Param)
  >>> for _ in range(4):
  ...   loss, grads = pruner.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, optimizer, x)
  ...   _ = optimizer.update(model, grads)
  >>> pruner.compact(model, optimizer).variables["params"]["layers"][0]["kernel"].shape
  (2, 4)
  """

  def __init__(self, model: nnx.Module, *args: Any, call: Call | None = None, **options: Any) -> None:
    self._call = call
    apply_fn, variables = functional(model, call=call)
    own = {name: tree for name, tree in variables.items() if name != COLLECTION or tree}
    super().__init__(apply_fn, own, *args, **options)

  def value_and_grad(
    self, loss_fn: Callable[..., Any], has_aux: bool = False, reduction: Reduction = "mean"
  ) -> Callable[..., Any]:
    """Replaces ``nnx.value_and_grad``: ``f(model, optimizer, *rest) -> (value, grads)``.

    Args:
      loss_fn: ``loss_fn(model, *rest)``; its changes of state (batch statistics, random counters) reach the model.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      reduction: as in ``fp.Pruner.value_and_grad``.

    Returns:
      A function; pass its ``grads`` to ``optimizer.update(model, grads)``.
    """

    def pure(graph: Any) -> Callable[..., Any]:
      def loss(params: PyTree, state: PyTree, *rest: Any) -> Any:
        copy = nnx.merge(graph, {}, params, state, copy=True)
        result = loss_fn(copy, *rest)
        value, aux = result if has_aux else (result, None)
        return value, (aux, nnx.to_pure_dict(split(copy, nnx.Param)[3]))

      return loss

    def value_and_gradients(model: nnx.Module, optimizer: Any, *rest: Any) -> tuple[Any, Any]:
      opt_state = self._state(optimizer)
      if self.auto is None:
        nnx.update(model, get_masks(opt_state))
        given = value_and_mask_grads(loss_fn, has_aux=has_aux, reduction=reduction)(model, *rest)
        value, (grads, mask_grads) = given
        return value, _joined(grads, Gradients(None, mask_grads))
      graph, _, params, state = split(model, nnx.Param)
      compute = super(Pruner, self).value_and_grad(pure(graph), has_aux=True, reduction=reduction)
      pure_state = nnx.to_pure_dict(state)
      (value, (aux, new)), found = compute(nnx.to_pure_dict(params), opt_state, pure_state, *rest)
      nnx.update(model, new)
      nnx.replace_by_pure_dict(params, found.params)
      return ((value, aux) if has_aux else value), _joined(params, found)

    return value_and_gradients

  def one_shot(
    self,
    params: nnx.Module,
    batches: Iterable[PyTree],
    loss_fn: Callable[..., Any] | None = None,
    reconstruct: bool = True,
    candidates: int = 1,
    score_fn: Callable[[nnx.Module, Masks], float] | None = None,
    progress: Progress | None = None,
  ) -> Any:
    """``fp.Pruner.one_shot`` for a module: returns a new module with refitted parameters, and its masks.

    Args:
      params: the module; it is not changed.
      batches: as in ``fp.Pruner.one_shot``.
      loss_fn: ``loss_fn(model, batch)``.
      reconstruct: as in ``fp.Pruner.one_shot``.
      candidates: likewise.
      score_fn: ``score_fn(model, masks)``.
      progress: as in ``fp.Pruner.one_shot``.
    """

    def module(variables: PyTree) -> nnx.Module:
      copy = nnx.clone(params)
      graph, masks, own, state = split(copy, nnx.Param)
      nnx.replace_by_pure_dict(own, variables["params"])
      return nnx.merge(graph, masks, own, state)

    def loss(variables: PyTree, batch: PyTree) -> Any:
      return loss_fn(module(variables), batch)  # type: ignore[misc]

    def score(variables: PyTree, masks: Masks) -> float:
      return score_fn(module(variables), masks)  # type: ignore[misc]

    _, variables = functional(params, call=self._call)
    own = {name: tree for name, tree in variables.items() if name != COLLECTION}
    chosen = (reconstruct, candidates, score_fn and score, progress)
    found = super().one_shot(own, batches, loss_fn and loss, *chosen)
    return [(module(v), m) for v, m in found] if isinstance(found, list) else (module(found[0]), found[1])

  def _state(self, opt_state: Any) -> PyTree:
    return opt_state.opt_state if isinstance(opt_state, nnx.Optimizer) else opt_state

  def _now(self, variables: nnx.Module, opt_state: Any) -> tuple[Callable[..., Any], dict[str, PyTree]]:
    # In the current mode: train() or eval() may have been called since.
    apply_fn, own = functional(variables, call=self._call)
    own[COLLECTION] = self.masks(opt_state)
    return self.auto.wrap(apply_fn, self._batch_axes) if self.auto else apply_fn, own


def _joined(grads: nnx.State, rows: Gradients) -> nnx.State:
  """Gradients for ``nnx.Optimizer``: a state of parameters that includes the per-example mask gradients."""
  sealed = jax.tree.map(nnx.Param, rows.sealed)
  return nnx.State({**grads.raw_mapping, MASK_GRADS: sealed})
