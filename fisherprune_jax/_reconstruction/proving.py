"""The proof that a change of basis changes nothing: the nodes that it passes, on random numbers.

Random numbers stand for parameters and for all that these nodes read from outside, and a random matrix for the change. Calibration
batches would prove less: a small branch hides behind a large residual stream, and some batches never reach a branch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.bottlenecks import random_like
from fisherprune_jax._reconstruction.consumers import LINEAR
from fisherprune_jax._reconstruction.fitting import Traced
from fisherprune_jax._reconstruction.flat import Flat

DIFFERENCE, EPSILONS = 1e-4, 16
"""Of a value, relative to its largest entry, or so many times the coarsest machine epsilon: what rounding may change."""


def is_same(
  traced: Traced,
  makers: Sequence[int],
  ends: Sequence[int],
  leaves: Sequence[Any],
  change: Callable[[list[Any]], list[Any]],
) -> bool:
  """Whether what is read of some products, and what they lead to, stays the same under a change of parameters.

  Args:
    traced: the network.
    makers: the positions of the products whose results change.
    ends: the positions of the products that sum over them.
    leaves: the variables, with masks of ones.
    change: the change of the leaves of the variables.
  """
  flat, rng = traced.flat, np.random.default_rng(1)
  inside, edge = _region(flat, makers, set(ends))
  made = {value for at in inside for value in flat.nodes[at].outs}
  read = [v for at in inside for v in flat.nodes[at].ins if v.literal is None and v not in made]
  strange = jax.dtypes.extended, jnp.complexfloating
  if any(jnp.issubdtype(value.aval.dtype, kind) for value in read for kind in strange):
    return False
  outside = {value: random_like(value, rng) for value in dict.fromkeys(read) if value in flat.varies}
  _, needed = flat.before(edge, [*flat.variables, *outside])
  drawn = [
    random_like(value, rng) if value in needed and value not in traced.masks else leaf
    for value, leaf in zip(flat.variables, leaves, strict=True)
  ]

  def values(leaves: list[Any]) -> list[jax.Array]:
    return flat.get(edge, {**flat.env(leaves), **outside})

  after = change(drawn)
  kinds = [value.aval.dtype for value in (*made, *read) if _is_real(value)]
  kinds += [new.dtype for old, new in zip(drawn, after, strict=True) if new is not old]
  allowed = max(DIFFERENCE, EPSILONS * max(float(jnp.finfo(kind).eps) for kind in kinds))
  return all(_is_close(a, b, allowed) for a, b in zip(values(drawn), values(after), strict=True))


def _is_real(value: Value) -> bool:
  return bool(jnp.issubdtype(value.aval.dtype, jnp.floating))


def _region(flat: Flat, makers: Sequence[int], ends: set[int]) -> tuple[list[int], list[Value]]:
  """The nodes that a change passes, and the values of them that are results of the ends, outputs, or read elsewhere.

  These nodes are the products that make features, what is linear behind them, the way to the ends, and the ends.
  """
  moving = {value for at in makers for value in flat.nodes[at].outs}
  way, _ = flat.before([value for at in ends for value in flat.nodes[at].ins], moving)
  inside, needed = set(makers), set(way)
  for at, node in enumerate(flat.nodes):
    is_linear = node.name in (*LINEAR, "concatenate")
    if any(value in moving for value in node.ins) and (is_linear or at in needed or at in ends):
      inside.add(at)
      if at not in ends:
        moving.update(node.outs)
  outputs = set(flat.program.outputs)
  made = [value for at in sorted(inside) for value in flat.nodes[at].outs]
  edge = [
    value
    for value in made
    if flat.made[value] in ends or value in outputs or any(at not in inside for at in flat.readers[value])
  ]
  return sorted(inside), edge


def _is_close(a: jax.Array, b: jax.Array, allowed: float) -> bool:
  if not jnp.issubdtype(a.dtype, jnp.floating):
    return bool(jnp.array_equal(a, b))
  first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return bool(np.abs(first - second).max(initial=0) <= allowed * np.abs(first).max(initial=0))
