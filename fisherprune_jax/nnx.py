"""The library for ``flax.nnx``: masks are variables of the model, beside its parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fisherprune_jax._compaction import compact as compaction
from fisherprune_jax._compaction.parts import at_paths
from fisherprune_jax._cost import cost
from fisherprune_jax._errors import describe
from fisherprune_jax._masks import COLLECTION, apply_mask, check_same_masks
from fisherprune_jax._training import gradients
from fisherprune_jax._training.finding import get_masks, set_masks
from fisherprune_jax._types import Masks, PyTree

Call = Callable[..., Any]
Filter = nnx.filterlib.Filter


@nnx.register_variable_name(COLLECTION)
class MaskVariable(nnx.Variable[jax.Array]):
  """A 0/1 mask, float32. ``nnx.bridge`` makes it of the Linen collection ``"masks"``.

  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> nnx.variable_type_from_name("masks") is fp.nnx.MaskVariable
  True
  """


class Mask(nnx.Module):
  r"""Multiplies an array by a 0/1 vector over one axis, which pruning can switch entries of.

  .. math:: y_{n \ldots c \ldots} = mask_c \, x_{n \ldots c \ldots}

  The product is taken in float32 (or wider) and cast back.

  Args:
    features: the size C of the feature axis.
    axis: the feature axis of the input.
    batch_axis: the example axis of the input, such as 1 for ``(T, B, C)``; see ``fp.Mask``.

  Raises:
    ValueError: when called, if the input lacks the axis, or its sizes differ from the mask's.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> fp.nnx.Mask(2)(jnp.array([[3.0, 4.0]]))
  Array([[3., 4.]], dtype=float32)
  """

  def __init__(self, features: int, axis: int = -1, batch_axis: int | None = 0) -> None:
    if isinstance(features, bool) or not isinstance(features, int) or features < 1:
      raise ValueError(f"features must be a number of at least 1, got {features!r}.")
    self.mask = MaskVariable(jnp.ones((features,), jnp.float32))
    self.axis, self.batch_axis = axis, batch_axis

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns ``x`` with the entries of dead features set to zero."""
    return apply_mask(x, self.mask[...], self.axis, self.batch_axis)


class Optimizer(nnx.Optimizer):
  """``nnx.Optimizer`` for a ``tx`` that prunes: ``update`` also switches the model's masks.

  With a plain ``nnx.Optimizer``, do that yourself after each ``update``:
  ``nnx.update(model, fp.get_masks(optimizer.opt_state))``.

  >>> import jax.numpy as jnp, optax
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
  >>> x = jnp.ones((4, 2))
  >>> tx = fp.pruning_sgd(0.1, fp.nnx.cost_model(model, x), prune_every=1)
  >>> optimizer = fp.nnx.Optimizer(model, tx, wrt=nnx.Param)
  >>> loss, (grads, mask_grads) = fp.nnx.value_and_grads(lambda m, x: jnp.mean(m(x) ** 2))(model, x)
  >>> _ = optimizer.update(model, grads, mask_grads=mask_grads)
  >>> float(jnp.sum(model.layers[1].mask[...]))
  2.0

  References:
    Flax, `Optimizer <https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/training/optimizer.html>`_
  """

  def __init__(self, model: nnx.Module, tx: optax.GradientTransformation, **options: Any) -> None:
    """Raises ``ValueError`` if the model's masks are seen to be others than those that ``tx`` starts from."""
    super().__init__(model, tx, **options)
    check_same_masks(nnx.to_pure_dict(nnx.state(model, MaskVariable)), get_masks(self.opt_state))

  def set_masks(self, model: nnx.Module, masks: Masks, *, cost: cost.CostModel | None = None) -> None:
    """Puts other masks into the pruning state and into ``model``; see :func:`fisherprune_jax.set_masks`.

    Args:
      model: the module that is trained.
      masks: a tree like ``fp.get_masks(optimizer.opt_state)``.
      cost: the cost model, to have the new cost at once.
    """
    state = set_masks(nnx.as_pure(self.opt_state), masks, cost=cost)
    nnx.update(self.opt_state, nnx.state(state))
    nnx.update(model, get_masks(state))

  def update(self, model: nnx.Module, grads: PyTree, /, **kwargs: Any) -> PyTree:
    """One step: parameters and masks of ``model``; ``mask_grads=`` and ``example_weights=`` go to ``tx``."""
    updates = super().update(model, grads, **kwargs)
    nnx.update(model, get_masks(self.opt_state))
    return updates


