"""A stack of layers that stays one loop, against one that is unrolled since each layer has a width of its own.

  python benchmarks/stacks.py --out benchmarks/stacks.json
  python benchmarks/stacks.py --layers 6 --seeds 0

Causal decoders under ``nn.scan`` whose heads and MLP widths are cut to half of their FLOPs: with ``tie=`` alike in all
layers, or in each layer on its own. First how long a training step of the compact network takes, and how long to compile,
with masks at random; then what six layers learn of Python's source while they are pruned so, in bits per byte of other files.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "showcase"))

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from code_transformer.network import (
  HEADS,
  LENGTH,
  MLP,
  WIDTH,
  Block,
  Lesson,
  Text,
  adamw,
  batch_at,
  evaluator,
  load,
  loss_fn,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fisherprune_jax as fp
from fisherprune_jax._latency.clock import machine, medians

BATCH, TARGET = 8, 0.5
FORMS = {"tie": ["*/query.heads*", "*/up*"], "ragged": []}
"""Values of the option ``tie`` of ``fp.Pruner``."""


class Layer(Block):
  """A block that a scan carries the stream through."""

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    return super().__call__(x), None


class Stack(nn.Module):
  """Bytes in, logits of the next byte out; the layers are one loop."""

  layers: int

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = nn.Embed(256, WIDTH)(tokens)
    x = x + self.param("position", nn.initializers.normal(0.02), (LENGTH, WIDTH))
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
    x, _ = stack(HEADS, MLP, jnp.float32, name="layers")(x, None)
    return nn.Dense(256)(nn.LayerNorm()(x))


def pruner_of(layers: int, steps: int, form: str) -> tuple[Stack, fp.Pruner]:
  """A network, and what prunes its heads and MLP widths."""
  model, tokens = Stack(layers), jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  schedule = {"keep": TARGET, "start": steps // 10, "stop": int(0.45 * steps), "every": 5, "tie": FORMS[form]}
  select = ["layers/query.heads", "layers/up"]
  return model, fp.Pruner(model.apply, shapes, tokens, select=select, **schedule)


def plain_step(small: fp.Compact, tx: optax.GradientTransformation) -> common.Step:
  """A training step of the compact network."""
  return common.train_step(common.without_masks(partial(loss_fn, small, 0.0)), tx)


def random_masks(cost: fp.CostModel, form: str, seed: int = 0) -> Any:
  """Half of each row, or between a quarter and three quarters of it, as many in all."""
  rng = np.random.default_rng(seed)

  def draw(mask: Any) -> jax.Array:
    rows, width = mask.shape
    shares = np.full(rows, 0.5) if form == "tie" else rng.permutation(np.linspace(0.25, 0.75, rows))
    kept = [rng.permutation(width) < max(1, round(share * width)) for share in shares]
    return jnp.asarray(kept, jnp.float32)

  return jax.tree.map(draw, cost.masks)


def speed(layers: int, repeats: int) -> list[dict[str, Any]]:
  """Of each form, how long a step of the compact network takes, and compiling it."""
  windows = np.random.default_rng(0).integers(256, size=(BATCH, LENGTH + 1), dtype=np.int32)
  lesson, rows, runs = Lesson(windows), [], []
  for form in FORMS:
    model, pruner = pruner_of(layers, 100, form)
    variables = jax.jit(model.init)(jax.random.key(0), windows[:1, :-1])
    start = time.perf_counter()
    small = pruner.compact(variables, random_masks(pruner.cost, form))
    compacted = time.perf_counter() - start
    params, tx = small.variables["params"], optax.adamw(1e-3)
    step = plain_step(small, tx).__wrapped__  # which leaves its arguments, to be called again
    lowered = jax.jit(step).lower(params, tx.init(params), lesson)
    start = time.perf_counter()
    compiled = lowered.compile()
    rows.append(
      {
        "layers": layers,
        "form": form,
        "flops_kept": small.cost / pruner.cost.dense,
        "compact_s": compacted,
        "compile_s": time.perf_counter() - start,
        "lines": len(lowered.as_text().splitlines()),
      }
    )
    runs.append(partial(compiled, params, tx.init(params), lesson))
  for row, seconds in zip(rows, medians(runs, repeats), strict=True):
    row["step_ms"] = 1e3 * float(seconds)
  return rows


def learn(layers: int, form: str, seed: int, steps: int, text: Text) -> dict[str, Any]:
  """Trains while pruning, compacts in mid-training, trains on."""
  model, pruner = pruner_of(layers, steps, form)
  params = jax.jit(model.init)(jax.random.key(seed), text.held_out[:1, :-1])["params"]
  tx, middle = pruner.wrap(adamw(steps)), steps // 2
  step = common.train_step(pruner.value_and_grad(partial(loss_fn, model.apply, 0.0)), tx)
  state = tx.init(params)
  lessons = (Lesson(batch_at(text, seed, at)[:BATCH]) for at in range(1, steps + 1))
  for lesson in itertools.islice(lessons, middle):
    params, state, _ = step(params, state, lesson)
  masks, small = pruner.masks(state), pruner.compact(params, state)
  params, state = small.variables["params"], small.shrink_opt_state(tx, state)
  step = plain_step(small, tx)
  for lesson in lessons:
    params, state, _ = step(params, state, lesson)
  bits = evaluator(small, text)({"params": params})
  return {
    "form": form,
    "seed": seed,
    "bits_per_byte": bits,
    "flops_kept": small.cost / pruner.cost.dense,
    "widths": [mask.sum(-1).astype(int).tolist() for mask in jax.tree.leaves(masks)],
  }


def main() -> None:
  """Prints two tables, and writes them if asked to."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", nargs="+", type=int, default=[6, 12, 24])
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--seeds", type=int, default=3, help="trainings of each form; 0 leaves them out")
  parser.add_argument("--steps", type=int, default=400, help="of each training")
  parser.add_argument("--out", type=Path)
  options = parser.parse_args()
  console = Console()
  times = [row for layers in track(options.layers, "times") for row in speed(layers, options.repeats)]
  shown = ("flops_kept", "compact_s", "compile_s", "step_ms")
  table = Table("layers", "form", "FLOPs kept", "compact s", "compile s", "step ms", "lines of the program")
  for row in times:
    table.add_row(str(row["layers"]), row["form"], *(f"{row[key]:.2f}" for key in shown), str(row["lines"]))
  console.print(table)
  text = load()
  jobs = [(form, seed) for seed in range(options.seeds) for form in FORMS]
  trained = [learn(6, form, seed, options.steps, text) for form, seed in track(jobs, "trainings")]
  table = Table("form", "bits per byte", "of each seed", "FLOPs kept")
  for form in FORMS if trained else ():
    rows = [row for row in trained if row["form"] == form]
    bits = [row["bits_per_byte"] for row in rows]
    kept = statistics.mean(row["flops_kept"] for row in rows)
    table.add_row(form, f"{statistics.mean(bits):.3f}", " ".join(f"{b:.3f}" for b in bits), f"{kept:.2f}")
  console.print(table)
  if options.out:
    found = {"machine": machine(), "times": times, "trainings": trained}
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()
