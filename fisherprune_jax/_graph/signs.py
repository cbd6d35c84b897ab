"""Values with zeros whose sign shows.

A mask times a negative number is -0.0, but entries that are not stored are shown as +0.0. Few primitives can tell:
``atan2``, ``bitcast_convert_type``, ``top_k``, and division by them. This walks back from their operands, until a
primitive does not pass the sign on (a sum of several terms, an exp). The values found are computed as traced, with
masks multiplied.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.spec import Spec

Links = Callable[[Node], Iterable[Any]]


def shown(program: Program, specs: Mapping[Node, Spec], links: Links) -> set[Value]:
  """The values of a program (and of those inside) with zeros whose sign shows in a result."""
  found: set[Value] = set()
  _walk(program, specs, links, found)
  return found


def _walk(program: Program, specs: Mapping[Node, Spec], links: Links, found: set[Value]) -> None:
  for node in reversed(program.nodes):
    if node in specs:
      _through(node, specs[node], found)
      continue
    before = -1
    while before < len(found):  # in loops, later iterations see the signs of earlier ones
      before = len(found)
      for link in links(node):
        found |= {inner for outer, inner in link.outs if outer in found}
        found |= {after for inner, after in link.iterations if inner in found}
        _walk(link.program, specs, links, found)
        _add(found, (outer for outer, inner in link.ins if inner in found))


def _through(node: Node, spec: Spec, found: set[Value]) -> None:
  handed_on = any(out in found for out in node.outs)
  operands = enumerate(node.ins)
  _add(found, (v for at, v in operands if at in spec.sees or (handed_on and at not in spec.blind)))


def _add(found: set[Value], values: Iterable[Value]) -> None:
  found |= {v for v in values if v.literal is None and jnp.issubdtype(v.aval.dtype, jnp.inexact)}
