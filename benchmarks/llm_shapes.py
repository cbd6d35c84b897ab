"""Pruning on the shapes of large language models: no weights, one host.

  python benchmarks/llm_shapes.py --out benchmarks/results/llm_shapes.json

Everything is done on abstract arrays: groups, cost, and the selection of masks at half of the FLOPs from random importance.
Each model is measured in a process of its own: CPU seconds, and the highest memory of that process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fisherprune_jax as fp


class Config(NamedTuple):
  """Sizes of a decoder; ``experts`` of which ``chosen`` are read by a token, or None for a dense network."""

  width: int
  layers: int
  heads: int
  groups: int
  depth: int
  hidden: int
  vocabulary: int
  experts: int | None = None
  chosen: int = 1


MODELS = {
  "Qwen3-0.6B": Config(1024, 28, 16, 8, 128, 3072, 151_936),
  "Llama-3-8B": Config(4096, 32, 32, 8, 128, 14_336, 128_256),
  "Qwen3-235B-A22B": Config(4096, 94, 64, 4, 128, 1536, 151_936, experts=128, chosen=8),
}
TOKENS = 64


def rotated(x: jax.Array) -> jax.Array:
  half = x.shape[-1] // 2
  angles = jnp.arange(x.shape[1])[:, None] * 1e6 ** (-jnp.arange(half) / half)
  cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, dense = self.config, partial(nn.DenseGeneral, use_bias=False)
    q = rotated(nn.RMSNorm(name="q_norm")(dense((c.heads, c.depth), name="q")(x)))
    k = rotated(nn.RMSNorm(name="k_norm")(dense((c.groups, c.depth), name="k")(x)))
    v = dense((c.groups, c.depth), name="v")(x)
    q = q.reshape(*q.shape[:2], c.groups, c.heads // c.groups, c.depth)
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k) * c.depth**-0.5
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    y = jnp.einsum("bgrts,bsgd->btgrd", weights, v)
    return dense(c.width, axis=(-3, -2, -1), name="o")(y)


class Experts(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    assert c.experts is not None
    gates = jax.nn.softmax(nn.Dense(c.experts, use_bias=False, name="router")(x))
    best, index = jax.lax.top_k(gates, c.chosen)
    weights = jnp.sum(jax.nn.one_hot(index, c.experts) * best[..., None], -2)
    init = nn.initializers.lecun_normal()
    up, gate = (self.param(name, init, (c.experts, c.width, c.hidden)) for name in ("up", "gate"))
    h = nn.silu(jnp.einsum("btd,edh->beth", x, gate)) * jnp.einsum("btd,edh->beth", x, up)
    down = self.param("down", init, (c.experts, c.hidden, c.width))
    return jnp.einsum("beth,ehd,bte->btd", h, down, weights)


class Decoder(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    c = self.config
    x = nn.Embed(c.vocabulary, c.width, name="embed")(ids)
    for at in range(c.layers):
      h = nn.RMSNorm(name=f"layer{at}_norm1")(x)
      x = x + Attention(c, name=f"layer{at}_attention")(h)
      h = nn.RMSNorm(name=f"layer{at}_norm2")(x)
      if c.experts:
        x = x + Experts(c, name=f"layer{at}_experts")(h)
      else:
        dense = partial(nn.Dense, use_bias=False)
        h = nn.silu(dense(c.hidden, name=f"layer{at}_gate")(h)) * dense(c.hidden, name=f"layer{at}_up")(h)
        x = x + dense(c.width, name=f"layer{at}_down")(h)
    return nn.Dense(c.vocabulary, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def measure(name: str) -> dict[str, Any]:
  """The numbers of one model, in this process."""
  model, ids = Decoder(MODELS[name]), jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), ids)
  found: dict[str, Any] = {"model": name, "parameters": sum(x.size for x in jax.tree.leaves(variables))}
  last = time.process_time()

  def note(what: str) -> None:
    nonlocal last
    now = time.process_time()
    found[what], last = now - last, now

  auto = fp.auto_mask(model.apply, variables, ids, select=lambda group: not group.name.startswith("embed"))
  note("groups_s")
  found["masks"], found["features"] = len(auto.masks), int(sum(m.size for m in auto.masks.values()))
  cost = auto.cost()
  note("cost_s")
  rng = np.random.default_rng(0)
  importance = {key: jnp.asarray(rng.uniform(size=m.shape), jnp.float32) for key, m in auto.masks.items()}
  found["recost_every"] = max(64, found["features"] // 500)
  for what in ("select_first_s", "select_again_s"):
    masks = fp.select_masks(cost, importance, 0.5 * cost.dense, recost_every=found["recost_every"])
    jax.block_until_ready(masks)
    note(what)
  found["kept"] = float(cost(masks)) / cost.dense
  found["masks_bytes"] = 4 * found["features"]
  found["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
  parser.add_argument("--out", type=Path)
  parser.add_argument("--here", action="store_true", help="measure one model in this process")
  args = parser.parse_args()
  if args.here:
    print(json.dumps(measure(args.models[0])))
    return
  rows = []
  for name in args.models:
    run = [sys.executable, __file__, "--here", "--models", name]
    rows.append(
      json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )
    print(json.dumps(rows[-1], indent=1), flush=True)
  if args.out:
    args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
  main()
