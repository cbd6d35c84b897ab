"""Where the promises end: what a random network may show though nobody promised otherwise."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

UNTRUE = (
  "prod cumprod reverse number straight rounded scaled mixed branches short all any clamp where sign".split()
)
"""Steps whose gradients are not the whole truth: of what is multiplied with a dead feature, of rules that mix, of
branches that are never taken, of loops that end before all that they carry has come to be non-zero, of what only says
whether something holds, of bounds between which zero may lie or not, of patterns of the network's own, and of what has a
value and no derivative."""
SUMS = {"dot_general", "conv_general_dilated", "reduce_sum", "cumsum", "reduce_window_sum"}
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def gradients_tell(names: Sequence[str]) -> bool:
  """Whether a gradient says of every slice of the parameters of these steps whether it matters."""
  return not any(name.startswith(tuple(UNTRUE)) for name in names)


def sums_to_zero(function: Callable[..., Any], *args: Any) -> bool:
  """Whether a sum of several terms is exactly zero somewhere: its sign is XLA's business."""
  closed = jax.make_jaxpr(function)(*args)
  return _run(closed.jaxpr, closed.consts, jax.tree.leaves(args))[1]


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], bool]:
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  read = lambda atom: atom.val if hasattr(atom, "val") else env[atom]
  found = False
  for eqn in jaxpr.eqns:
    values = list(map(read, eqn.invars))
    inner = next((eqn.params[name] for name in INNER if hasattr(eqn.params.get(name), "eqns")), None)
    if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(values):
      outs, deeper = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
      found |= deeper
    else:
      outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
      outs = outs if eqn.primitive.multiple_results else [outs]
    found |= eqn.primitive.name in SUMS and any((np.asarray(out) == 0).any() for out in outs)
    env.update(zip(eqn.outvars, outs, strict=True))
  return list(map(read, jaxpr.outvars)), found
