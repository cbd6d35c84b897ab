"""Published time-series classifiers on five UCR and UEA data sets: test accuracy before and after pruning.

  python benchmarks/ucr.py --out benchmarks/ucr.json
  python benchmarks/ucr.py --data GunPoint --nets FCN --seeds 1

The networks are the FCN and the ResNet of Wang et al. (2017, arXiv 1611.06455). The data sets come with the package
``aeon``. Published accuracies are those of Fawaz et al. (2019, arXiv 1809.04356), who train for 1,500 to 2,000 epochs.
Training is shorter here, with batches of at most 8 and faster batch statistics. Three ways of pruning start from the
trained network: ``one_shot(reconstruct=False)``, ``one_shot`` on the training series without labels, and ``fp.Pruner`` in
further training. Accuracies are those of the compacted networks. Prints the tables of ``docs/benchmarks.md``.
"""

import argparse
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables

import fisherprune_jax as fp

LEVELS = tables.LEVELS["time series"]
EPOCHS = dict(zip(tables.DATA, (150, 200, 60, 300, 60), strict=True))
"""Epochs of the dense network. Pruning in training takes a fifth of them at each level."""
SEEDS = {"FCN": 3, "ResNet": 1}
PACKAGES = ("fisherprune-jax", "jax", "flax", "optax", "aeon", "numpy")
WAYS = ("masks", "one_shot", "gradual")


class Data(NamedTuple):
  """Series ``(N, T, C)`` and integer labels."""

  train: np.ndarray
  labels: np.ndarray
  test: np.ndarray
  test_labels: np.ndarray


def load(name: str) -> Data:
  """Read a data set from the package ``aeon``; series are stretched to the length of the longest one."""
  from aeon.datasets import load_classification

  found = [load_classification(name, split=split, load_equal_length=False) for split in ("train", "test")]
  times = np.linspace(0, 1, max(np.shape(one)[-1] for series, _ in found for one in series))

  def stretch(one: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(times, np.linspace(0, 1, len(row)), row) for row in one], -1)

  (train, labels), (test, test_labels) = [
    (np.array([stretch(one) for one in series], np.float32), labels) for series, labels in found
  ]
  classes = np.unique(labels)
  return Data(train, np.searchsorted(classes, labels), test, np.searchsorted(classes, test_labels))


class ConvNorm(nn.Module):
  """A convolution along time and batch norm, initialized as in Keras."""

  width: int
  kernel: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = nn.Conv(self.width, (self.kernel,), kernel_init=nn.initializers.glorot_uniform())(x)
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-3)(x)


class FCN(nn.Module):
  """Three convolutions and the mean over time."""

  classes: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    for width, kernel in ((128, 8), (256, 5), (128, 3)):
      x = nn.relu(ConvNorm(width, kernel)(x, train))
    return nn.Dense(self.classes, kernel_init=nn.initializers.glorot_uniform())(x.mean(1))


class ResNet(nn.Module):
  """Three residual blocks of three convolutions and the mean over time."""

  classes: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    for width in (64, 128, 128):
      h = nn.relu(ConvNorm(width, 8)(x, train))
      h = nn.relu(ConvNorm(width, 5)(h, train))
      h = ConvNorm(width, 3)(h, train)
      if x.shape == h.shape:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-3)(x)
      else:
        x = ConvNorm(width, 1)(x, train)
      x = nn.relu(x + h)
    return nn.Dense(self.classes, kernel_init=nn.initializers.glorot_uniform())(x.mean(1))


NETS: dict[str, Callable[[int], nn.Module]] = {"FCN": FCN, "ResNet": ResNet}