def value_and_grads(
  loss_fn: Call, *, wrt: Filter = nnx.Param, has_aux: bool = False, reduction: gradients.Reduction = "mean"
) -> Call:
  """``fp.value_and_grads`` for a module: gradients of parameters and of every example's own mask, in one pass.

  Args:
    loss_fn: ``loss_fn(model, batch, *rest)``. What it changes in the model (batch statistics, random counters)
      is changed in the model that is passed.
    wrt: which variables are parameters.
    has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
    reduction: as for ``fp.value_and_grads``.

  Returns:
    ``f(model, batch, *rest) -> (value, (grads, mask_grads))``: ``grads`` as from ``nnx.grad``, ``mask_grads`` a
    nested dictionary with leaves ``(..., B, C)``.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> step = fp.nnx.value_and_grads(lambda mask, x: jnp.mean(jnp.sum(mask(x), axis=1)))
  >>> step(fp.nnx.Mask(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))[1][1]["mask"]
  Array([[1., 2.],
         [3., 4.]], dtype=float32)
  """

  def value_and_both(model: nnx.Module, batch: PyTree, *rest: Any) -> Any:
    graph, masks, params, state = _split(model, wrt)

    def pure(params: nnx.State, masks: Masks, batch: PyTree, *rest: Any) -> Any:
      copy = nnx.merge(graph, masks, params, state, copy=True)
      result = loss_fn(copy, batch, *rest)
      value, aux = result if has_aux else (result, None)
      return value, (aux, _split(copy, wrt)[3])

    differentiate = gradients.value_and_grads(pure, has_aux=True, reduction=reduction)
    (value, (aux, state)), grads = differentiate(params, masks, batch, *rest)
    nnx.update(model, state)
    return ((value, aux) if has_aux else value), grads

  return value_and_both


def cost_model(model: nnx.Module, *args: Any, call: Call | None = None, **options: Any) -> cost.CostModel:
  """``fp.cost_model`` for a module.

  Args:
    model: the module; its masks are found by their type. Call ``model.eval()`` first for the cost of the network
      that is served.
    *args: what it is called with; the first array leads with the example axis, unless ``batch_axes=`` says otherwise.
    call: ``call(model, *args)`` instead of ``model(*args)``.
    **options: those of ``fp.cost_model``.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3))
  >>> fp.nnx.cost_model(model, jnp.ones((1, 2))).dense  # 3 (2*2 - 1) + 3 for the bias
  12.0
  """
  apply_fn, variables = functional(model, call=call)
  return cost.cost_model(apply_fn, variables, *args, **options)


def compact(
  model: nnx.Module, *args: Any, call: Call | None = None, mutable: bool = False, **options: Any
) -> compaction.Compact:
  """``fp.compact`` for a module; to train it on as a module, see :func:`module`.

  Args:
    model: the module, with masks switched; call ``model.eval()`` first for the network to serve.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    call: ``call(model, *args)`` instead of ``model(*args)``.
    mutable: return ``(output, {"state": ...})``: what the call changes in the model (batch statistics).
    **options: those of ``fp.compact``.

  Returns:
    The compact network: ``small(small.variables, *args)``, with ``small.variables`` a nested dictionary of
    ``"params"`` and ``"state"``.

  >>> import jax, jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
  >>> model.layers[1].mask[...] = jnp.array([1.0, 0.0, 1.0])
  >>> small = fp.nnx.compact(model, jnp.ones((4, 2)))
  >>> jax.tree.map(jnp.shape, small.variables["params"]["layers"][0])
  {'bias': (2,), 'kernel': (2, 2)}
  """
  apply_fn, variables = functional(model, call=call, mutable=mutable)
  if mutable:
    options.setdefault("updates", lambda output: output[1])
  return compaction.compact(apply_fn, variables, *args, **options)


