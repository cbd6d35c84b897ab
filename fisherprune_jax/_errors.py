"""Errors that state the requirement, the value and the remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require(condition: bool, requirement: str, value: Any, remedy: str = "") -> None:
  """Raises ``ValueError`` unless ``condition`` holds."""
  if not condition:
    raise ValueError(f"{requirement}, got {value!r}.{' ' + remedy if remedy else ''}")


def is_traced(x: Any) -> bool:
  """Whether ``x`` has no value yet, so that a check of its value has to be skipped."""
  return isinstance(x, jax.core.Tracer)


def is_known(x: Any) -> bool:
  """Whether the values of ``x`` can be read here: neither traced, nor abstract, nor partly on other hosts."""
  return (
    not is_traced(x) and not isinstance(x, jax.ShapeDtypeStruct) and getattr(x, "is_fully_addressable", True)
  )


def describe(x: Any) -> str:
  """A short description of an array, or of the type of anything else."""
  if hasattr(x, "shape") and hasattr(x, "dtype"):
    return f"{x.dtype}{list(x.shape)}"
  return type(x).__name__


def is_number(x: Any) -> bool:
  """Whether ``x`` is a real number or a scalar array."""
  if isinstance(x, bool) or not isinstance(x, int | float | np.number | np.ndarray | jax.Array):
    return False
  return jnp.ndim(x) == 0


def require_same_tree(tree: Any, reference: Any, what: str, like: str, remedy: str) -> None:
  """Raises ``ValueError`` unless two trees have one structure."""
  found, wanted = jax.tree.structure(tree), jax.tree.structure(reference)
  if found != wanted:
    raise ValueError(f"{what} must have the structure of {like}, {wanted}; got {found}. {remedy}")
