"""Prunes a transformer in heads and MLP widths while it learns Python, compacts it in mid-training, and trains on.

  python examples/code_transformer.py --out demo_code

The text is the source of Python's own standard library, read as bytes; every tenth file is held out. Three networks are
trained for as many steps: a dense one, one that is pruned to a fraction of its FLOPs and compacted on the way, and a
small one of the same FLOPs from scratch. Writes ``report.json``, ``curve.png`` and TensorBoard ``events``.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from code_network import BATCH, HELD_OUT, LENGTH, Text, Transformer, batch_at, cost_of, load, narrower, nats

import fisherprune_jax as fp

try:
  import tyro
  from code_results import plot, sample, table
  from rich.console import Console
  from rich.progress import Progress, TextColumn
  from tensorboardX import SummaryWriter
except ImportError as error:
  sys.exit(f"This example needs {error.name}, which is missing: pip install 'fisherprune-jax[examples]'")

PRUNED_BY, COMPACT_AT = (
  0.45,
  0.5,
)  # of the steps: when the cost is at the target, and when dead features are removed


@dataclass(frozen=True)
class Args:
  """Prunes a byte-level transformer while it learns the source of Python's standard library."""

  out: Path
  """Folder for report.json, curve.png and events."""
  flops_target: float = 0.4
  """Fraction of the dense network's FLOPs to prune to, above 0 and at most 1."""
  steps: int = 600
  """Training steps of each of the three networks."""
  seed: int = 0
  """Of the first weights and of the order of the text."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """What layers compute in; bfloat16 for accelerators. Parameters and scores stay float32."""

  def __post_init__(self) -> None:
    if not 0 < self.flops_target <= 1:
      sys.exit(f"--flops-target must be above 0 and at most 1, got {self.flops_target}.")
    if self.steps < 2 or self.seed < 0:
      sys.exit(f"--steps must be at least 2 and --seed at least 0, got {self.steps} and {self.seed}.")


class Run(NamedTuple):
  """What is known of a training: (step, bits per byte), (step, milliseconds per step), and its events."""

  curve: list[tuple[int, float]]
  times: list[tuple[int, float]]
  events: SummaryWriter


def adamw(steps: int) -> optax.GradientTransformation:
  rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, steps // 20), steps, 1e-4)
  return optax.adamw(rate, b2=0.98, weight_decay=0.05)


def pruning(cost: fp.CostModel, args: Args) -> optax.GradientTransformationExtraArgs:
  """The budget comes down linearly after a tenth of the steps; as many features go as it takes."""
  first, last = args.steps // 10, max(args.steps // 10 + 1, int(PRUNED_BY * args.steps))
  budget = optax.linear_schedule(cost.dense, args.flops_target * cost.dense, last - first, first)
  every_feature = sum(mask.size for mask in jax.tree.leaves(cost.masks))
  return fp.fisher_prune(
    cost, prune_every=min(5, max(1, args.steps // 20)), flops_target=budget, features_per_prune=every_feature
  )


Step = Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]


def plain_step(apply: Callable[..., Any], tx: Any) -> Step:
  """A step without masks: of a network that is not pruned, or of a compact one."""

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, windows: jax.Array) -> tuple[Any, Any, jax.Array]:
    loss_fn = lambda params: nats(apply({"params": params}, windows[:, :-1]), windows).mean()  # noqa: E731
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def pruning_step(apply: Callable[..., Any], tx: Any) -> Step:
  def loss_fn(params: Any, masks: Any, windows: jax.Array) -> jax.Array:
    return nats(apply({"params": params, "masks": masks}, windows[:, :-1]), windows).mean()

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, windows: jax.Array) -> tuple[Any, Any, jax.Array]:
    loss, (grads, mask_grads) = fp.value_and_grads(loss_fn)(params, fp.get_masks(opt_state), windows)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def evaluator(apply: Callable[..., Any], text: Text) -> Callable[[Any], float]:
  """Bits per byte of the held-out windows."""
  score = jax.jit(lambda variables, windows: nats(apply(variables, windows[:, :-1]), windows).mean())

  def evaluate(variables: Any) -> float:
    parts = np.split(text.held_out, HELD_OUT // 64)
    return float(np.mean([score(variables, part) for part in parts])) / LENGTH / math.log(2)

  return evaluate


def fit(
  step: Step, evaluate: Callable[..., float], params: Any, opt_state: Any, steps: range, run: Run, job: "Job"
) -> tuple[Any, Any]:
  """Trains over a range of steps; looks at results (and waits for them) only every so many."""
  every = max(1, job.args.steps // 30)
  begun, since = math.nan, steps.stop
  for done in range(steps.start + 1, steps.stop + 1):
    params, opt_state, loss = step(params, opt_state, batch_at(job.text, job.args.seed, done))
    if done == steps.start + 1:  # which compiled
      jax.block_until_ready(loss)
      begun, since = time.perf_counter(), done
    if done % every == 0 or done == steps.stop:
      stats = {"loss": float(loss) / LENGTH / math.log(2)}
      if done > since:
        run.times.append((done, 1e3 * (time.perf_counter() - begun) / (done - since)))
      run.curve.append((done, evaluate(params, opt_state)))
      stats |= {"bits_per_byte": run.curve[-1][1]} | job.pruning_stats(opt_state)
      for name, value in stats.items():
        run.events.add_scalar(name, float(value), done)
      job.progress.update(job.task, completed=done, bits=run.curve[-1][1])
      begun, since = time.perf_counter(), done
  return params, opt_state


@dataclass
class Job:
  """What all trainings share, and the task of the progress bar that is under way."""

  args: Args
  text: Text
  progress: Progress
  task: Any = None

  def begin(self, name: str) -> Run:
    self.task = self.progress.add_task(name, total=self.args.steps, bits=math.nan)
    return Run([], [], SummaryWriter(str(self.args.out / "events" / name)))

  def pruning_stats(self, opt_state: Any) -> dict[str, Any]:
    """The pruning's own numbers, while there is a pruning."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, fp.FisherPruneState))
    pruned = [x for x in found if isinstance(x, fp.FisherPruneState) and x.masks]
    return fp.scalars(opt_state) if pruned else {}

  def variables(self, model: Transformer) -> Any:
    return jax.jit(model.init)(jax.random.key(self.args.seed), self.text.held_out[:1, :-1])


def train_plain(name: str, model: Transformer, job: Job) -> tuple[Run, Any]:
  """Trains a network as it is."""
  run, tx, params = job.begin(name), adamw(job.args.steps), job.variables(model)["params"]
  score = evaluator(model.apply, job.text)
  evaluate = lambda params, _: score({"params": params})  # noqa: E731
  step = plain_step(model.apply, tx)
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
  step = pruning_step(model.apply, tx)
  params, opt_state = fit(step, evaluate, params, tx.init(params), range(middle), run, job)

  state, variables = fp.get_state(opt_state), {"params": params, "masks": fp.get_masks(opt_state)}
  small = fp.compact(model.apply, variables, tokens)
  difference = jnp.max(jnp.abs(model.apply(variables, tokens) - small(small.variables, tokens)))
  params, opt_state = small.variables["params"], small.shrink_opt_state(tx, opt_state)

  score = evaluator(small, job.text)
  swap_bits = run.curve[-1][1], score(small.variables)
  evaluate = lambda params, _: score({"params": params})  # noqa: E731
  step = plain_step(small, tx)
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
    job = Job(args, text, progress)
    dense = train_plain("dense", model, job)
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
