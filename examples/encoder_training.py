"""How pretrained_encoder.py trains: the dense network with masks, which is pruned, then the compact one; with checkpoints."""

import shlex
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from encoder_results import cosine
from encoder_teacher import BATCH, Sentences, batch_at, embed
from rich.progress import Progress
from tensorboardX import SummaryWriter

import fisherprune_jax as fp

RATE, WEIGHT_DECAY = 5e-4, 0.01
NOISE = 0.015  # in every coordinate of the targets while pruning, see ``loss_fn``
PRUNED_BY, COMPACT_AT = 0.25, 0.28  # of the steps: when the cost is at the target, and when dead features go
EVERY = 10  # steps from one pruning to the next
EVALUATIONS = 20


class Job(NamedTuple):
  """What the two parts of the training share."""

  out: Path
  steps: int
  seed: int
  save_every: int
  sentences: dict[str, Sentences]
  words: jax.Array
  bars: Progress
  stop: threading.Event

  @property
  def middle(self) -> int:
    """The step after which dead features are removed."""
    return int(COMPACT_AT * self.steps)

  @property
  def evaluate_every(self) -> int:
    """Steps from one evaluation to the next."""
    return max(1, self.steps // EVALUATIONS)


class Run(NamedTuple):
  """A training as checkpoints hold it; ``curve`` has the latest rows (step, loss, validation cosine)."""

  params: Any
  opt_state: Any
  curve: np.ndarray


class Stage(NamedTuple):
  """A part of the training: a range of steps of one network, with masks or without."""

  name: str
  encode: Callable[..., Any]
  step: Callable[..., Any]
  steps: range
  masked: bool


class Pruned(NamedTuple):
  """The last state with masks, the compact network as it was trained, and what is known of the way there."""

  state: fp.FisherPruneState
  small: fp.Compact
  curve: np.ndarray
  difference: float
  step_ms: dict[str, float]


def trained(variables: Any) -> Any:
  """The parameters that are trained: all but the table of words, of which a batch sees a few rows."""
  return {name: value for name, value in variables["params"].items() if name != "words"}


def variables_of(params: Any, words: jax.Array, masks: Any = None) -> dict[str, Any]:
  return {"params": {"words": words, **params}} | ({} if masks is None else {"masks": masks})


def loss_fn(apply: Callable[..., Any], params: Any, masks: Any, batch: Any, words: jax.Array) -> jax.Array:
  """Nats of the teacher's embeddings, normally distributed around the student's with deviation NOISE.

  At first the student is the teacher, and where a loss is least its gradients tell nothing of a feature. Targets drawn
  from the student's own distribution do: the mean square of their gradients is Fisher's information. So targets have
  noise while features are pruned.
  """
  *tokens, targets = batch
  errors = apply(variables_of(params, words, masks), *tokens) - targets
  return jnp.mean(jnp.sum(errors**2, axis=-1)) / (2 * NOISE**2)


def optimizer(job: Job, cost: fp.CostModel, flops_target: float) -> optax.GradientTransformationExtraArgs:
  """AdamW; the cost comes down to the target in the first part, as many features go as it takes."""
  rate = optax.warmup_cosine_decay_schedule(0.0, RATE, max(1, job.steps // 20), job.steps)
  first, last = job.steps // 50, max(job.steps // 50 + 1, int(PRUNED_BY * job.steps))
  budget = optax.linear_schedule(cost.dense, flops_target * cost.dense, last - first, first)
  every_feature = sum(mask.size for mask in jax.tree.leaves(cost.masks))
  every = min(EVERY, max(1, job.steps // 50))
  prune = fp.fisher_prune(cost, prune_every=every, target=budget, features_per_prune=every_feature)
  return optax.chain(optax.adamw(rate, b2=0.98, weight_decay=WEIGHT_DECAY), prune)


def pruning_step(apply: Callable[..., Any], tx: Any) -> Callable[..., Any]:
  """A step with masks, their gradients, and the pruning."""

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, batch: Any, words: jax.Array) -> tuple[Any, Any, jax.Array]:
    grads_of = fp.value_and_mask_grads(partial(loss_fn, apply))
    loss, (grads, mask_grads) = grads_of(params, fp.get_masks(opt_state), batch, words)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def plain_step(apply: Callable[..., Any], tx: Any) -> Callable[..., Any]:
  """A step of the compact network, which has no masks."""

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, batch: Any, words: jax.Array) -> tuple[Any, Any, jax.Array]:
    loss, grads = jax.value_and_grad(partial(loss_fn, apply))(params, None, batch, words)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def evaluate(stage: Stage, run: Run, loss: float, n: int, job: Job, writer: SummaryWriter) -> Run:
  """Adds a row to the curve, and writes it and what pruning did for TensorBoard."""
  validation, masks = job.sentences["validation"], fp.get_masks(run.opt_state) if stage.masked else None
  encode = partial(stage.encode, variables_of(run.params, job.words, masks))
  stats = {"loss": loss, "cosine": cosine(embed(encode, validation), validation)}
  for name, value in (stats | (fp.metrics(run.opt_state) if stage.masked else {})).items():
    writer.add_scalar(name, float(value), n)
  return run._replace(curve=np.vstack([run.curve[1:], [n, *stats.values()]]))


def leave(n: int) -> None:
  """Ends the process, and says how to go on."""
  command = shlex.join(["python", *sys.argv, *["--resume"] * ("--resume" not in sys.argv)])
  sys.exit(f"Stopped after step {n:,}, and saved it. To go on: {command}")


def fit(stage: Stage, run: Run, job: Job) -> tuple[Run, float]:
  """Trains over the steps of a stage, from its checkpoint on; also the milliseconds that a step took."""
  first, last, took = stage.steps.start, stage.steps.stop, []
  keep = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
  with ocp.CheckpointManager(job.out.absolute() / "checkpoints" / stage.name, options=keep) as manager:
    if start := manager.latest_step() or 0:
      run = manager.restore(start, args=ocp.args.StandardRestore(run))
    start = max(start, first)
    task = job.bars.add_task(stage.name, total=last - first, completed=start - first, now="")
    with SummaryWriter(str(job.out / "events"), purge_step=start + 1) as writer:
      for n in range(start + 1, last + 1):
        batch = batch_at(job.sentences["train"], NOISE * stage.masked, job.seed, n)
        begun = time.perf_counter()
        params, opt_state, loss = stage.step(run.params, run.opt_state, batch, job.words)
        run, loss = run._replace(params=params, opt_state=opt_state), float(loss)
        took.append(1e3 * (time.perf_counter() - begun))
        if n % job.evaluate_every == 0 or n == job.steps:
          run = evaluate(stage, run, loss, n, job, writer)
        job.bars.update(task, completed=n - first, now=f"cosine {run.curve[-1, 2]:.4f}")
        if n % job.save_every == 0 or n == last or job.stop.is_set():
          writer.flush()
          manager.save(n, args=ocp.args.StandardSave(run))
        if job.stop.is_set():
          leave(n)
  return run, float(np.median(took or [np.nan]))


def prune(auto: fp.AutoMask, cost: fp.CostModel, flops_target: float, job: Job) -> Pruned:
  """Trains while pruning, removes what was pruned, and goes on where the optimizer was."""
  tx, params = optimizer(job, cost, flops_target), jax.tree.map(jnp.array, trained(auto.variables))
  run = Run(params, tx.init(params), np.full((-(-job.steps // job.evaluate_every), 3), np.nan))
  stage = Stage("pruning", jax.jit(auto.apply), pruning_step(auto.apply, tx), range(job.middle), True)
  run, before = fit(stage, run, job)

  state, tokens = fp.get_state(run.opt_state), [x[:BATCH] for x in job.sentences["validation"][:2]]
  variables = variables_of(run.params, job.words, state.masks)
  small = fp.compact(auto.apply, variables, *tokens)
  difference = jnp.max(jnp.abs(auto.apply(variables, *tokens) - small(small.variables, *tokens)))

  run = Run(trained(small.variables), small.shrink_opt_state(tx, run.opt_state), run.curve)
  stage = Stage("distilling", jax.jit(small), plain_step(small, tx), range(job.middle, job.steps), False)
  run, after = fit(stage, run, job)
  small.variables = variables_of(run.params, job.words)  # what is exported
  return Pruned(state, small, run.curve, float(difference), {"before": before, "after": after})
