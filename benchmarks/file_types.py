"""What a published network keeps: Google's Magika, which tells the types of files, pruned without training and distilled.

  pip install magika onnx
  python benchmarks/file_types.py --out benchmarks/magika.json

The network is read from the ONNX file of the ``magika`` package and written as plain JAX functions. Its examples are files
of this machine, of every type that it finds here, with the features of Magika's own code. No two have equal features.
Scores are agreement with the dense network on test files: the share with the same first type. The masks alone and the
refitted networks are means over calibration sets. The distilled ones, of the first calibration set, are refitted networks
that train for ``--minutes`` towards the probabilities of the dense network, on all files but those of the test. Prints the
table of ``docs/benchmarks.md``.
"""

import argparse
import collections
import functools
import importlib.metadata
import itertools
import json
import math
import os
import random
import resource
import stat
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import optax
import tables
from magika import Magika

import fisherprune_jax as fp

LEVELS = tables.LEVELS["Magika"]
RATES = (1e-4, 3e-4, 1e-3)
TEST, VALIDATION, CALIBRATION = 2000, 256, 1024
BATCH = 64
PER_EXTENSION, PER_TYPE = 80, 120
ROOTS = ("/usr", "/etc", "/opt", sysconfig.get_paths()["purelib"])
PACKAGES = ("jax", "jaxlib", "magika", "onnx", "onnxruntime", "optax", "numpy")


class Data(NamedTuple):
  """Features ``(N, 2048)`` of files, and what the dense network says of them, ``(N, 214)``."""

  ids: np.ndarray
  probabilities: np.ndarray

  def at(self, rows: Any) -> "Data":
    return Data(self.ids[rows], self.probabilities[rows])


def parameters(path: Path) -> dict[str, jax.Array]:
  """The parameters of Magika's network, by names of their own."""
  arrays = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(str(path)).graph.initializer}
  top, net = "jax2tf_get_logits_/", "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/"
  found = {
    "bytes": arrays[top + "Const:0"],
    "bytes_bias": arrays[net + "Dense_0/Reshape:0"].ravel(),
    "place_scale": arrays[net + "LayerNorm_0/Reshape_2:0"].reshape(-1, 1),
    "place_bias": arrays[net + "LayerNorm_0/Reshape_3:0"].reshape(-1, 1),
    "conv": arrays[net + "Conv_0/transpose_3:0"][..., 0].transpose(2, 1, 0),
    "conv_bias": arrays["const_fold_opt__209"].ravel(),
    "scale": arrays[net + "LayerNorm_1/Reshape_2:0"].ravel(),
    "bias": arrays[net + "LayerNorm_1/Reshape_3:0"].ravel(),
    "types": arrays[top + "Const_24:0"],
    "types_bias": arrays[net + "Dense_1/Reshape:0"].ravel(),
  }
  return {name: jnp.asarray(x) for name, x in found.items()}