class Trainer(NamedTuple):
  """Train a network on a data set, ``batch`` series per step; ``seed`` sets their order."""

  net: nn.Module
  data: Data
  batch: int
  seed: int

  def steps(self, epochs: int) -> int:
    """Steps in a number of epochs."""
    return epochs * (len(self.data.labels) // self.batch)

  def batches(self, epochs: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Full batches of every epoch, in random order."""
    rng, count = np.random.default_rng((self.seed, seed)), len(self.data.labels)
    for _ in range(epochs):
      order = rng.permutation(count)
      for at in range(0, count - self.batch + 1, self.batch):
        rows = order[at : at + self.batch]
        yield self.data.train[rows], self.data.labels[rows]

  def loss(self, params: Any, batch_stats: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
    """Mean cross entropy and new batch statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = self.net.apply(variables, batch[0], train=True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return losses.mean(), new["batch_stats"]

  def train(self, variables: Any, epochs: int, seed: int = 0, pruner: fp.Pruner | None = None) -> Any:
    """Train with Adam, from a learning rate of 1e-3 down to 0. Returns variables and the optimizer state."""
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, self.steps(epochs)))
    compute: Any = jax.value_and_grad(self.loss, has_aux=True)
    if pruner is not None:
      tx, compute = pruner.wrap(tx), pruner.value_and_grad(self.loss, has_aux=True)

    @jax.jit
    def step(variables: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
      params, state = variables["params"], () if pruner is None else (opt_state,)
      (_, stats), grads = compute(params, *state, variables["batch_stats"], batch)
      updates, opt_state = tx.update(grads, opt_state, params)
      return {"params": optax.apply_updates(params, updates), "batch_stats": stats}, opt_state

    opt_state = tx.init(variables["params"])
    for batch in self.batches(epochs, seed):
      variables, opt_state = step(variables, opt_state, batch)
    return variables, opt_state

  def gradual(self, variables: Any, epochs: int) -> Iterator[tuple[Any, Any]]:
    """Prune level by level in training; each level goes on from the one before. Yields variables and masks."""
    options: dict[str, Any] = {"stop": self.steps(epochs) // 2, "every": 2, "measure": "macs"}
    for at, level in enumerate(LEVELS):
      pruner = fp.Pruner(self.net.apply, variables, self.data.train[:1], keep=level, **options)
      variables, opt_state = self.train(variables, epochs, 1 + at, pruner)
      options["masks"] = pruner.masks(opt_state)
      yield variables, options["masks"]


def accuracy(run: Callable[..., Any], x: np.ndarray, labels: np.ndarray) -> float:
  """Percentage of series that are classified correctly."""
  return 100 * float(np.mean(np.argmax(jax.jit(run)(jnp.asarray(x)), -1) == labels))


def measure(net: str, name: str, seed: int, ways: list[str]) -> dict[str, Any]:
  """Train one network, prune it in each way, and return accuracies, costs and seconds of processor time."""
  data = load(name)
  model = NETS[net](int(data.labels.max()) + 1)
  trainer = Trainer(model, data, min(len(data.labels) // 10, 8), 100 * seed)
  test = functools.partial(accuracy, x=data.test, labels=data.test_labels)
  start = time.process_time()
  variables, _ = trainer.train(model.init(jax.random.key(seed), data.train[:1]), EPOCHS[name])
  found: dict[str, Any] = {"net": net, "data": name, "seed": seed, "epochs": EPOCHS[name]}
  run = functools.partial(model.apply, variables)
  found |= {"dense": test(run), "train": accuracy(run, data.train, data.labels)}
  found["seconds"] = {"dense": time.process_time() - start}
  pruner = fp.Pruner(model.apply, variables, data.train, keep=LEVELS, measure="macs")
  found["macs"] = {"dense": pruner.cost.dense}
  for way in ways:
    start = time.process_time()
    if way == "gradual":
      pairs = list(trainer.gradual(variables, EPOCHS[name] // 5))
    else:
      pairs = pruner.one_shot(variables, [data.train], reconstruct=way == "one_shot")
    found["seconds"][way] = time.process_time() - start
    found["macs"][way] = [float(pruner.cost(masks)) for _, masks in pairs]
    smalls = [pruner.compact(*pair) for pair in pairs]
    found[way] = [test(functools.partial(small, small.variables)) for small in smalls]
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--data", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
  parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
  parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
  parser.add_argument("--seeds", type=int, default=None, help="by default 3 for FCN and 1 for ResNet")
  parser.add_argument("--out", type=Path, default=None)
  args = parser.parse_args()
  results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"runs": []}
  for net in args.nets:
    for name in args.data:
      for seed in range(args.seeds or SEEDS[net]):
        if (net, name, seed) in [(run["net"], run["data"], run["seed"]) for run in results["runs"]]:
          continue
        results["runs"].append(measure(net, name, seed, args.ways))
        results["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
        if args.out:
          args.out.write_text(json.dumps(results, indent=2) + "\n")
  print(tables.series(results))


if __name__ == "__main__":
  main()
