"""What networks keep of their accuracy when they are pruned, by what says which features go.

  python benchmarks/quality.py --out benchmarks/quality
  python benchmarks/quality.py --quick

One dense network per seed is trained (or taken as it comes: the encoder's weights are a package's); from it every criterion
prunes on, level by level, with the same epochs, the same schedule and the same order of examples. Beside them, a network of
the widths that Fisher's criterion left, trained from scratch for as long. Numbers are of test examples that no choice was
made on.
Writes ``quality.json`` and ``quality.png``; what is there already is not run again.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quality_results import LEVELS, SCRATCH, Runs, plot, table
from quality_tasks import TASKS, Data, Network, Task, Widths, loss_of
from rich.console import Console
from rich.progress import Progress

import fisherprune_jax as fp

OVER_COST, ALONE = {}, {"cost_weight": 0.0}


def per_mask(mask_grads: Any, masks: Any) -> Any:
  """Root mean squares of gradients over the mean of their mask's, as magnitudes are."""

  def importance(g: jax.Array, mask: jax.Array) -> jax.Array:
    norms, alive = jnp.sqrt(jnp.mean(jnp.square(g), -2)), mask != 0
    mean = jnp.sum(norms * alive, -1, keepdims=True) / jnp.maximum(jnp.sum(alive, -1, keepdims=True), 1)
    return norms / jnp.maximum(mean, 1e-30)

  return jax.tree.map(importance, mask_grads, masks)


PER_MASK = fp.Criterion(per_mask, "fisher per mask")
CRITERIA: dict[str, dict[str, Any]] = {
  "fisher": {"method": "fisher", **OVER_COST},
  "fisher, not over cost": {"method": "fisher", **ALONE},
  "fisher per mask": {"method": PER_MASK, **ALONE},
  "taylor": {"method": "taylor", **OVER_COST},
  "taylor, not over cost": {"method": "taylor", **ALONE},
  "magnitude": {"method": "magnitude", **ALONE},
  "magnitude over cost": {"method": "magnitude", **OVER_COST},
  "fisher_magnitude": {"method": "fisher_magnitude", **OVER_COST},
  "fisher_magnitude, not over cost": {"method": "fisher_magnitude", **ALONE},
  "random": {"method": "random", **ALONE},
  "fisher of outputs": {"method": "fisher", **OVER_COST},
  "fisher_magnitude of outputs": {"method": "fisher_magnitude", **OVER_COST},
}
"""Those of outputs take the gradients of the outputs' projection on random directions instead of the loss's."""


class Net(NamedTuple):
  """Parameters and masks."""

  params: Any
  masks: Any


