"""The mask layer for ``flax.linen``."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fisherprune_jax._masks import COLLECTION, apply_mask, axes_of


class Mask(nn.Module):
  r"""Multiplies an array by a 0/1 vector over one axis, which pruning can switch entries of.

  .. math:: y_{n \ldots c \ldots} = mask_c \, x_{n \ldots c \ldots}

  The vector is the variable ``mask`` of collection ``"masks"``: float32, ones at first. It may come with an
  example axis, ``(B, C)`` beside ``(C,)``, as :func:`per_example` makes it. Where ``apply`` is given no such
  collection at all, the layer is the identity; one mask that is missing from a collection is an error. (Flax hands a
  lifted module, as by ``nn.scan``, its own part of the collections alone: a missing mask is seen there if the module
  has another one.) The product is taken in float32 (or wider) and cast back, because in bfloat16 the gradient of the
  mask would lose 3 %.

  Attributes:
    axis: the feature axis of the input.
    batch_axis: the example axis of the input, such as 1 for ``(T, B, C)``; None in a model that is written for one
      example and mapped by ``jax.vmap``, where masks are mapped along with the examples. A wrong one is an error where its length
      is not the number of examples; where T equals B **it cannot be seen**, and the importance is that of other examples.

  Raises:
    ValueError: if the input lacks the axis, or its sizes differ from the mask's.

  >>> import jax, jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> fp.Mask().apply({"masks": {"mask": jnp.array([1.0, 0.0])}}, jnp.array([[3.0, 4.0]]))
  Array([[3., 0.]], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018

    Flax, `Module <https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/module.html>`_: variables and
    their collections
  """

  axis: int = -1
  batch_axis: int | None = 0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns ``x`` with the entries of dead features set to zero."""
    axis, _ = axes_of(x, self.axis, self.batch_axis)
    if self.is_initializing():
      mask = self.variable(COLLECTION, "mask", jnp.ones, (x.shape[axis],), jnp.float32).value
    elif self.has_variable(COLLECTION, "mask"):
      mask = self.get_variable(COLLECTION, "mask")
    elif self._collection_given():
      raise ValueError(
        f"The collection {COLLECTION!r} must hold a mask for every Mask layer, got none at "
        f"{'/'.join(self.path) or 'the root'}. Pass all masks that init made, or no {COLLECTION!r} at all."
      )
    else:
      return x
    return apply_mask(x, mask, self.axis, self.batch_axis)

  def _collection_given(self) -> bool:
    assert self.scope is not None
    return COLLECTION in self.scope.root.variables()
