"""Prunes a transformer in heads and MLP widths while it learns Python, compacts it in mid-training, and trains on.

  python examples/code_transformer.py --out demo_code

The text is the source of Python's own standard library, read as bytes; every tenth file is held out. Three networks are
trained for as many steps: a dense one, one that is pruned to a fraction of its FLOPs and compacted on the way, and a
small one of the same FLOPs from scratch. The dense one teaches the two others: half of what they learn is which bytes it
thinks likely. Writes ``report.json``, ``curve.png`` and TensorBoard ``events``.
"""

import json
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from code_network import BATCH, Transformer, cost_of, load, narrower

import fisherprune_jax as fp

try:
  import tyro
  from code_results import plot, sample, table
  from code_training import Args, Job, Run, adamw, evaluator, fit, plain_step, pruning_step
  from rich.console import Console
  from rich.progress import Progress, TextColumn
except ImportError as error:
  sys.exit(f"This example needs {error.name}, which is missing: pip install 'fisherprune-jax[examples]'")

PRUNED_BY, COMPACT_AT = 0.45, 0.5
"""Of the steps: when the cost is at the target, and when dead features are removed."""


def pruning(cost: fp.CostModel, args: Args) -> optax.GradientTransformationExtraArgs:
  """The budget comes down linearly after a tenth of the steps; as many features go as it takes."""
  first, last = args.steps // 10, max(args.steps // 10 + 1, int(PRUNED_BY * args.steps))
  budget = optax.linear_schedule(cost.dense, args.flops_target * cost.dense, last - first, first)
  every_feature = sum(mask.size for mask in jax.tree.leaves(cost.masks))
  return fp.fisher_prune(
    cost, prune_every=min(5, max(1, args.steps // 20)), target=budget, features_per_prune=every_feature
  )


def train_plain(name: str, model: Transformer, job: Job) -> tuple[Run, Any]:
  """Trains a network as it is."""
  run, tx, params = job.begin(name), adamw(job.args.steps), job.variables(model)["params"]
  score = evaluator(model.apply, job.text)
  evaluate = lambda params, _: score({"params": params})  # noqa: E731
  step = plain_step(model.apply, tx, job.args.teaching)
  params, _ = fit(step, evaluate, params, tx.init(params), range(job.args.steps), run, job)
  return run, params


class Pruned(NamedTuple):
  """A training that was pruned: the last state with masks, the compact network, how far its outputs were off."""

  run: Run
  state: fp.FisherPruneState
  small: fp.Compact
  params: Any
  difference: float
  swap_bits: tuple[float, float]


def train_pruned(model: Transformer, cost: fp.CostModel, job: Job) -> Pruned:
  """Trains while pruning, removes what was pruned, and goes on where the optimizer was."""
  run, args = job.begin("pruned"), job.args
  params, tokens = job.variables(model)["params"], job.text.held_out[:BATCH, :-1]
  tx = optax.chain(adamw(args.steps), pruning(cost, args))
  score, middle = evaluator(model.apply, job.text), max(1, int(COMPACT_AT * args.steps))
  evaluate = lambda params, state: score({"params": params, "masks": fp.get_masks(state)})  # noqa: E731
  step = pruning_step(model.apply, tx, args.teaching)
  params, opt_state = fit(step, evaluate, params, tx.init(params), range(middle), run, job)

  state, variables = fp.get_state(opt_state), {"params": params, "masks": fp.get_masks(opt_state)}
  small = fp.compact(model.apply, variables, tokens)
  difference = jnp.max(jnp.abs(model.apply(variables, tokens) - small(small.variables, tokens)))
  params, opt_state = small.variables["params"], small.shrink_opt_state(tx, opt_state)

  score = evaluator(small, job.text)
  swap_bits = run.curve[-1][1], score(small.variables)
  evaluate = lambda params, _: score({"params": params})  # noqa: E731
  step = plain_step(small, tx, args.teaching)
  params, _ = fit(step, evaluate, params, opt_state, range(middle, args.steps), run, job)
  return Pruned(run, state, small, params, float(difference), swap_bits)


def measure(args: Args, cost: fp.CostModel, dense: Any, pruned: Pruned, small: Any) -> dict[str, Any]:
  """What ``report.json`` says of the three networks."""
  (dense_run, dense_params), (small_run, small_params, small_model) = dense, small
  middle = max(1, int(COMPACT_AT * args.steps))
  alive = {
    f"{layer}/{name}": {"dense": leaf["mask"].size, "pruned": int(leaf["mask"].sum())}
    for layer, masks in pruned.state.masks.items()
    for name, leaf in masks.items()
  }
  phases = [[ms for n, ms in pruned.run.times if (n > middle) == late] for late in (False, True)]
  before, after = (float(np.median(times)) if times else math.nan for times in phases)
  return {
    **vars(args) | {"out": str(args.out)},
    "dense_flops": cost.dense,
    "pruned_flops": pruned.small.cost,
    "flops_fraction": pruned.small.cost / cost.dense,
    "small_flops": cost_of(small_model).dense,
    "small_network": {"heads": small_model.heads, "mlp": small_model.mlp},
    **{
      f"{name}_params": sum(x.size for x in jax.tree.leaves(params))
      for name, params in (("dense", dense_params), ("pruned", pruned.params), ("small", small_params))
    },
    **{
      f"{name}_bits_per_byte": run.curve[-1][1]
      for name, run in (("dense", dense_run), ("pruned", pruned.run), ("small", small_run))
    },
    "widths": alive,
    "compacted_at": middle,
    "max_abs_difference": pruned.difference,
    "bits_per_byte_around_compaction": pruned.swap_bits,
    **{
      f"step_ms_{name}": float(np.median([ms for _, ms in run.times] or [math.nan]))
      for name, run in (("dense", dense_run), ("small", small_run))
    },
    "step_ms_before": before,
    "step_ms_after": after,
    "step_speedup": before / after,
  }


def main(args: Args) -> None:
  start, console, text = time.perf_counter(), Console(), load()
  args.out.mkdir(parents=True, exist_ok=True)
  model = Transformer(dtype=jnp.dtype(args.dtype))
  cost = cost_of(model)
  fields = TextColumn("{task.fields[bits]:.3f} bits per byte")
  with Progress(*Progress.get_default_columns(), fields, console=console) as progress:
    job = Job(args, text, progress, model)
    dense = train_plain("dense", model, job)
    job.teacher = dense[1]
    pruned = train_pruned(model, cost, job)
    small_model = narrower(pruned.small.cost, model.dtype)
    small = (*train_plain("small", small_model, job), small_model)
  report = measure(args, cost, dense, pruned, small)
  report["sample"] = sample(pruned.small, {"params": pruned.params}, b"def ", 300, args.seed)
  runs = {"dense": dense[0], "pruned": pruned.run, "small": small[0]}
  for run in runs.values():
    run.events.close()
  plot(args.out / "curve.png", report, runs, pruned.state, cost)
  report["seconds"] = time.perf_counter() - start
  (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  console.print(table(report))
  console.print(fp.summary(pruned.state), highlight=False)
  console.print(
    f"Compacted at step {report['compacted_at']}: {report['step_ms_before']:.1f} ms per step before, "
    f"{report['step_ms_after']:.1f} ms after; outputs differed by {report['max_abs_difference']:.1e} at most."
  )
  console.rule("a sample of the pruned network")
  console.print(report["sample"], markup=False, highlight=False)
  console.rule()
  if pruned.small.cost > args.flops_target * cost.dense:
    console.print(
      f"{args.flops_target:.1%} was not reached: {pruned.small.cost / cost.dense:.1%} is what is left."
    )
  console.print(f"Wrote report.json, curve.png and events into {args.out} in {report['seconds']:.0f} s.")


if __name__ == "__main__":
  main(tyro.cli(Args))
