"""Prunes a click-prediction network to a budget of FLOPs while it trains; may be killed at any time.

  python examples/ranking_mlp.py --pruning.flops_target 25000 --out ranking

The classic trainer's job and options: an MLP on discretized features, a binary label, momentum SGD. Clicks are
those of a teacher, each row is seen once. Trains without and with pruning, compacts, checks and times. Writes
``report.json``, ``curve.png``, ``events/`` for TensorBoard and ``checkpoints/``. After a kill or Ctrl-C,
``--resume`` goes on to the same numbers, bit by bit.
"""

import json
import os
import shlex
import signal
import sys
import threading
import timeit
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ranking_clicks import Data, relative_cross_entropy, rows_of

import fisherprune_jax as fp

try:
  import orbax.checkpoint as ocp
  import tyro
  from matplotlib.figure import Figure
  from rich.console import Console
  from rich.progress import Progress, TextColumn
  from rich.table import Column, Table
  from sklearn.metrics import roc_auc_score
  from tensorboardX import SummaryWriter
except ImportError as error:
  sys.exit(f"This example needs {error.name}, which is missing: pip install 'fisherprune-jax[examples]'")

BATCH, TEST_ROWS = 64, 30_000
LEARNING_RATE = 0.2


class MLP(nn.Module):
  """Three dense layers, each with a mask over its features, and a logit."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for layer, width in enumerate((256, 128, 64), start=1):
      x = fp.Mask(name=f"layer{layer}")(nn.relu(nn.Dense(width)(x)))
    return nn.Dense(1)(x)[:, 0]


model = MLP()
predict = jax.jit(model.apply)


@dataclass(frozen=True)
class Pruning:
  """The options of the classic trainer."""

  iter: int = 10
  """Steps from one pruned feature to the next."""
  burn_in: int = 500
  """Steps before the first one may go."""
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


class Run(NamedTuple):
  """A network in training, as checkpoints hold it; ``curve`` has rows (step, loss, test RCE, test AUC)."""

  params: Any
  opt_state: Any
  curve: np.ndarray
  resumed_at: int

  @property
  def variables(self) -> dict[str, Any]:
    return {"params": self.params, "masks": fp.get_masks(self.opt_state)}


def batch_at(step: int, seed: int) -> Data:
  """New rows, a function of seed and step alone: a resumed job sees what it would have seen."""
  return rows_of(np.random.default_rng((seed, step)), BATCH)[0]


def optimizer(args: Args, cost: fp.CostModel, flops_target: float) -> optax.GradientTransformationExtraArgs:
  rate, options = optax.cosine_decay_schedule(LEARNING_RATE, args.steps), args.pruning
  pruning = {"prune_every": options.iter, "burn_in": options.burn_in, "decay": options.decay}
  return fp.pruning_sgd(rate, cost, momentum=0.9, flops_target=flops_target, **pruning)


def loss_fn(params: Any, masks: Any, batch: Data) -> jax.Array:
  logits = model.apply({"params": params, "masks": masks}, batch[0])
  return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch[1]))


def claim(args: Args, cost: fp.CostModel) -> None:
  """Keeps the folder to one job: only ``--resume`` goes on with it, and only with the same options."""
  path = args.out / "checkpoints" / "args.json"
  job = {"seed": args.seed, "steps": args.steps, **asdict(args.pruning), "dense_flops": cost.dense}
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(job))
    os.replace(path.with_suffix(".tmp"), path)  # all of it or nothing
  elif not args.resume:
    sys.exit(f"{args.out} holds the checkpoints of a job: go on with --resume, or take another --out.")
  there = json.loads(path.read_text())
  if differ := [f"{key} {there.get(key)}, not {job[key]}" for key in job if job[key] != there.get(key)]:
    sys.exit(f"The job in {args.out} began with {'; '.join(differ)}. Say the same, or take another --out.")


def evaluate(run: Run, row: int, step: int, loss: Any, data: Data, writer: SummaryWriter) -> str:
  """Fills a row of the curve, writes it and what pruning did for TensorBoard, and says it in a line."""
  logits = predict(run.variables, data[0])
  rce, auc = relative_cross_entropy(logits, data[1]), roc_auc_score(data[1], logits)
  run.curve[row] = step, loss, rce, auc
  values = dict(zip(("loss", "rce", "auc"), run.curve[row, 1:], strict=True)) | fp.metrics(run.opt_state)
  for name, value in values.items():
    writer.add_scalar(name, float(value), step)
  return f"RCE {rce:.2f} %, {float(values['pruning/cost']):,.0f} FLOPs"


def train(
  name: str, args: Args, cost: fp.CostModel, data: Data, stop: threading.Event, bars: Progress
) -> Run:
  """Trains the dense or the pruned network, from its latest checkpoint on."""
  tx = optimizer(args, cost, cost.dense if name == "dense" else args.pruning.flops_target)

  @partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params: Any, opt_state: Any, batch: Data) -> tuple[Any, Any, jax.Array]:
    loss, (grads, mask_grads) = fp.value_and_mask_grads(loss_fn)(params, fp.get_masks(opt_state), batch)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, loss

  every = max(1, args.steps // 30)  # steps from one evaluation to the next
  params = model.init(jax.random.key(args.seed), data[0][:1])["params"]
  run = Run(params, tx.init(params), np.zeros((-(-args.steps // every), 4)), 0)
  keep = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
  with ocp.CheckpointManager(args.out.absolute() / "checkpoints" / name, options=keep) as manager:
    if start := manager.latest_step() or 0:
      run = manager.restore(start, args=ocp.args.StandardRestore(run))._replace(resumed_at=start)
    if args.resume:
      bars.console.print(f"The {name} network: {start:,} of {args.steps:,} steps are saved.")
    task = bars.add_task(f"{name} network", total=args.steps, completed=start, now="")
    with SummaryWriter(str(args.out / "events" / name), purge_step=start + 1) as writer:
      for step in range(start + 1, args.steps + 1):
        params, opt_state, loss = train_step(run.params, run.opt_state, batch_at(step, args.seed))
        run = run._replace(params=params, opt_state=opt_state)
        if step % every == 0 or step == args.steps:
          now = evaluate(run, (step - 1) // every, step, loss, data, writer)
          bars.update(task, completed=step, now=now)
        if step % args.save_every == 0 or step == args.steps or stop.is_set():
          writer.flush()
          manager.save(step, args=ocp.args.StandardSave(run))
        if stop.is_set():
          command = shlex.join(["python", *sys.argv, *["--resume"] * (not args.resume)])
          sys.exit(f"Stopped after step {step:,} of the {name} network, and saved it. To go on: {command}")
  return run


def forward_times(dense: Run, small: fp.Compact, rows: np.ndarray) -> dict[str, float]:
  """Median milliseconds of the forward pass without masks, and of the compact one, taking turns."""
  calls = [(predict, {"params": dense.params}), (jax.jit(small), small.variables)]
  timers = [timeit.Timer(lambda f=f, v=v: jax.block_until_ready(f(v, rows))) for f, v in calls]
  times = [[1e3 * timer.timeit(1) for timer in timers] for _ in range(100)]
  before, after = map(float, np.median(times, axis=0))
  return {"dense_ms": before, "compact_ms": after, "speedup": before / after}


def measure(args: Args, cost: fp.CostModel, runs: dict, small: fp.Compact, rows: np.ndarray) -> dict:
  """What ``report.json`` says of the two networks."""
  masks = {layer: leaf["mask"] for layer, leaf in runs["pruned"].variables["masks"].items()}
  difference = predict(runs["pruned"].variables, rows) - small(small.variables, rows)
  params = {"dense": runs["dense"].params, "pruned": small.variables}
  timings = {str(size): forward_times(runs["dense"], small, rows[:size]) for size in (1, 256)}
  return {
    **asdict(args) | {"out": str(args.out), "flops_target": args.pruning.flops_target},
    "dense_flops": cost.dense,
    "pruned_flops": small.cost,
    "flops_fraction": small.cost / cost.dense,
    **{f"{name}_params": sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()},
    **{f"{name}_rce": run.curve[-1, 2] for name, run in runs.items()},
    **{f"{name}_auc": run.curve[-1, 3] for name, run in runs.items()},
    "widths": {layer: {"dense": mask.size, "pruned": int(mask.sum())} for layer, mask in masks.items()},
    "max_abs_difference": float(jnp.max(jnp.abs(difference))),
    "timings": timings,
    **timings["256"],
    "resumed_at": {name: run.resumed_at for name, run in runs.items()},
  }


def plot(path: Path, report: dict, runs: dict[str, Run], cost: fp.CostModel) -> None:
  """RCE, cost, and a mark for every pruned feature over training, one above the other."""
  figure = Figure(figsize=(10, 7), layout="constrained")
  top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=(3, 3, 2))
  state, target, went = runs["pruned"].opt_state, report["flops_target"], fp.history(runs["pruned"].opt_state)
  for (name, run), color in zip(runs.items(), ("0.5", "C0"), strict=True):
    top.plot(*run.curve[:, [0, 2]].T, color, label=f"{name} network: {run.curve[-1, 2]:.2f} %")
  steps = np.array([0, *(gone.step for gone in went), report["steps"]])
  costs = jax.vmap(lambda step: cost(fp.masks_at(state, step)))(steps)
  middle.plot(steps, costs / 1e3, drawstyle="steps-post", label="pruned network")
  middle.axhline(target / 1e3, color="C3", linestyle="--", linewidth=1, label=f"budget: {target:,.0f} FLOPs")
  middle.set_ylim(0)
  marks = [[gone.step for gone in went if gone.mask == layer] for layer in report["widths"]]
  bottom.eventplot(marks, colors="C0", linelengths=0.6, linewidths=0.6)
  left = [f"{layer}\n{width['pruned']} of {width['dense']} left" for layer, width in report["widths"].items()]
  bottom.set_yticks(range(len(left)), left)
  bottom.set(xlabel="training step; one mark per pruned feature", xlim=(0, report["steps"]), ylim=(2.6, -0.6))
  for ax, label in ((top, "RCE on test rows [%]"), (middle, "cost [kFLOPs per example]"), (bottom, "")):
    ax.set_ylabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, axis="both" if label else "x")
    if label:
      ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
  figure.savefig(path, dpi=200)


def table(report: dict) -> Table:
  found = Table("", *(Column(name, justify="right") for name in ("dense", "pruned")))
  for name, form in (("FLOPs", ",.0f"), ("params", ",.0f"), ("RCE", ".2f"), ("AUC", ".4f")):
    found.add_row(name, *(format(report[f"{which}_{name.lower()}"], form) for which in ("dense", "pruned")))
  for size, times in report["timings"].items():
    found.add_row(f"ms, batch of {size}", f"{times['dense_ms']:.3f}", f"{times['compact_ms']:.3f}")
  return found


def main(args: Args) -> None:
  start, console, stop = timeit.default_timer(), Console(), threading.Event()
  data, log_odds = rows_of(np.random.default_rng(2**32), TEST_ROWS)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stop.set())  # looked at between steps
  rows, columns = data[0], (*Progress.get_default_columns(), TextColumn("{task.fields[now]}"))
  cost = fp.cost_model(model.apply, model.init(jax.random.key(0), rows[:1]), rows[:1])
  claim(args, cost)
  with Progress(*columns, console=console) as bars:
    runs = {name: train(name, args, cost, data, stop, bars) for name in ("dense", "pruned")}
  small, state = fp.compact(model.apply, runs["pruned"].variables, rows[:1]), runs["pruned"].opt_state
  report = measure(args, cost, runs, small, rows)
  plot(args.out / "curve.png", report, runs, cost)
  report["teacher_rce"] = relative_cross_entropy(log_odds, data[1])
  report["seconds"] = timeit.default_timer() - start
  (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  console.print(table(report), fp.summary(state), sep="\n")
  console.print(f"The teacher's own RCE, the best there is: {report['teacher_rce']:.2f} %")
  console.print(f"Largest difference between masked and compact outputs: {report['max_abs_difference']:.1e}")
  console.print(f"Wrote report.json, curve.png and events for TensorBoard into {args.out}.")
  if small.cost > args.pruning.flops_target:
    exhausted = fp.get_state(state).exhausted
    why = "every layer keeps its last feature" if exhausted else "the steps ended before; take more --steps"
    console.print(f"The budget of {args.pruning.flops_target:,.0f} FLOPs was not reached: {why}.")


if __name__ == "__main__":
  main(tyro.cli(Args))
