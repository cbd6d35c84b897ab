"""What an elementwise primitive makes of zeros and their signs, found by applying it.

It is applied once to a grid of numbers with both zeros, an axis per operand.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.compat import Primitive
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node

SIGNED_AT_WILL = frozenset({"max", "min", "clamp"})
"""XLA may return either of +0 and -0, which differs by place."""


class Zeros(NamedTuple):
  """What a primitive makes of zeros.

  Attributes:
    kept: whether the result is zero if all operands but constants are.
    sees: sign-sensitive operands.
    blind: sign-insensitive operands.
  """

  kept: bool
  sees: frozenset[int]
  blind: frozenset[int]


def probe(node: Node, infos: Sequence[Info]) -> Zeros:
  operands = tuple(
    (np.dtype(value.aval.dtype), None if info.const is None else np.asarray(info.const).item())
    for value, info in zip(node.ins, infos, strict=True)
    if jnp.issubdtype(value.aval.dtype, jnp.number) or value.aval.dtype == bool
  )
  if len(operands) != len(infos):
    return Zeros(False, frozenset(), frozenset())
  try:
    return _ask(node.eqn.primitive, tuple(sorted(node.params.items())), operands)
  except TypeError:  # unhashable parameters
    return _ask.__wrapped__(node.eqn.primitive, tuple(node.params.items()), operands)


@functools.lru_cache(maxsize=4096)
def _ask(primitive: Primitive, params: Any, operands: Any) -> Zeros:
  axes = [_numbers(dtype, const) for dtype, const in operands]
  with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
    grid = [jnp.asarray(x) for x in np.meshgrid(*axes, indexing="ij")]
    result = np.asarray(compat.apply(primitive, grid, dict(params))[0])
  # NumPy's sign tests lack some half precisions; float64 holds all.
  result = result if np.iscomplexobj(result) else result.astype(np.float64)
  signs = [_sign(result, at, axis) for at, axis in enumerate(axes)]
  zeros = [
    np.arange(axis.size) == 0 if const is not None else axis == 0
    for axis, (_, const) in zip(axes, operands, strict=True)
  ]
  return Zeros(
    kept=bool((result[np.ix_(*zeros)] == 0).all()),
    sees=frozenset(at for at, sign in enumerate(signs) if sign == "seen"),
    blind=frozenset(at for at, sign in enumerate(signs) if sign == "lost")
    if primitive.name not in SIGNED_AT_WILL
    else frozenset(),
  )


def _numbers(dtype: np.dtype, const: Any) -> np.ndarray:
  """Numbers to try, with zeros of both signs."""
  if const is not None:
    return np.asarray([const]).astype(dtype)
  if np.issubdtype(dtype, np.bool_):
    return np.asarray([False, True])
  if jnp.issubdtype(dtype, jnp.complexfloating):
    parts = np.asarray([0.0, -0.0, 1.0, -1.0])
    numbers = np.empty(16, np.complex128)
    numbers.real, numbers.imag = np.repeat(parts, 4), np.tile(parts, 4)
    return numbers.astype(dtype)
  if jnp.issubdtype(dtype, jnp.floating):
    return np.asarray([0.0, -0.0, 1.0, -1.0, 0.5, -2.0]).astype(dtype)
  return np.asarray([0, 1, 2]).astype(dtype)


def _sign(result: np.ndarray, at: int, numbers: np.ndarray) -> str:
  """The sign of an operand's zeros is ``lost``, passed ``on`` to a zero, or ``seen``."""
  rows = np.moveaxis(result, at, 0)
  pairs = [
    (rows[i], rows[j]) for i in range(numbers.size) for j in range(i) if numbers[i] == numbers[j]
  ]  # none for integers
  if not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
    return "seen"
  return "on" if any(_apart(a.real, b.real) or _apart(a.imag, b.imag) for a, b in pairs) else "lost"


def _apart(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether equal numbers differ in the sign of a zero."""
  return bool((np.signbit(a) != np.signbit(b))[a == 0].any())
