"""Prunes the tables of a click-prediction network to a budget of bytes while it trains.

  python examples/showcase/ranking_tables/main.py --keep 0.25 --out tables

Users click on items of a catalogue; few items are popular, and half of the catalogue says nothing about clicks. Each row of
a table is a group of its own (``rows=True``), and ``measure="memory"`` counts bytes. Layers shrink within the same budget.
Trains without and with pruning, compacts, checks, saves. Writes ``report.json`` and ``ranking.safetensors``.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import roc_auc_score

import fisherprune_jax as fp

ITEMS, USERS, HISTORY, BATCH, TEST_ROWS = 2000, 200, 6, 512, 20_000
Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Items seen before, the item shown, the user, and whether it was clicked."""


class Ranking(nn.Module):
  """Tables of items and users, and two dense layers."""

  @nn.compact
  def __call__(self, history: jax.Array, item: jax.Array, user: jax.Array) -> jax.Array:
    items, users = nn.Embed(ITEMS, 16, name="items"), nn.Embed(USERS, 16, name="users")
    seen, shown = items(history).mean(1), items(item)
    liking = users(user)
    h = jnp.concatenate([seen, shown, liking, seen * shown, liking * shown], -1)
    for width in (64, 32):
      h = nn.relu(nn.Dense(width)(h))
    return nn.Dense(1)(h)[:, 0]


class World:
  """The teacher: tastes of items and users; items of odd numbers have none."""

  def __init__(self) -> None:
    rng = np.random.default_rng(0)
    self.items = rng.normal(size=(ITEMS, 4)) * (np.arange(ITEMS)[:, None] % 2 == 0)
    self.users = rng.normal(size=(USERS, 4))
    popular = 1 / (20 + np.arange(ITEMS))
    self.popular = popular / popular.sum()

  def rows(self, seed: int, count: int) -> Data:
    rng = np.random.default_rng(seed)
    items = rng.choice(ITEMS, (count, HISTORY + 1), p=self.popular).astype(np.int32)
    history, item, user = items[:, 1:], items[:, 0], rng.integers(0, USERS, count, dtype=np.int32)
    taste = self.users[user] + 2 * self.items[history].mean(1)
    log_odds = 1.5 * np.sum(taste * self.items[item], -1) - 0.5
    return history, item, user, np.float32(rng.uniform(size=count) < 1 / (1 + np.exp(-log_odds)))


def loss_fn(params: Any, batch: Data) -> jax.Array:
  logits = Ranking().apply({"params": params}, *batch[:3])
  return optax.sigmoid_binary_cross_entropy(logits, batch[3]).mean()


def train(world: World, params: Any, steps: int, seed: int, pruner: fp.Pruner | None) -> tuple[Any, Any]:
  """Parameters and optimizer state, with a pruner or without."""
  tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
  tx = tx if pruner is None else pruner.wrap(tx)

  @jax.jit
  def step(params: Any, state: Any, batch: Data) -> tuple[Any, Any]:
    if pruner is None:
      grads = jax.grad(loss_fn)(params, batch)
    else:
      _, grads = pruner.value_and_grad(loss_fn)(params, state, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for at in range(steps):
    params, state = step(params, state, world.rows(10**6 * (seed + 1) + at, BATCH))
  return params, state


def megabytes(tree: Any) -> float:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=Path, required=True, help="folder for the results")
  parser.add_argument("--keep", type=float, default=0.25, help="share of the bytes")
  parser.add_argument("--steps", type=int, default=3000)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  began, world = time.perf_counter(), World()
  test = world.rows(1, TEST_ROWS)
  variables = jax.jit(Ranking().init)(jax.random.key(options.seed), *test[:3])
  stop = max(2, options.steps * 2 // 3)
  pruner = fp.Pruner(
    Ranking().apply, variables, *test[:3], rows=True, measure="memory",
    keep=options.keep, start=options.steps // 6, stop=stop, every=max(1, options.steps // 100),
  )  # fmt: skip
  dense, _ = train(world, variables["params"], options.steps, options.seed, None)
  params, state = train(world, variables["params"], options.steps, options.seed, pruner)
  small = pruner.compact(params, state)
  options.out.mkdir(parents=True, exist_ok=True)
  small.save(options.out / "ranking.safetensors")
  logits = small(small.variables, *test[:3])
  tables = {name: small.variables["params"][name]["embedding"].shape for name in ("items", "users")}
  live = np.asarray(pruner.masks(state)["items.rows"])
  report = {
    "dense_auc": roc_auc_score(test[3], Ranking().apply({"params": dense}, *test[:3])),
    "pruned_auc": roc_auc_score(test[3], logits),
    "dense_megabytes": megabytes(variables),
    "pruned_megabytes": megabytes(small.variables),
    "target_megabytes": pruner.target / 1e6,
    "tables": tables,
    "items_with_taste": float(live[::2].mean()),
    "items_without": float(live[1::2].mean()),
    "max_abs_difference": float(jnp.abs(logits - pruner.apply(params, state, *test[:3])).max()),
    "seconds": time.perf_counter() - began,
  }
  (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
  print(small)
  print(json.dumps(report, indent=1))


if __name__ == "__main__":
  main()
