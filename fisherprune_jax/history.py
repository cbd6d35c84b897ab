"""When each feature went: the state remembers it, and everything over time derives from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax.masks import named_rows
from fisherprune_jax.states import get_state


class Pruned(NamedTuple):
  """A feature that went: the step (from 1), the name of its mask, its index."""

  step: int
  mask: str
  feature: int


def history(opt_state: Any) -> list[Pruned]:
  """What was pruned, in order: ``(step, mask, feature)``.

  Features that went at the same step are in the order of the masks. It is read from the state on the device, so
  it survives checkpoints; call it outside ``jit``.

  Args:
    opt_state: the state of any transformation that :func:`fisher_prune` is a part of.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(3)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.fisher_prune(cost, prune_every=1)
  >>> state = tx.init({})
  >>> for _ in range(2):
  ...   _, state = tx.update({}, state, mask_grads={"m": jnp.array([[3.0, 1.0, 2.0]])})
  >>> fp.history(state)
  [Pruned(step=1, mask='m', feature=1), Pruned(step=2, mask='m', feature=2)]
  """
  rows = named_rows(jax.tree.map(np.asarray, get_state(opt_state).pruned_at))
  found = [
    Pruned(int(at[feature]), name, int(feature)) for name, at in rows for feature in np.flatnonzero(at >= 0)
  ]
  return sorted(found, key=lambda pruned: pruned.step)  # stable: the order of the masks within a step


def masks_at(opt_state: Any, step: int) -> Any:
  """The masks as they were after a step: a replay of the past; jit-able.

  Args:
    opt_state: the state of any transformation that :func:`fisher_prune` is a part of.
    step: a step from 0 (all ones) on.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(3)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.fisher_prune(cost, prune_every=1)
  >>> _, state = tx.update({}, tx.init({}), mask_grads={"m": jnp.array([[3.0, 1.0, 2.0]])})
  >>> fp.masks_at(state, 0)["m"], fp.masks_at(state, 1)["m"]
  (Array([1., 1., 1.], dtype=float32), Array([1., 0., 1.], dtype=float32))
  """
  return jax.tree.map(
    lambda at: jnp.asarray((at < 0) | (at > step), jnp.float32), get_state(opt_state).pruned_at
  )
