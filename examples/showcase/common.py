"""Shared by the showcases: a training loop that can be stopped and resumed, timing, export, tables and pictures."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fisherprune_jax as fp

try:
  import flatbuffers  # noqa: F401  (jax.export writes files with it)
  import orbax.checkpoint as ocp
  import sklearn  # noqa: F401
  import tyro  # noqa: F401
  from matplotlib.figure import Figure
  from rich.progress import Progress, TextColumn
  from rich.table import Column, Table
  from tensorboardX import SummaryWriter
except ImportError as error:
  sys.exit(f"This example needs {error.name}, which is missing: pip install 'fisherprune-jax[examples]'")

Step = Callable[..., tuple[Any, Any, jax.Array]]


class Run(NamedTuple):
  """A network in training, as checkpoints hold it.

  Attributes:
    params: its parameters.
    opt_state: the state of its optimizer.
    curve: the values of the last evaluations by name, oldest first; NaN where there was none yet.
    resumed_at: the step of the checkpoint that the training was resumed from.
  """

  params: Any
  opt_state: Any
  curve: dict[str, np.ndarray]
  resumed_at: int = 0

  def step_ms(self, first: int, last: int) -> float:
    """The median milliseconds of the steps after ``first``, up to ``last``."""
    step = self.curve["step"]
    return float(np.median(self.curve["ms"][(step > first) & (step <= last)]))


def train_step(value_and_grad: Callable[..., Any], tx: optax.GradientTransformationExtraArgs) -> Step:
  """A training step; ``value_and_grad`` takes parameters, the optimizer state and the batch, as a pruner's does."""

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, *batch: Any) -> tuple[Any, Any, jax.Array]:
    loss, grads = value_and_grad(params, opt_state, *batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def without_masks(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
  """``jax.value_and_grad`` with the signature of a pruner's."""
  return lambda params, opt_state, *batch: jax.value_and_grad(loss_fn)(params, *batch)


def write(out: Path, report: dict[str, Any], begun: float) -> None:
  """Writes ``report.json``, with the seconds since ``begun``."""
  report["seconds"] = time.perf_counter() - begun
  (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def progress() -> Progress:
  return Progress(*Progress.get_default_columns(), TextColumn("{task.fields[now]}"))


class Job:
  """The trainings of one output folder.

  Args:
    out: the folder. TensorBoard events go to ``events``, checkpoints to ``checkpoints``.
    steps: training steps of each network.
    bars: shows progress.
    evaluations: how many of them, evenly spread over the steps.
    save_every: steps between two checkpoints; 0 writes none. With checkpoints, SIGINT and SIGTERM save and exit.
  """

  def __init__(
    self, out: Path, steps: int, bars: Progress, evaluations: int = 30, save_every: int = 0
  ) -> None:
    self.out, self.steps, self.bars, self.save_every = out, steps, bars, save_every
    self.every = max(1, steps // evaluations)
    self.stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM) if save_every else ():
      signal.signal(number, lambda *_: self.stop.set())  # checked after each step

  def begin(self, params: Any, tx: optax.GradientTransformation, names: Sequence[str]) -> Run:
    """A network before its first step; ``names`` are those of the values that ``evaluate`` of :meth:`fit` returns."""
    rows = 2 + self.steps // self.every
    curve = {name: np.full(rows, np.nan) for name in ("step", "loss", "ms", *names)}
    return Run(params, tx.init(params), curve)

  def fit(
    self,
    name: str,
    run: Run,
    step: Step,
    batch_at: Callable[[int], Sequence[Any]],
    evaluate: Callable[[Any, Any], Mapping[str, Any]],
    metrics: Callable[[Any], Mapping[str, Any]] = lambda opt_state: {},
    first: int = 0,
    last: int | None = None,
  ) -> Run:
    """Trains, from the latest checkpoint on if there is one.

    Args:
      name: of the progress bar and of the folders of events and checkpoints.
      run: the network.
      step: ``step(params, opt_state, *batch) -> (params, opt_state, loss)``.
      batch_at: the batch of a step, a function of its number alone, so that a resumed training gets the same ones.
      evaluate: ``evaluate(params, opt_state)`` returns the values for the curve.
      metrics: ``metrics(opt_state)`` returns values for TensorBoard alone.
      first: the step after which to start.
      last: the last step; None for the last of all.
    """
    last, took = last or self.steps, []
    with contextlib.ExitStack() as stack:
      if self.save_every:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
        folder = self.out.absolute() / "checkpoints" / name
        manager = stack.enter_context(ocp.CheckpointManager(folder, options=options))
        if saved := manager.latest_step():
          run = manager.restore(saved, args=ocp.args.StandardRestore(run))._replace(resumed_at=saved)
      start = max(first, run.resumed_at)
      writer = SummaryWriter(str(self.out / "events" / name), purge_step=start + 1)
      stack.enter_context(writer)
      task = self.bars.add_task(name, total=last - first, completed=start - first, now="")
      for n in range(start + 1, last + 1):
        batch = jax.block_until_ready(batch_at(n))
        begun = time.perf_counter()
        params, opt_state, loss = jax.block_until_ready(step(run.params, run.opt_state, *batch))
        took.append(1e3 * (time.perf_counter() - begun))
        run = run._replace(params=params, opt_state=opt_state)
        if n % self.every == 0 or n == last:
          values = evaluate(params, opt_state)
          self.bars.update(
            task, completed=n - first, now=", ".join(f"{k} {v:.4g}" for k, v in values.items())
          )
          ms, took = np.median(took[1:] or took), []  # the first step compiles
          values = {"step": n, "loss": float(loss), "ms": ms, **values}
          run = run._replace(
            curve={key: np.append(old[1:], float(values[key])) for key, old in run.curve.items()}
          )
          for key, value in {**values, **metrics(opt_state)}.items():
            writer.add_scalar(key, float(value), n)
        stop = self.stop.is_set()
        if self.save_every and (stop or n % self.save_every == 0 or n == last):
          writer.flush()
          manager.save(n, args=ocp.args.StandardSave(run))
        if stop:
          command = shlex.join(["python", *sys.argv, *["--resume"] * ("--resume" not in sys.argv)])
          sys.exit(f"Stopped after step {n:,}, and saved it. To go on: {command}")
    return run


def claim(out: Path, job: dict[str, Any], resume: bool) -> None:
  """Keeps a folder to one job: only ``--resume`` goes on with it, and only with the same options."""
  path = out / "checkpoints" / "args.json"
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(job))
    os.replace(path.with_suffix(".tmp"), path)  # all of it or nothing
  elif not resume:
    sys.exit(f"{out} holds the checkpoints of a job: go on with --resume, or take another --out.")
  there = json.loads(path.read_text())
  if differ := [f"{key} {there.get(key)}, not {job[key]}" for key in job if job[key] != there.get(key)]:
    sys.exit(f"The job in {out} began with {'; '.join(differ)}. Say the same, or take another --out.")


def size(tree: Any) -> int:
  """The number of parameters in a tree."""
  return sum(x.size for x in jax.tree.leaves(tree))


def sizes(cost: fp.CostModel, dense: Any, small: fp.Compact, masks: Mapping[str, Any]) -> dict[str, Any]:
  """FLOPs, parameters and widths of the dense and the pruned network, for a report."""
  return {
    "dense_flops": cost.dense,
    "pruned_flops": small.cost,
    "flops_fraction": small.cost / cost.dense,
    "dense_params": size(dense),
    "pruned_params": size(small.variables),
    "widths": {name: {"dense": mask.size, "pruned": int(mask.sum())} for name, mask in masks.items()},
  }


def largest_difference(a: Any, b: Any) -> float:
  return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


def speed(
  dense: Callable[..., Any],
  small: fp.Compact,
  inputs: Sequence[np.ndarray],
  batches: Sequence[int],
  repeats: int = 60,
) -> dict[str, Any]:
  """Median milliseconds of the dense and the compact network, which take turns, for each batch size and for the last."""

  def ms(call: Callable[..., Any], args: Sequence[np.ndarray]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    return 1e3 * (time.perf_counter() - start)

  timings, calls = {}, (dense, partial(jax.jit(small), small.variables))
  for batch in batches:
    args = [np.resize(x, (batch, *x.shape[1:])) for x in inputs]
    times = [[ms(call, args) for call in calls] for _ in range(repeats + 1)]
    before, after = np.median(times[1:], axis=0).tolist()  # the first ones compile
    timings[str(batch)] = {"dense_ms": before, "compact_ms": after, "speedup": before / after}
  return {"timings": timings, **timings[str(batches[-1])]}


LOAD_AND_RUN = """
import sys, jax.export, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], exported.call(*np.load(sys.argv[2]).values()))
assert "fisherprune_jax" not in sys.modules
"""


def exported(small: fp.Compact, path: Path, *args: np.ndarray) -> np.ndarray:
  """Writes StableHLO; the outputs that a fresh process gets from the file without this library."""
  path.write_bytes(small.export(*args).serialize())
  with tempfile.TemporaryDirectory() as folder:
    given, found = Path(folder, "given.npz"), Path(folder, "found.npy")
    np.savez(given, *args)
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, path, given, found], check=True)
    return np.load(found)


def table(
  report: Mapping[str, Any], networks: Mapping[str, str], rows: Sequence[tuple[str, str, str]]
) -> Table:
  """Numbers of a report: a column for each network, a row for each title, key and format; and the timings."""
  shown = Table("", *(Column(title, justify="right") for title in networks.values()))
  for title, key, form in rows:
    shown.add_row(title, *(format(report[f"{name}_{key}"], form) for name in networks))
  for batch, times in report.get("timings", {}).items():
    compact = f"{times['compact_ms']:.3f} ({times['speedup']:.2f}x faster)"
    shown.add_row(f"ms, batch of {batch}", f"{times['dense_ms']:.3f}", compact)
  return shown


@contextlib.contextmanager
def picture(path: Path, report: Mapping[str, Any], panels: int = 1) -> Iterator[list[Any]]:
  """Axes for a caller to fill, one above the other, beside bars of the widths before and after pruning."""
  widths = report["widths"]
  figure = Figure(figsize=(12, 1.5 + max(3 * panels, 0.3 * len(widths))), layout="constrained")
  mosaic = figure.subplot_mosaic([[n, "widths"] for n in range(panels)], width_ratios=(3, 2))
  bars, axes = mosaic.pop("widths"), list(mosaic.values())
  for key, color, label in (("dense", "0.85", "before"), ("pruned", "C0", "after")):
    shares = [100 * width[key] / width["dense"] for width in widths.values()]
    bars.barh(range(len(widths)), shares, 0.7, color=color, label=f"{label} pruning")
  for row, width in enumerate(widths.values()):
    bars.text(102, row, f"{width['pruned']:,} of {width['dense']:,}", va="center")
  bars.set_yticks(range(len(widths)), widths)
  bars.set(xlabel="width [% of the dense one]", xlim=(0, 138), ylim=(len(widths) - 0.4, -0.6))
  bars.set_xticks(range(0, 101, 25))
  yield axes
  for ax in axes:
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    if ax.get_legend() is None:
      ax.legend(loc="best")
  bars.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
  for ax in (*axes, bars):
    ax.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)
