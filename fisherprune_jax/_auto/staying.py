"""Axes of a group that cannot shrink, because an array made of variables alone sums over them.

Spectral norms, weight standardisation or projections of learned queries do not depend on arguments. They are computed
before any mask, from all entries.
"""

from collections.abc import Sequence

from fisherprune_jax._auto.atoms import Atom, leaves
from fisherprune_jax._auto.axes import Axes, used
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.spec import factors_of
from fisherprune_jax._graph.structured import links


def staying(axes: Axes, program: Program, variables: Sequence[Value]) -> dict[tuple[int, Atom], str]:
  """The variables (by position) and leaves that keep all entries, with the line that needs them."""
  origins: dict[Value, frozenset[int]] = {value: frozenset({at}) for at, value in enumerate(variables)}
  return _walk(axes, program, origins)


def _walk(axes: Axes, program: Program, origins: dict[Value, frozenset[int]]) -> dict[tuple[int, Atom], str]:
  found: dict[tuple[int, Atom], str] = {}
  for node in used(program):
    found |= {(at, leaf): node.source for value, leaf in _summed(axes, node) for at in origins.get(value, ())}
    of_all = frozenset[int]().union(*(origins.get(value, frozenset()) for value in node.ins))
    origins.update((out, of_all) for out in node.outs if not axes.varies(out))
    for link in links(node, axes.live):
      origins.update((inner, origins[outer]) for outer, inner in link.ins if outer in origins)
      origins.update(
        (taker, of_all) for taker, _ in link.iterations
      )  # any value may reach the next iteration
      found |= _walk(axes, link.program, origins)
  return found


def _summed(axes: Axes, node: Node) -> list[tuple[Value, Atom]]:
  """Leaves that a node sums over, or needs whole, in operands made of variables alone."""
  spec = axes.live.specs.get(node)
  if spec is None or any(map(axes.varies, node.ins)):
    return []
  needed = spec.roles.summed | spec.whole
  return [
    (value, leaf)
    for value, own in zip(node.ins, spec.ins, strict=True)
    if value.literal is None
    for atom, axis in zip(axes.of(value), own, strict=True)
    if not needed.isdisjoint(factors_of(axis))
    for leaf in leaves(atom)
  ]
