"""Trees of masks: one 0/1 vector per group of prunable features, or a stack of such vectors."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._errors import (
  Path,
  is_known,
  is_traced,
  path_name,
  require_same_tree,
  require_shapes,
  same_structure,
)
from fisherprune_jax._types import MaskGrads, Masks, Shape

COLLECTION = "masks"
"""The Flax collection of masks."""


def per_example(masks: Masks, batch_size: int) -> MaskGrads:
  r"""Add an example axis to every mask, before its feature axis: ``(..., C) -> (..., B, C)``.

  The gradient of a loss with respect to these masks has one row per example:

  .. math:: g_{nk} = \partial \textstyle\sum_i loss_i / \partial mask_{nk}

  Args:
    masks: a tree of masks, each ``(C,)`` or a stack ``(L, C)`` like those of ``nn.scan``.
    batch_size: the number of examples B.

  Returns:
    A tree of the same structure and dtypes, with leaves ``(..., B, C)``.

  Raises:
    ValueError: if a mask is a scalar.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> fp.per_example({"mask": jnp.ones(3)}, batch_size=2)["mask"].shape
  (2, 3)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """

  def expand(mask: jax.typing.ArrayLike) -> jax.Array:
    mask = jnp.asarray(mask)
    if mask.ndim == 0:
      raise ValueError("A mask must have a feature axis, got a scalar.")
    return jnp.broadcast_to(mask[..., None, :], (*mask.shape[:-1], batch_size, mask.shape[-1]))

  return jax.tree.map(expand, masks)


def apply_mask(x: jax.Array, mask: jax.Array, axis: int = -1, batch_axis: int | None = 0) -> jax.Array:
  r"""Multiply an array by a mask along one axis, or by one mask per example.

  .. math:: y_{n \ldots c \ldots} = mask_{(n)c} \, x_{n \ldots c \ldots}

  This is the product of ``fp.Mask``, for models without a framework. Do not write ``x * mask``: it broadcasts
  per-example masks ``(B, C)`` against the last two axes of ``x``. That is silently wrong if another axis is as long as
  the batch. A wrong ``batch_axis`` of size B, as in ``(T, B, C)`` with T equal to B, is not detected either.

  Args:
    x: an array with a feature axis.
    mask: ``(C,)``, or ``(B, C)`` from :func:`per_example`.
    axis: the feature axis of ``x``.
    batch_axis: the example axis of ``x``; None in a model for one example that is mapped by ``jax.vmap``.

  Returns:
    An array like ``x``; the product is computed in float32 (or wider) and cast back.

  Raises:
    ValueError: if ``x`` lacks an axis, or sizes differ from the mask's.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> x = jnp.arange(1.0, 9.0).reshape(2, 2, 2)  # time, examples, features
  >>> fp.apply_mask(x, jnp.array([[1.0, 0.0], [0.0, 1.0]]), batch_axis=1)
  Array([[[1., 0.],
          [0., 4.]],
  <BLANKLINE>
         [[5., 0.],
          [0., 8.]]], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """
  mask = jnp.asarray(mask)
  axis, batch_axis = axes_of(x, axis, batch_axis)
  places = (axis,) if mask.ndim == 1 or batch_axis is None else (batch_axis, axis)
  expected = tuple(x.shape[place] for place in places)
  if mask.shape != expected:
    one = " Map a model for one example over its masks too: jax.vmap(one, in_axes=(-2, 0))(masks, x)."
    several = " Where examples are folded into an axis with others, unfold them first: x.reshape(B, -1, C)."
    raise ValueError(
      f"A mask for an input of shape {x.shape} must have shape {expected} (features along axis {axis}, "
      f"examples along axis {batch_axis}), got {mask.shape}. Check Mask's axis and batch_axis, and "
      f"that the masks are those of this model.{one if batch_axis is None else several}"
    )
  if places[0] > axis:
    mask = mask.T
  shape = [n if i in places else 1 for i, n in enumerate(x.shape)]
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return (x.astype(dtype) * mask.astype(dtype).reshape(shape)).astype(x.dtype)


def axes_of(x: jax.Array, axis: int, batch_axis: int | None) -> tuple[int, int | None]:
  """The feature axis and the example axis of an input, as non-negative numbers."""
  found = _axis_of(x, axis, "axis"), None if batch_axis is None else _axis_of(x, batch_axis, "batch_axis")
  if found[0] == found[1]:
    raise ValueError(
      f"Mask needs a feature axis apart from the example axis, got axis={axis} and batch_axis={batch_axis} for an "
      f"input of shape {x.shape}. In a model that is written for one example say batch_axis=None, and map it over "
      "masks and examples together: jax.vmap(one, in_axes=(-2, 0))(masks, x)."
    )
  return found


def _axis_of(x: jax.Array, axis: int, name: str) -> int:
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"Mask's {name} must be an axis of its input, got {axis} for shape {x.shape}.")
  return axis % x.ndim


def named_rows(tree: Masks) -> list[tuple[str, Any]]:
  """Every mask vector of a tree by name; rows of a stack ``(L, C)`` are ``layers[0]``, ``layers[1]``, ...

  >>> import jax.numpy as jnp
  >>> [name for name, _ in named_rows({"conv": {"mask": jnp.ones(2)}, "layers": jnp.ones((2, 3))})]
  ['conv', 'layers[0]', 'layers[1]']
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(name, leaf[row]) for path, leaf in leaves for name, row in _rows(path, leaf)]


