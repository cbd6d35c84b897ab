"""Names for the axes of arrays: those that are taken entry by entry are ``d0 d1 ...`` in all of them.

An axis along which a primitive mixes entries has a name of its own on each side, as in ``d0 s1 -> d0 t1``; so the first
letter of a factor tells whether a rule may let an entry go.
"""

from collections.abc import Iterable, Sequence

from fisherprune_jax._graph.program import Node, Value
from fisherprune_jax._graph.spec import Axes, Factor, Sizes
from fisherprune_jax._types import Shape

SHARED = "d"
"""The letter of the names that ``spec.names_of`` gives."""


def side(letter: str, mixed: Sequence[bool]) -> tuple[Factor, ...]:
  """The axes of one array: named by ``letter`` where entries are mixed, shared with the others where not."""
  return tuple(f"{letter if mixes else SHARED}{i}" for i, mixes in enumerate(mixed))


def mixed_of(factors: Iterable[Factor]) -> frozenset[Factor]:
  """Those of some factors along which entries are mixed, so that every one has to be there."""
  return frozenset(f for f in factors if not f.startswith(SHARED))


def apart(letter: str, arrays: Sequence[Value], start: int = 0) -> tuple[tuple[Factor, ...], ...]:
  """Factors of its own for each axis of each array, from axis ``start`` on: ``i0.0 i0.1, i1.0 ..``."""
  return tuple(tuple(f"{letter}{at}.{k}" for k in range(len(v.shape) - start)) for at, v in enumerate(arrays))


def sized(*arrays: tuple[Axes, Shape]) -> Sizes:
  """The sizes of factors, from the shapes of arrays that have them along an axis.

  Args:
    *arrays: axes, and the shape of an array with these. What is no single factor (``None``, ``Prod``, ...) is left out.

  Returns:
    What ``Spec`` calls ``sizes``: the size of each factor.

  >>> import fisherprune_jax as fp
  >>> fp.rules.sized((("n", "k"), (5, 4)), (("k", None), (4, 1)))
  {'n': 5, 'k': 4}
  """
  return {
    axis: n for axes, shape in arrays for axis, n in zip(axes, shape, strict=True) if isinstance(axis, str)
  }


def sizes_in(node: Node, ins: Sequence[Axes], outs: Sequence[Axes]) -> Sizes:
  """The same of all operands and results of a node."""
  arrays = zip((*ins, *outs), (*node.ins, *node.outs), strict=True)
  return sized(*((axes, value.shape) for axes, value in arrays))
