"""Everything that is worth measuring on a GPU, in eight minutes: ``make bench-gpu``.

  python benchmarks/gpu.py --out benchmarks/results/gpu.json

- ``compact``: how much faster compact networks run, over how many FLOPs they have less: ResNet-50, ViT-B and a Llama-like
  decoder, at three batch sizes.
- ``overhead``: a training step with ``fp.Pruner`` over a plain one, for ViT-B.
- ``predicted``: measured over predicted seconds of the compact ViT-B, by ``fp.measure_latency``.
- ``reconstruct``: seconds that ``fp.reconstruct`` takes for the decoder.

Parts that would begin after the limit are left out, and the result says so. ``--tiny`` runs all of it on small networks, for the
tests. Dense and compact take turns; times are medians of wall-clock time.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from decoding import TINY, Sizes, forward, init
from networks import Block, ResNet50, ViT

import fisherprune_jax as fp
from fisherprune_jax._latency.clock import medians

LIMIT = 480.0
LLAMA = Sizes(layers=8, width=2048, heads=16, shared=4, depth=128, hidden=5632, vocabulary=8192)


class Network(NamedTuple):
  """A function of variables and a batch, its variables without masks, and batches of a size."""

  apply: Callable[..., jax.Array]
  variables: Any
  batch: Callable[[int], jax.Array]


class Small(nn.Module):
  """A network of the kind of ViT, for the tests."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Dense(16)(x.reshape(x.shape[0], -1, 12))
    return nn.Dense(4)(Block(2)(x).mean(1))


def images(size: int, count: int) -> jax.Array:
  return jax.random.normal(jax.random.key(count), (count, size, size, 3))


def of_flax(model: nn.Module, size: int) -> Network:
  variables = jax.jit(model.init)(jax.random.key(0), images(size, 1))
  plain = {name: tree for name, tree in variables.items() if name != "masks"}
  return Network(model.apply, plain, functools.partial(images, size))


def decoder(sizes: Sizes, tokens: int) -> Network:
  def batch(count: int) -> jax.Array:
    return jax.random.randint(jax.random.key(count), (count, tokens), 0, sizes.vocabulary)

  return Network(forward, init(sizes), batch)


def networks(is_tiny: bool) -> dict[str, Network]:
  if is_tiny:
    return {"ViT-B": of_flax(Small(), 6), "decoder": decoder(TINY, 8)}
  return {
    "ResNet-50": of_flax(ResNet50(), 224),
    "ViT-B": of_flax(ViT(), 224),
    "decoder": decoder(LLAMA, 512),
  }


def halved(network: Network) -> tuple[fp.Pruner, Any]:
  """A pruner, and masks that keep every second feature of all groups but the residual streams."""
  pruner = fp.Pruner(network.apply, network.variables, network.batch(1), keep=0.5, start=0, stop=100)
  members = {group.name: len(group.members) for group in pruner.groups}
  widest = max(members.values())
  masks = {
    name: jnp.broadcast_to(jnp.arange(mask.shape[-1]) % 2 == 0, mask.shape).astype(jnp.float32)
    if members[name] < widest
    else mask
    for name, mask in pruner.auto.masks.items()
  }
  return pruner, masks


def compact(found: dict[str, Network], batches: list[int]) -> Iterator[dict[str, Any]]:
  for name, network in found.items():
    pruner, masks = halved(network)
    small = pruner.compact(network.variables, masks)
    ratio = pruner.cost.dense / small.cost
    for count in batches:
      x, dense = network.batch(count), jax.jit(network.apply)
      runs = [functools.partial(dense, network.variables, x), functools.partial(small, small.variables, x)]
      before, after = medians(runs, 20, 0.05).tolist()
      yield {
        "network": name,
        "batch": count,
        "flops_ratio": ratio,
        "dense_ms": 1e3 * before,
        "compact_ms": 1e3 * after,
        "speedup_over_flops_ratio": before / after / ratio,
      }


def overhead(network: Network, count: int) -> Iterator[dict[str, Any]]:
  x, tx = network.batch(count), optax.sgd(1e-3, momentum=0.9)
  pruner = fp.Pruner(
    network.apply, network.variables, network.batch(1), keep=0.5, start=10**6, stop=2 * 10**6
  )
  wrapped, params = pruner.wrap(tx), network.variables["params"]

  def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(network.apply({"params": params}, x) ** 2)

  @jax.jit
  def plain(params: Any, opt_state: Any) -> Any:
    updates, opt_state = tx.update(jax.grad(loss_fn)(params, x), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  @jax.jit
  def pruning(params: Any, opt_state: Any) -> Any:
    _, grads = pruner.value_and_grad(loss_fn)(params, opt_state, x)
    updates, opt_state = wrapped.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  runs = [
    functools.partial(step, params, how.init(params)) for step, how in ((plain, tx), (pruning, wrapped))
  ]
  before, after = medians(runs, 20, 0.05).tolist()
  yield {"batch": count, "plain_ms": 1e3 * before, "pruner_ms": 1e3 * after, "ratio": after / before}


def predicted(network: Network, count: int) -> Iterator[dict[str, Any]]:
  pruner, masks = halved(network)
  x, given = network.batch(count), {**network.variables, "masks": masks}
  cost = fp.measure_latency(pruner.auto.apply, given, x, multiple_of=32 if count > 2 else 4, repeats=3)
  small = pruner.compact(network.variables, masks)
  (measured,) = medians([functools.partial(small, small.variables, x)], 20, 0.05).tolist()
  expected = count * float(cost(masks))
  yield {
    "batch": count,
    "predicted_ms": 1e3 * expected,
    "measured_ms": 1e3 * measured,
    "ratio": measured / expected,
  }


def reconstruct(network: Network, examples: int) -> Iterator[dict[str, Any]]:
  pruner, masks = halved(network)
  batches = [network.batch(8) for _ in range(max(1, examples // 8))]
  began = time.perf_counter()
  found = fp.reconstruct(pruner.auto.apply, {**network.variables, "masks": masks}, batches)
  jax.block_until_ready(found)
  size = sum(leaf.size for leaf in jax.tree.leaves(network.variables))
  yield {"examples": examples, "parameters": size, "seconds": time.perf_counter() - began}


def measured(is_tiny: bool, limit: float) -> dict[str, Any]:
  """All parts that begin within the limit, in seconds."""
  began, found = time.monotonic(), networks(is_tiny)
  count = 2 if is_tiny else 64
  parts = {
    "compact": compact(found, [1, 2] if is_tiny else [1, 16, 128]),
    "overhead": overhead(found["ViT-B"], count),
    "predicted": predicted(found["ViT-B"], count),
    "reconstruct": reconstruct(found["decoder"], 16 if is_tiny else 256),
  }
  rows: dict[str, Any] = {name: [] for name in parts}
  for name, part in parts.items():
    while time.monotonic() - began < limit and (row := next(part, None)) is not None:
      rows[name].append(row)
      print(name, row, flush=True)
  left_out = [name for name, part in rows.items() if not part]
  device = jax.devices()[0]
  return {"device": f"{device.device_kind}, JAX {jax.__version__}", "left_out": left_out, **rows}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=Path)
  parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which no part begins")
  parser.add_argument("--tiny", action="store_true")
  options = parser.parse_args()
  result = measured(options.tiny, options.limit)
  if options.out:
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
