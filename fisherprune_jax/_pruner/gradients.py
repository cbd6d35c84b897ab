"""Gradients of parameters and masks as one tree, which passes through a training script unchanged."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fisherprune_jax._graph.compat import without_arithmetic
from fisherprune_jax._types import AxisNames, MaskGrads, Masks, PyTree

# Rows of mask gradients belong to single examples: a sum or a mean over devices or micro-batches is wrong, and nothing
# would show it. JAX refuses arithmetic on arrays of an extended dtype, with an error that names the dtype. Random
# keys are the only such dtypes that can be defined, so rows travel as the data of "keys" whose name is the advice.
_SEALED = without_arithmetic(
  "mask gradients of fp.Pruner",
  "one row per example, which no arithmetic may change. To average the gradients of the parameters over devices, call "
  "grads.average(axis_name). To accumulate over micro-batches, put optax.MultiSteps inside pruner.wrap. For anything else, "
  "such as a norm, use grads.params",
)
MASK_GRADS = "fp.mask_grads"
"""The key of sealed rows among gradients that are a mapping, as ``nnx.Optimizer`` wants them."""


@jax.tree_util.register_pytree_with_keys_class
class Gradients:
  """The gradients that ``Pruner.value_and_grad`` returns: pass them to the transformation of ``Pruner.wrap``.

  They are a pytree. Its leaves are the gradients of the parameters and, in a sealed form that arithmetic refuses, the
  per-example gradients of the masks.

  Attributes:
    params: the gradients of the parameters, a tree like these.
    sealed: the gradients of the masks in their sealed form.
  """

  params: PyTree
  sealed: MaskGrads

  def __init__(self, params: PyTree, mask_grads: MaskGrads) -> None:
    self.params = params
    self.sealed = jax.tree.map(_seal, mask_grads)

  @property
  def mask_grads(self) -> MaskGrads:
    """The per-example gradients of the masks, float32 leaves ``(..., B, C)``."""
    return jax.tree.map(_unseal, self.sealed)

  def average(self, axis_name: AxisNames) -> "Gradients":
    """The same with the gradients of the parameters averaged over a mapped axis (``pmap``, ``shard_map``).

    Args:
      axis_name: the axis, or a tuple of axes.

    Returns:
      Gradients. The rows of the masks stay on their devices: the optimizer averages the importance itself if
      ``Pruner`` was given the same ``axis_name``.
    """
    return self.replace(jax.lax.pmean(self.params, axis_name))

  def replace(self, params: PyTree) -> "Gradients":
    """The same with other gradients of the parameters, such as unscaled ones."""
    return Gradients.tree_unflatten(None, (params, self.sealed))

  def __contains__(self, key: object) -> bool:
    """Whether the gradients of the parameters have a key, as Flax's ``TrainState`` asks."""
    return isinstance(self.params, Mapping) and key in self.params

  def tree_flatten_with_keys(self) -> Any:
    """Children with keys, for JAX."""
    key = jax.tree_util.GetAttrKey
    return ((key("params"), self.params), (key("mask_grads"), self.sealed)), None

  @classmethod
  def tree_unflatten(cls, _: None, children: Any) -> "Gradients":
    """The tree of some children, for JAX."""
    made = object.__new__(cls)
    made.params, made.sealed = children
    return made


def _seal(rows: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(rows.astype(jnp.float32), jnp.uint32)
  return jax.random.wrap_key_data(bits[..., None], impl=_SEALED)


def _unseal(sealed: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(jax.random.key_data(sealed)[..., 0], jnp.float32)


def plain(tree: PyTree) -> PyTree:
  """A tree with the gradients of the parameters in the place of all ``Gradients``."""
  return jax.tree.map(lambda x: x.params if is_gradients(x) else x, tree, is_leaf=is_gradients)


def is_gradients(x: Any) -> bool:
  """Whether a node of a tree is ``Gradients``."""
  return isinstance(x, Gradients)


def joined(grads: PyTree, masks: Masks) -> PyTree:
  """Gradients out of a mapping that holds rows under ``MASK_GRADS``; anything else as it is."""
  if not isinstance(grads, Mapping) or MASK_GRADS not in grads:
    return grads
  rows = jax.tree.unflatten(jax.tree.structure(masks), jax.tree.leaves(grads[MASK_GRADS]))
  own: Any = jax.tree.map(lambda x: x, grads)  # another dictionary, or Flax's State
  del own[MASK_GRADS]
  return Gradients.tree_unflatten(None, (own, rows))
