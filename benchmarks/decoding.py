"""Tokens per second of a decoder with a cache of keys and values, before and after pruning.

  python benchmarks/decoding.py --out benchmarks/results/decoding.json

A Llama-like decoder (grouped queries, gated MLP, layers in a loop, random weights) decodes at a full context. The groups come
from its ordinary forward pass. Budgets are in FLOPs or in bytes, for one batch size and context length each. Importance is random
but for its scale: a head counts as much as all parameters it has. One thread; dense and compact take turns, and medians count.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fisherprune_jax as fp


class Sizes(NamedTuple):
  layers: int = 6
  width: int = 384
  heads: int = 6
  shared: int = 3
  depth: int = 64
  hidden: int = 1024
  vocabulary: int = 2048


TINY = Sizes(2, 16, 4, 2, 4, 24, 32)
RUNS = [(1, 512), (16, 512), (16, 2048)]


def init(sizes: Sizes) -> Any:
  rng = np.random.default_rng(0)
  n, width = sizes.layers, sizes.width
  shapes = {
    "q": (n, width, sizes.heads, sizes.depth),
    "k": (n, width, sizes.shared, sizes.depth),
    "v": (n, width, sizes.shared, sizes.depth),
    "o": (n, sizes.heads, sizes.depth, width),
    "gate": (n, width, sizes.hidden),
    "up": (n, width, sizes.hidden),
    "down": (n, sizes.hidden, width),
  }

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(width), jnp.float32)

  layers = {name: normal(*shape) for name, shape in shapes.items()}
  return {"params": {"table": normal(sizes.vocabulary, width), "layers": layers}}


def empty_cache(sizes: Sizes, batch: int, context: int) -> Any:
  past = jnp.zeros((sizes.layers, batch, context, sizes.shared, sizes.depth))
  return {"k": past, "v": past, "at": jnp.int32(0)}


def norm(x: jax.Array) -> jax.Array:
  return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rotated(x: jax.Array, at: jax.Array) -> jax.Array:
  """Rotary positions of ``(batch, time, heads, depth)``."""
  half = x.shape[-1] // 2
  angles = at[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
  sine, cosine = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
  """Attention of grouped queries; ``seen`` tells which positions a token may read."""
  grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  scores = jnp.einsum("btsgd,bmsd->bsgtm", grouped, k) / np.sqrt(q.shape[-1])
  weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
  return jnp.einsum("bsgtm,bmsd->btsgd", weights, v).reshape(q.shape)


def mlp(x: jax.Array, p: Any) -> jax.Array:
  x = norm(x)
  return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def forward(variables: Any, tokens: jax.Array) -> jax.Array:
  """The ordinary forward pass of all tokens, without a cache."""
  p, at = variables["params"], jnp.arange(tokens.shape[1])

  def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
    y = norm(x)
    q, k, v = (jnp.einsum("btw,whd->bthd", y, w[name]) for name in "qkv")
    y = attend(rotated(q, at), rotated(k, at), v, at[:, None] >= at)
    x = x + jnp.einsum("bthd,hdw->btw", y, w["o"])
    return x + mlp(x, w), None

  x, _ = lax.scan(layer, p["table"][tokens], p["layers"])
  return norm(x) @ p["table"].T


def step(variables: Any, token: jax.Array) -> tuple[jax.Array, Any]:
  """The logits behind one token per sequence, and the new cache."""
  p, cache = variables["params"], variables["cache"]
  at = cache["at"][None]
  seen = jnp.arange(cache["k"].shape[2]) <= at

  def layer(x: jax.Array, each: Any) -> tuple[jax.Array, Any]:
    w, past_k, past_v = each
    y = norm(x)
    q, k, v = (jnp.einsum("btw,whd->bthd", y, w[name]) for name in "qkv")
    past_k = lax.dynamic_update_slice_in_dim(past_k, rotated(k, at), at[0], 1)
    past_v = lax.dynamic_update_slice_in_dim(past_v, v, at[0], 1)
    y = attend(rotated(q, at), past_k, past_v, seen)
    x = x + jnp.einsum("bthd,hdw->btw", y, w["o"])
    return x + mlp(x, w), (past_k, past_v)

  x, (k, v) = lax.scan(layer, p["table"][token], (p["layers"], cache["k"], cache["v"]))
  return norm(x) @ p["table"].T, {"k": k, "v": v, "at": cache["at"] + 1}


def new_cache(output: Any) -> Any:
  return {"cache": output[1]}


def pruned(
  sizes: Sizes, variables: Any, batch: int, context: int, measure: str, keep: float
) -> tuple[Any, Any]:
  """The compact step and the masks, equal in all layers so that they stay a loop."""
  tokens = jax.random.randint(jax.random.key(1), (4, min(context, 64)), 0, sizes.vocabulary)
  auto = fp.auto_mask(forward, variables, tokens, select=lambda group: group.name != "table")

  def outputs(params: Any, masks: Any, tokens: jax.Array) -> jax.Array:
    return auto.apply({"params": params, "masks": masks}, tokens)

  importance = fp.estimate_importance(outputs, variables["params"], auto.masks, [tokens], method="outputs")
  given = {**variables, "cache": empty_cache(sizes, batch, context), "masks": auto.masks}
  token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
  decode = auto.wrap(step)
  cost = fp.cost_model(decode, given, token, measure=measure, state_from=new_cache)
  masks = fp.select_masks(cost, importance, keep * cost.dense, tie=[*auto.masks], min_features=1)
  small = fp.compact(decode, {**given, "masks": masks}, token, state_from=lambda output: {"cache": output[1]})
  return small, masks


class Decoder:
  """A step that keeps its cache, and is timed."""

  def __init__(self, run: Any, variables: Any, batch: int, context: int) -> None:
    self._run = jax.jit(lambda fixed, cache, token: run({**fixed, "cache": cache}, token), donate_argnums=1)
    self._fixed = {name: tree for name, tree in variables.items() if name != "cache"}
    self._cache = jax.tree.map(jnp.copy, {**variables["cache"], "at": jnp.int32(context // 2)})
    self._token = jnp.zeros((batch, 1), jnp.int32)
    self.seconds: list[float] = []

  def __call__(self) -> jax.Array:
    began = time.perf_counter()
    logits, cache = self._run(self._fixed, self._cache, self._token)
    self._cache = jax.block_until_ready(cache)
    self.seconds.append(time.perf_counter() - began)
    return logits


def megabytes(tree: Any) -> float:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6


def measured(
  sizes: Sizes, batch: int, context: int, keeps: dict[str, float], repeats: int
) -> list[dict[str, Any]]:
  variables = init(sizes)
  dense = {**variables, "cache": empty_cache(sizes, batch, context)}
  rows = [{"network": "dense", "cache_mb": megabytes(dense["cache"]), "weights_mb": megabytes(variables)}]
  decoders = [Decoder(step, dense, batch, context)]
  for measure, keep in keeps.items():
    small, masks = pruned(sizes, variables, batch, context, measure, keep)
    decoders.append(Decoder(small, small.variables, batch, context))
    left = {name: int(mask[0].sum()) for name, mask in masks.items()}
    cache, weights = small.variables["cache"], small.variables["params"]
    row = {"network": f"{keep:.0%} of the {measure}", "left": left}
    rows.append({**row, "cache_mb": megabytes(cache), "weights_mb": megabytes(weights)})
  for decoder in decoders * (repeats + 3):
    decoder()
  for row, decoder in zip(rows, decoders, strict=True):
    row |= {
      "batch": batch,
      "context": context,
      "tokens_per_second": batch / float(np.median(decoder.seconds[3:])),
    }
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=Path)
  parser.add_argument("--repeats", type=int, default=40)
  parser.add_argument("--tiny", action="store_true", help="a small network and one run, for the tests")
  options = parser.parse_args()
  sizes, runs = (TINY, [(2, 16)]) if options.tiny else (Sizes(), RUNS)
  rows = []
  for batch, context in runs:
    rows += measured(sizes, batch, context, {"flops": 0.5, "bytes": 0.5}, options.repeats)
    for row in rows[-3:]:
      print(row)
  if options.out:
    machine = f"{platform.processor() or platform.machine()}, one thread, JAX {jax.__version__}"
    found = {"machine": machine, "sizes": sizes._asdict(), "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
