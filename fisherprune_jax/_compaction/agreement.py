"""Whether another function computes the same as a compact network, from the same variables."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._errors import describe, same_structure
from fisherprune_jax._types import Array, PyTree


def disagreement(
  reference: Callable[..., PyTree], other: Callable[..., PyTree], variables: PyTree, *args: PyTree
) -> str:
  """How the outputs of two functions of the same variables differ; empty if they agree up to rounding.

  They are compared on these variables and on random ones of the same shapes: a norm with a scale of zero, for example,
  hides what precedes it.

  >>> import jax.numpy as jnp
  >>> total, mean = lambda w, x: w * x.sum(), lambda w, x: w * x.mean()
  >>> disagreement(total, total, jnp.zeros(1), jnp.ones(4))
  ''
  >>> disagreement(total, mean, jnp.zeros(1), jnp.ones(4))
  'its outputs differ by 75 %'
  """
  reference, other = jax.jit(reference), jax.jit(other)
  for tree in (variables, _others_like(variables)):
    wanted = reference(tree, *args)
    try:
      found = other(tree, *args)
    except Exception as error:  # any function: it may raise anything
      return f"it fails: {str(error).partition(chr(10))[0]}"
    if not same_structure(found, wanted):
      return "its outputs have another structure"
    for one, two in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
      if why := _difference(jnp.asarray(one), jnp.asarray(two)):
        return why
  return ""


def _difference(wanted: jax.Array, found: jax.Array) -> str:
  if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
    return f"it gives {describe(found)} for {describe(wanted)}"
  if not jnp.issubdtype(wanted.dtype, jnp.inexact):
    return "" if bool((wanted == found).all()) else "its outputs differ"
  share = float(
    jnp.linalg.norm(jnp.ravel(wanted - found)) / jnp.maximum(jnp.linalg.norm(jnp.ravel(wanted)), 1e-30)
  )
  enough = math.sqrt(jnp.finfo(wanted.dtype).eps)  # usual for sums in another order
  return "" if share <= enough else f"its outputs differ by {100 * share:.3g} %"


def _others_like(variables: PyTree) -> PyTree:
  """Similar random variables: of the same signs and sizes, and nowhere zero."""
  random = np.random.default_rng(0)  # JAX would compile a program for each shape
  return jax.tree.map(lambda leaf: _other_like(leaf, random), variables)


def _other_like(leaf: Array, random: np.random.Generator) -> Array:
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf
  factor = random.uniform(0.5, 1.5, leaf.shape)
  fan_in = math.prod(leaf.shape[:-1])
  fresh = random.normal(size=leaf.shape) / math.sqrt(max(fan_in, 1)) if leaf.ndim > 1 else factor
  values = np.asarray(leaf, np.float64)
  return jnp.asarray(np.where(values == 0, fresh, values * factor), leaf.dtype)
