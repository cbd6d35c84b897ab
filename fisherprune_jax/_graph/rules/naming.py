"""Names for the axes of arrays: those that are taken entry by entry are ``d0 d1 ...`` in all of them.

An axis along which a primitive mixes entries has a name of its own on each side, as in ``d0 s1 -> d0 t1``; so the first
letter of a factor tells whether a rule may let an entry go.
"""

from collections.abc import Iterable, Sequence

from fisherprune_jax._graph.spec import Axes, Factor, Sizes
from fisherprune_jax._types import Size

SHARED = "d"
"""The letter of the names that ``spec.names_of`` gives."""


def side(letter: str, mixed: Sequence[bool]) -> tuple[Factor, ...]:
  """The axes of one array: named by ``letter`` where entries are mixed, shared with the others where not."""
  return tuple(f"{letter if mixes else SHARED}{i}" for i, mixes in enumerate(mixed))


def mixed_of(factors: Iterable[Factor]) -> frozenset[Factor]:
  """Those of some factors along which entries are mixed, so that every one has to be there."""
  return frozenset(f for f in factors if not f.startswith(SHARED))


def sized(*arrays: tuple[Axes, Sequence[Size]]) -> Sizes:
  """The sizes of the factors that axes are, from the shapes of the arrays that have them; ``None`` has no size."""
  return {
    axis: n for axes, shape in arrays for axis, n in zip(axes, shape, strict=True) if isinstance(axis, str)
  }
