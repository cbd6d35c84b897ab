"""Prunes a click-prediction network to a budget of FLOPs while it trains; can be stopped and resumed.

  python examples/showcase/ranking_mlp/main.py --pruning.flops_target 25000 --out ranking

This is the classic trainer: an MLP on discretized features, a binary label, momentum SGD. One feature is pruned every so
many steps. ``fp.Pruner`` follows a falling budget instead, so this script uses automatic masks and ``fp.pruning_sgd``.
A teacher makes the clicks, and each row is seen once. Trains without and with pruning, compacts, checks and times.
Writes ``report.json``, ``curve.png``, ``events/`` for TensorBoard and ``checkpoints/``. After a kill or Ctrl-C,
``--resume`` continues to the same numbers, bit by bit.
"""

import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from ranking_mlp.clicks import Data, relative_cross_entropy, rows_of
from sklearn.metrics import roc_auc_score

import fisherprune_jax as fp

BATCH, TEST_ROWS = 64, 30_000
LEARNING_RATE = 0.2


class MLP(nn.Module):
  """Three dense layers and a logit."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for width in (256, 128, 64):
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(1)(x)[:, 0]


model = MLP()


@dataclass(frozen=True)
class Pruning:
  """The options of the classic trainer."""

  iter: int = 10
  """Steps from one pruned feature to the next."""
  burn_in: int = 500
  """Steps before the first one."""
  flops_target: float = 25_000
  """FLOPs per example to prune to."""
  decay: float = 0.98
  """Of the running mean of the importance: 0.98 averages about 50 steps."""


@dataclass(frozen=True)
class Args:
  """Prunes a click-prediction network to a budget of FLOPs while it trains."""

  out: Path
  """Folder for report.json, curve.png, events and checkpoints."""
  pruning: Pruning = field(default_factory=Pruning)
  seed: int = 0
  """Of the first weights and of the order of the rows."""
  steps: int = 6000
  """Training steps of each of the two networks."""
  save_every: int = 500
  """Steps from one checkpoint to the next."""
  resume: bool = False
  """Go on from the checkpoints in the folder."""

  def __post_init__(self) -> None:
    if min(self.steps, self.save_every, self.pruning.iter) < 1 or min(self.seed, self.pruning.burn_in) < 0:
      sys.exit("--steps, --save-every, --pruning.iter start at 1, --seed, --pruning.burn_in at 0.")
    if not (0 <= self.pruning.decay < 1 and self.pruning.flops_target > 0):
      sys.exit("--pruning.decay must be in [0, 1), --pruning.flops_target above 0.")


def batch_at(seed: int, step: int) -> tuple[Data]:
  """New rows, a function of seed and step alone: a resumed training gets the same ones."""
  return (rows_of(np.random.default_rng((seed, step)), BATCH)[0],)


def train(
  args: Args, name: str, auto: fp.AutoMask, cost: fp.CostModel, data: Data, job: common.Job
) -> common.Run:
  """Trains the dense or the pruned network."""
  options = args.pruning
  tx = fp.pruning_sgd(
    optax.cosine_decay_schedule(LEARNING_RATE, args.steps),
    cost,
    momentum=0.9,
    flops_target=options.flops_target if name == "pruned" else cost.dense,
    prune_every=options.iter,
    burn_in=options.burn_in,
    decay=options.decay,
  )

  def loss_fn(params: Any, masks: Any, batch: Data) -> jax.Array:
    logits = auto.apply({"params": params, "masks": masks}, batch[0])
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch[1]))

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, batch: Data) -> tuple[Any, Any, jax.Array]:
    loss, (grads, mask_grads) = fp.value_and_mask_grads(loss_fn)(params, fp.get_masks(opt_state), batch)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, loss

  predict, (rows, labels) = jax.jit(auto.apply), data

  def evaluate(params: Any, opt_state: Any) -> dict[str, float]:
    logits = predict({"params": params, "masks": fp.get_masks(opt_state)}, rows)
    return {
      "rce": relative_cross_entropy(logits, labels),
      "auc": roc_auc_score(labels, logits),
      "flops": fp.get_state(opt_state).cost,
    }

  params = model.init(jax.random.key(args.seed), rows[:1])["params"]
  run = job.begin(params, tx, ("rce", "auc", "flops"))
  return job.fit(name, run, step, partial(batch_at, args.seed), evaluate, fp.metrics)


def plot(path: Path, report: dict[str, Any], runs: dict[str, common.Run]) -> None:
  """RCE and cost over the steps, beside the widths."""
  with common.picture(path, report, panels=2) as (top, bottom):
    for (name, run), color in zip(runs.items(), ("0.5", "C0"), strict=True):
      label = f"{name} network: {report[f'{name}_rce']:.2f} %"
      top.plot(run.curve["step"], run.curve["rce"], color, label=label)
    bottom.plot(run.curve["step"], run.curve["flops"] / 1e3, "C0", label="pruned network")
    budget = report["flops_target"]
    bottom.axhline(budget / 1e3, color="C3", ls="--", label=f"budget: {budget:,.0f} FLOPs")
    top.set(ylabel="relative cross entropy\non test rows [%]")
    bottom.set(ylabel="kFLOPs per example", xlabel="training step", ylim=(0, None))


def main(args: Args) -> None:
  begun = time.perf_counter()
  data, log_odds = rows_of(np.random.default_rng(2**32), TEST_ROWS)
  rows = data[0]
  auto = fp.auto_mask(model.apply, jax.eval_shape(model.init, jax.random.key(0), rows[:1]), rows[:1])
  cost = auto.cost()
  common.claim(
    args.out,
    {"seed": args.seed, "steps": args.steps, **asdict(args.pruning), "dense_flops": cost.dense},
    args.resume,
  )
  with common.progress() as bars:
    job = common.Job(args.out, args.steps, bars, save_every=args.save_every)
    runs = {name: train(args, name, auto, cost, data, job) for name in ("dense", "pruned")}
  dense, pruned = runs.values()
  masks = fp.get_masks(pruned.opt_state)
  variables = {"params": pruned.params, "masks": masks}
  small = auto.compact(variables)
  report = {
    **asdict(args) | {"out": str(args.out), "flops_target": args.pruning.flops_target},
    **common.sizes(cost, dense.params, small, masks),
    **{f"{name}_{key}": run.curve[key][-1] for name, run in runs.items() for key in ("rce", "auc")},
    "max_abs_difference": common.largest_difference(
      auto.apply(variables, rows), small(small.variables, rows)
    ),
    **common.speed(
      partial(jax.jit(model.apply), {"params": dense.params}), small, [rows], (1, 256), repeats=100
    ),
    "resumed_at": {name: run.resumed_at for name, run in runs.items()},
    "teacher_rce": relative_cross_entropy(log_odds, data[1]),
  }
  plot(args.out / "curve.png", report, runs)
  common.write(args.out, report, begun)
  console, form = bars.console, (("FLOPs", "flops", ",.0f"), ("parameters", "params", ","))
  form += (("relative cross entropy, %", "rce", ".2f"), ("AUC", "auc", ".4f"))
  console.print(common.table(report, {"dense": "dense", "pruned": "pruned"}, form))
  console.print(fp.summary(pruned.opt_state), highlight=False)
  console.print(f"The teacher's own RCE, the best there is: {report['teacher_rce']:.2f} %")
  console.print(f"Largest difference between masked and compact outputs: {report['max_abs_difference']:.1e}")
  console.print(f"Wrote report.json, curve.png and events for TensorBoard into {args.out}.")
  if small.cost > args.pruning.flops_target:
    exhausted = fp.get_state(pruned.opt_state).exhausted
    why = "every layer keeps its last feature" if exhausted else "the steps ended before; take more --steps"
    console.print(f"The budget of {args.pruning.flops_target:,.0f} FLOPs was not reached: {why}.")


if __name__ == "__main__":
  main(tyro.cli(Args))
