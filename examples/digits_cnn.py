"""Prunes a convolutional network to a FLOPs target while it trains on real digits, then makes it smaller.

  python examples/digits_cnn.py --flops-target 0.1 --out demo

Trains one network twice on scikit-learn's 8x8 digits, without and with pruning, compacts, checks, times and exports
it. Writes ``report.json``, ``curve.png``, ``model.stablehlo`` and TensorBoard ``events`` into the output folder.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisherprune_jax as fp

try:
  import flatbuffers  # noqa: F401  (jax.export writes files with it)
  import tyro
  from matplotlib.figure import Figure
  from rich.console import Console
  from rich.progress import Progress, TextColumn
  from rich.table import Column, Table
  from sklearn.datasets import load_digits
  from tensorboardX import SummaryWriter
except ImportError as error:
  sys.exit(f"This example needs {error.name}, which is missing: pip install 'fisherprune-jax[examples]'")

TEST_IMAGES = 450  # the last ones; no choice depends on them
BATCH = 64
EVALUATIONS = 40
Data = tuple[np.ndarray, np.ndarray]  # images (n, 8, 8, 1) between 0 and 1, and their labels


class CNN(nn.Module):
  """Three convolutions and a dense layer, each with a mask over its features."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = fp.Mask(name="conv1")(nn.relu(nn.Conv(64, (3, 3))(x)))
    x = fp.Mask(name="conv2")(nn.relu(nn.Conv(128, (3, 3), strides=2)(x)))
    x = fp.Mask(name="conv3")(nn.relu(nn.Conv(128, (3, 3))(x)))
    x = x.reshape(x.shape[0], -1)
    x = fp.Mask(name="dense")(nn.relu(nn.Dense(128)(x)))
    return nn.Dense(10)(x)


model = CNN()


@dataclass(frozen=True)
class Args:
  """Prunes a network to a FLOPs target while it trains on scikit-learn's digits."""

  out: Path
  """Folder for report.json, curve.png, model.stablehlo and events."""
  flops_target: float = 0.1
  """Fraction of the dense network's FLOPs to prune to, above 0 and at most 1."""
  seed: int = 0
  """Of the first weights and of the order of the images."""
  steps: int = 1000
  """Training steps of each of the two networks."""

  def __post_init__(self) -> None:
    if not 0 < self.flops_target <= 1:
      sys.exit(f"--flops-target must be above 0 and at most 1, got {self.flops_target}.")
    if self.steps < 1 or self.seed < 0:
      sys.exit(f"--steps must be at least 1 and --seed at least 0, got {self.steps} and {self.seed}.")


class Run(NamedTuple):
  """A trained network: parameters and masks, the pruning state, and (step, test accuracy) along the way."""

  variables: dict[str, Any]
  state: fp.FisherPruneState
  curve: list[tuple[int, float]]


def load() -> tuple[Data, Data]:
  """The digits, for training and for testing."""
  digits = load_digits()
  images, labels = np.float32(digits.images[..., None] / 16), digits.target
  return (images[:-TEST_IMAGES], labels[:-TEST_IMAGES]), (images[-TEST_IMAGES:], labels[-TEST_IMAGES:])


def batches(data: Data, steps: int, seed: int) -> Iterator[Data]:
  """Random images, each shifted by at most one pixel."""
  (images, labels), rng = data, np.random.default_rng(seed)
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = np.lib.stride_tricks.sliding_window_view(padded, (8, 8, 1), axis=(1, 2, 3))[:, :, :, 0]
  for _ in range(steps):
    rows, (down, right) = rng.integers(len(padded), size=BATCH), rng.integers(3, size=(2, BATCH))
    yield shifted[rows, down, right], labels[rows]


