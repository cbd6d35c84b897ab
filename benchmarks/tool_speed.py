"""How long the library itself takes: to analyse a network, to price masks, to compact.

  python benchmarks/tool_speed.py --out benchmarks/tool_speed.json

Wall-clock seconds, medians: of ``cost_model`` (tracing and analysis, without any compilation), of
``compact``, of ``auto_mask`` on the same network without its masks (tracing taken off), and milliseconds of the jitted prices. Transformers of 6 to 48 layers show that it grows linearly.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params
from networks import ResNet50, ViT, keep, share, variables_of
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fisherprune_jax as fp

NETWORKS: dict[str, Callable[[], nn.Module]] = {
  "resnet50": ResNet50,
  **{f"vit-{layers}-layers": partial(ViT, layers) for layers in (6, 12, 24, 48)},
}
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)


def equations(jaxpr: Jaxpr) -> int:
  """How many there are, inner ones too."""
  return len(jaxpr.eqns) + sum(equations(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params))


def seconds(run: Callable[[], Any], repeats: int, count: int = 1) -> float:
  """The median time of a call."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(count):
      out = run()
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / count)
  return float(np.median(times))


def measure(name: str, repeats: int) -> dict[str, Any]:
  """One row."""
  model = NETWORKS[name]()
  variables = variables_of(model, np.zeros(IMAGE.shape, IMAGE.dtype))
  cost = fp.cost_model(model.apply, variables, IMAGE)
  masks = keep(cost.masks, share(0.5))
  price, per_feature = jax.jit(cost), jax.jit(cost.per_feature)
  pruned = variables | {"masks": masks}
  jax.block_until_ready((price(masks), per_feature(masks)))  # compiles
  return {
    "network": name,
    "equations": equations(jax.make_jaxpr(model.apply)(variables, IMAGE).jaxpr),
    "cost_model_s": seconds(lambda: _analysed(model, variables), repeats),
    "compact_s": seconds(lambda: fp.compact(model.apply, pruned, IMAGE).variables, repeats),
    "auto_mask_s": seconds(lambda: _grouped(model, variables), repeats)
    - seconds(lambda: _traced(model, variables), repeats),
    "cost_ms": 1e3 * seconds(lambda: price(masks), repeats, 100),
    "per_feature_ms": 1e3 * seconds(lambda: per_feature(masks), repeats, 100),
  }


def _analysed(model: nn.Module, variables: Any) -> float:
  jax.clear_caches()  # or else the second time is faster than anyone's first
  return fp.cost_model(model.apply, variables, IMAGE).dense


def _grouped(model: nn.Module, variables: Any) -> int:
  jax.clear_caches()
  return len(fp.auto_mask(model.apply, _plain(variables), IMAGE).groups)


def _traced(model: nn.Module, variables: Any) -> int:
  jax.clear_caches()
  return len(jax.make_jaxpr(model.apply)(_plain(variables), IMAGE).jaxpr.eqns)


def _plain(variables: Any) -> Any:
  return {name: collection for name, collection in variables.items() if name != "masks"}


def main() -> None:
  """Prints a table, and writes it if asked to."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  rows = [measure(name, options.repeats) for name in track(options.networks, "measuring")]
  table = Table(
    "network", "equations", "cost_model s", "compact s", "auto_mask s", "cost ms", "per_feature ms"
  )
  for row in rows:
    table.add_row(
      row["network"], str(row["equations"]), *(f"{value:.2f}" for value in list(row.values())[2:])
    )
  Console().print(table)
  if options.out:
    options.out.write_text(json.dumps({"backend": jax.default_backend(), "rows": rows}, indent=2))


if __name__ == "__main__":
  main()
