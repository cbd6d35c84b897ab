"""A compact network as StableHLO."""

from collections.abc import Callable, Iterator, Sequence

import jax
from jax import export as jax_export

from fisherprune_jax._graph.examples import map_with_axes
from fisherprune_jax._graph.variables import abstract, dtype_of
from fisherprune_jax._types import BatchAxes, PyTree, Size


def export(
  function: Callable[..., PyTree],
  args: Sequence[PyTree],
  platforms: Sequence[str] | None,
  fixed: Sequence[PyTree] | None = None,
) -> jax_export.Exported:
  """Export ``function(*args)``, with symbolic sizes or not; ``fixed`` are arguments without symbols."""
  jitted = jax.jit(function)
  try:
    return jax_export.export(jitted, platforms=platforms)(*args)
  except Exception as error:  # models may fail on a symbol in any way: in len, range, a comparison, a reshape
    if not any(_symbols(args)):
      raise
    if fixed is not None and not any(_symbols(fixed)):
      jax_export.export(jitted, platforms=platforms)(
        *fixed
      )  # raises errors that have nothing to do with symbols
    said = next(iter(str(error).splitlines()), "").rstrip(".")
    raise ValueError(
      "A network that is exported for any size must not compute with it in a way that a symbol cannot follow, got "
      f"{type(error).__name__}: {said}. Export it for one batch size, export(..., batch=None) or save(..., batch=None); or "
      "give your own symbols with constraints (jax.export.symbolic_shape) as sizes of the arguments. A model can take sizes "
      "from x.shape, reshape with -1, and must not contain the batch size."
    ) from error


def shapes_of(args: Sequence[PyTree], batch_axes: BatchAxes, batch: str | None) -> tuple[PyTree, ...]:
  """The shapes of arguments; ``batch`` names the size of example axes, None keeps it."""
  shapes = abstract(tuple(args))
  return shapes if batch is None else _with_symbol(shapes, batch_axes, batch)


def _with_symbol(shapes: PyTree, batch_axes: BatchAxes, name: str) -> PyTree:
  """The shapes with a symbol along their example axes, unless they have one there."""
  scopes = [size.scope for size in _symbols(shapes)]
  (batch,) = jax_export.symbolic_shape(name, scope=scopes[0] if scopes else None)

  def with_batch(x: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
    if axis is None or axis >= len(x.shape) or jax_export.is_symbolic_dim(x.shape[axis]):
      return x
    axis %= len(x.shape)
    return jax.ShapeDtypeStruct((*x.shape[:axis], batch, *x.shape[axis + 1 :]), dtype_of(x))

  return map_with_axes(with_batch, shapes, batch_axes)


def _symbols(shapes: Sequence[PyTree]) -> Iterator[Size]:
  return (size for x in jax.tree.leaves(shapes) for size in x.shape if jax_export.is_symbolic_dim(size))
