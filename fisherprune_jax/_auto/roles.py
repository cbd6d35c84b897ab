"""Roles of groups, for their names: heads, their depth, or the width of a layer."""

from collections.abc import Collection

from fisherprune_jax._auto.atoms import Atom, leaves
from fisherprune_jax._auto.axes import Axes
from fisherprune_jax._auto.naming import DEPTH, HEADS
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.spec import Spec, factors_of


def roles_of(axes: Axes, groups: Collection[Atom]) -> dict[Atom, str]:
  """The heads and depths among groups, from products of two varying arrays, as in attention.

  Queries and keys are summed over their depth, beside heads; other groups of products with heads are depths of values.
  """
  found: dict[Atom, str] = {}
  for body in axes.bodies:
    for node in body.program.nodes:
      spec = axes.live.specs.get(node)
      if node.name == "dot_general" and spec is not None and all(map(axes.varies, node.ins)):
        summed, others = _parts(axes, node, spec, groups)
        told = dict.fromkeys(summed, DEPTH) if others else {}
        if told or any(found.get(leaf) == HEADS for leaf in others):
          told |= dict.fromkeys(others, HEADS if told else DEPTH)
        for leaf, role in told.items():
          found.setdefault(leaf, role)
  return found


def _parts(axes: Axes, node: Node, spec: Spec, groups: Collection[Atom]) -> tuple[list[Atom], list[Atom]]:
  """The groups that a product sums over, and the other groups of its operands."""
  summed, others = list[Atom](), list[Atom]()
  for operand, own in enumerate(spec.ins):
    for atom, axis in zip(axes.operand(node, operand), own, strict=True):
      kind = others if spec.roles.summed.isdisjoint(factors_of(axis)) else summed
      kind += [leaf for leaf in leaves(atom) if leaf in groups]
  return summed, others
