"""Half of the layers of a transformer, without training: by importance, the last ones, every second one.

  python benchmarks/depth.py --out benchmarks/results/depth.json

A causal transformer of 24 layers learns the bytes of Python's standard library. Then 12 layers are removed, with and without
refitting what is left. The numbers are bits per byte on files that were held out, less is better.
"""

import argparse
import json
import sysconfig
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import fisherprune_jax as fp

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 24, 64, 4, 64, 32


class Block(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.LayerNorm(name="norm1")(x)
    q, k, v = (nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(y) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
    past = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = nn.softmax(jnp.where(past, scores, -1e9))
    x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(jnp.einsum("bhqk,bkhd->bqhd", weights, v))
    y = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="norm2")(x)))
    return x + nn.Dense(WIDTH, name="down")(y)


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = nn.Embed(256, WIDTH, name="embed")(tokens)
    x = x + self.param("position", nn.initializers.normal(0.02), (LENGTH, WIDTH))
    for layer in range(LAYERS):
      x = Block(name=f"layer{layer}")(x)
    return nn.Dense(256, name="head")(nn.LayerNorm(name="norm")(x))


def windows(text: np.ndarray, count: int, seed: int) -> np.ndarray:
  starts = np.random.default_rng(seed).integers(len(text) - LENGTH - 1, size=count)
  return np.stack([text[at : at + LENGTH + 1] for at in starts]).astype(np.int32)


def texts() -> tuple[np.ndarray, np.ndarray]:
  """The bytes to learn from, and those of other files."""
  files = [path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
  parts = (b"".join(f for n, f in enumerate(files) if (n % 10 == 0) == held) for held in (False, True))
  train, held_out = (np.frombuffer(part, np.uint8) for part in parts)
  return train, held_out


def trained(model: nn.Module, text: np.ndarray, steps: int, seed: int) -> Any:
  params = model.init(jax.random.key(seed), jnp.zeros((1, LENGTH), jnp.int32))["params"]
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, 100, steps))
  )

  @jax.jit
  def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
    grads = jax.grad(lambda p: loss(model.apply({"params": p}, batch[:, :-1]), batch))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for at in track(range(steps), "training"):
    params, state = step(params, state, windows(text, BATCH, seed * steps + at))
  return params


def loss(logits: jax.Array, batch: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def run(steps: int, keep: int, seed: int) -> dict[str, float]:
  """Bits per byte of each way to keep some layers."""
  text, other = texts()
  model = Transformer()
  params = trained(model, text, steps, seed)
  test = jnp.asarray(windows(other, 512, 1))
  calibration = [jnp.asarray(windows(text, 64, 10**6 + at))[:, :-1] for at in range(8)]
  whole = [f"layer{at}/*.block" for at in range(LAYERS)]
  options = {"keep": 1.0, "blocks": True, "select": lambda group: group.kind == "block"}
  by_layer = fp.Pruner(model.apply, {"params": params}, calibration[0], tie=whole, depth=2 * keep, **options)
  by_block = fp.Pruner(model.apply, {"params": params}, calibration[0], depth=2 * keep, **options)
  apply = jax.jit(by_layer.apply)

  def bits(params: Any, masks: Any) -> float:
    return float(loss(apply(params, masks, test[:, :-1]), test) / jnp.log(2))

  def fixed(kept: Any) -> Any:
    """Masks of the layers to keep."""
    return {name: jnp.full(m.shape, float(int(name.split("/")[0][5:]) in kept)) for name, m in ones.items()}

  ones = by_layer.cost.masks
  found = {"dense": bits(params, ones)}
  ways = {"the first layers": range(keep), "every second layer": range(0, LAYERS, LAYERS // keep)}
  for way, kept in ways.items():
    masks = fixed(set(kept))
    variables = {"params": params, "masks": masks}
    refitted = fp.reconstruct(by_layer.auto.apply, variables, calibration)
    found[way], found[f"{way}, refitted"] = bits(params, masks), bits(refitted["params"], masks)
  for way, pruner in (("layers by importance", by_layer), ("blocks by importance", by_block)):
    for reconstruct in (False, True):
      new, masks = pruner.one_shot(params, calibration, reconstruct=reconstruct)
      found[way + (", refitted" if reconstruct else "")] = bits(new, masks)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--keep", type=int, default=12, help="how many layers stay")
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--out", type=Path)
  args = parser.parse_args()
  runs = []
  for seed in range(args.seeds):
    runs.append(run(args.steps, args.keep, seed))
    print(json.dumps(runs[-1], indent=1), flush=True)
    if args.out:
      args.out.write_text(
        json.dumps({"layers": LAYERS, "keep": args.keep, "steps": args.steps, "runs": runs}, indent=1) + "\n"
      )


if __name__ == "__main__":
  main()
