"""What pretrained_encoder.py says of its networks: how good, how fast, the exported file, the picture and the table."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from encoder_teacher import LENGTH, Encode, Sentences, embed
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Column, Table
from scipy.stats import spearmanr

import fisherprune_jax as fp

SERVED = (1, 32)  # sentences at a time, whose speed is measured
PARTS = {  # what the groups are that ``auto_mask`` finds in a layer, by its names
  "attention/query.heads": "heads",
  "attention/query.depth": "depth of queries and keys",
  "attention/value": "depth of values",
  "up": "MLP",
}
NAMES = {"dense": "dense", "pruned": "pruned", "not_distilled": "pruned, not distilled"}


def cosine(found: np.ndarray, sentences: Sentences) -> float:
  """The mean cosine between embeddings and the teacher's; all of them have length one."""
  return float(np.mean(np.sum(found * sentences.embeddings, axis=1)))


def spearman(found: np.ndarray, sentences: Sentences) -> float:
  """The rank correlation between the cosines of all pairs of sentences, and the teacher's."""
  pairs = np.triu_indices(len(found), 1)
  return float(spearmanr(*((x @ x.T)[pairs] for x in (found, sentences.embeddings))).statistic)


def recall(queries: np.ndarray, answers: np.ndarray, count: int) -> float:
  """The share of queries whose own answer is among the ``count`` nearest ones."""
  near = queries @ answers.T
  return float(np.mean(np.sum(near > np.diag(near)[:, None], axis=1) < count))


def quality(encode: Encode, docstrings: Sentences, codes: Sentences) -> dict[str, float]:
  """Agreement with the teacher on docstrings, and how well they find their functions, of held-out modules."""
  found, answers = embed(encode, docstrings), embed(encode, codes)
  return {
    "cosine": cosine(found, docstrings),
    "code_cosine": cosine(answers, codes),
    "spearman": spearman(found, docstrings),
    "recall_at_1": recall(found, answers, 1),
    "recall_at_10": recall(found, answers, 10),
  }


def times(calls: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
  """Median milliseconds of calls that take turns, of two."""
  found: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(turns + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      found[name] += [1e3 * (time.perf_counter() - start)] * (turn > 0)  # the first one compiles
  medians = {f"{name}_ms": float(np.median(those)) for name, those in found.items()}
  before, after = medians.values()
  return {**medians, "speedup": before / after}


LOAD_AND_RUN = """
import sys, jax.export, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = np.load(sys.argv[2])
np.save(sys.argv[3], exported.call(given["ids"], given["mask"]))
assert "fisherprune_jax" not in sys.modules
"""


def export_difference(small: fp.Compact, path: Path, sentences: Sentences) -> float:
  """Writes StableHLO; how far the embeddings are off that a fresh process gets from it without this library."""
  ids, mask = (x[:3] for x in sentences[:2])
  path.write_bytes(small.export(ids, mask).serialize())
  with tempfile.TemporaryDirectory() as folder:
    given, found = Path(folder, "given.npz"), Path(folder, "found.npy")
    np.savez(given, ids=ids, mask=mask)
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, path, given, found], check=True)
    return float(np.max(np.abs(np.load(found) - small(small.variables, ids, mask))))


def measure(
  auto: fp.AutoMask,
  cost: fp.CostModel,
  pruned: Any,
  sentences: dict[str, Sentences],
  bars: Progress,
  turns: int,
) -> dict[str, Any]:
  """What ``report.json`` says of the dense network, of the pruned one, and of the first weights under its masks.

  Milliseconds are medians of so many ``turns``.
  """
  small, masks, params = pruned.small, pruned.state.masks, auto.variables["params"]
  cut = fp.compact(auto.apply, {"params": params, "masks": masks}, *sentences["validation"][:2])
  networks = {
    "dense": (jax.jit(auto.apply), {"params": params}, cost.dense),
    "pruned": (jax.jit(small), small.variables, small.cost),
    "not_distilled": (jax.jit(cut), cut.variables, cut.cost),
  }
  report: dict[str, Any] = {}
  task = bars.add_task("report", total=len(networks) + len(SERVED), now="")
  for name, (encode, variables, flops) in networks.items():
    found = quality(partial(encode, variables), sentences["docstrings"], sentences["codes"])
    found |= {"flops": flops, "params": sum(x.size for x in jax.tree.leaves(variables))}
    report |= {f"{name}_{key}": value for key, value in found.items()}
    bars.advance(task)
  timings = {}
  for size in SERVED:
    tokens = [np.resize(x, (size, LENGTH)) for x in sentences["codes"][:2]]
    calls = {
      name: partial(*networks[net][:2], *tokens) for name, net in (("dense", "dense"), ("compact", "pruned"))
    }
    timings[str(size)] = times(calls, turns)
    bars.advance(task)
  return report | {
    "flops_fraction": small.cost / cost.dense,
    "widths": {name: {"dense": mask.size, "pruned": int(mask.sum())} for name, mask in masks.items()},
    "sentences": {name: len(those.ids) for name, those in sentences.items()},
    "max_abs_difference": pruned.difference,
    **{f"step_ms_{name}": value for name, value in pruned.step_ms.items()},
    "timings": timings,
    **timings["32"],
  }


