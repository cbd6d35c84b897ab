"""Names of factors.

Axes taken entry by entry are ``d0 d1 ...`` in all arrays. Axes along which entries are mixed have two names, as in ``d0
s1 -> d0 t1``. So the first letter tells whether entries may be removed.
"""

from collections.abc import Iterable, Sequence

from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.spec import Axes, Factor, Sizes
from fisherprune_jax._types import Shape

SHARED = "d"
"""The letter of ``names_of``."""


def side(letter: str, mixed: Sequence[bool]) -> tuple[Factor, ...]:
  """Named by the letter where entries are mixed, else shared."""
  return tuple(f"{letter if mixes else SHARED}{i}" for i, mixes in enumerate(mixed))


def mixed_of(factors: Iterable[Factor]) -> frozenset[Factor]:
  """The factors along which entries are mixed."""
  return frozenset(f for f in factors if not f.startswith(SHARED))


def apart(letter: str, arrays: Sequence[Value], start: int = 0) -> tuple[tuple[Factor, ...], ...]:
  """Separate factors for each axis, from ``start`` on: ``i0.0 i0.1, i1.0 ..``."""
  return tuple(tuple(f"{letter}{at}.{k}" for k in range(len(v.shape) - start)) for at, v in enumerate(arrays))


def sized(*arrays: tuple[Axes, Shape]) -> Sizes:
  """The sizes of factors, from the shapes of arrays that have them as axes.

  Args:
    *arrays: axes, and the shape of an array with these. Other axes (``None``, ``Prod``, ...) are left out.

  Returns:
    The size of each factor, for a ``Spec``.

  >>> import fisherprune_jax as fp
  >>> fp.rules.sized((("n", "k"), (5, 4)), (("k", None), (4, 1)))
  {'n': 5, 'k': 4}
  """
  return {
    axis: n for axes, shape in arrays for axis, n in zip(axes, shape, strict=True) if isinstance(axis, str)
  }


def sizes_in(node: Node, ins: Sequence[Axes], outs: Sequence[Axes]) -> Sizes:
  """The same for a node's operands and results."""
  arrays = zip((*ins, *outs), (*node.ins, *node.outs), strict=True)
  return sized(*((axes, value.shape) for axes, value in arrays))
