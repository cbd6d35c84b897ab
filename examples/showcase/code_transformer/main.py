"""Prunes the heads and MLP widths of a transformer while it learns Python, compacts it in mid-training, and trains on.

  python examples/showcase/code_transformer/main.py --out demo_code

The text is the source of Python's own standard library, read as bytes; every tenth file is held out. Three networks are
trained for as many steps: a dense one, one that is pruned to a fraction of its FLOPs and compacted on the way, and a
small one of the same FLOPs from scratch. The dense one teaches the two others: half of their loss is the cross entropy
with its predictions. Writes ``report.json``, ``curve.png`` and TensorBoard ``events``.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import jax
import jax.numpy as jnp
import tyro
from code_transformer import network as net
from code_transformer.network import BATCH, HEADS, LENGTH, MLP, Lesson, Transformer

import fisherprune_jax as fp

PRUNED_BY, COMPACT_AT = 0.45, 0.5
"""Of the steps: when the cost is at the target, and when masked features are removed."""


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
  """Share of the dense network's predictions in the loss of the two others, from 0 (it does not teach) to 1."""
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

  @property
  def middle(self) -> int:
    """The step after which masked features are removed."""
    return max(1, int(COMPACT_AT * self.steps))


def pruner_of(model: Transformer, args: Args) -> fp.Pruner:
  """Heads and MLP widths are pruned; the width of the stream and the depth of heads stay."""
  tokens, start = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32), args.steps // 10
  return fp.Pruner(
    model.apply,
    jax.eval_shape(model.init, jax.random.key(0), tokens),
    tokens,
    keep=args.flops_target,
    start=start,
    stop=max(start + 1, int(PRUNED_BY * args.steps)),
    every=min(5, max(1, args.steps // 20)),
    select=lambda group: group.name.endswith((".heads", "/up")),
  )


def narrower(pruner: fp.Pruner, budget: float, dtype: Any) -> tuple[Transformer, float]:
  """The widest network of one shape for all layers, heads and MLP scaled alike, within a budget; and its cost."""

  @jax.jit
  def cost_of(heads: int, mlp: int) -> jax.Array:
    widths = {HEADS: heads, MLP: mlp}
    return pruner.cost(
      {name: 1.0 * (jnp.arange(m.size) < widths[m.size]) for name, m in pruner.cost.masks.items()}
    )

  for mlp in range(MLP, 0, -1):
    heads = max(1, round(HEADS * mlp / MLP))
    if (cost := float(cost_of(heads, mlp))) <= budget:
      break
  return Transformer(heads, mlp, dtype), cost


@dataclass
class Trainer:
  """What the three trainings share.

  Attributes:
    teacher: the parameters of the dense network once it is trained.
  """

  args: Args
  text: net.Text
  model: Transformer
  job: common.Job
  teacher: Any = None

  def __post_init__(self) -> None:
    apply = lambda params, windows: self.model.apply({"params": params}, windows[:, :-1])  # noqa: E731
    self.answers = jax.jit(lambda *given: jax.nn.softmax(apply(*given)))

  def lesson(self, step: int) -> tuple[Lesson]:
    """The batch of a step."""
    windows = net.batch_at(self.text, self.args.seed, step)
    taught = self.teacher is not None and self.args.teaching > 0
    return (Lesson(windows, self.answers(self.teacher, windows) if taught else None),)

  def params(self, model: Transformer) -> Any:
    return jax.jit(model.init)(jax.random.key(self.args.seed), self.text.held_out[:1, :-1])["params"]

  def plain(
    self, name: str, run: common.Run, apply: Any, tx: Any, flops: float, first: int = 0
  ) -> common.Run:
    """Trains a network without masks."""
    bits = net.evaluator(lambda params, tokens: apply({"params": params}, tokens), self.text)
    step = common.train_step(common.without_masks(partial(net.loss_fn, apply, self.args.teaching)), tx)
    evaluate = lambda params, opt_state: {"bits_per_byte": bits(params), "flops": flops}  # noqa: E731
    return self.job.fit(name, run, step, self.lesson, evaluate, first=first)

  def begin(self, model: Transformer, tx: Any) -> common.Run:
    return self.job.begin(self.params(model), tx, ("bits_per_byte", "flops"))

  def dense(self, name: str, model: Transformer, flops: float) -> common.Run:
    """Trains a network as it is."""
    tx = net.adamw(self.args.steps)
    return self.plain(name, self.begin(model, tx), model.apply, tx, flops)

  def pruned(self, pruner: fp.Pruner) -> "Pruned":
    """Trains while pruning, compacts, and continues with the optimizer state."""
    tx, middle = pruner.wrap(net.adamw(self.args.steps)), self.args.middle
    step = common.train_step(
      pruner.value_and_grad(partial(net.loss_fn, self.model.apply, self.args.teaching)), tx
    )
    bits = net.evaluator(pruner.apply, self.text)

    def evaluate(params: Any, opt_state: Any) -> dict[str, Any]:
      return {"bits_per_byte": bits(params, opt_state), "flops": fp.get_state(opt_state).cost}

    run = self.begin(self.model, tx)
    run = self.job.fit("pruned", run, step, self.lesson, evaluate, pruner.metrics, last=middle)
    small, tokens = pruner.compact(run.params, run.opt_state), self.text.held_out[:BATCH, :-1]
    before, after = pruner.apply(run.params, run.opt_state, tokens), small(small.variables, tokens)
    around = run.curve["bits_per_byte"][-1], net.evaluator(small, self.text)(small.variables)
    masked, opt_state = run.opt_state, small.shrink_opt_state(tx, run.opt_state)
    run = run._replace(params=small.variables["params"], opt_state=opt_state)
    run = self.plain("compacted", run, small, tx, small.cost, first=middle)
    return Pruned(run, masked, small, common.largest_difference(before, after), around)


class Pruned(NamedTuple):
  """A training that was pruned.

  Attributes:
    run: the compact network at the end.
    masked: the last optimizer state with masks.
    small: the compact network.
    difference: the largest difference of its outputs from those of the masked network.
    around: bits per byte before and after the compaction.
  """

  run: common.Run
  masked: Any
  small: fp.Compact
  difference: float
  around: tuple[float, float]


def plot(path: Path, report: dict[str, Any], runs: dict[str, common.Run]) -> None:
  """Bits per byte, cost and time per step over the steps, beside the widths."""
  with common.picture(path, report, panels=3) as (bits, flops, times):
    for (name, run), color in zip(runs.items(), ("0.5", "C0", "C2"), strict=True):
      curve = run.curve
      bits.plot(
        curve["step"], curve["bits_per_byte"], color, label=f"{name}: {curve['bits_per_byte'][-1]:.3f}"
      )
      flops.plot(curve["step"], curve["flops"] / 1e6, color, label=name)
      times.plot(curve["step"], curve["ms"], color, label=name)
    late = [
      max(run.curve["bits_per_byte"][run.curve["step"] >= report["steps"] / 10]) for run in runs.values()
    ]
    bits.set(ylabel="held-out bits per byte", ylim=(None, max(late) + 0.1))
    flops.set(ylabel=f"MFLOPs per {LENGTH} bytes", ylim=(0, None))
    times.set(ylabel="ms per step", xlabel="training step", ylim=(0, None))
    for ax in (bits, flops, times):
      ax.axvline(report["compacted_at"], color="0.3", ls=":", lw=1, label="compacted")


def main(args: Args) -> None:
  begun, text, model = time.perf_counter(), net.load(), Transformer(dtype=jnp.dtype(args.dtype))
  args.out.mkdir(parents=True, exist_ok=True)
  pruner = pruner_of(model, args)
  with common.progress() as bars:
    trainer = Trainer(args, text, model, common.Job(args.out, args.steps, bars))
    dense = trainer.dense("dense", model, pruner.cost.dense)
    trainer.teacher = dense.params
    pruned = trainer.pruned(pruner)
    small_model, small_flops = narrower(pruner, pruned.small.cost, model.dtype)
    small = trainer.dense("small", small_model, small_flops)
  runs = {"dense": dense, "pruned": pruned.run, "small": small}
  ms = {"dense": dense.step_ms(0, args.steps), "small": small.step_ms(0, args.steps)}
  ms |= {"before": pruned.run.step_ms(0, args.middle), "after": pruned.run.step_ms(args.middle, args.steps)}
  report = {
    **vars(args) | {"out": str(args.out)},
    **common.sizes(pruner.cost, dense.params, pruned.small, pruner.masks(pruned.masked)),
    "small_flops": small_flops,
    "small_params": common.size(small.params),
    "small_network": {"heads": small_model.heads, "mlp": small_model.mlp},
    **{f"{name}_bits_per_byte": run.curve["bits_per_byte"][-1] for name, run in runs.items()},
    "compacted_at": args.middle,
    "max_abs_difference": pruned.difference,
    "bits_per_byte_around_compaction": pruned.around,
    **{f"step_ms_{name}": value for name, value in ms.items()},
    "step_speedup": ms["before"] / ms["after"],
    "sample": net.sample(pruned.small, {"params": pruned.run.params}, b"def ", 300, args.seed),
  }
  plot(args.out / "curve.png", report, runs)
  common.write(args.out, report, begun)
  rows = ((f"FLOPs per {LENGTH} bytes", "flops", ",.0f"), ("parameters", "params", ","))
  rows += (("bits per byte", "bits_per_byte", ".3f"),)
  bars.console.print(
    common.table(report, {"dense": "dense", "pruned": "pruned", "small": "small from scratch"}, rows)
  )
  bars.console.print(pruner.summary(pruned.masked), highlight=False)
  bars.console.print(
    f"Compacted at step {args.middle}: {ms['before']:.1f} ms per step before, {ms['after']:.1f} ms after; "
    f"outputs differed by {pruned.difference:.1e} at most."
  )
  bars.console.rule("a sample of the pruned network")
  bars.console.print(report["sample"], markup=False, highlight=False)
  bars.console.rule()
  if pruned.small.cost > args.flops_target * pruner.cost.dense:
    bars.console.print(f"{args.flops_target:.1%} was not reached: {report['flops_fraction']:.1%} is left.")
  bars.console.print(f"Wrote report.json, curve.png and events into {args.out} in {report['seconds']:.0f} s.")


if __name__ == "__main__":
  main(tyro.cli(Args))
