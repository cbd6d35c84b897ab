"""What quality.py and equal_time.py keep of their runs, and what they show of them."""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality_tasks import TASKS
from rich.table import Table

LEVELS = (0.5, 0.25, 0.125, 0.0625, 0.03)
"""Shares of the multiply-accumulates."""
SCRATCH = "from scratch"


class Runs:
  """All results, in a file from which a run that was ended goes on: ``{task: {criterion: {level: {seed: result}}}}``."""

  def __init__(self, path: Path) -> None:
    self._path = path
    self.found = json.loads(path.read_text()) if path.exists() else {}

  def get(self, *keys: Any) -> Any:
    found = self.found
    for key in map(str, keys):
      found = found.get(key, {})
    return found

  def put(self, value: Any, *keys: Any) -> None:
    *path, last = map(str, keys)
    found = self.found
    for key in path:
      found = found.setdefault(key, {})
    found[last] = value
    self._path.write_text(json.dumps(self.found, indent=1) + "\n")


def summary(found: dict[str, Any]) -> list[tuple[str, list[tuple[float, float, float, int]]]]:
  """By criterion and level: level, mean, standard error, number of seeds."""
  rows = []
  for criterion, levels in found.items():
    row = []
    for level, seeds in levels.items():
      values = [result["test"] for result in seeds.values()]
      error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
      row.append((float(level), statistics.mean(values), error, len(values)))
    rows.append((criterion, row))
  return rows


def table(name: str, found: dict[str, Any]) -> Table:
  """Mean and standard error of each criterion at each level."""
  out = Table("share of MACs", *(f"{level:.3g}" for level in LEVELS), title=f"{name}: {TASKS[name].unit}")
  for criterion, row in summary(found):
    cells = {level: f"{mean:.2f} ± {error:.2f} ({n})" for level, mean, error, n in row}
    if criterion == "dense":
      out.title = f"{out.title}; dense {cells[1.0]}"
    else:
      out.add_row(criterion, *(cells.get(level, "") for level in LEVELS))
  return out


def panels(path: Path, found: dict[str, Any]) -> Iterator[tuple[Axes, str, Any]]:
  """A panel for each task, to be drawn into, with its name and results; the picture is written when all are drawn."""
  columns = min(2, len(found))
  rows = -(-len(found) // columns)
  figure = Figure(figsize=(6.5 * columns, 5 * rows), layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for ax in axes[len(found) :]:
    ax.set_axis_off()
  for ax, (name, results) in zip(axes, found.items(), strict=False):
    yield ax, name, results
    ax.set_title(name)
    ax.invert_xaxis()
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=150)


def plot(path: Path, found: dict[str, Any]) -> None:
  """Accuracy against share, one line a criterion."""
  for ax, name, results in panels(path, found):
    for at, (criterion, row) in enumerate(summary(results)):
      levels, means, errors, _ = zip(*row, strict=True)
      if criterion == "dense":
        ax.axhline(means[0], color="0.6", linestyle="--", linewidth=1, label="dense")
      else:
        style = {"color": "0.3", "linestyle": ":"} if criterion == SCRATCH else {"color": f"C{at - 1}"}
        ax.errorbar(levels, means, errors, marker="o", markersize=4, capsize=2, label=criterion, **style)
    ax.set(xscale="log", xlabel="share of the dense network's MACs", ylabel=TASKS[name].unit)
    ax.set_xticks(LEVELS, [f"{100 * level:.3g} %" for level in LEVELS])
    ax.minorticks_off()
