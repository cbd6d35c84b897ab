"""Trees of masks: one 0/1 vector per group of prunable features, or a stack of such vectors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def per_example(masks: Any, batch_size: int) -> Any:
  r"""Gives every mask an example axis before its feature axis: ``(..., C) -> (..., B, C)``.

  The gradient of a loss with respect to these masks has one row per example:

  .. math:: g_{nk} = \partial \textstyle\sum_i loss_i / \partial mask_{nk}

  Args:
    masks: a tree of masks, each ``(C,)`` or a stack ``(L, C)`` as ``nn.scan`` makes it.
    batch_size: the number of examples B.

  Returns:
    A tree of the same structure and dtypes, with leaves ``(..., B, C)``.

  Raises:
    ValueError: if a mask is a scalar.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> fp.per_example({"mask": jnp.ones(3)}, batch_size=2)["mask"].shape
  (2, 3)
  """

  def expand(mask: Any) -> jax.Array:
    mask = jnp.asarray(mask)
    if mask.ndim == 0:
      raise ValueError("A mask must have a feature axis, got a scalar.")
    return jnp.broadcast_to(mask[..., None, :], (*mask.shape[:-1], batch_size, mask.shape[-1]))

  return jax.tree.map(expand, masks)


def named_rows(tree: Any) -> list[tuple[str, Any]]:
  """Every mask vector of a tree with its name: a stack ``(L, C)`` at ``layers`` is ``layers[0]``, ``layers[1]``, ...

  >>> import jax.numpy as jnp
  >>> [name for name, _ in named_rows({"conv": {"mask": jnp.ones(2)}, "layers": jnp.ones((2, 3))})]
  ['conv', 'layers[0]', 'layers[1]']
  """
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/mask") or "mask"
    for row in np.ndindex(leaf.shape[:-1]):
      found.append((name + "".join(f"[{i}]" for i in row), leaf[row]))
  return found


def flatten(tree: Any) -> jax.Array:
  """All entries of a tree of masks as one vector, in the order that ties are broken in."""
  return jnp.concatenate([jnp.reshape(leaf, -1) for leaf in jax.tree.leaves(tree)])


def unflatten(vector: jax.Array, tree: Any) -> Any:
  """The inverse of ``flatten``, in the shapes of ``tree``."""
  leaves, start = [], 0
  for leaf in jax.tree.leaves(tree):
    leaves.append(jnp.reshape(vector[start : start + leaf.size], leaf.shape))
    start += leaf.size
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)
