"""How the networks of code_transformer.py are trained: steps, what is looked at between them, and who teaches."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from code_network import HELD_OUT, LENGTH, Lesson, Text, Transformer, batch_at, loss_of, nats
from rich.progress import Progress
from tensorboardX import SummaryWriter

import fisherprune_jax as fp


@dataclass(frozen=True)
class Args:
  """Prunes a byte-level transformer while it learns the source of Python's standard library."""

  out: Path
  """Folder for report.json, curve.png and events."""
  flops_target: float = 0.4
  """Fraction of the dense network's FLOPs to prune to, above 0 and at most 1."""
  steps: int = 600
  """Training steps of each of the three networks."""
  teaching: float = 0.5
  """Weight of the dense network's predictions in what the two others learn, from 0 (it does not teach) to 1."""
  seed: int = 0
  """Of the first weights and of the order of the text."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """What layers compute in; bfloat16 for accelerators. Parameters and scores stay float32."""

  def __post_init__(self) -> None:
    if not 0 < self.flops_target <= 1:
      sys.exit(f"--flops-target must be above 0 and at most 1, got {self.flops_target}.")
    if not 0 <= self.teaching <= 1:
      sys.exit(f"--teaching must be from 0 to 1, got {self.teaching}.")
    if self.steps < 2 or self.seed < 0:
      sys.exit(f"--steps must be at least 2 and --seed at least 0, got {self.steps} and {self.seed}.")


class Run(NamedTuple):
  """What is known of a training: (step, bits per byte), (step, milliseconds per step), and its events."""

  curve: list[tuple[int, float]]
  times: list[tuple[int, float]]
  events: SummaryWriter


@dataclass
class Job:
  """What all trainings share, and the task of the progress bar that is under way."""

  args: Args
  text: Text
  progress: Progress
  model: Transformer
  teacher: Any = None
  """Parameters of the dense network, once it is trained."""
  task: Any = None

  def stops(self, steps: range) -> list[int]:
    """Where results are looked at (and waited for), the first and the last step among them."""
    every = max(1, self.args.steps // 30)
    return sorted({steps.start, *(at for at in steps if at % every == 0), steps.stop})

  @cached_property
  def _answers(self) -> Callable[[Any, Any], jax.Array]:
    """What a network thinks likely, everywhere in some windows."""
    return jax.jit(
      lambda params, windows: jax.nn.softmax(self.model.apply({"params": params}, windows[:, :-1]))
    )

  def lesson(self, step: int) -> Lesson:
    """The batch of a step."""
    windows = batch_at(self.text, self.args.seed, step)
    taught = self.teacher is not None and self.args.teaching > 0
    return Lesson(windows, self._answers(self.teacher, windows) if taught else None)

  def begin(self, name: str) -> Run:
    self.task = self.progress.add_task(name, total=self.args.steps, bits=math.nan)
    return Run([], [], SummaryWriter(str(self.args.out / "events" / name)))

  def pruning_stats(self, opt_state: Any) -> dict[str, Any]:
    """The pruning's own numbers, while there is a pruning."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, fp.FisherPruneState))
    pruned = [x for x in found if isinstance(x, fp.FisherPruneState) and x.masks]
    return fp.metrics(opt_state) if pruned else {}

  def variables(self, model: Transformer) -> Any:
    return jax.jit(model.init)(jax.random.key(self.args.seed), self.text.held_out[:1, :-1])


def adamw(steps: int) -> optax.GradientTransformation:
  rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, steps // 20), steps, 1e-4)
  return optax.adamw(rate, b2=0.98, weight_decay=0.05)


Step = Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]


def plain_step(apply: Callable[..., Any], tx: Any, teaching: float) -> Step:
  """A step without masks: of a network that is not pruned, or of a compact one."""

  def loss_fn(params: Any, lesson: Lesson) -> jax.Array:
    return loss_of(apply({"params": params}, lesson.windows[:, :-1]), lesson, teaching).mean()

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, lesson: Lesson) -> tuple[Any, Any, jax.Array]:
    loss, grads = jax.value_and_grad(loss_fn)(params, lesson)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def pruning_step(apply: Callable[..., Any], tx: Any, teaching: float) -> Step:
  def loss_fn(params: Any, masks: Any, lesson: Lesson) -> jax.Array:
    logits = apply({"params": params, "masks": masks}, lesson.windows[:, :-1])
    return loss_of(logits, lesson, teaching).mean()

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, lesson: Lesson) -> tuple[Any, Any, jax.Array]:
    loss, (grads, mask_grads) = fp.value_and_mask_grads(loss_fn)(params, fp.get_masks(opt_state), lesson)
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
  step: Step, evaluate: Callable[..., float], params: Any, opt_state: Any, steps: range, run: Run, job: Job
) -> tuple[Any, Any]:
  """Trains over a range of steps; looks at results (and waits for them) only every so many."""
  for begin, end in pairwise(job.stops(steps)):
    lessons = jax.block_until_ready([job.lesson(at) for at in range(begin + 1, end + 1)])
    if begin == steps.start:  # the first step compiles
      params, opt_state, loss = jax.block_until_ready(step(params, opt_state, lessons.pop(0)))
    start = time.perf_counter()
    for lesson in lessons:
      params, opt_state, loss = step(params, opt_state, lesson)
    stats = {"loss": float(loss) / LENGTH / math.log(2)}
    if lessons:
      run.times.append((end, 1e3 * (time.perf_counter() - start) / len(lessons)))
    run.curve.append((end, evaluate(params, opt_state)))
    stats |= {"bits_per_byte": run.curve[-1][1]} | job.pruning_stats(opt_state)
    for name, value in stats.items():
      run.events.add_scalar(name, float(value), end)
    job.progress.update(job.task, completed=end, bits=run.curve[-1][1])
  return params, opt_state
