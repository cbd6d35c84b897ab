"""What code_transformer.py says of its three networks: the report, the picture, the table, a sample."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from code_network import LENGTH
from matplotlib.figure import Figure
from rich.table import Column, Table

import fisherprune_jax as fp


def sample(apply: Callable[..., Any], variables: Any, prompt: bytes, count: int, seed: int) -> str:
  """Goes on from a prompt, byte by byte."""

  @jax.jit
  def pick(window: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.categorical(key, apply(variables, window)[0, last] / 0.6)

  text, key = list(prompt), jax.random.key(seed)
  for n in range(count):
    window = np.zeros((1, LENGTH), np.int32)
    window[0, : len(text)] = text[-LENGTH:]
    text.append(int(pick(window, min(len(text), LENGTH) - 1, jax.random.fold_in(key, n))))
  return bytes(text).decode("utf-8", "replace")


def plot(path: Path, report: dict[str, Any], runs: Mapping[str, Any], state: Any, cost: fp.CostModel) -> None:
  """Bits per byte, cost, widths and time per step over the steps, one above the other."""
  figure = Figure(figsize=(10, 11), layout="constrained")
  axes = bits, flops, widths, times = figure.subplots(4, sharex=True, height_ratios=(3, 2, 2, 2))
  for (name, run), color in zip(runs.items(), ("0.5", "C0", "C2"), strict=True):
    bits.plot(*zip(*run.curve, strict=True), color=color, label=f"{name}: {run.curve[-1][1]:.3f}")
    if run.times:
      times.plot(*zip(*run.times, strict=True), color=color, label=name)
  late = [value for run in runs.values() for step, value in run.curve if step >= report["steps"] / 10]
  bits.set(ylabel="held-out bits per byte", ylim=(None, max(late) + 0.1))
  steps = sorted({0, report["compacted_at"], *(gone.step for gone in fp.history(state))})
  masks = [fp.masks_at(state, step) for step in steps]
  flops.plot(
    [*steps, report["steps"]],
    [float(cost(m)) / 1e6 for m in [*masks, masks[-1]]],
    "C0",
    drawstyle="steps-post",
  )
  flops.axhline(report["flops_target"] * cost.dense / 1e6, color="C3", ls="--", lw=1, label="target")
  flops.set(ylabel=f"MFLOPs per {LENGTH} bytes", ylim=(0, None))
  for n, name in enumerate(report["widths"]):
    layer, kind = name.split("/")
    share = [100 * float(jnp.mean(m[layer][kind]["mask"])) for m in masks]
    style = "-" if kind == "mlp" else "--"
    label = f"{name}: {report['widths'][name]['pruned']} of {report['widths'][name]['dense']}"
    widths.plot(steps, share, style, color=f"C{n // 2}", drawstyle="steps-post", label=label)
  widths.set(ylabel="alive [%]", ylim=(0, 104))
  times.set(ylabel="ms per step", xlabel="training step", ylim=(0, None), xlim=(0, report["steps"]))
  for ax in axes:
    ax.axvline(report["compacted_at"], color="0.3", ls=":", lw=1, label="compacted")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
  figure.savefig(path, dpi=150)


def table(report: dict[str, Any]) -> Table:
  right = partial(Column, justify="right")
  rows = Table("", *map(right, ("dense", "pruned", "small from scratch")))
  names = ("dense", "pruned", "small")
  for title, key, form in (
    (f"MFLOPs per {LENGTH} bytes", "flops", lambda x: f"{x / 1e6:,.1f}"),
    ("parameters", "params", "{:,}".format),
    ("bits per byte", "bits_per_byte", "{:.3f}".format),
  ):
    rows.add_row(title, *(form(report[f"{name}_{key}"]) for name in names))
  rows.add_row("ms per step", *(f"{report[f'step_ms_{name}']:.1f}" for name in ("dense", "after", "small")))
  return rows
