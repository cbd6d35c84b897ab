"""How much faster compact networks run, against how many FLOPs they have less.

  python benchmarks/compact_speed.py --out benchmarks/compact_speed.json
  python benchmarks/compact_speed.py --round-to 8 --networks resnet50-half vit

On a CPU: one thread, process CPU time; on an accelerator: wall-clock time. Dense and compact take turns in one
process, medians are reported. Dense is the network without masks.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts its threads

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fisherprune_jax as fp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.networks import VGG, Masks, ResNet50, ViT, budget, fraction, variables_of
from examples.digits_cnn import CNN

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Masks]] = {
  "resnet50-half": (ResNet50, (224, 224, 3), fraction(0.5)),
  "resnet50-three-quarters": (ResNet50, (224, 224, 3), fraction(0.75)),
  "vit": (ViT, (224, 224, 3), fraction(0.5)),
  "vgg": (VGG, (64, 64, 3), budget(0.25)),
  "digits": (CNN, (8, 8, 1), budget(0.1)),
}


def seconds(run: Callable[[], Any], count: int) -> float:
  """What one of ``count`` calls takes."""
  clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
  start = clock()
  for _ in range(count):
    out = run()
  jax.block_until_ready(out)
  return (clock() - start) / count


def measure(name: str, batches: list[int], repeats: int, round_to: int) -> list[dict[str, Any]]:
  """The rows of one network."""
  make, shape, cut = NETWORKS[name]
  model = make()
  x = jax.ShapeDtypeStruct((1, *shape), np.float32)
  variables = variables_of(model, np.zeros(x.shape, x.dtype))
  cost = fp.cost_model(model.apply, variables, x)
  plain = {k: v for k, v in variables.items() if k != "masks"}
  small = fp.compact(model.apply, variables | {"masks": cut(cost)}, x, round_to=round_to)
  dense = jax.jit(model.apply)
  rows = []
  for batch in batches:
    given = jax.device_put(np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32))
    runs = [lambda g=given: dense(plain, g), lambda g=given: small(small.variables, g)]
    once = [seconds(run, 1) for run in runs + runs][2:]  # the first call compiles
    count = max(1, round(0.1 / max(once)))
    times = np.array(
      [[seconds(run, count) for run in runs] for _ in track(range(repeats), f"{name} {batch}")]
    )
    before, after = np.median(times, axis=0)
    ratio = cost.dense / small.cost
    rows.append(
      {
        "network": name,
        "batch": batch,
        "flops_kept": small.cost / cost.dense,
        "dense_ms": 1e3 * before,
        "compact_ms": 1e3 * after,
        "speedup": before / after,
        "speedup_over_flops_ratio": before / after / ratio,
      }
    )
  return rows


def main() -> None:
  """Prints a table, and writes it if asked to."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
  parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--round-to", type=int, default=1)
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  table = Table("network", "batch", "FLOPs kept", "dense ms", "compact ms", "speed-up", "/ FLOPs ratio")
  rows = []
  for name in options.networks:
    for row in measure(name, options.batches, options.repeats, options.round_to):
      rows.append(row)
      table.add_row(
        row["network"],
        str(row["batch"]),
        f"{row['flops_kept']:.1%}",
        *(f"{row[key]:.2f}" for key in ("dense_ms", "compact_ms", "speedup", "speedup_over_flops_ratio")),
      )
  Console().print(table)
  if options.out:
    options.out.write_text(json.dumps({"backend": jax.default_backend(), "rows": rows}, indent=2))


if __name__ == "__main__":
  main()