class CompactModule(nnx.Module):
  """A compact network as a module; made by :func:`module`.

  It has the attributes of the module that it came from, so that optimizers and checkpoints find its variables under
  the same paths; its call is the compact program.
  """

  def __init__(self, small: compaction.Compact, model: nnx.Module) -> None:
    for name, value in vars(model).items():
      if not name.startswith("_"):
        setattr(self, name, value)
    self._small = small

  def __call__(self, *args: Any) -> Any:
    """The outputs of the module that it came from."""
    _, variables = functional(self)
    output = self._small({name: variables[name] for name in self._small.variables}, *args)
    if self._small.updates is None:
      return output
    output, changed = output
    nnx.update(self, changed["state"])
    return output


def module(small: compaction.Compact, model: nnx.Module) -> CompactModule:
  """A compact network as a module with smaller variables, which can be trained on.

  Args:
    small: the compact network, from :func:`compact`. For batch statistics it must be made with ``mutable=True``.
    model: the module that it was made of.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
  >>> model.layers[1].mask[...] = jnp.array([1.0, 0.0, 1.0])
  >>> thin = fp.nnx.module(fp.nnx.compact(model, jnp.ones((4, 2))), model)
  >>> thin.layers[0].kernel.shape, thin(jnp.ones((4, 2))).shape
  ((2, 2), (4, 1))
  """
  graph, masks, _, _ = _split(model, nnx.Param)
  variables = {COLLECTION: masks, **small.variables}
  thin = nnx.merge(graph, variables[COLLECTION], variables["params"], variables["state"])
  if COLLECTION not in small.variables:
    nnx.pop(thin, MaskVariable)
  return CompactModule(small, thin)


def shrink_optimizer(
  small: compaction.Compact, thin: CompactModule, optimizer: nnx.Optimizer
) -> nnx.Optimizer:
  """An optimizer for ``thin`` that goes on where ``optimizer`` was; see ``Compact.shrink_opt_state``.

  Args:
    small: the compact network.
    thin: the same as a module, from :func:`module`.
    optimizer: that of the module it came from, for all its parameters or some of them (``wrt=nnx.LoRAParam``).
  """
  trained = at_paths([path for path, _ in nnx.to_flat_state(nnx.state(thin, optimizer.wrt))])
  tx, state = optimizer.tx, small.shrink_opt_state(optimizer.tx, nnx.as_pure(optimizer.opt_state), trained)
  thinner = type(optimizer)(thin, tx._replace(init=lambda params: state), wrt=optimizer.wrt)
  thinner.tx = tx
  thinner.step[...] = optimizer.step[...]
  return thinner


def functional(model: nnx.Module, *, call: Call | None = None, mutable: bool = False) -> tuple[Call, PyTree]:
  """A module as ``apply_fn(variables, *args)`` and its variables: ``"params"``, ``"masks"`` and ``"state"``.

  >>> import jax, jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> apply_fn, variables = fp.nnx.functional(fp.nnx.Mask(2))
  >>> variables["masks"], apply_fn(variables, jnp.ones((1, 2)))
  ({'mask': Array([1., 1.], dtype=float32)}, Array([[1., 1.]], dtype=float32))
  """
  graph, masks, params, state = _split(model, nnx.Param)
  variables = {"params": nnx.to_pure_dict(params), COLLECTION: masks, "state": nnx.to_pure_dict(state)}

  def apply_fn(variables: dict[str, PyTree], *args: Any) -> PyTree:
    copy = nnx.merge(graph, variables[COLLECTION], variables["params"], variables["state"])
    output = copy(*args) if call is None else call(copy, *args)
    return (output, {"state": nnx.to_pure_dict(_split(copy, nnx.Param)[3])}) if mutable else output

  return apply_fn, variables


def _split(model: nnx.Module, wrt: Filter) -> tuple[Any, Masks, Any, Any]:
  """Its graph, its masks as a nested dictionary of arrays, its parameters, and everything else."""
  if not isinstance(model, nnx.Module):
    raise TypeError(f"model must be an nnx.Module, got {describe(model)}.")
  graph, *states = nnx.split(model, MaskVariable, wrt, ...)
  masks, params, state = states
  return graph, nnx.to_pure_dict(masks), params, state
