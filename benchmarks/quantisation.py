"""What pruning and int8 weights leave of a network's accuracy and of its file.

  python benchmarks/quantisation.py --out benchmarks/results/quantisation.json

A network of convolutions reads digits. It is pruned to half, a quarter and a tenth of its FLOPs without labels. Kernels become int8
with a float32 scale for each output channel. Files are those of safetensors, without a program.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

import fisherprune_jax as fp

DIGITS = Path(__file__).parent.parent / "examples" / "digits.csv.gz"
LEVELS = (0.5, 0.25, 0.1)
TRAINED = 1350
"""How many of the 1,797 images are for training and calibration."""

Apply = Callable[[Any, jax.Array], jax.Array]


class Net(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.Conv(32, (3, 3))(x))
    x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
    x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
    return nn.Dense(10)(x)


def quantise(tree: Any) -> Any:
  """Kernels as int8, with a scale for each output channel; other arrays as they are."""

  def of(w: jax.Array) -> Any:
    if w.ndim < 2:
      return w
    scale = jnp.max(jnp.abs(w), axis=range(w.ndim - 1)) / 127
    scale = jnp.where(scale > 0, scale, 1)
    return {"int8": jnp.round(w / scale).astype(jnp.int8), "scale": scale}

  return jax.tree.map(of, tree)


def dequantise(tree: Any) -> Any:
  """The arrays that ``quantise`` took, to rounding."""

  def of(w: Any) -> Any:
    return w["int8"] * w["scale"] if is_quantised(w) else w

  return jax.tree.map(of, tree, is_leaf=is_quantised)


def is_quantised(node: Any) -> bool:
  return isinstance(node, dict) and "int8" in node


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels in random order."""
  rows = np.random.default_rng(seed).permutation(np.loadtxt(DIGITS, delimiter=",", dtype=np.float32))
  return rows[:, :-1].reshape(-1, 8, 8, 1) / 16, rows[:, -1].astype(int)


def trained(apply_fn: Apply, params: Any, images: np.ndarray, labels: np.ndarray, steps: int) -> Any:
  """Parameters after some steps of Adam."""
  tx = optax.adam(2e-3)

  @jax.jit
  def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      logits = apply_fn({"params": params}, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = tx.init(params)
  for at in range(steps):
    rows = np.random.default_rng(at).integers(0, TRAINED, 64)
    params, opt_state = step(params, opt_state, images[rows], labels[rows])
  return params


def kilobytes(variables: Any) -> float:
  """The size of a file of arrays."""
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "variables.safetensors"
    save_file({jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}, path)
    return path.stat().st_size / 1e3


def measure(seed: int, steps: int) -> dict[str, Any]:
  """Accuracy and size of each way, by level."""
  images, labels = digits(seed)
  batches = np.split(images[:TRAINED], 9)
  example = images[:1]

  def cell(apply_fn: Apply, variables: Any) -> dict[str, float]:
    found = jnp.argmax(jax.jit(apply_fn)(variables, images[TRAINED:]), axis=-1)
    return {"accuracy": 100 * float(np.mean(found == labels[TRAINED:])), "kilobytes": kilobytes(variables)}

  model = Net()
  params = model.init(jax.random.key(seed), example)["params"]
  variables = {"params": trained(model.apply, params, images, labels, steps)}

  def as_int8(variables: Any, x: jax.Array) -> jax.Array:
    return model.apply(dequantise(variables), x)

  quantised = quantise(variables)
  rows: dict[str, Any] = {
    "float32": {"dense": cell(model.apply, variables)},
    "int8": {"dense": cell(as_int8, quantised)},
    "pruned": {},
    "pruned, then int8": {},
    "int8, then pruned": {},
    "int8, pruned in float32, int8 again": {},
  }

  def one_shot(params: Any, then_int8: str, alone: str | None = None) -> None:
    family = fp.Pruner(model.apply, variables, example, keep=LEVELS)
    for level, (fitted, masks) in zip(LEVELS, family.one_shot(params, batches), strict=True):
      small = family.compact(fitted, masks)

      def small_int8(variables: Any, x: jax.Array, small: Any = small) -> jax.Array:
        return small(dequantise(variables), x)

      rows[then_int8][str(level)] = cell(small_int8, quantise(small.variables))
      if alone:
        rows[alone][str(level)] = cell(small, small.variables)

  one_shot(variables["params"], "pruned, then int8", "pruned")
  one_shot(dequantise(quantised)["params"], "int8, pruned in float32, int8 again")
  auto = fp.auto_mask(as_int8, quantised, example)
  cost = auto.cost()

  def outputs(_: Any, masks: Any, batch: jax.Array) -> jax.Array:
    return auto.apply({**quantised, "masks": masks}, batch)

  importance = fp.estimate_importance(outputs, {}, auto.masks, batches, method="outputs")
  targets = [level * cost.dense for level in LEVELS]
  for level, masks in zip(LEVELS, fp.select_masks(cost, importance, targets), strict=True):
    small = auto.compact({**quantised, "masks": masks})
    rows["int8, then pruned"][str(level)] = cell(small, small.variables)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=600)
  parser.add_argument("--out", type=Path)
  args = parser.parse_args()
  runs = []
  for seed in range(args.seeds):
    runs.append(measure(seed, args.steps))
    print(json.dumps(runs[-1], indent=1), flush=True)
  for way in runs[0]:
    print(
      way, {level: statistics.mean(run[way][level]["accuracy"] for run in runs) for level in runs[0][way]}
    )
  if args.out:
    args.out.write_text(json.dumps({"levels": LEVELS, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
  main()
