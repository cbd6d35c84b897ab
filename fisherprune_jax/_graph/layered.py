"""Stacks of variables that are computed with before the loop over their layers: each layer is demanded by itself.

Otherwise a cast of stacked kernels before the loop would keep of each layer what any layer needs.
"""

from typing import TYPE_CHECKING

import numpy as np

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.boxes import Where
from fisherprune_jax._graph.facts import Factors, needed
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.spec import Factor, Pick, Spec, factors_of

if TYPE_CHECKING:
  from fisherprune_jax._graph.liveness import Liveness


def axis_of(node: Node, live: "Liveness") -> Factor | Pick | None:
  """The axis of layers, if a node computes a stack from variables layer by layer, and layers of it are demanded."""
  if len(node.outs) != 1:
    return None
  (out,), spec = node.outs, live.specs[node]
  is_by_layer = out not in live.demanded_whole and (out in live.demanded_layers or out in live.demanded_alone)
  if live.info(out).varies or not is_by_layer:
    return None
  axis = spec.outs[0][0]
  is_filled = isinstance(axis, Pick) and (axis.filled or (axis.index < 0).any())
  if not isinstance(axis, str | Pick) or is_filled or spec.same_as is not None:
    return None
  (factor,) = factors_of(axis)
  rest = [one for axes in (*spec.ins, *spec.outs) for one in axes[1:]]
  rest += [axes[0] for axes in spec.ins if axes and axes[0] != factor]
  is_apart = factor not in spec.unordered and not any(factor in factors_of(one) for one in rest)
  return axis if is_apart else None


def backward(node: Node, live: "Liveness", axis: Factor | Pick) -> list[Factors | None]:
  """Demands what each layer of the result needs; returns the factors of each layer, or None."""
  spec, infos, (out,) = live.specs[node], [live.info(value) for value in node.ins], node.outs
  layers = live.by_layer(out)
  found: list[Factors | None] = [None] * len(layers)
  for layer, one in enumerate(layers):
    if one.when is sets.NEVER:
      continue
    stored = [Where((sets.fixed(np.arange(len(layers)) == layer), *one.box), when=one.when)]
    factors = found[layer] = needed(spec, infos, stored)
    for operand, value, where in live.demands(node, infos, factors, stored):
      place = int(axis.index[layer]) if isinstance(axis, Pick) else layer
      if spec.ins[operand][:1] != factors_of(axis):
        live.ask(value, where)
      elif out in live.demanded_layers:
        live.ask_layer(value, place, where.in_an_iteration())
      else:
        live.ask(value, where, place)
  return found


def taken(spec: Spec) -> int | None:
  """The layer of operand 0 that the result is, if it is one."""
  axis = spec.outs[0][0] if spec.outs and spec.outs[0] else None
  if not isinstance(axis, Pick) or axis.filled or axis.index.size != 1 or spec.ins[0][:1] != (axis.factor,):
    return None
  return int(axis.index[0]) if axis.index[0] >= 0 else None