def optimizer(cost: fp.CostModel, flops_target: float, steps: int) -> optax.GradientTransformationExtraArgs:
  """Momentum SGD; the cost comes down to the target from 10 % to 50 % of the steps, then the weights settle."""
  budget = optax.linear_schedule(cost.dense, flops_target * cost.dense, math.ceil(0.4 * steps), steps // 10)
  every_feature = sum(mask.size for mask in jax.tree.leaves(cost.masks))
  return optax.chain(
    optax.add_decayed_weights(5e-4),
    optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.15, steps // 30, steps), momentum=0.9),
    fp.fisher_prune(cost, prune_every=min(2, steps), target=budget, features_per_prune=every_feature),
  )


def loss_fn(params: Any, masks: Any, batch: Data) -> jax.Array:
  images, labels = batch
  logits = model.apply({"params": params, "masks": masks}, images)
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@jax.jit
def accuracy(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
  return jnp.mean(jnp.argmax(model.apply(variables, images), -1) == labels)


def train(
  args: Args, cost: fp.CostModel, flops_target: float, data: tuple[Data, Data], progress: Progress
) -> Run:
  """Trains while pruning to ``flops_target`` of the dense cost; 1 prunes nothing."""
  tx = optimizer(cost, flops_target, args.steps)
  task = progress.add_task(f"to {flops_target:.1%} of the FLOPs", total=args.steps, loss=math.nan, share=1.0)

  @partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params: Any, opt_state: Any, batch: Data) -> tuple[Any, Any, jax.Array]:
    masks = fp.get_masks(opt_state)
    loss, (grads, mask_grads) = fp.value_and_mask_grads(loss_fn)(params, masks, batch)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, loss

  train_set, test_set = data
  params = model.init(jax.random.key(args.seed), train_set[0][:1])["params"]
  opt_state, curve = tx.init(params), []
  events = SummaryWriter(str(args.out / "events" / f"to_{flops_target:g}"))
  for step, batch in enumerate(batches(train_set, args.steps, args.seed), start=1):
    params, opt_state, loss = train_step(params, opt_state, batch)
    run = Run({"params": params, "masks": fp.get_masks(opt_state)}, fp.get_state(opt_state), curve)
    if step % max(1, args.steps // EVALUATIONS) == 0 or step == args.steps:
      curve.append((step, float(accuracy(run.variables, *test_set))))
      for name, value in {"loss": loss, "accuracy": curve[-1][1], **fp.metrics(opt_state)}.items():
        events.add_scalar(name, float(value), step)
      progress.update(task, completed=step, loss=float(loss), share=float(run.state.cost) / cost.dense)
  events.close()
  return run


def forward_times(dense: Run, small: fp.Compact, images: np.ndarray) -> dict[str, float]:
  """Median milliseconds of the forward pass without masks, and of the compact one, taking turns."""
  calls = [(jax.jit(model.apply), {"params": dense.variables["params"]}), (jax.jit(small), small.variables)]
  times: list[list[float]] = [[], []]
  for turn in range(2 * 60):
    function, variables = calls[turn % 2]
    start = time.perf_counter()
    jax.block_until_ready(function(variables, images))
    times[turn % 2].append(1e3 * (time.perf_counter() - start))
  before, after = map(float, np.median(times, axis=1))
  return {"dense_ms": before, "compact_ms": after, "speedup": before / after}


LOAD_AND_RUN = """
import sys, jax.export, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], exported.call(np.load(sys.argv[2])))
assert "fisherprune_jax" not in sys.modules
"""


def export_agrees(small: fp.Compact, path: Path, images: np.ndarray) -> bool:
  """Writes StableHLO; whether a fresh process, without this library, gets the same classes from it."""
  path.write_bytes(small.export(images).serialize())
  with tempfile.TemporaryDirectory() as folder:
    given, found = Path(folder, "images.npy"), Path(folder, "logits.npy")
    np.save(given, images)
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, path, given, found], check=True)
    return np.array_equal(np.load(found).argmax(-1), small(small.variables, images).argmax(-1))


def measure(args: Args, cost: fp.CostModel, runs: list[Run], small: fp.Compact, images: np.ndarray) -> dict:
  """What ``report.json`` says of the two networks."""
  dense, pruned = runs
  masks = {layer: leaf["mask"] for layer, leaf in pruned.state.masks.items()}
  difference = model.apply(pruned.variables, images) - small(small.variables, images)
  timings = {str(size): forward_times(dense, small, images[:size]) for size in (1, 256)}
  return {
    **vars(args) | {"out": str(args.out)},
    "dense_flops": cost.dense,
    "pruned_flops": small.cost,
    "flops_fraction": small.cost / cost.dense,
    "dense_params": sum(x.size for x in jax.tree.leaves(dense.variables["params"])),
    "pruned_params": sum(x.size for x in jax.tree.leaves(small.variables)),
    "dense_accuracy": dense.curve[-1][1],
    "pruned_accuracy": pruned.curve[-1][1],
    "widths": {layer: {"dense": mask.size, "pruned": int(mask.sum())} for layer, mask in masks.items()},
    "max_abs_difference": float(jnp.max(jnp.abs(difference))),
    "timings": timings,
    **timings["256"],
  }


def cost_curve(state: fp.FisherPruneState, cost: fp.CostModel) -> tuple[list[int], list[float]]:
  """Steps and the kFLOPs after each, from what the state remembers: when every feature went."""
  steps = sorted({0, int(state.step), *(pruned.step for pruned in fp.history(state))})
  return steps, [float(cost(fp.masks_at(state, step))) / 1e3 for step in steps]