def costs(state: Any, cost: fp.CostModel) -> tuple[list[int], list[float]]:
  """Steps and the MFLOPs after each, from what the state remembers: when every feature went."""
  steps = sorted({0, int(state.step), *(gone.step for gone in fp.history(state))})
  return steps, [float(cost(fp.masks_at(state, step))) / 1e6 for step in steps]


def plot(path: Path, report: dict[str, Any], pruned: Any, cost: fp.CostModel) -> None:
  """Agreement and cost over training, what the networks find, and what is left of every group."""
  figure = Figure(figsize=(14, 9), layout="constrained")
  axes = figure.subplot_mosaic("AD;BD;CD", width_ratios=(3, 2))
  plot_training(axes["A"], axes["B"], report, pruned, cost)
  plot_found(axes["C"], report)
  plot_widths(axes["D"], report["widths"])
  for ax in axes.values():
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
  figure.savefig(path, dpi=150)


def plot_training(top: Any, bottom: Any, report: dict[str, Any], pruned: Any, cost: fp.CostModel) -> None:
  top.plot(
    *pruned.curve[:, [0, 2]].T, "C0", marker=".", label=f"validation, {pruned.curve[-1, 2]:.3f} at the end"
  )
  top.axhline(
    report["not_distilled_cosine"],
    color="C1",
    ls="--",
    lw=1,
    label="the first weights under the last masks, held out",
  )
  top.set(ylabel="cosine with the teacher", ylim=(None, 1))
  steps, flops = costs(pruned.state, cost)
  bottom.plot([*steps, report["steps"]], [*flops, flops[-1]], "C0", drawstyle="steps-post")
  bottom.axhline(report["flops_target"] * cost.dense / 1e6, color="C3", ls="--", lw=1, label="target")
  bottom.set(ylabel="MFLOPs per sentence", ylim=(0, None), xlabel="training step")
  for ax in (top, bottom):
    ax.axvline(int(pruned.state.step), color="0.3", ls=":", lw=1, label="compacted")
    ax.set_xlim(0, report["steps"])
    ax.grid(alpha=0.25)
    ax.legend(loc="lower right")


def plot_found(ax: Any, report: dict[str, Any]) -> None:
  scores = {"recall@1": "recall_at_1", "recall@10": "recall_at_10"}
  for n, ((key, title), color) in enumerate(zip(NAMES.items(), ("0.5", "C0", "C1"), strict=True)):
    shares = [100 * report[f"{key}_{score}"] for score in scores.values()]
    drawn = ax.bar(np.arange(len(scores)) + (n - 1) * 0.27, shares, 0.25, color=color, label=title)
    ax.bar_label(drawn, fmt="%.1f")
  ax.set_xticks(range(len(scores)), scores)
  ax.set(ylabel="held-out functions\nfound by docstring [%]", ylim=(0, 110), xlim=(-0.5, 2.4))
  ax.legend(loc="center right", frameon=False)


def plot_widths(ax: Any, widths: dict[str, dict[str, int]]) -> None:
  """What is left of every group; those of a layer lie together."""
  layers = list(dict.fromkeys(name.partition("/")[0] for name in widths))
  titles, places = [], []
  for n, name in enumerate(widths):
    layer, _, part = name.partition("/")
    titles.append(f"{layer}: {PARTS.get(part, part)}")
    places.append(n + 0.6 * layers.index(layer))
  ax.barh(places, 100, color="0.93")
  ax.barh(places, [100 * width["pruned"] / width["dense"] for width in widths.values()], color="C0")
  for place, width in zip(places, widths.values(), strict=True):
    ax.text(102, place, f"{width['pruned']:,} of {width['dense']:,}", va="center", fontsize=8)
  ax.set_yticks(places, titles, fontsize=8)
  ax.set_xticks(range(0, 101, 20))
  ax.set(xlabel="features left [%]", xlim=(0, 118), ylim=(places[-1] + 0.6, -0.6))


def table(report: dict[str, Any]) -> Table:
  rows = Table("", *(Column(title, justify="right") for title in NAMES.values()))
  for title, key, form in (
    ("MFLOPs per sentence", "flops", lambda x: f"{x / 1e6:,.1f}"),
    ("parameters", "params", "{:,}".format),
    ("cosine with the teacher, docstrings", "cosine", "{:.3f}".format),
    ("cosine with the teacher, functions", "code_cosine", "{:.3f}".format),
    ("Spearman's correlation over pairs", "spearman", "{:.3f}".format),
    ("functions found, recall@1", "recall_at_1", "{:.1%}".format),
    ("functions found, recall@10", "recall_at_10", "{:.1%}".format),
  ):
    rows.add_row(title, *(form(report[f"{name}_{key}"]) for name in NAMES))
  for size, those in report["timings"].items():
    compact = f"{those['compact_ms']:.1f} ({those['speedup']:.2f}x faster)"
    rows.add_row(f"ms, batch of {size}", f"{those['dense_ms']:.1f}", compact, "the same")
  return rows
