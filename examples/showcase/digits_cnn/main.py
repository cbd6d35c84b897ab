"""Prunes a convolutional network to a fraction of its FLOPs while it learns real digits; then times and exports it.

  python examples/showcase/digits_cnn/main.py --flops-target 0.1 --out demo

Trains one network twice on scikit-learn's 8x8 digits, without and with pruning. Writes ``report.json``, ``curve.png``,
``model.stablehlo`` and TensorBoard ``events`` into the output folder.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from sklearn.datasets import load_digits

import fisherprune_jax as fp

TEST_IMAGES = 450  # the last ones; no choice depends on them
BATCH = 64
Data = tuple[np.ndarray, np.ndarray]  # images (n, 8, 8, 1) between 0 and 1, and their labels


class CNN(nn.Module):
  """Three convolutions and a dense layer."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.Conv(64, (3, 3))(x))
    x = nn.relu(nn.Conv(128, (3, 3), strides=2)(x))
    x = nn.relu(nn.Conv(128, (3, 3))(x))
    x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
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


def load() -> tuple[Data, Data]:
  """The digits, for training and for testing."""
  digits = load_digits()
  images, labels = np.float32(digits.images[..., None] / 16), digits.target
  return (images[:-TEST_IMAGES], labels[:-TEST_IMAGES]), (images[-TEST_IMAGES:], labels[-TEST_IMAGES:])


def batches(data: Data, seed: int) -> Iterator[tuple[Data]]:
  """Random images, each shifted by at most one pixel."""
  (images, labels), rng = data, np.random.default_rng(seed)
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = np.lib.stride_tricks.sliding_window_view(padded, (8, 8, 1), axis=(1, 2, 3))[:, :, :, 0]
  while True:
    rows, (down, right) = rng.integers(len(padded), size=BATCH), rng.integers(3, size=(2, BATCH))
    yield ((shifted[rows, down, right], labels[rows]),)


def loss_fn(params: Any, batch: Data) -> jax.Array:
  logits = model.apply({"params": params}, batch[0])
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def train(name: str, pruner: fp.Pruner, data: tuple[Data, Data], seed: int, job: common.Job) -> common.Run:
  rate = optax.warmup_cosine_decay_schedule(0.0, 0.15, job.steps // 30, job.steps)
  tx = pruner.wrap(optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9)))
  train_set, (images, labels) = data

  @jax.jit
  def evaluate(params: Any, opt_state: Any) -> dict[str, jax.Array]:
    hits = jnp.argmax(pruner.apply(params, opt_state, images), -1) == labels
    return {"accuracy": jnp.mean(hits), "flops": pruner.cost(pruner.masks(opt_state))}

  run = job.begin(model.init(jax.random.key(seed), images[:1])["params"], tx, ("accuracy", "flops"))
  step = common.train_step(pruner.value_and_grad(loss_fn), tx)
  given = batches(train_set, seed)
  return job.fit(name, run, step, lambda n: next(given), evaluate, pruner.metrics)


def plot(path: Path, report: dict[str, Any], pruned: common.Run) -> None:
  """The accuracy over the FLOPs that are left, beside the widths."""
  accuracy, left = 100 * pruned.curve["accuracy"], 100 * pruned.curve["flops"] / report["dense_flops"]
  dense, at = 100 * report["dense_accuracy"], (left[-1], accuracy[-1])
  with common.picture(path, report) as (ax,):
    ax.axhline(dense, color="0.5", ls="--", label=f"dense network: {dense:.1f} %")
    ax.plot(left, accuracy, "C0.-", label="network while it is pruned")
    ax.plot(*at, "C0o", markersize=10, label=f"at the end: {at[1]:.1f} % at {at[0]:.1f} % of the FLOPs")
    worst = np.min(accuracy[pruned.curve["step"] >= report["steps"] / 10])
    ax.set(ylabel="test accuracy [%]", ylim=(max(0, worst - 2), 100.2))
    ax.set(xlabel="FLOPs left [% of the dense network]", xlim=(103, 0))


def main(args: Args) -> None:
  begun, data = time.perf_counter(), load()
  args.out.mkdir(parents=True, exist_ok=True)
  images, start = data[1][0], args.steps // 10
  shapes = {"params": jax.eval_shape(model.init, jax.random.key(0), images[:1])["params"]}
  schedule = {"start": start, "stop": start + math.ceil(0.4 * args.steps), "every": min(2, args.steps)}
  prune = partial(fp.Pruner, model.apply, shapes, images[:1], **schedule)
  pruner = prune(keep=args.flops_target)
  with common.progress() as bars:
    job = common.Job(args.out, args.steps, bars, evaluations=50)
    dense = train("dense", prune(keep=1.0), data, args.seed, job)
    pruned = train("pruned", pruner, data, args.seed, job)
  small = pruner.compact(pruned.params, pruned.opt_state)
  logits = small(small.variables, images)

  report = {
    **vars(args) | {"out": str(args.out)},
    **common.sizes(pruner.cost, dense.params, small, pruner.masks(pruned.opt_state)),
    "dense_accuracy": dense.curve["accuracy"][-1],
    "pruned_accuracy": pruned.curve["accuracy"][-1],
    "max_abs_difference": common.largest_difference(
      pruner.apply(pruned.params, pruned.opt_state, images), logits
    ),
    **common.speed(partial(jax.jit(model.apply), {"params": dense.params}), small, [images], (1, 256)),
  }
  outputs = common.exported(small, args.out / "model.stablehlo", images)
  report["export_agrees"] = np.array_equal(outputs.argmax(-1), logits.argmax(-1))
  plot(args.out / "curve.png", report, pruned)
  common.write(args.out, report, begun)
  rows = (("FLOPs", "flops", ",.0f"), ("parameters", "params", ","), ("test accuracy", "accuracy", ".2%"))
  bars.console.print(common.table(report, {"dense": "dense", "pruned": "pruned"}, rows))
  bars.console.print(pruner.summary(pruned.opt_state), highlight=False)
  bars.console.print(
    f"Largest difference between masked and compact outputs: {report['max_abs_difference']:.1e}"
  )
  bars.console.print(f"Wrote report.json, curve.png, model.stablehlo and events into {args.out}.")
  if not report["export_agrees"]:
    sys.exit("The exported network does not give the classes that the compact one gives.")
  if small.cost > args.flops_target * pruner.cost.dense:
    bars.console.print(f"{args.flops_target:.4%} was not reached: every layer keeps its last feature.")


if __name__ == "__main__":
  main(tyro.cli(Args))
