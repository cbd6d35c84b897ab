"""What the serving form of compact networks (``fp.compact(..., freeze=True)``) gains.

  python benchmarks/serving_form.py --out benchmarks/results/serving_form.json

Half of the features of every group are masked. One thread, process CPU time, one image; the networks take turns in one
process, medians are reported.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts its threads

import jax
import jax.numpy as jnp
import numpy as np
from serving_networks import NETWORKS

import fisherprune_jax as fp


def variables_of(model: Any, x: Any) -> Any:
  """Random variables, statistics too."""
  rng = np.random.default_rng(0)

  def draw(leaf: Any) -> jax.Array:
    if leaf.ndim < 2:
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1]), leaf.dtype)

  return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), x))


def measure(name: str, repeats: int) -> dict[str, Any]:
  """The numbers of one network."""
  model = NETWORKS[name]()
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 224, 224, 3)), jnp.float32)
  variables = variables_of(model, x)
  auto = fp.auto_mask(model.apply, variables, x)
  masks = jax.tree.map(lambda m: (jnp.arange(m.shape[-1]) % 2 == 0).astype(jnp.float32) * m, auto.masks)
  given = {**auto.variables, "masks": masks}
  found: dict[str, Any] = {"network": name, "parameters": count(variables)}
  networks = {}
  for form, options in (("compact", {}), ("frozen", {"freeze": True})):
    start = time.process_time()
    networks[form] = small = fp.compact(auto.apply, given, x, **options)
    found[f"{form}_s"] = time.process_time() - start
    found[f"{form}_parameters"], found[f"{form}_flops"] = count(small.variables), small.cost
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / "small.safetensors"
      small.save(path)
      found[f"{form}_megabytes"] = path.stat().st_size / 1e6
    exported = small.export(x).call(x)
    found[f"{form}_error"] = float(
      jnp.max(jnp.abs(exported - auto.apply(given, x))) / jnp.max(jnp.abs(exported))
    )
  runs = {"dense": (jax.jit(model.apply), variables), **{f: (s, s.variables) for f, s in networks.items()}}
  times: dict[str, list[float]] = {form: [] for form in runs}
  for turn in range(repeats + 1):
    for form, (run, held) in runs.items():
      start = time.process_time()
      for _ in range(3):
        jax.block_until_ready(run(held, x))
      if turn:  # the first compiles
        times[form].append((time.process_time() - start) / 3)
  return {**found, **{f"{form}_ms": 1e3 * float(np.median(each)) for form, each in times.items()}}


def count(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--out", type=Path)
  args = parser.parse_args()
  rows = []
  for name in args.networks:
    rows.append(measure(name, args.repeats))
    print(json.dumps(rows[-1], indent=1), flush=True)
  if args.out:
    args.out.write_text(
      json.dumps({"machine": f"{jax.default_backend()}, one thread", "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
  main()
