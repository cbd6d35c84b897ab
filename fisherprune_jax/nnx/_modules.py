"""The mask layer, and modules as functions of their variables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fisherprune_jax._errors import describe
from fisherprune_jax._masks import COLLECTION, apply_mask
from fisherprune_jax._types import Masks, PyTree

Call = Callable[..., Any]
"""``call(model, *args)``."""
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
  r"""Multiply an array by a prunable 0/1 vector along one axis.

  .. math:: y_{n \ldots c \ldots} = mask_c \, x_{n \ldots c \ldots}

  The product is computed in float32 (or wider) and cast back.

  Args:
    features: the size C of the feature axis.
    axis: the feature axis of the input.
    batch_axis: the example axis of the input, such as 1 for ``(T, B, C)``; see ``fp.Mask``.

  Raises:
    ValueError: when called, if the input lacks the axis, or sizes differ from the mask's.

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
    """The input with masked features set to zero."""
    return apply_mask(x, self.mask[...], self.axis, self.batch_axis)


def functional(model: nnx.Module, *, call: Call | None = None, mutable: bool = False) -> tuple[Call, PyTree]:
  """A module as ``apply_fn(variables, *args)`` and its variables: ``"params"``, ``"masks"`` and ``"state"``.

  >>> import jax, jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> apply_fn, variables = fp.nnx.functional(fp.nnx.Mask(2))
  >>> variables["masks"], apply_fn(variables, jnp.ones((1, 2)))
  ({'mask': Array([1., 1.], dtype=float32)}, Array([[1., 1.]], dtype=float32))
  """
  graph, masks, params, state = split(model, nnx.Param)
  variables = {"params": nnx.to_pure_dict(params), COLLECTION: masks, "state": nnx.to_pure_dict(state)}

  def apply_fn(variables: dict[str, PyTree], *args: Any) -> PyTree:
    copy = nnx.merge(graph, variables.get(COLLECTION, {}), variables["params"], variables["state"])
    output = copy(*args) if call is None else call(copy, *args)
    return (output, {"state": nnx.to_pure_dict(split(copy, nnx.Param)[3])}) if mutable else output

  return apply_fn, variables


def split(model: nnx.Module, wrt: Filter) -> tuple[Any, Masks, Any, Any]:
  """A module's graph, masks as a nested dictionary of arrays, parameters, and other variables."""
  if not isinstance(model, nnx.Module):
    raise TypeError(f"model must be an nnx.Module, got {describe(model)}.")
  graph, *states = nnx.split(model, MaskVariable, wrt, ...)
  masks, params, state = states
  return graph, nnx.to_pure_dict(masks), params, state