def plot(path: Path, report: dict, runs: list[Run], cost: fp.CostModel) -> None:
  """Accuracy, cost, and a mark for every pruned feature over training, one above the other."""
  figure = Figure(figsize=(10, 7), layout="constrained")
  top, middle, bottom = axes = figure.subplots(3, sharex=True, height_ratios=(3, 3, 2))
  state, target = runs[1].state, report["flops_target"] * cost.dense / 1e3
  dashed = {"linestyle": "--", "linewidth": 1}
  for run, color, name in zip(runs, ("0.5", "C0"), ("dense", "pruned"), strict=True):
    label = f"{name} network: {100 * report[f'{name}_accuracy']:.1f} %"
    top.plot(*np.transpose(run.curve) * [[1], [100]], color=color, label=label)
  top.axhline(100 * report["dense_accuracy"], color="0.5", label="dense network, at the end", **dashed)
  worst = 100 * min(value for run in runs for step, value in run.curve if step >= report["steps"] / 10)
  top.set(ylabel="test accuracy [%]", ylim=(max(0, worst - 2), 100.5))
  middle.plot(*cost_curve(state, cost), "C0", drawstyle="steps-post", label="pruned network")
  middle.axhline(target, color="C3", label=f"target: {target:,.4g} kFLOPs", **dashed)
  middle.set(ylabel="cost [kFLOPs per image]", ylim=(0, None))
  middle.yaxis.set_major_formatter("{x:,.0f}")
  for row, (layer, width) in enumerate(report["widths"].items()):
    steps = [n for n in state.pruned_at[layer]["mask"] if n > 0]
    bottom.plot(steps, [row] * len(steps), "|", color="C0", markersize=14, markeredgewidth=0.6)
    text = f"{width['dense']} features, {width['pruned']} left"
    bottom.text(1.015, row, text, transform=bottom.get_yaxis_transform(), va="center")
  bottom.set_yticks(range(row + 1), report["widths"])
  bottom.set_ylabel("one mark per\npruned feature", labelpad=10)
  bottom.set(xlabel="training step", xlim=(0, state.step), ylim=(row + 0.6, -0.6))
  for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, axis="x" if ax is bottom else "both")
  for ax in (top, middle):
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
  figure.savefig(path, dpi=200)


def tables(report: dict, breakdown: list) -> Iterator[Table]:
  """Layer by layer (here a layer is a line of code), and in all."""
  right = partial(Column, justify="right")
  layers = Table("layer", *map(right, ("width", "pruned", "FLOPs", "pruned", "share", "pruned")))
  widths = [(layer, str(width["dense"]), str(width["pruned"])) for layer, width in report["widths"].items()]
  lines = sorted({row.where for row in breakdown})
  for line, cells in zip(lines, [*widths, ("logits", "10", "10")], strict=True):
    dense, now = np.sum([(row.dense, row.now) for row in breakdown if row.where == line], axis=0)
    shares = dense / report["dense_flops"], now / report["pruned_flops"]
    layers.add_row(*cells, f"{dense:,.0f}", f"{now:,.0f}", *map("{:.1%}".format, shares))
  yield layers
  summary = Table("", *map(right, ("dense", "pruned", "")))
  for name, key in (("FLOPs per image", "flops"), ("parameters", "params")):
    dense, pruned = report[f"dense_{key}"], report[f"pruned_{key}"]
    summary.add_row(name, f"{dense:,.0f}", f"{pruned:,.0f}", f"{pruned / dense:.2%}")
  dense, pruned = 100 * report["dense_accuracy"], 100 * report["pruned_accuracy"]
  summary.add_row("test accuracy", f"{dense:.2f}%", f"{pruned:.2f}%", f"{pruned - dense:+.2f} points")
  for size, times in report["timings"].items():
    cells = f"{times['dense_ms']:.3f} ms", f"{times['compact_ms']:.3f} ms", f"{times['speedup']:.2f}x faster"
    summary.add_row(f"forward, batch of {size}", *cells)
  yield summary


def main(args: Args) -> None:
  start, console, data = time.perf_counter(), Console(), load()
  args.out.mkdir(parents=True, exist_ok=True)
  images = data[1][0]
  cost = fp.cost_model(model.apply, model.init(jax.random.key(0), images[:1]), images[:1])
  fields = TextColumn("loss {task.fields[loss]:.3f}, at {task.fields[share]:.1%}")
  with Progress(*Progress.get_default_columns(), fields, console=console) as progress:
    runs = [train(args, cost, target, data, progress) for target in (1.0, args.flops_target)]
  pruned = runs[1].variables
  small = fp.compact(model.apply, pruned, images[:1])

  report = measure(args, cost, runs, small, images)
  report["export_agrees"] = export_agrees(small, args.out / "model.stablehlo", images)
  plot(args.out / "curve.png", report, runs, cost)
  report["seconds"] = time.perf_counter() - start
  (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  console.print(*tables(report, cost.breakdown(pruned["masks"])))
  console.print(f"Largest difference between masked and compact outputs: {report['max_abs_difference']:.1e}")
  console.print(f"Wrote report.json, curve.png, model.stablehlo and events into {args.out}.")
  if not report["export_agrees"]:
    sys.exit("The exported network does not give the classes that the compact one gives.")
  if runs[1].state.exhausted:
    console.print(f"{args.flops_target:.4%} was not reached: every layer keeps its last feature.")


if __name__ == "__main__":
  main(tyro.cli(Args))