def _rows(path: Path, leaf: Any) -> list[tuple[str, tuple[int, ...]]]:
  """The names and indices of the vectors of one leaf."""
  name = path_name(path).removesuffix("/mask") if path else "mask"
  return [(name + "".join(f"[{i}]" for i in row), row) for row in np.ndindex(leaf.shape[:-1])]


def check_names(masks: Masks) -> None:
  """Raise if two masks have one name, as keys may hold slashes."""
  paths: dict[str, Path] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(masks):
    for name, _ in _rows(path, leaf):
      if name in paths:
        keys = [jax.tree_util.keystr(p) for p in (paths[name], path)]
        raise ValueError(
          f"Every mask must have a unique name, its keys joined by '/', got {name!r} for two masks, at {keys[0]} and "
          f"{keys[1]}. Rename a key of one of them."
        )
      paths[name] = path


def check_masks(masks: Masks, expected: Masks, whose: str) -> None:
  """Raise unless ``masks`` are 0/1 masks in the tree and shapes of ``expected``; tracers pass."""
  how = "Pass a tree like what fp.get_masks returns."
  require_same_tree(masks, expected, "masks", f"the masks of {whose}", how)
  what = f"masks must have the shapes of the masks of {whose}"
  require_shapes(masks, expected, lambda shape, path: f"{what}, {shape} at {path}", how)
  for path, mask in jax.tree_util.tree_leaves_with_path(masks):
    check_switches(path, mask)


def check_same_masks(masks: Masks, started: Masks) -> None:
  """Raise if a model's masks are known to differ from the initial masks of its optimizer."""
  pairs = [masks, started]
  if not same_structure(masks, started) or not all(map(is_known, jax.tree.leaves(pairs))):
    return
  for (path, ours), theirs in zip(
    jax.tree_util.tree_leaves_with_path(masks), jax.tree.leaves(started), strict=True
  ):
    if not np.array_equal(ours, theirs):
      raise ValueError(
        f"The masks of the model must be those that its optimizer starts from, got others at {path_name(path)}: "
        f"{int(np.sum(np.asarray(ours) > 0))} alive in the model, {int(np.sum(np.asarray(theirs) > 0))} in the "
        "optimizer state. Start from the model's masks: fp.fisher_prune(..., masks=...)."
      )


def check_switches(path: Path, mask: Any) -> None:
  """Raise unless all entries of a mask are 0 or 1; tracers pass."""
  if not is_known(mask):
    return
  values = np.asarray(mask)
  wrong = values[~np.isin(values, (0, 1))]
  if wrong.size:
    raise ValueError(f"Masks must be 0 or 1, got {wrong[0]} at {path_name(path)}.")


def redate(pruned_at: Masks, masks: Masks, step: jax.typing.ArrayLike) -> Masks:
  """The history for given masks: live features were never pruned, newly masked ones at ``step``.

  >>> import jax.numpy as jnp
  >>> redate(jnp.array([-1, -1, 5, 5]), jnp.array([1.0, 0.0, 1.0, 0.0]), 7)
  Array([-1,  7, -1,  5], dtype=int32)
  """

  def of_leaf(at: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask > 0, -1, jnp.where(at < 0, step, at)).astype(jnp.int32)

  return jax.tree.map(of_leaf, pruned_at, masks)


def flatten(tree: Masks) -> jax.Array:
  """All entries of a tree of masks as one vector, in the order that breaks ties."""
  return jnp.concatenate([jnp.reshape(leaf, -1) for leaf in jax.tree.leaves(tree)] or [jnp.zeros(0)])


def unflatten(vector: jax.Array, tree: Masks) -> Masks:
  """The inverse of ``flatten``, in the shapes of ``tree``."""
  (found,) = unflatten_all([vector], tree)
  return found


def unflatten_all(vectors: Sequence[jax.Array], tree: Masks) -> list[Masks]:
  """``unflatten`` for several vectors, as one smaller program."""
  leaves, structure = jax.tree.flatten(tree)
  shapes = [leaf.shape for leaf in leaves]
  starts = _hidden(np.cumsum([0, *map(math.prod, shapes)], dtype=np.int32)[:-1], vectors[0])
  cut = [map(_part, [vector] * len(shapes), starts, shapes) for vector in vectors]
  return [jax.tree.unflatten(structure, list(parts)) for parts in cut]


def _hidden(starts: np.ndarray, vector: jax.Array) -> Sequence[jax.typing.ArrayLike]:
  """Offsets that XLA, under ``jit``, cannot tell to be constants.

  XLA compiles equal kernels once, but slices at different constants are different kernels, of 20 ms each. A conditional
  with equal branches hides the constants.
  """
  if not is_traced(vector) or vector.size == 0:
    return list(starts)
  return jax.lax.cond(jnp.ravel(vector)[0] != 0, lambda: list(starts), lambda: list(starts))


# The start is an argument: outside of ``jit``, one program serves all leaves of a shape.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _part(vector: jax.Array, start: jax.typing.ArrayLike, shape: Shape) -> jax.Array:
  part = jax.lax.dynamic_slice(vector, (start,), (math.prod(shape),), allow_negative_indices=False)
  return part.reshape(shape)
