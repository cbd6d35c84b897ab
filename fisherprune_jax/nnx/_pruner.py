"""``fp.Pruner`` for modules."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fisherprune_jax._compaction.compact import Compact, compact
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._pruner import pruner
from fisherprune_jax._pruner.gradients import MASK_GRADS, Gradients
from fisherprune_jax._training.finding import get_masks
from fisherprune_jax._training.gradients import Reduction
from fisherprune_jax._types import Masks, PyTree
from fisherprune_jax.nnx._modules import Call, functional, split
from fisherprune_jax.nnx._training import value_and_grads


class Pruner(pruner.Pruner):
  """``fp.Pruner`` for a ``flax.nnx`` module, with ``nnx.Optimizer``; model, loss function and optimizer stay as they are.

  Args:
    model: the module. If it holds :class:`Mask` layers, their masks are used; otherwise automatic ones are. Call
      ``model.eval()`` first for the cost of the network that is served.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    call: ``call(model, *args)`` instead of ``model(*args)``.
    **options: those of ``fp.Pruner``.

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
      loss_fn: ``loss_fn(model, *rest)``. What it changes in the model (batch statistics, random counters) is changed in
        the model that is passed.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      reduction: as in ``fp.Pruner.value_and_grad``.

    Returns:
      A function whose ``grads`` go to ``optimizer.update(model, grads)``.
    """

    def pure(graph: Any) -> Callable[..., Any]:
      def loss(params: PyTree, state: PyTree, *rest: Any) -> Any:
        copy = nnx.merge(graph, {}, params, state, copy=True)
        result = loss_fn(copy, *rest)
        value, aux = result if has_aux else (result, None)
        return value, (aux, nnx.to_pure_dict(split(copy, nnx.Param)[3]))

      return loss

    def value_and_gradients(model: nnx.Module, optimizer: Any, *rest: Any) -> tuple[Any, Any]:
      opt_state = _pure(optimizer)
      if self.auto is None:
        nnx.update(model, get_masks(opt_state))
        given = value_and_grads(loss_fn, has_aux=has_aux, reduction=reduction)(model, *rest)
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

  def apply(self, model: nnx.Module, optimizer: Any, *args: PyTree) -> PyTree:
    """The outputs of the masked network, in the mode (``train()``, ``eval()``) that the model is in.

    Args:
      model: the module.
      optimizer: the ``nnx.Optimizer``, its state, or masks.
      *args: the arguments of the model.
    """
    apply_fn, variables = self._now(model, optimizer)
    return apply_fn(variables, *args)

  def compact(  # type: ignore[override]  # a module has its variables inside
    self, model: nnx.Module, optimizer: Any, **options: Any
  ) -> Compact:
    """The network without its masked features; ``fp.nnx.module(small, model)`` makes a module of it.

    Args:
      model: the module; call ``model.eval()`` first for the network to serve.
      optimizer: the ``nnx.Optimizer``, its state, or masks.
      **options: those of ``fp.compact``.
    """
    apply_fn, variables = self._now(model, optimizer)
    return compact(apply_fn, variables, *self._args, batch_axes=self._batch_axes, **options)

  def masks(self, optimizer: Any) -> Masks:
    """The masks of an ``nnx.Optimizer``, of its state, or as they are given.

    Args:
      optimizer: one of these.
    """
    return super().masks(_pure(optimizer))

  def summary(self, optimizer: Any) -> str:
    """A table of masks; see ``fp.summary``."""
    return super().summary(_pure(optimizer))

  def _now(self, model: nnx.Module, optimizer: Any) -> tuple[Callable[..., Any], dict[str, PyTree]]:
    """The model as it is now, as a function, and its variables with the masks of an optimizer."""
    apply_fn, variables = functional(model, call=self._call)
    variables[COLLECTION] = self.masks(optimizer)
    return self.auto.wrap(apply_fn, self._batch_axes) if self.auto else apply_fn, variables


def _pure(optimizer: Any) -> PyTree:
  return nnx.as_pure(optimizer.opt_state) if isinstance(optimizer, nnx.Optimizer) else optimizer


def _joined(grads: nnx.State, rows: Gradients) -> nnx.State:
  """Gradients as ``nnx.Optimizer`` takes them: a state of parameters, with the rows of masks as one of them."""
  sealed = jax.tree.map(nnx.Param, rows.sealed)
  return nnx.State({**grads.raw_mapping, MASK_GRADS: sealed})
