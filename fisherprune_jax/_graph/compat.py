"""Every contact with JAX internals, in one place: a test holds that no other module imports any.

What differs between the supported versions of JAX is bridged by asking objects for what they have, so
that nothing outside this file needs to know which version runs.
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
"""The parameters of an equation: what they are, its primitive alone knows."""
UndecidedSize = InconclusiveDimensionOperation
_LIBRARIES = tuple(
  f"{os.sep}{name}{os.sep}"
  for name in (
    *("flax", "jax", "optax", "fisherprune_jax", "haiku", "equinox", "haliax", "keras", "jaxtyping"),
    *("einops", "penzai", "transformers", "chex", "beartype", "typeguard"),
  )
)
"""Folders of libraries: a line in them is none of the user's own."""


def trace(fn: Callable[..., PyTree], *args: PyTree) -> tuple[Any, PyTree]:
  """Traces ``fn`` to a jaxpr; returns it and the tree of ``fn``'s result (of ``ShapeDtypeStruct``)."""
  # A function of its own each time: JAX remembers traces by function, and what this one reads may have changed.
  trace_once = jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)
  try:
    return trace_once(*args)
  except jax.errors.TracerBoolConversionError:
    # Python decides by a constant, as lax.reduce_window does by its initial value: JAX can tell if it computes
    # with constants at once. Not the first choice, since then programs hold large arrays of constants.
    with jax.ensure_compile_time_eval():
      return trace_once(*args)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """Splits an open or closed jaxpr into the jaxpr and the values of its constants."""
  return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bind(eqn: Equation, arrays: Sequence[Array], params: Params | None = None) -> list[jax.Array]:
  """Applies an equation's primitive to ``arrays``, with its own parameters or with ``params``."""
  with eqn.ctx.manager:
    return apply(eqn.primitive, arrays, eqn.params if params is None else params)


def located(eqn: Equation, callers: Sequence[Equation] = ()) -> AbstractContextManager[Any]:
  """Where what is computed anew is said to come from: the line and the names of an equation, inside of ``callers``."""
  names = source_info_util.current_name_stack()
  for outer in (*callers, eqn):
    names = names + outer.source_info.name_stack
  return source_info_util.user_context(eqn.source_info.traceback, name_stack=names)


def apply(primitive: Primitive, arrays: Sequence[Array], params: Params) -> list[jax.Array]:
  """Applies a primitive to ``arrays``; one result is a list of one."""
  out = primitive.bind(*arrays, **primitive.get_bind_params(params))
  return list(out) if primitive.multiple_results else [out]


def evaluate(eqn: Equation, arrays: Sequence[Array]) -> np.ndarray:
  """The value of a single-result equation at known operands, also in the middle of a trace."""
  if eqn.primitive.name == "pvary":  # it changes a type alone, and needs the trace that it stands in
    return np.asarray(arrays[0])
  with jax.ensure_compile_time_eval():
    return np.asarray(bind(eqn, [jnp.asarray(x) for x in arrays])[0])


def without_arithmetic(name: str, advice: str) -> Any:
  """A kind of random key for data that are none: JAX refuses to compute with it, in an error that gives the advice."""

  def refuse(*_: Any) -> Any:
    raise TypeError(f"{name} are no random keys: {advice}")

  functions: dict[str, Any] = dict.fromkeys(("seed", "split", "random_bits", "fold_in"), refuse)
  return define_prng_impl(key_shape=(1,), name=name, tag=f"{name}: {advice}", **functions)


def varying_axes(x: Array) -> frozenset[str]:
  """The mapped axes over which an array differs between devices, where ``shard_map`` keeps account of them."""
  aval = jax.typeof(x)
  kind = getattr(aval, "manual_axis_type", aval)
  return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def unaccounted_axes() -> list[Any]:
  """The named axes that the code is mapped over (``vmap``, ``pmap``, ``shard_map``) with no account of what differs."""
  names = list(get_axis_env().axis_sizes)
  return [name for name in names if name not in varying_axes(jax.lax.axis_index(name))]


def source_of(eqn: Equation) -> str:
  """The line of the user's own code that an equation came from, as ``file:line (function)``; empty if unknown."""
  frames = list(source_info_util.user_frames(eqn.source_info.traceback))
  own = [frame for frame in frames if not any(part in frame.file_name for part in _LIBRARIES)]
  if not frames:
    return ""
  frame = (own or frames)[0]
  return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"


def scope_of(eqn: Equation) -> str:
  """The names that an equation was traced under, ``jax.named_scope`` and Flax modules, with slashes between."""
  return str(eqn.source_info.name_stack)


def scan_counts(params: Params) -> tuple[int, int]:
  """How many constants and how many carried values a scan has."""
  if "ft_in" in params:
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)
  return params["num_consts"], params["num_carry"]


def sub_jaxprs(params: Params) -> list[Any]:
  """All jaxprs among an equation's parameters, closed ones with their constants (which JAX's own function drops)."""
  found = []
  for value in params.values():
    items = value if isinstance(value, tuple | list) else (value,)
    found += [item for item in items if hasattr(item, "eqns")]
  return found


def acts(eqn: Equation) -> bool:
  """Whether an equation has effects other than printing and debugging."""
  return any(not isinstance(effect, DebugEffect | OrderedDebugEffect) for effect in eqn.effects)


def is_concrete(x: Any) -> bool:
  """Whether ``x`` is a value rather than a tracer or an abstract shape."""
  return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def number(x: Any) -> np.ndarray | None:
  """A scalar as a NumPy array, None if its value is not known here.

  Inside a caller's trace JAX would turn any comparison with a ``jax.Array`` into a tracer.
  """
  return np.asarray(x) if is_concrete(x) and dtype_of(x) != np.dtype(object) else None


def dtype_of(x: Any) -> Any:
  """The dtype of an array; of extended types (random keys) ``object``."""
  dtype = getattr(x, "dtype", None) or np.asarray(x).dtype
  return dtype if isinstance(dtype, np.dtype) else np.dtype(object)


def is_static_size(n: Size) -> bool:
  """Whether an axis size is a number, not a symbol of a shape-polymorphic trace."""
  return type(n) is int or isinstance(n, np.integer | int)  # the usual first: this is asked of every axis


def is_size(n: Any) -> bool:
  """Whether ``n`` can be the size of an axis: a whole number that is not negative, or a symbol."""
  if type(n) is int or (is_static_size(n) and not isinstance(n, bool)):
    return bool(n >= 0)
  return is_symbolic_dim(n)


def differ(a: Size, b: Size) -> bool:
  """Whether two sizes cannot be one: a number is no symbol, and two symbols are as far apart as JAX can tell."""
  if is_static_size(a) or is_static_size(b):
    return bool(a != b)
  try:
    return bool(a < b or a > b)
  except UndecidedSize:
    return False
