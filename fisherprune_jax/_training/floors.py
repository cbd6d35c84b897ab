"""Floors: the number of features that each mask keeps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from fisherprune_jax._errors import as_written, is_known, is_number, path_name, require, same_structure
from fisherprune_jax._masks import named_rows
from fisherprune_jax._types import Masks

Floor = int | float
Widths = Mapping[str, int]
"""Exact numbers of features, by glob patterns of mask names."""
MinFeatures = Floor | Mapping[str, Any] | Masks
"""A number for all masks, numbers by glob patterns, or a tree like the masks."""
BLOCKS = "*.block"
"""Masks of residual branches, as named by ``auto_mask``; their default floor is 0."""


def fits(name: str, pattern: str) -> bool:
  """Whether a glob pattern matches the name of a mask or of its stack.

  >>> fits("layers[0]", "layers"), fits("layers[0]", "layers[0]"), fits("layers[0]", "conv*")
  (True, True, False)
  """
  stack = name.split("[")[0]
  return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(stack, pattern)


def first_that_fits(name: str, by_pattern: Mapping[str, Any], default: Any) -> Any:
  return next((value for pattern, value in by_pattern.items() if fits(name, pattern)), default)


def require_used(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
  unused = [pattern for pattern in patterns if not any(fits(name, pattern) for name in names)]
  require(
    not unused, f"{option} must name masks ({', '.join(names)})", unused, "Patterns are those of a shell."
  )


def floors_of(
  masks: Masks, min_features: MinFeatures, exclude: Sequence[str] = (), widths: Widths | None = None
) -> Masks:
  """The floor of every mask, ``(..., 1)`` for a mask ``(..., C)``.

  Args:
    masks: a tree of masks.
    min_features: as in ``fisher_prune``; fractions are rounded up.
    exclude: patterns of masks that keep all features.
    widths: exact numbers by pattern; they override the others.

  Raises:
    ValueError: for a number that is negative or above its mask's size, or an unused pattern.

  >>> import jax.numpy as jnp
  >>> floors_of({"conv": jnp.ones(8), "head": jnp.ones(4)}, {"conv": 0.2, "*": 3})["conv"]
  array([2])
  """
  rows = named_rows(masks)
  if isinstance(min_features, Mapping) and not same_structure(min_features, masks):
    wanted = _by_pattern([name for name, _ in rows], min_features)
  elif same_structure(min_features, masks) and not is_number(min_features):
    wanted = [np.asarray(leaf) for leaf in _spread(min_features, masks)]
  else:
    wanted = [0 if fits(name, BLOCKS) else min_features for name, _ in rows]
  require_used("exclude", exclude, [name for name, _ in rows])
  left_alone = [any(fits(name, pattern) for pattern in exclude) for name, _ in rows]
  wanted = [
    mask.shape[-1] if alone else floor
    for alone, (_, mask), floor in zip(left_alone, rows, wanted, strict=True)
  ]
  found = [_number(name, mask.shape[-1], floor) for (name, mask), floor in zip(rows, wanted, strict=True)]
  if widths is not None:
    exact = _exact([(name, mask.shape[-1]) for name, mask in rows], widths)
    found = [floor if width is None else width for floor, width in zip(found, exact, strict=True)]
  leaves, at = [], 0
  for leaf in jax.tree.leaves(masks):
    count = math.prod(leaf.shape[:-1])
    leaves.append(np.reshape(found[at : at + count], (*leaf.shape[:-1], 1)))
    at += count
  return jax.tree.unflatten(jax.tree.structure(masks), leaves)


def _exact(sizes: Sequence[tuple[str, int]], widths: Any) -> list[int | None]:
  """The exact width of every row; None without a pattern."""
  if not isinstance(widths, Mapping):
    raise TypeError(
      f"widths must map patterns of mask names to numbers of features, such as {{'conv*': 16}}, got {widths!r}."
    )
  require_used("widths", widths, [name for name, _ in sizes])
  for pattern, width in widths.items():
    valid = is_number(width) and math.isfinite(width)
    require(
      valid, f"widths must be whole numbers, for the pattern {pattern!r}", width, "Leave other masks out."
    )
  found = [first_that_fits(name, widths, None) for name, _ in sizes]
  for (name, size), width in zip(sizes, found, strict=True):
    valid = width is None or (width == int(width) and 0 <= width <= size)
    require(valid, f"widths must be whole numbers from 0 to {size}, the size of the mask {name}", width)
  return found


def _by_pattern(names: list[str], floors: Mapping[str, Any]) -> list[Any]:
  require_used("min_features", floors, names)
  return [first_that_fits(name, floors, 0 if fits(name, BLOCKS) else 1) for name in names]


def _spread(floors: Masks, masks: Masks) -> list[Any]:
  found: list[Any] = []
  for (path, mask), floor in zip(
    jax.tree_util.tree_leaves_with_path(masks), map(np.asarray, jax.tree.leaves(floors)), strict=True
  ):
    rows = mask.shape[:-1]
    require(
      floor.shape in ((), rows),
      f"min_features as a tree must hold one number{f', or {list(rows)} of them,' if rows else ''} for the mask at "
      f"{path_name(path)}",
      floor,
    )
    found += [*np.broadcast_to(floor, rows).ravel()]
  return found


def _number(name: str, size: int, floor: Any) -> int:
  remedy = "Give a number of features, or a fraction below 1."
  valid = is_number(floor) and math.isfinite(floor) and floor >= 0 and (floor < 1 or floor == int(floor))
  require(
    valid, f"min_features must be at least 0, a whole number or a fraction below 1, for {name}", floor, remedy
  )
  least = _part(floor, size) if 0 < floor < 1 else int(floor)
  require(
    least <= size, f"min_features must be at most {size}, the size of the mask {name}", floor, "Lower it."
  )
  return least


def _part(fraction: Any, size: int) -> int:
  """A fraction of a size, rounded up; it may be a rounded quotient of whole numbers.

  >>> _part(0.07, 100), _part(5 / 7, 7), _part(0.2, 8)
  (7, 5, 2)
  """
  least = math.ceil(as_written(fraction) * size)
  # The float 5 / 7 is slightly above five sevenths. Half precision cannot tell quotients apart.
  kind = np.asarray(fraction).dtype
  return least - int(kind.itemsize >= 4 and kind.type((least - 1) / size) == fraction)


def check_floors(masks: Masks, floors: Masks) -> None:
  """Raise if a mask has fewer features than its floor, but some; tracers pass."""
  least = [floor for leaf in jax.tree.leaves(floors) for floor in np.reshape(leaf, -1)]
  for (name, mask), floor in zip(named_rows(masks), least, strict=True):
    if is_known(mask):
      alive = int(np.sum(np.asarray(mask) > 0))
      remedy = "Lower min_features, or start from masks that keep as many."
      require(alive == 0 or alive >= floor, f"masks must keep min_features={floor} of {name}", alive, remedy)
