"""How well measured times foretell those of compact networks, and what pruning by them is worth against pruning by FLOPs.

  python benchmarks/latency.py --out benchmarks/latency.json
  python benchmarks/latency.py --networks digits --batches 64

For each network and batch size: the time of the dense and of the compact one, taking turns, medians; and what
``fp.measure_latency`` foretells. On a CPU one thread is used.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from compact_speed import NETWORKS, without_masks
from networks import keep, variables_of
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fisherprune_jax as fp
from fisherprune_jax._latency.clock import machine, medians
from fisherprune_jax._latency.whole import LONG_VISIT

SHOWN = (
  "dense_ms",
  "compact_ms",
  "predicted_ms",
  "speedup",
  "predicted",
  "speedup_over_predicted",
  "flops_ratio",
)


def rounded_up(multiple_of: int, mask: jax.Array) -> jax.Array:
  """A mask of the next width that is a multiple."""
  return (np.arange(mask.size) < -(-int(mask.sum()) // multiple_of) * multiple_of).astype(np.float32)


def measure(name: str, batch: int, multiple_of: int, repeats: int, cache: Path | None) -> dict[str, Any]:
  """The row of one network at one batch size."""
  make, shape, cut = NETWORKS[name]
  model = make()
  one = np.zeros((1, *shape), np.float32)
  variables = variables_of(model, one)
  given = jax.device_put(np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32))
  flops = fp.cost_model(model.apply, variables, one)
  masks = keep(flops.masks, cut(flops))
  time = fp.measure_latency(
    model.apply,
    variables,
    given,
    multiple_of=multiple_of,
    repeats=repeats,
    cache=cache,
    track=partial(track, description=f"{name} {batch}"),
  )
  masks = jax.tree.map(partial(rounded_up, multiple_of), masks)
  small = fp.compact(model.apply, variables | {"masks": masks}, one)
  runs = [
    partial(jax.jit(model.apply), without_masks(variables), given),
    partial(jax.jit(small), small.variables, given),
  ]
  dense, compact = (1e3 * medians(runs, repeats, LONG_VISIT)).tolist()
  predicted = time.dense / float(time(masks))
  return {
    "network": name,
    "batch": batch,
    "dense_ms": dense,
    "compact_ms": compact,
    "predicted_ms": 1e3 * batch * float(time(masks)),
    "speedup": dense / compact,
    "predicted": predicted,
    "speedup_over_predicted": dense / compact / predicted,
    "flops_ratio": flops.dense / small.cost,
  }


def main() -> None:
  """Prints a table, and writes it if asked to."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  names = ["resnet50-half", "vit", "digits"]
  parser.add_argument("--networks", nargs="+", default=names, choices=list(NETWORKS))
  parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
  parser.add_argument("--multiple-of", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--cache", type=Path, help="a file that remembers what was timed")
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  table = Table("network", "batch", *(name.replace("_", " ") for name in SHOWN), title=machine())
  rows = []
  for name in options.networks:
    for batch in options.batches:
      rows.append(measure(name, batch, options.multiple_of, options.repeats, options.cache))
      table.add_row(name, str(batch), *(f"{rows[-1][key]:.2f}" for key in SHOWN))
  Console().print(table)
  if options.out:
    options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
