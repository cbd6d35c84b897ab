"""The mask layer for ``flax.linen``."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fisherprune_jax._masks import COLLECTION, apply_mask, axes_of


class Mask(nn.Module):
  r"""Multiply an array by a prunable 0/1 vector along one axis.

  .. math:: y_{n \ldots c \ldots} = mask_c \, x_{n \ldots c \ldots}

  The vector is the variable ``mask`` of collection ``"masks"``, float32 and initially ones. Its shape is ``(C,)``, or
  ``(B, C)`` per example, as from :func:`per_example`. If ``apply`` gets no such collection, the layer is the identity.
  A single mask missing from the collection is an error. Inside lifted modules, as by ``nn.scan``, this is detected
  only if the module has another mask. The product is computed in float32 (or wider) and cast back, because in bfloat16
  the mask's gradient would lose 3 %.

  Attributes:
    axis: the feature axis of the input.
    batch_axis: the example axis of the input, such as 1 for ``(T, B, C)``; None in a model for one example, mapped by
      ``jax.vmap`` over masks and examples. A wrong axis is an error unless its size is the number of examples; then,
      as for T equal to B, **it is not detected**, and the importance is wrong.

  Raises:
    ValueError: if the input lacks the axis, or sizes differ from the mask's.

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
    """The input with masked features set to zero."""
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