@dataclass(frozen=True, eq=False)
class Bench:
  """A task with its data, its cost, and what is compiled once for all seeds."""

  task: Task
  epochs: tuple[int, int]
  levels: tuple[float, ...] = LEVELS

  @functools.cached_property
  def data(self) -> tuple[Data, Data, Data]:
    return self.task.load()

  @functools.cached_property
  def network(self) -> Network:
    """A network with masks, to be called."""
    return self.task.start(0, None)

  @functools.cached_property
  def cost(self) -> fp.CostModel:
    apply, params, masks = self.network
    return fp.cost_model(apply, Net(params, masks)._asdict(), self.data[0][0][:1], measure="macs")

  def steps(self, epochs: int) -> int:
    return epochs * ((self.task.epoch or len(self.data[0][1])) // self.task.batch)

  def batches(self, epochs: int, seed: int) -> Iterator[Data]:
    """Every example at most once in an epoch."""
    (inputs, labels), rng = self.data[0], np.random.default_rng(seed)
    for _ in range(epochs):
      order = rng.permutation(len(labels))[: self.task.epoch]
      for at in range(0, len(order) - self.task.batch + 1, self.task.batch):
        rows = order[at : at + self.task.batch]
        yield inputs[rows], labels[rows]

  def dense(self, seed: int, epochs: int, widths: Widths | None = None) -> Net:
    """A network that nothing is pruned of."""
    apply, params, masks = self.task.start(seed, widths)
    loss = loss_of(self.task, apply)
    tx = self.task.optimizer(optax.cosine_decay_schedule(self.task.learning_rate, max(1, self.steps(epochs))))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Data) -> tuple[Any, Any]:
      updates, state = tx.update(jax.grad(loss)(params, masks, batch), state, params)
      return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in self.batches(epochs, seed):
      params, state = step(params, state, batch)
    return Net(params, masks)

  @functools.cached_property
  def schedules(self) -> tuple[Any, Any]:
    """The learning rate and the budget: each level begins with a warm restart, and comes down in its first half."""
    length, whole = self.steps(self.epochs[1]), self.cost.dense
    rate = optax.cosine_decay_schedule(self.task.learning_rate, length)
    shares = jnp.array([1.0, *self.levels])

    def budget(step: jax.Array) -> jax.Array:
      level = jnp.minimum((step - 1) // length, len(self.levels) - 1)
      done = jnp.minimum(1.0, ((step - 1) % length + 1) / (length // 2))
      return whole * shares[level] * (shares[level + 1] / shares[level]) ** done

    return lambda step: rate(step % length), budget

  def options(self, criterion: str) -> dict[str, Any]:
    """What a transformation is told of a criterion."""
    return CRITERIA[criterion]

  @functools.cache  # noqa: B019 (there are as many as tasks)
  def pruner(self, criterion: str) -> tuple[Any, Any]:
    """A transformation and a compiled step."""
    rate, budget = self.schedules
    features = sum(mask.size for mask in jax.tree.leaves(self.cost.masks))
    prune = fp.fisher_prune(
      self.cost, target=budget, prune_every=2, features_per_prune=features, **self.options(criterion)
    )
    tx, loss = optax.chain(self.task.optimizer(rate), prune), loss_of(self.task, self.network.apply)

    def projection(params: Any, masks: Any, batch: Data, key: jax.Array) -> jax.Array:
      outputs = self.network.apply({"params": params, "masks": masks}, batch[0])
      return jnp.sum(outputs * jax.random.rademacher(key, outputs.shape, outputs.dtype))

    @jax.jit
    def step(params: Any, state: Any, batch: Data) -> tuple[Any, Any]:
      masks = fp.get_masks(state)
      _, (grads, mask_grads) = fp.value_and_mask_grads(loss)(params, masks, batch)
      if criterion.endswith("of outputs"):
        of_sum = fp.value_and_mask_grads(projection, reduction="sum")
        key = jax.random.fold_in(jax.random.key(0), fp.get_state(state).step)
        _, (_, mask_grads) = of_sum(params, masks, batch, key)
      updates, state = tx.update(grads, state, params, mask_grads=mask_grads)
      return optax.apply_updates(params, updates), state

    return tx, step

  def pruned(self, net: Net, criterion: str, seed: int) -> Iterator[Net]:
    """What a dense network becomes at each level."""
    tx, step = self.pruner(criterion)
    params, state = net.params, tx.init(net.params)
    for level in range(len(self.levels)):
      for batch in self.batches(self.epochs[1], 1000 * (level + 1) + seed):
        params, state = step(params, state, batch)
      yield Net(params, fp.get_masks(state))

  def result(self, net: Net, widths: Widths | None = None) -> dict[str, Any]:
    """What is kept of a network."""
    apply = jax.jit(self.network.apply if widths is None else self.task.start(0, widths).apply)
    scores = [np.mean(self.task.score(apply(net._asdict(), x), y)) for x, y in self.data[1:]]
    alive = [int(mask.sum()) for mask in jax.tree.leaves(net.masks)]
    return {**dict(zip(("validation", "test"), map(float, scores), strict=True)), "widths": alive}


def run_seed(name: str, bench: Bench, seed: int, chosen: list[str], runs: Runs, tick: Any) -> None:
  """One dense network, and all that is made of it."""
  possible = [c for c in chosen if c != SCRATCH or bench.task.scratch]
  missing = [c for c in possible if not runs.get(name, c, LEVELS[-1], seed)]
  if not missing:
    return
  dense = bench.dense(seed, bench.epochs[0])
  runs.put(bench.result(dense), name, "dense", 1.0, seed)
  for criterion in missing:
    for level, result in zip(LEVELS, results_of(name, bench, dense, criterion, seed, runs), strict=True):
      runs.put(result, name, criterion, level, seed)
      tick()


def results_of(
  name: str, bench: Bench, dense: Net, criterion: str, seed: int, runs: Runs
) -> Iterator[dict[str, Any]]:
  """Level by level."""
  if criterion != SCRATCH:
    yield from map(bench.result, bench.pruned(dense, criterion, seed))
    return
  for at, level in enumerate(LEVELS):
    widths = tuple(runs.get(name, "fisher", level, seed)["widths"])
    yield bench.result(bench.dense(seed, bench.epochs[0] + (at + 1) * bench.epochs[1], widths), widths)


def main() -> None:
  """Runs what is missing, prints the tables, draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
  parser.add_argument("--criteria", nargs="+", default=[*CRITERIA, SCRATCH], choices=[*CRITERIA, SCRATCH])
  parser.add_argument("--seeds", type=int, help="how many; by default as many as each task has")
  parser.add_argument(
    "--epochs", nargs=2, type=int, help="dense, and at each level; by default those of each task"
  )
  parser.add_argument("--quick", action="store_true", help="one seed, few epochs: for a glance")
  parser.add_argument("--out", type=Path, default=Path("quality"))
  options = parser.parse_args()
  options.out.mkdir(parents=True, exist_ok=True)
  runs = Runs(options.out / ("quick.json" if options.quick else "quality.json"))
  console = Console()
  with Progress(console=console) as progress:
    for name in options.tasks:
      seeds = 1 if options.quick else options.seeds or TASKS[name].seeds
      epochs = tuple(options.epochs or TASKS[name].epochs)
      epochs = (-(-epochs[0] // 10), -(-epochs[1] // 10)) if options.quick else epochs
      each, bench = len(options.criteria) * len(LEVELS), Bench(TASKS[name], epochs)
      bar = progress.add_task(name, total=seeds * each)
      for seed in range(seeds):
        run_seed(name, bench, seed, options.criteria, runs, partial(progress.advance, bar))
        progress.update(bar, completed=(seed + 1) * each)
  for name in options.tasks:
    console.print(table(name, runs.found[name]))
  plot(options.out / "quality.png", {name: runs.found[name] for name in options.tasks})


if __name__ == "__main__":
  main()
