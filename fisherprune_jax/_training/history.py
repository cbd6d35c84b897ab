"""The pruning history, from the steps in the state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherprune_jax._masks import named_rows
from fisherprune_jax._training.finding import get_state
from fisherprune_jax._types import Masks


class Pruned(NamedTuple):
  """A pruned feature: the step (from 1), the name of its mask, its index."""

  step: int
  mask: str
  feature: int


def history(opt_state: optax.OptState, name: str | None = None) -> list[Pruned]:
  """All pruned features in order, as ``(step, mask, feature)``; call it outside ``jit``.

  Within a step they are in the order of the masks. Features that :func:`set_masks` put back are left out; features
  masked from the start have step 0. The history is part of the state, so checkpoints keep it.

  Args:
    opt_state: see :func:`get_state`.
    name: likewise.

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
  rows = named_rows(jax.tree.map(np.asarray, get_state(opt_state, name).pruned_at))
  found = [
    Pruned(int(at[feature]), mask, int(feature)) for mask, at in rows for feature in np.flatnonzero(at >= 0)
  ]
  return sorted(found, key=lambda pruned: pruned.step)  # stable: ordered by mask within a step


def masks_at(opt_state: optax.OptState, step: int, name: str | None = None) -> Masks:
  """The masks after a given step; jit-able.

  Features that :func:`set_masks` put back count as never pruned.

  Args:
    opt_state: see :func:`get_state`.
    step: the step; 0 is the start.
    name: see :func:`get_state`.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(3)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.fisher_prune(cost, prune_every=1)
  >>> _, state = tx.update({}, tx.init({}), mask_grads={"m": jnp.array([[3.0, 1.0, 2.0]])})
  >>> fp.masks_at(state, 0)["m"], fp.masks_at(state, 1)["m"]
  (Array([1., 1., 1.], dtype=float32), Array([1., 0., 1.], dtype=float32))
  """
  pruned_at = get_state(opt_state, name).pruned_at
  return jax.tree.map(lambda at: jnp.asarray((at < 0) | (at > step), jnp.float32), pruned_at)