def normalized(x: jax.Array, scale: jax.Array, bias: jax.Array, axis: int) -> jax.Array:
  """Layer normalization along an axis."""
  mean = x.mean(axis, keepdims=True)
  variance = jnp.maximum(0, (x * x).mean(axis, keepdims=True) - mean * mean)
  return (x - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias


def apply(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
  """The logits of types ``(B, 214)`` for 2048 bytes of each file, 256 for none: four bytes are one place."""
  x = jax.nn.gelu(params["bytes"][ids] + params["bytes_bias"])
  x = normalized(x.reshape(len(ids), 512, -1), params["place_scale"], params["place_bias"], 1)
  x = jax.lax.conv_general_dilated(x, params["conv"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
  x = jax.nn.gelu(x + params["conv_bias"]).max(1)
  return normalized(x, params["scale"], params["bias"], 1) @ params["types"] + params["types_bias"]


def in_batches(run: Callable[..., jax.Array], ids: np.ndarray) -> np.ndarray:
  """The outputs for any number of files, of batches that all have one shape."""
  padded = np.pad(ids, ((0, -len(ids) % BATCH), (0, 0))).reshape(-1, BATCH, ids.shape[1])
  return np.concatenate([np.asarray(run(x)) for x in padded])[: len(ids)]


def agreement(run: Callable[..., jax.Array], data: Data) -> float:
  """100 x the share of files of which a network finds the same type as the dense one."""
  return 100 * float(np.mean(in_batches(jax.jit(run), data.ids).argmax(1) == data.probabilities.argmax(1)))


def collect(magika: Magika, roots: list[str]) -> np.ndarray:
  """Features of regular files that anyone may read, all different: some of each extension, more of those without one."""
  paths: dict[str, set[str]] = collections.defaultdict(set)
  for folder, _, names in itertools.chain.from_iterable(map(os.walk, roots)):
    for path in (os.path.join(folder, name) for name in names):
      mode = os.lstat(path).st_mode
      if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        paths[os.path.splitext(path)[1].lower()].add(path)
  found: dict[bytes, None] = {}
  for extension in sorted(paths):
    few = PER_EXTENSION if extension else 8 * PER_EXTENSION
    most = len(found) + few
    for path in random.Random(0).sample(sorted(paths[extension]), min(3 * few, len(paths[extension]))):
      try:
        _, read = magika._get_result_or_features_from_path(Path(path))
      except OSError:
        continue
      if read is not None and len(found) < most:  # None: too short for the network
        found[np.array(read.beg + read.end, np.int32).tobytes()] = None
  return np.stack([np.frombuffer(ids, np.int32) for ids in found])


def spread(data: Data) -> Data:
  """The files in random order, at most ``PER_TYPE`` of each type that the dense network finds."""
  seen: collections.Counter[int] = collections.Counter()
  data = data.at(np.random.default_rng(0).permutation(len(data.ids)))
  rows = []
  for row, kind in enumerate(data.probabilities.argmax(1)):
    seen[kind] += 1
    if seen[kind] <= PER_TYPE:
      rows.append(row)
  return data.at(rows)


def difference(magika: Magika, data: Data) -> dict[str, float]:
  """How far probabilities are from those of onnxruntime: of each file, the largest difference of all types."""
  parts = np.array_split(data.ids, -(-len(data.ids) // BATCH))
  wanted = np.concatenate([magika._onnx_session.run(None, {"bytes": ids})[0] for ids in parts])
  largest = np.abs(wanted - data.probabilities).max(1)
  same = 100 * float(np.mean(wanted.argmax(1) == data.probabilities.argmax(1)))
  quantiles = {f"quantile {q}": float(np.quantile(largest, q)) for q in (0.5, 0.9, 0.99)}
  # onnxruntime itself is further than that from the network in float64, for files that repeat a few bytes: the
  # variance along the places is a small difference of large numbers.
  assert quantiles["quantile 0.5"] < 1e-5, quantiles
  return {**quantiles, "max": float(largest.max()), "same type": same}


def distill(small: fp.Compact, data: list[Data], rate: float, minutes: float) -> tuple[float, int, Any]:
  """The validation loss, the number of steps and the variables after training, by Adam with a cosine schedule."""
  (unseen, train), tx = data, optax.scale_by_adam()

  def loss(variables: Any, ids: jax.Array, probabilities: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(small(variables, ids), probabilities).mean()

  @jax.jit
  def step(variables: Any, opt_state: Any, rate: jax.Array, *batch: jax.Array) -> Any:
    updates, opt_state = tx.update(jax.grad(loss)(variables, *batch), opt_state)
    return jax.tree.map(lambda x, u: x - rate * u, variables, updates), opt_state

  rng, steps, variables, opt_state = np.random.default_rng(0), 0, small.variables, tx.init(small.variables)
  step(variables, opt_state, 0.0, *train.at(slice(BATCH // 2)))  # compiled before the clock starts
  start = time.perf_counter()
  while (part := (time.perf_counter() - start) / (60 * minutes)) < 1:
    rows = rng.integers(len(train.ids), size=BATCH // 2)
    now = rate * (1 + math.cos(math.pi * part)) / 2
    variables, opt_state = jax.block_until_ready(step(variables, opt_state, now, *train.at(rows)))
    steps += 1
  logits = in_batches(jax.jit(functools.partial(small, variables)), unseen.ids)
  return float(optax.softmax_cross_entropy(logits, unseen.probabilities).mean()), steps, variables


def one_shot(pruner: fp.Pruner, params: Any, pool: Data, seed: int, refits: bool) -> tuple[Any, Any]:
  """The networks of all levels, and what they took; seeds take other files for calibration."""
  rows = np.random.default_rng(seed).permutation(len(pool.ids))[:CALIBRATION]
  batches = list(pool.ids[rows].reshape(-1, BATCH, pool.ids.shape[1]))
  start = time.perf_counter(), time.process_time()
  family = jax.block_until_ready(pruner.one_shot(params, batches, reconstruct=refits))
  took = {"seconds": time.perf_counter() - start[0], "cpu seconds": time.process_time() - start[1]}
  took["peak GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  took["features"] = [{name: int(x.sum()) for name, x in masks.items()} for _, masks in family]
  took["share of MACs"] = [float(pruner.cost(masks)) / pruner.cost.dense for _, masks in family]
  return [pruner.compact(*pair) for pair in family], took


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--roots", nargs="+", default=list(ROOTS), help="folders of files")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--minutes", type=float, default=10, help="of training, for each network and rate")
  parser.add_argument("--out", type=Path, default=Path("benchmarks/magika.json"))
  args = parser.parse_args()

  magika = Magika()
  params = parameters(magika._model_path)
  ids = collect(magika, args.roots)
  dense = jax.jit(lambda ids: jax.nn.softmax(apply(params, ids)))
  data = spread(Data(ids, in_batches(dense, ids)))
  test, validation, pool = map(data.at, np.split(np.arange(len(data.ids)), (TEST, TEST + VALIDATION)))
  results: dict[str, Any] = {"model": magika.get_model_name(), "cores": os.cpu_count(), "seeds": []}
  results["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
  for name, part in {"test": test, "validation": validation, "training": pool}.items():
    results[name] = {"files": len(part.ids), "types": len(set(part.probabilities.argmax(1)))}
  results |= {"files found": len(ids), "calibration": CALIBRATION, "onnxruntime": difference(magika, test)}

  def keep() -> None:
    args.out.write_text(json.dumps(results, indent=2) + "\n")

  keep()
  pruner = fp.Pruner(apply, params, pool.ids[:BATCH], keep=list(LEVELS), measure="macs")
  results["MACs"], families = pruner.cost.dense, []
  for seed in range(args.seeds):
    run: dict[str, Any] = {}
    for name, refits in (("masks", False), ("one_shot", True)):
      networks, run[name] = one_shot(pruner, params, pool, seed, refits)
      run[name]["agreement"] = [agreement(functools.partial(x, x.variables), test) for x in networks]
    families.append(networks)
    results["seeds"].append(run)
    keep()
  rates, results["distilled"] = RATES, {}
  for level, small in list(zip(LEVELS, families[0], strict=True))[::-1]:  # the smallest chooses the rate
    tried = {rate: distill(small, [validation, pool], rate, args.minutes) for rate in rates}
    rates = (min(tried, key=lambda rate: tried[rate][0]),)
    score = agreement(functools.partial(small, tried[rates[0]][2]), test)
    how = [{"rate": rate, "loss": loss, "steps": steps} for rate, (loss, steps, _) in tried.items()]
    results["distilled"][str(level)] = {"agreement": score, "minutes": args.minutes, "tried": how}
    keep()
  print(json.dumps({name: found for name, found in results.items() if name != "seeds"}, indent=2))
  print(tables.files(results))


if __name__ == "__main__":
  main()
