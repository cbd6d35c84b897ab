"""Lays masks along the axes of an array that hold their features, examples and iterations.

A mask has one axis for each of its *labels*, the atoms of those axes. ``Spots`` are the places of examples. Along a
product of atoms the mask of one leaf is repeated; along a sum, other parts are ones. Masks are only moved and repeated,
so the program's analysis still sees masks.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherprune_jax._auto.atoms import PRODUCT, Atom, leaves
from fisherprune_jax._types import Shape


class Laid(NamedTuple):
  """A mask with one axis per label; if laid along an axis, that axis comes first."""

  array: jax.Array
  labels: tuple[Atom, ...]


class Spots(NamedTuple):
  """The examples of an array: ``index`` along ``axes``, -1 for none; ``label`` is the example label of masks.

  None as ``index`` means that they lie in order along a single axis.
  """

  label: Atom
  axes: tuple[int, ...]
  index: jax.Array | None  # type: ignore[assignment]  # not that of a tuple


def lay(
  masks: Mapping[Atom, Laid], axis: int, atoms: Sequence[Atom], spots: Spots | None = None
) -> tuple[jax.Array, list[Atom]]:
  """Lay ``masks`` of leaves along one axis of an array; the last axis of each is its leaf, which has no label.

  Returns:
    An array of the rank of ``atoms``, with axes of full size or 1; and labels that the array lacks.
  """
  found = along(atoms[axis], masks)
  assert found is not None
  array, labels = found if spots is None or spots.label not in found.labels else _at(spots, axis, found)
  shape: list[int] = [1] * len(atoms)
  shape[axis] = array.shape[0]
  array = jnp.moveaxis(array, 0, -1)
  places, missing = [], []
  for at, label in enumerate(labels):
    if isinstance(label, int):
      place = label
    else:
      found_at = next((i for i, atom in enumerate(atoms) if i != axis and label in leaves(atom)), None)
      if found_at is None:
        missing.append(label)
        continue
      place = found_at
      array = _spread(array, at, atoms[place], label)
    shape[place] = array.shape[at]
    places.append(place)
  if missing:
    return array, missing
  order = [*places, axis]
  array = jnp.transpose(array, [order.index(i) for i in sorted(order)])
  return array.reshape(shape), []


def _at(spots: Spots, axis: int, laid: Laid) -> tuple[jax.Array, tuple[Atom | int, ...]]:
  """A mask with each row at its example: axes of the array in place of the example label."""
  others = tuple(label for label in laid.labels if label is not spots.label)
  array = jnp.moveaxis(laid.array, 1 + laid.labels.index(spots.label), -1)
  if spots.index is None:
    return array, (*others, *spots.axes)
  index, count = spots.index, array.shape[-1]
  array = jnp.concatenate([array, jnp.ones_like(array[..., :1])], -1)  # the last row is for no example
  index = jnp.where(index < 0, count, index)
  if axis not in spots.axes:
    return jnp.take(array, index, -1), (*others, *spots.axes)
  index = jnp.moveaxis(index, spots.axes.index(axis), 0)
  flat = jnp.take_along_axis(array.reshape(len(array), -1, count + 1), index.reshape(len(index), 1, -1), -1)
  array = flat.reshape(*array.shape[:-1], *index.shape[1:])
  return array, (*others, *(at for at in spots.axes if at != axis))


def lay_whole(
  masks: Mapping[Atom, Laid], atoms: Sequence[Atom], spots: Spots | None = None
) -> tuple[jax.Array, list[Atom]]:
  """A mask of one entry for a whole array, as in ``lay``."""
  (leaf,) = masks
  array, missing = lay(masks, len(atoms), [*atoms, leaf], spots)
  return (array if missing else jnp.squeeze(array, -1)), missing


def along(atom: Atom, masks: Mapping[Atom, Laid]) -> Laid | None:
  """Masks along an axis, ``(axis, *labels)``; None without masks."""
  atom = atom.root()
  if not atom.kind:
    mask = masks.get(atom)
    return mask and Laid(jnp.moveaxis(mask.array, -1, 0), mask.labels)
  parts = [along(part, masks) for part in atom.parts]
  if not any(parts):
    return None
  labels = tuple(dict.fromkeys(label for part in parts if part for label in part.labels))
  sizes = {
    label: part.array.shape[1 + part.labels.index(label)] for part in parts if part for label in part.labels
  }
  if atom.kind == PRODUCT:
    return _multiplied(atom, parts, labels)
  rest = [sizes[label] for label in labels]
  full = [
    _full(part, p.size, labels, rest) for part, p in zip(parts, (p.root() for p in atom.parts), strict=True)
  ]
  return Laid(jnp.concatenate(full), labels)


def _full(part: Laid | None, size: int, labels: Sequence[Atom], rest: Shape) -> jax.Array:
  """A part with an axis for every label; ones if it is not masked."""
  if part is None:
    return jnp.ones((size, *rest), jnp.float32)
  array = _with_labels(part, labels)
  return jnp.broadcast_to(array, (size, *rest))


def _with_labels(part: Laid, labels: Sequence[Atom]) -> jax.Array:
  """The array with an axis for every label, of size 1 for missing ones."""
  array, own = part
  wanted = [label for label in labels if label in own]
  array = jnp.transpose(array, [0, *(1 + own.index(label) for label in wanted)])
  shape = [array.shape[1 + wanted.index(label)] if label in wanted else 1 for label in labels]
  return array.reshape((array.shape[0], *shape))


def _multiplied(atom: Atom, parts: Sequence[Laid | None], labels: tuple[Atom, ...]) -> Laid:
  """The outer product of masks along the parts of an axis; labels among the parts lie there."""
  count, inside = len(parts), [part.root() for part in atom.parts]
  arrays = []
  for at, part in enumerate(parts):
    if part is not None:
      array = _with_labels(part, labels)
      arrays.append(array.reshape((*(1,) * at, array.shape[0], *(1,) * (count - at - 1), *array.shape[1:])))
  shape = jnp.broadcast_shapes(*(array.shape for array in arrays))
  array = functools.reduce(jnp.multiply, (jnp.broadcast_to(array, shape) for array in arrays))
  rest = list(labels)
  for at, atom in enumerate(inside):
    label = next((label for label in rest if label in leaves(atom)), None) if parts[at] is None else None
    if label is not None:
      place = count + rest.index(label)
      array = _spread(array, place, atom, label)
      array = jnp.squeeze(jnp.swapaxes(array, at, place), place)
      rest.remove(label)
  kept = array.shape[count:]
  array = jnp.broadcast_to(array, (*(atom.size for atom in inside), *kept))
  return Laid(array.reshape((math.prod(atom.size for atom in inside), *kept)), tuple(rest))


def _spread(array: jax.Array, at: int, atom: Atom, label: Atom) -> jax.Array:
  """An axis of a label, repeated to one of an atom that contains the label."""
  atom = atom.root()
  if atom is label:
    return array
  before, after = array.shape[:at], array.shape[at + 1 :]
  if atom.kind == PRODUCT:
    sizes = [part.root().size for part in atom.parts]
    place = next(i for i, part in enumerate(atom.parts) if label in leaves(part))
    array = _spread(array, at, atom.parts[place], label)
    shape = [size if i == place else 1 for i, size in enumerate(sizes)]
    array = jnp.broadcast_to(array.reshape((*before, *shape, *after)), (*before, *sizes, *after))
    return array.reshape((*before, math.prod(sizes), *after))
  return jnp.concatenate(
    [
      _spread(array, at, part, label)
      if label in leaves(part)
      else jnp.ones((*before, part.root().size, *after), array.dtype)
      for part in atom.parts
    ],
    axis=at,
  )
