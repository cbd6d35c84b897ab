"""What training makes of the networks of `peers.py`: the best one of Torch-Pruning, and that of `Pruner.one_shot`.

  python benchmarks/peers_training.py --peers benchmarks/peers.json --out benchmarks/peers_training.json

The choice of Torch-Pruning becomes masks of this library. `compact` then gives a network with the same outputs, and one loop
in JAX trains both, by the encoder's task of `quality_tasks.py`. Validation sentences choose between learning rates.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables
import torch
from peers import DEPTH, EXAMPLES, LAYERS, LEVELS, Option, Peer, agreement, embed, share
from quality_tasks import TASKS, sentences, teacher

import fisherprune_jax as fp

RATES = (3e-5, 6e-5, 1.25e-4, 2.5e-4, 5e-4)


def best_option(found: dict[str, Any], level: float) -> Option:
  """The option with the highest agreement on the docstrings, among those that keep the width of the embedding."""
  cells = [row[f"{level:.0%}"] for name, row in found["rows"].items() if name.startswith("Torch-Pruning")]
  best = max((x for x in cells if not x["width"]), key=lambda x: x["test"])
  return Option(**{name: best[name] for name in Option._fields})


def masks_of(
  option: Option, removed: dict[str, np.ndarray], masks: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """The choice of Torch-Pruning as masks of this library."""
  for at, layer in enumerate(LAYERS):
    inner = removed.get(f"{layer}.attention.self.query", np.array([], int))
    gone = {"up": removed.get(f"{layer}.intermediate.dense", np.array([], int))}
    if option.attention == "heads":
      gone["attention/query.heads"] = inner // DEPTH
    else:
      gone |= {"attention/query.depth": inner % DEPTH, "attention/value": inner % DEPTH}
    for name, rows in gone.items():
      masks = masks | {f"layer{at}/{name}": masks[f"layer{at}/{name}"].at[rows].set(0)}
  return masks


def trained(small: fp.Compact, data: Any, steps: int, rate: float) -> Callable[[Any], Any]:
  """The network after some steps."""
  task, params = TASKS["encoder"], small.variables["params"]
  tx = task.optimizer(optax.cosine_decay_schedule(rate, steps))

  @jax.jit
  def step(params: Any, state: Any, ids: jax.Array, wanted: jax.Array) -> Any:
    grads = jax.grad(lambda params: jnp.mean(task.loss(small({"params": params}, ids), wanted)))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state, order = tx.init(params), np.random.default_rng(0).permutation(len(data[0]))
  for rows in np.resize(order, (steps, task.batch)):
    params, state = step(params, state, *(x[rows] for x in data))
  return functools.partial(jax.jit(small), {"params": params})


def main() -> None:
  """Trains all networks and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--peers", type=Path, default=Path("benchmarks/peers.json"))
  parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
  parser.add_argument("--steps", type=int, nargs="+", default=(40, 200))
  parser.add_argument("--out", type=Path, default=None)
  args, (data, validation, test), (apply, variables, _) = parser.parse_args(), sentences(), teacher()
  found, ids, begun, rows = json.loads(args.peers.read_text()), data[0][:EXAMPLES], time.perf_counter(), {}
  peer, batches = Peer(ids), np.split(ids, 16)

  def put(row: str, level: float, **values: Any) -> None:
    rows.setdefault(row, {})[f"{level:.0%}"] = values
    print(f"{time.perf_counter() - begun:,.0f} s, {level:.0%}, {row}: {values}", flush=True)
    if args.out:
      args.out.write_text(json.dumps({"versions": found["versions"], "rows": rows}, indent=1) + "\n")

  pruner = fp.Pruner(apply, variables, batches[0], keep=list(args.levels), measure="macs")
  assert pruner.auto is not None

  def measure(name: str, level: float, params: Any, masks: Any, steps: list[int]) -> fp.Compact:
    small = pruner.compact(params, masks)
    start = agreement(functools.partial(jax.jit(small), small.variables), test)
    put(f"{name}, 0 steps", level, cost=float(pruner.cost(masks)) / pruner.cost.dense, test=start)
    for count in steps:
      networks = [trained(small, data, count, rate) for rate in RATES]
      scores = [(agreement(network, validation), agreement(network, test)) for network in networks]
      put(f"{name}, {count} steps", level, test=max(scores)[1], rates=dict(zip(RATES, scores, strict=True)))
    return small

  for level in args.levels:
    option = best_option(found, level)
    model, removed = peer.prune(option, level)
    masks = masks_of(option, removed, pruner.auto.masks)
    small = measure("Torch-Pruning", level, variables, masks, args.steps)
    with torch.no_grad():
      difference = float(np.abs(embed(model, test[0]).numpy() - small(small.variables, test[0])).max())
    put("check", level, difference=difference, cost=share(removed), option=option._asdict())
    fitted = fp.reconstruct(pruner.auto.apply, {**variables, "masks": masks}, batches)
    measure("Torch-Pruning, refitted by this library", level, {"params": fitted["params"]}, masks, [])
  for level, (params, masks) in zip(args.levels, pruner.one_shot(variables, batches), strict=True):
    measure("this library", level, params, masks, args.steps)
  print(f"\n{tables.agreements({'rows': rows})}")


if __name__ == "__main__":
  main()
