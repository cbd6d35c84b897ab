"""Errors with requirement, value and remedy; warnings."""

import inspect
import os
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._types import PyTree, Shape

HERE = os.path.join(os.path.dirname(__file__), "")
"""The folder of this library."""
Path = tuple[Any, ...]
"""The keys from the root of a tree to a node."""


def require(condition: bool, requirement: str, value: Any, remedy: str = "") -> None:
  """Raise ``ValueError`` unless ``condition`` holds."""
  if not condition:
    raise ValueError(f"{requirement}, got {value!r}.{' ' + remedy if remedy else ''}")


def warn(message: str) -> None:
  """Warn at the line of the user's code that led here."""
  level, frame = 1, inspect.currentframe()
  while frame is not None and frame.f_code.co_filename.startswith(HERE):
    level, frame = level + 1, frame.f_back
  warnings.warn(message, stacklevel=level)


def is_traced(x: Any) -> bool:
  """Whether ``x`` is a tracer, without a value to check."""
  return isinstance(x, jax.core.Tracer)


def is_known(x: Any) -> bool:
  """Whether the values of ``x`` can be read here: not traced, abstract, or partly on other hosts."""
  return (
    not is_traced(x) and not isinstance(x, jax.ShapeDtypeStruct) and getattr(x, "is_fully_addressable", True)
  )


def describe(x: Any) -> str:
  """The type and shape of an array, or the type of another object."""
  if hasattr(x, "shape") and hasattr(x, "dtype"):
    return f"{x.dtype}{list(x.shape)}"
  return type(x).__name__


def is_number(x: Any) -> bool:
  """Whether ``x`` is a real number or a scalar array."""
  if isinstance(x, bool) or not isinstance(x, int | float | np.number | np.ndarray | jax.Array):
    return False
  return jnp.ndim(x) == 0


def as_written(x: Any) -> Fraction:
  """A finite number as the shortest decimal that equals it in its precision.

  >>> as_written(0.07), as_written(np.float32(0.1))
  (Fraction(7, 100), Fraction(1, 10))
  """
  number = np.asarray(x)
  if jnp.issubdtype(number.dtype, jnp.integer):
    return Fraction(int(number))
  texts = (f"{float(number):.{digits}g}" for digits in range(1, 18))
  return Fraction(next(text for text in texts if number.dtype.type(float(text)) == number))


def path_name(path: Path) -> str:
  """A tree path as text, such as ``params/Dense_0/kernel``."""
  return jax.tree_util.keystr(path, simple=True, separator="/") if path else "the root"


def path_names(path: Path) -> tuple[str, ...]:
  """A tree path as names; unlike ``path_name`` it is unique, as keys may hold slashes."""
  return tuple(path_name((key,)) for key in path)


def require_same_tree(tree: PyTree, reference: PyTree, what: str, like: str, remedy: str) -> None:
  """Raise ``ValueError`` unless two trees have one structure, with the first difference."""
  if not same_structure(tree, reference):
    raise ValueError(
      f"{what} must have the structure of {like}, got {_first_difference(tree, reference)}. {remedy}"
    )


def require_shapes(tree: PyTree, like: PyTree, requirement: Callable[[Shape, str], str], remedy: str) -> None:
  """Raise ``ValueError`` unless the leaves of two trees of one structure have the same shapes.

  Args:
    tree: the tree to check.
    like: the reference.
    requirement: ``requirement(shape, path)``, the requirement in words.
    remedy: advice.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  for (path, leaf), other in zip(leaves, jax.tree.leaves(like), strict=True):
    if jnp.shape(leaf) != other.shape:
      require(False, requirement(other.shape, path_name(path)), jnp.shape(leaf), remedy)


def same_structure(tree: PyTree, reference: PyTree) -> bool:
  """Whether two trees have one structure."""
  found: object = jax.tree.structure(tree)
  wanted: object = jax.tree.structure(reference)
  return found == wanted


def _first_difference(tree: PyTree, reference: PyTree, path: Path = ()) -> str:
  """The first difference between two trees of different structures."""
  found, wanted = _children(tree), _children(reference)
  missing = [key for key in wanted if key not in found]
  added = [key for key in found if key not in wanted]
  if type(tree) is not type(reference) and _is_node(tree) | _is_node(reference):
    return f"{describe(tree)} in place of {describe(reference)} at {path_name(path)}"
  if missing and added:
    return f"nothing at {path_name((*path, missing[0]))}, but something at {path_name((*path, added[0]))}"
  if missing or added:
    return f"{'nothing' if missing else 'one more'} at {path_name((*path, *(missing or added)[:1]))}"
  for key in wanted:
    if not same_structure(found[key], wanted[key]):
      return _first_difference(found[key], wanted[key], (*path, key))
  return f"{describe(tree)} of another kind at {path_name(path)}"  # static data of a node


def _children(node: PyTree) -> dict[Any, PyTree]:
  """The children of a node by key; empty for a leaf."""
  if not _is_node(node):
    return {}
  pairs = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
  return {path[0]: child for path, child in pairs}


def _is_node(x: PyTree) -> bool:
  return not jax.tree_util.all_leaves([x])
