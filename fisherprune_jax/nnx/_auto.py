"""Masks for modules without masks."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from fisherprune_jax._auto.auto import AutoMask
from fisherprune_jax._auto.auto import auto_mask as find
from fisherprune_jax._auto.groups import Group
from fisherprune_jax._auto.skipping import Skipped
from fisherprune_jax._graph.variables import abstract
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._types import BatchAxes, PyTree
from fisherprune_jax.nnx._modules import Call, MaskVariable, split

Form = Callable[..., tuple[PyTree, PyTree]]
"""A module as a function of its variables, ``form(variables, *args) -> (output, state)``."""


class AutoMasked(nnx.Module):
  """A module with masks before the sums over its features; made by :func:`auto_mask`.

  It is called like the model and updates the model's state (batch statistics, random streams, caches). ``train()`` and
  ``eval()`` reach the model. ``print`` shows its groups as a table.

  Attributes:
    model: the model itself, not a copy.
    masks: the :class:`MaskVariable` of each group.
  """

  def __init__(self, model: nnx.Module, found: AutoMask, call: Call | None, batch_axes: BatchAxes) -> None:
    self.model = model
    self.masks = nnx.Dict({name: MaskVariable(mask) for name, mask in found.masks.items()})
    self._found, self._call, self._batch_axes = found, call, batch_axes

  @property
  def groups(self) -> tuple[Group, ...]:
    """What can be pruned."""
    return self._found.groups

  @property
  def call(self) -> Call | None:
    """``call(model, *args)``, or None."""
    return self._call

  @property
  def skipped(self) -> tuple[Skipped, ...]:
    """Other axes of variables, each with the reason."""
    return self._found.skipped

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """The outputs of the model with these masks."""
    graph, variables = _split_variables(self.model)
    variables[COLLECTION] = nnx.to_pure_dict(nnx.state(self.masks, MaskVariable))
    form = self._found.wrap(_form(graph, self._call), self._batch_axes)
    output, state = form(variables, *args, **kwargs)
    nnx.update(self.model, state)
    return output

  def __str__(self) -> str:
    return str(self._found)


def auto_mask(
  model: nnx.Module, *args: Any, call: Call | None = None, batch_axes: BatchAxes = 0, **options: Any
) -> AutoMasked:
  """``fp.auto_mask`` for a module: find what can be pruned, and put masks beside it.

  Args:
    model: the module, without masks. It is analysed in its current mode, and can be called in both.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    call: ``call(model, *args)`` instead of ``model(*args)``, here and in later calls.
    batch_axes: the example axes of ``args``, like ``jax.vmap``'s ``in_axes``.
    **options: options of ``fp.auto_mask``.

  Returns:
    A module that is called like ``model`` and shares its variables. It works with all of ``fp.nnx``.

  Raises:
    ValueError: if there is no group, or ``model`` holds masks.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 1, rngs=rngs))  # as it was
  >>> masked = fp.nnx.auto_mask(model, jnp.ones((4, 2)))
  >>> {name: masked.masks[name].shape for name in masked.masks}
  {'layers/0': (3,)}
  >>> masked.masks["layers/0"][...] = jnp.array([1.0, 0.0, 1.0])
  >>> small = fp.nnx.compact(masked, jnp.ones((4, 2)))
  >>> small.variables["params"]["model"]["layers"][0]["kernel"].shape
  (2, 2)
  """
  graph, variables = _split_variables(model)
  form = _form(graph, call)
  found = find(
    lambda variables, *args: form(variables, *args)[0],
    abstract(variables),
    *args,
    batch_axes=batch_axes,
    **options,
  )
  return AutoMasked(model, found, call, batch_axes)


def _split_variables(model: nnx.Module) -> tuple[Any, dict[str, PyTree]]:
  """The graph and the variables of a module without masks."""
  graph, masks, params, state = split(model, nnx.Param)
  if masks:
    raise ValueError(
      f"auto_mask takes a module that holds no masks, got one with some at {sorted(masks)}. Prune with those, by "
      "fp.nnx.cost_model(model, ...), or leave every fp.nnx.Mask out of it."
    )
  return graph, {"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)}


def _form(graph: Any, call: Call | None) -> Form:
  def form(variables: Mapping[str, PyTree], *args: Any, **kwargs: Any) -> tuple[PyTree, PyTree]:
    model = nnx.merge(graph, variables["params"], variables["state"])
    output = model(*args, **kwargs) if call is None else call(model, *args, **kwargs)
    return output, split(model, nnx.Param)[3]

  return form
