"""What training after pruning adds, by labels and by the dense network's outputs (distillation).

  python benchmarks/distillation.py --out benchmarks/results/distillation.json

Networks of ``quality.py`` start from the masks of ``Pruner.one_shot``, with and without refitted parameters, and train for 20
epochs. The teacher is the dense network: cross entropy with its probabilities at a temperature. Validation examples choose
the learning rate; numbers are of test examples. Prints the tables of ``docs/distillation.md``.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tables
from quality import Bench, Net
from quality_tasks import TASKS, Data

import fisherprune_jax as fp

RATES = (3e-4, 1e-3, 3e-3)
TEMPERATURES = {"trained by labels": None, "distilled, T = 1": 1.0, "distilled, T = 4": 4.0}
BATCHES, EXAMPLES = 16, 1024


def distance(logits: jax.Array, labels: jax.Array, wanted: jax.Array, temperature: float | None) -> jax.Array:
  """Mean cross entropy with labels, or with a teacher's softened probabilities times the squared temperature."""
  if temperature is None:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  soft = jax.nn.softmax(wanted / temperature)
  return temperature**2 * optax.softmax_cross_entropy(logits / temperature, soft).mean()


@functools.cache
def step_of(bench: Bench, temperature: float | None, rate: float) -> tuple[Any, Callable[..., Any]]:
  """An optimizer and a compiled step."""
  tx = optax.adam(optax.cosine_decay_schedule(rate, bench.steps(bench.epochs[1])))

  @jax.jit
  def step(params: Any, state: Any, masks: Any, batch: Data, wanted: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
      return distance(
        bench.network.apply(Net(params, masks)._asdict(), batch[0]), batch[1], wanted, temperature
      )

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  return tx, step


def trained(bench: Bench, net: Net, dense: Net, temperature: float | None, rate: float, seed: int) -> Net:
  """The network after its epochs."""
  tx, step = step_of(bench, temperature, rate)
  say = jax.jit(bench.network.apply)
  params, state = net.params, tx.init(net.params)
  for batch in bench.batches(bench.epochs[1], 500 + seed):
    params, state = step(params, state, net.masks, batch, say(dense._asdict(), batch[0]))
  return Net(params, net.masks)


def run(name: str, seed: int) -> dict[str, Any]:
  """The test accuracies of one dense network and of what is made of it, by start and training, at each level."""
  bench = Bench(TASKS[name], TASKS[name].epochs)
  dense = bench.dense(seed, bench.epochs[0])
  calibration = np.split(bench.data[0][0][:EXAMPLES], BATCHES)
  pruner = fp.Pruner(
    bench.network.apply,
    dense._asdict(),
    calibration[0],
    keep=list(tables.LEVELS["distillation"]),
    measure="macs",
  )
  found: dict[str, Any] = {"dense": bench.result(dense)["test"]}
  for start, refits in (("masks", False), ("one_shot", True)):
    nets = [Net(*pair) for pair in pruner.one_shot(dense.params, calibration, reconstruct=refits)]
    found[start] = [bench.result(net)["test"] for net in nets]
    for way, temperature in TEMPERATURES.items():
      tried = [
        [bench.result(trained(bench, net, dense, temperature, rate, seed)) for rate in RATES] for net in nets
      ]
      best = [max(results, key=lambda result: result["validation"]) for results in tried]
      found[f"{start}, {way}"] = [result["test"] for result in best]
      print(f"{name} {seed}, {start}, {way}: {found[f'{start}, {way}']}", flush=True)
  return found


def main() -> None:
  """Runs all tasks and prints their tables."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", nargs="+", default=["digits", "mnist1d"])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  found: dict[str, list[Any]] = {}
  for name in options.tasks:
    for seed in range(options.seeds):
      found.setdefault(name, []).append(run(name, seed))
      if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
  print(tables.trained(found))


if __name__ == "__main__":
  main()
