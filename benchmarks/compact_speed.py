"""How much faster compact networks run, against how many FLOPs they have less.

  python benchmarks/compact_speed.py --out benchmarks/results/compact_speed.json
  python benchmarks/compact_speed.py --round-to 8 --networks resnet50-half vit

On a CPU: one thread, process CPU time; on an accelerator: wall-clock time. Dense and compact take turns in one
process, medians are reported. Dense is the network without masks; "by hand" is one that was written with the
widths of the compact one, the most that can be had.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts its threads

import flax.linen as nn
import jax
import numpy as np
from networks import VGG, Cut, Digits, ResNet50, ViT, budget, fraction, keep, rounded, variables_of
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fisherprune_jax as fp

NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], Cut]] = {
  "resnet50-half": (ResNet50, (224, 224, 3), fraction(0.5)),
  "resnet50-three-quarters": (ResNet50, (224, 224, 3), fraction(0.75)),
  "vit": (ViT, (224, 224, 3), fraction(0.5)),
  "vgg": (VGG, (64, 64, 3), budget(0.25)),
  "digits": (Digits, (8, 8, 1), budget(0.1)),
}


SHOWN = ("dense_ms", "compact_ms", "speedup", "speedup_over_flops_ratio", "by_hand_over_flops_ratio")


def seconds(run: Callable[[], Any], count: int) -> float:
  """What one of ``count`` calls takes."""
  clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
  start = clock()
  for _ in range(count):
    out = run()
  jax.block_until_ready(out)
  return (clock() - start) / count


def measure(name: str, batches: list[int], repeats: int, multiple_of: int) -> list[dict[str, Any]]:
  """The rows of one network."""
  make, shape, cut = NETWORKS[name]
  model = make()
  x = jax.ShapeDtypeStruct((1, *shape), np.float32)
  variables = variables_of(model, np.zeros(x.shape, x.dtype))
  cost = fp.cost_model(model.apply, variables, x)
  width = rounded(cut(cost), multiple_of)
  small = fp.compact(model.apply, variables | {"masks": keep(cost.masks, width)}, x)
  hand = make(width=width)
  calls = {
    "dense": (jax.jit(model.apply), without_masks(variables)),
    "compact": (small, small.variables),
    "by_hand": (jax.jit(hand.apply), without_masks(variables_of(hand, np.zeros(x.shape, x.dtype)))),
  }
  ratio = cost.dense / small.cost
  rows = []
  for batch in batches:
    given = jax.device_put(np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32))
    runs = [partial(call, held, given) for call, held in calls.values()]
    once = [seconds(run, 1) for run in runs + runs][len(runs) :]  # the first call compiles
    count = max(1, round(0.1 / max(once)))
    times = [[seconds(run, count) for run in runs] for _ in track(range(repeats), f"{name} {batch}")]
    ms = dict(zip(calls, 1e3 * np.median(times, axis=0), strict=True))
    faster = {key: ms["dense"] / ms[key] for key in ("compact", "by_hand")}
    rows.append(
      {
        "network": name,
        "batch": batch,
        "flops_kept": 1 / ratio,
        **{f"{key}_ms": value for key, value in ms.items()},
        "speedup": faster["compact"],
        "speedup_over_flops_ratio": faster["compact"] / ratio,
        "by_hand_over_flops_ratio": faster["by_hand"] / ratio,
      }
    )
  return rows


def without_masks(variables: Any) -> Any:
  """A masked network's variables, for running it as if it had no masks."""
  return {name: collection for name, collection in variables.items() if name != "masks"}


def main() -> None:
  """Prints a table, and writes it if asked to."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
  parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--multiple-of", type=int, default=1)
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  table = Table(
    "network", "batch", "FLOPs kept", "dense ms", "compact ms", "speed-up", "/ ratio", "by hand / ratio"
  )
  rows = []
  for name in options.networks:
    for row in measure(name, options.batches, options.repeats, options.multiple_of):
      rows.append(row)
      table.add_row(
        row["network"],
        str(row["batch"]),
        f"{row['flops_kept']:.1%}",
        *(f"{row[key]:.2f}" for key in SHOWN),
      )
  Console().print(table)
  if options.out:
    options.out.write_text(json.dumps({"backend": jax.default_backend(), "rows": rows}, indent=2))


if __name__ == "__main__":
  main()
