"""What networks keep when they are pruned without training: masks alone, masks refitted, and ``Pruner.one_shot``.

  python benchmarks/one_shot.py --out benchmarks/one_shot.json
  python benchmarks/one_shot.py --tasks residual --seeds 1
  python benchmarks/one_shot.py --tasks encoder --seeds 1 --examples 4096

``encoder`` is the pretrained sentence encoder of ``quality.py``: agreement with the dense network, 100 x cosine, on 500
docstrings. ``residual`` is a residual network with batch norm, trained on signals of ten classes until it has learnt them by
heart: test accuracy. Calibration takes 1,024 examples without labels. With another number, only ``one_shot`` is measured.
Prints the tables of ``docs/benchmarks.md``.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import tables

import fisherprune_jax as fp

EXAMPLES, BATCH = 1024, 64


class Task(NamedTuple):
  """A trained network, arguments to calibrate on, and how good variables are under masks."""

  apply: Callable[..., jax.Array]
  variables: Any
  batches: list[np.ndarray]
  score: Callable[[Callable[..., jax.Array]], float]


class Residual(nn.Module):
  """Six residual blocks of convolutions along time."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
    x = nn.relu(norm()(nn.Conv(32, (5,), use_bias=False)(x)))
    for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (64, 2), (64, 1)):
      h = nn.relu(norm()(nn.Conv(width, (5,), strides=stride, use_bias=False)(x)))
      h = norm()(nn.Conv(width, (5,), use_bias=False)(h))
      if x.shape != h.shape:
        x = norm()(nn.Conv(width, (1,), strides=stride, use_bias=False)(x))
      x = nn.relu(x + h)
    return nn.Dense(10)(x.mean(1))


def signals(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Sums of six waves with amplitudes of a class, shifted, stretched and noisy: ``(count, 64, 1)`` and labels."""
  rng, amplitudes = np.random.default_rng(seed), np.random.default_rng(100).normal(size=(10, 6))
  labels = rng.integers(0, 10, count)
  times = np.linspace(0, 1, 64) * rng.uniform(0.9, 1.1, (count, 6, 1)) + rng.uniform(0, 1, (count, 1, 1))
  waves = np.sin(2 * np.pi * np.arange(1, 7)[:, None] * times)
  x = np.einsum("nk,nkt->nt", amplitudes[labels], waves) * rng.uniform(0.6, 1.4, (count, 1))
  return np.float32(x + 0.6 * rng.normal(size=x.shape))[..., None], labels


def residual(seed: int, examples: int) -> Task:
  """The network, trained for 25 epochs on 6,000 signals."""
  (x, y), (unseen, labels), model = signals(6000, seed), signals(2000, 1000 + seed), Residual()
  variables = model.init(jax.random.key(seed), x[:2])
  tx = optax.adam(optax.cosine_decay_schedule(2e-3, 25 * 60))

  @jax.jit
  def step(variables: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
    def loss(params: Any) -> Any:
      given = {**variables, "params": params}
      logits, new = model.apply(given, x, train=True, mutable=["batch_stats"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, opt_state = tx.update(grads, opt_state)
    return {**new, "params": optax.apply_updates(variables["params"], updates)}, opt_state

  opt_state = tx.init(variables["params"])
  for epoch in range(25):
    for rows in np.split(np.random.default_rng(epoch).permutation(6000), 60):
      variables, opt_state = step(variables, opt_state, x[rows], y[rows])
  batches = np.split(x[:examples], examples // (2 * BATCH))
  return Task(
    model.apply,
    variables,
    batches,
    lambda run: 100 * float(np.mean(np.argmax(run(unseen), -1) == labels)),
  )


def encoder(seed: int, examples: int) -> Task:
  """MiniLM-L6; seeds take other sentences for calibration."""
  from quality_tasks import agreement, sentences, teacher

  apply, variables, _ = teacher()
  (ids, _), _, (unseen, said) = sentences()
  batches = np.split(np.roll(ids, -examples * seed, 0)[:examples], examples // BATCH)
  return Task(apply, variables, batches, lambda run: float(np.mean(agreement(run(unseen), said))))


def measure(task: Task, levels: tuple[float, ...], is_whole: bool) -> dict[str, Any]:
  """Scores at each level, and seconds of the one call for all levels, compilation included."""
  pruner = fp.Pruner(task.apply, task.variables, task.batches[0], keep=list(levels), measure="macs")
  auto = pruner.auto
  assert auto is not None

  def score(variables: Any, masks: Any) -> float:
    return task.score(jax.jit(functools.partial(auto.apply, {**variables, "masks": masks})))

  found: dict[str, Any] = {"dense": score(task.variables, auto.masks)}
  if is_whole:
    alone = [masks for _, masks in pruner.one_shot(task.variables, task.batches, reconstruct=False)]
    found["masks"] = [score(task.variables, masks) for masks in alone]
    whole = [{**task.variables, "masks": masks} for masks in alone]
    refitted = [fp.reconstruct(auto.apply, variables, task.batches) for variables in whole]
    found["masks, refitted"] = list(map(score, refitted, alone))
  start = time.perf_counter()
  family = pruner.one_shot(task.variables, task.batches)
  found["seconds"] = time.perf_counter() - start
  found["one_shot"] = [score(variables, masks) for variables, masks in family]
  return found


TASKS = {"encoder": encoder, "residual": residual}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--examples", type=int, default=EXAMPLES)
  parser.add_argument("--out", type=Path, default=None)
  args = parser.parse_args()
  results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
  for name in args.tasks:
    is_whole = args.examples == EXAMPLES
    label = name if is_whole else f"{name}, {args.examples:,} examples"
    runs = results.setdefault(label, [])
    for seed in range(len(runs), args.seeds):
      runs.append(measure(TASKS[name](seed, args.examples), tables.LEVELS[name], is_whole))
      if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    seconds = np.mean([run["seconds"] for run in runs])
    print(f"{len(runs)} seeds, {seconds:.0f} s for all levels\n\n{tables.networks({label: runs})}\n")


if __name__ == "__main__":
  main()
