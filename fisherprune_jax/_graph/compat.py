"""The only contact with JAX internals, as a test checks.

It bridges JAX versions by what objects have.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util
from jax._src.core import InconclusiveDimensionOperation, get_axis_env, is_symbolic_dim
from jax._src.debugging import DebugEffect, OrderedDebugEffect
from jax.extend import core
from jax.extend.random import define_prng_impl

from fisherprune_jax._types import Array, PyTree, Size

Equation = core.JaxprEqn
Literal = core.Literal
Primitive = core.Primitive
Params = dict[str, Any]
"""Their meaning depends on the primitive."""
UndecidedSize = InconclusiveDimensionOperation
_LIBRARIES = tuple(
  f"{os.sep}{name}{os.sep}"
  for name in (
    *("flax", "jax", "optax", "fisherprune_jax", "haiku", "equinox", "haliax", "keras", "jaxtyping"),
    *("einops", "penzai", "transformers", "chex", "beartype", "typeguard"),
  )
)
"""Library folders, whose lines are not the user's."""


def trace(fn: Callable[..., PyTree], *args: PyTree) -> tuple[Any, PyTree]:
  """Traces ``fn``; returns the jaxpr and the tree of results."""
  # A new function each time: JAX caches traces, but what ``fn`` reads may have changed.
  trace_once = jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)
  try:
    return trace_once(*args)
  except jax.errors.TracerBoolConversionError:
    # Python branches on a constant, as in lax.reduce_window. Early evaluation settles it, but puts large constants into
    # programs: so only as a fallback.
    with jax.ensure_compile_time_eval():
      return trace_once(*args)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """Splits an open or closed jaxpr from its constants."""
  return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bind(eqn: Equation, arrays: Sequence[Array], params: Params | None = None) -> list[jax.Array]:
  with eqn.ctx.manager:
    return apply(eqn.primitive, arrays, eqn.params if params is None else params)


def located(eqn: Equation, callers: Sequence[Equation] = ()) -> AbstractContextManager[Any]:
  """Gives new computations the line and names of an equation, inside its callers."""
  names = source_info_util.current_name_stack()
  for outer in (*callers, eqn):
    names = names + outer.source_info.name_stack
  return source_info_util.user_context(eqn.source_info.traceback, name_stack=names)


def apply(primitive: Primitive, arrays: Sequence[Array], params: Params) -> list[jax.Array]:
  """Always returns a list."""
  out = primitive.bind(*arrays, **primitive.get_bind_params(params))
  return list(out) if primitive.multiple_results else [out]


def evaluate(eqn: Equation, arrays: Sequence[Array]) -> np.ndarray:
  """The value of a single-result equation, even inside a trace."""
  if eqn.primitive.name == "pvary":  # only changes a type, and needs its trace
    return np.asarray(arrays[0])
  with jax.ensure_compile_time_eval():
    return np.asarray(bind(eqn, [jnp.asarray(x) for x in arrays])[0])


def without_arithmetic(name: str, advice: str) -> Any:
  """A random-key type for other data: computing with it raises an error with the advice."""

  def refuse(*_: Any) -> Any:
    raise TypeError(f"{name} are no random keys: {advice}")

  functions: dict[str, Any] = dict.fromkeys(("seed", "split", "random_bits", "fold_in"), refuse)
  return define_prng_impl(key_shape=(1,), name=name, tag=f"{name}: {advice}", **functions)


def varying_axes(x: Array) -> frozenset[str]:
  """The mapped axes over which devices differ in an array, as ``shard_map`` tracks them."""
  aval = jax.typeof(x)
  kind = getattr(aval, "manual_axis_type", aval)
  return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def unaccounted_axes() -> list[Any]:
  """The mapped axes for which JAX does not track this."""
  names = list(get_axis_env().axis_sizes)
  return [name for name in names if name not in varying_axes(jax.lax.axis_index(name))]


def source_of(eqn: Equation) -> str:
  """The user's line as ``file:line (function)``; empty if unknown."""
  frames = list(source_info_util.user_frames(eqn.source_info.traceback))
  own = [frame for frame in frames if not any(part in frame.file_name for part in _LIBRARIES)]
  if not frames:
    return ""
  frame = (own or frames)[0]
  return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"


def scope_of(eqn: Equation) -> str:
  return str(eqn.source_info.name_stack)


def scan_counts(params: Params) -> tuple[int, int]:
  """The numbers of constants and carried values of a scan."""
  if "ft_in" in params:
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)
  return params["num_consts"], params["num_carry"]


def sub_jaxprs(params: Params) -> list[Any]:
  """All jaxprs in parameters, with constants (unlike JAX's function)."""
  found = []
  for value in params.values():
    items = value if isinstance(value, tuple | list) else (value,)
    found += [item for item in items if hasattr(item, "eqns")]
  return found


def acts(eqn: Equation) -> bool:
  """Whether it has effects other than printing and debugging."""
  return any(not isinstance(effect, DebugEffect | OrderedDebugEffect) for effect in eqn.effects)


def is_concrete(x: Any) -> bool:
  return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def number(x: Any) -> np.ndarray | None:
  """A scalar as a NumPy array; None if unknown.

  Inside a trace, JAX would turn comparisons with its arrays into tracers.
  """
  return np.asarray(x) if is_concrete(x) and dtype_of(x) != np.dtype(object) else None


def dtype_of(x: Any) -> Any:
  """The dtype; ``object`` for extended types (random keys)."""
  dtype = getattr(x, "dtype", None) or np.asarray(x).dtype
  return dtype if isinstance(dtype, np.dtype) else np.dtype(object)


def is_static_size(n: Size) -> bool:
  """Whether a size is a number, not a symbol."""
  return type(n) is int or isinstance(n, np.integer | int)  # the usual case first


def is_size(n: Any) -> bool:
  """Whether it can be an axis size: non-negative or a symbol."""
  if type(n) is int or (is_static_size(n) and not isinstance(n, bool)):
    return bool(n >= 0)
  return is_symbolic_dim(n)


def differ(a: Size, b: Size) -> bool:
  """Whether sizes differ for certain; symbols do as far as JAX can tell."""
  if is_static_size(a) or is_static_size(b):
    return bool(a != b)
  try:
    return bool(a < b or a > b)
  except UndecidedSize:
    return False
