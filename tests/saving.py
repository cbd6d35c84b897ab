"""A training process that saves after every step, and may be killed: ``python -m tests.saving FOLDER STEPS``."""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import fisherprune_jax as fp
from tests import job


def manager(folder: Path) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))


def train(folder: Path, steps: int) -> dict[str, Any]:
  """Goes on from the last whole checkpoint, or starts; saves in the background while the next step runs."""
  tx = job.transformation()
  step = jax.jit(functools.partial(job.train_step, tx), donate_argnums=(0, 1))
  state = dict(zip(("params", "opt_state"), job.start(tx), strict=True))
  with manager(folder) as checkpoints:
    done = checkpoints.latest_step() or 0
    print("start", done, flush=True)
    if done:
      state = checkpoints.restore(done, args=ocp.args.StandardRestore(jax.eval_shape(lambda: state)))
    for n in range(done, steps):
      params, opt_state, _ = step(state["params"], state["opt_state"], job.batch(n))
      state = {"params": params, "opt_state": opt_state}
      checkpoints.save(n + 1, args=ocp.args.StandardSave(state))
      print("saving", n + 1, flush=True)
  return state


def evaluate_compact(folder: Path) -> jax.Array:
  """Restores a compact network in its own shapes, trains it one step further, and runs it."""
  tx = job.transformation()
  with ocp.StandardCheckpointer() as checkpoints:
    masks = checkpoints.restore(folder.absolute() / "masks", job.variables()["masks"])
    small = fp.compact(job.MODEL.apply, {**job.variables(), "masks": masks}, job.batch(0)[0])
    fresh = small.shrink_opt_state(tx, tx.init(job.variables()["params"]))
    abstract = jax.eval_shape(lambda: {"variables": small.variables, "opt_state": fresh})
    state = checkpoints.restore(folder.absolute() / "compact", abstract)
  return one_more_step(small, tx, state)


def one_more_step(small: fp.Compact, tx: Any, state: dict[str, Any]) -> jax.Array:
  images, labels = job.batch(99)

  def loss(params: Any) -> jax.Array:
    return jnp.mean((small({"params": params}, images) - labels[:, None]) ** 2)

  params = state["variables"]["params"]
  updates, _ = tx.update(jax.grad(loss)(params), state["opt_state"], params)
  return small({"params": jax.tree.map(jnp.add, params, updates)}, images)


if __name__ == "__main__":
  train(Path(sys.argv[1]), int(sys.argv[2]))
