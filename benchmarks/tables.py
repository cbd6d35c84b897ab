"""Writes tables of README.md and ``docs/benchmarks.md`` from the files of the other benchmarks: ``python benchmarks/tables.py``.

A row of README.md without results keeps the numbers that it has. A row that has neither is left out.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from one_shot import LEVELS

HERE = Path(__file__).parent
WAYS = ("masks", "masks, refitted", "one_shot")
HEADER = "| | cost left | before | after |\n|---|---|---|---|"

Cells = Callable[[Any], tuple[str, str, str]]


def mean(values: list[float]) -> str:
  """Mean, and the standard error if values differ."""
  error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
  return f"{statistics.mean(values):.1f}" + (f" ± {error:.1f}" if error else "")


def one_shot(task: str, level: float) -> Cells:
  """The cells of a task of ``one_shot.py`` at one level."""

  def cells(found: Any) -> tuple[str, str, str]:
    after = [run["one_shot"][LEVELS[task].index(level)] for run in found[task]]
    return f"{100 * level:.3g} % of MACs", mean([run["dense"] for run in found[task]]), mean(after)

  return cells


def in_training(task: str, level: float) -> Cells:
  """The cells of a task of ``quality.py`` at one level, by the default criterion."""

  def cells(found: Any) -> tuple[str, str, str]:
    before, after = (
      mean([run["test"] for run in runs.values()])
      for runs in (found[task]["dense"]["1.0"], found[task]["fisher_magnitude"][str(level)])
    )
    return f"{100 * level:.3g} % of MACs", before, after

  return cells


def speed(network: str, batch: int) -> Cells:
  """The cells of a network of ``compact_speed.py``."""

  def cells(found: Any) -> tuple[str, str, str]:
    (row,) = [row for row in found["rows"] if (row["network"], row["batch"]) == (network, batch)]
    return f"{100 * row['flops_kept']:.1f} % of FLOPs", "1x", f"{row['speedup']:.2f}x"

  return cells


ROWS: dict[str, tuple[str, Cells]] = {
  "Sentence encoder, one-shot: agreement, 100 x cosine": ("results/one_shot.json", one_shot("encoder", 0.5)),
  "Residual network, one-shot: accuracy, %": ("results/one_shot.json", one_shot("residual", 0.25)),
  "Digits network, in training: accuracy, %": ("quality/quality.json", in_training("digits", 0.125)),
  "ResNet-50, one image on a CPU core: speed": ("compact_speed.json", speed("resnet50-half", 1)),
}


def table(folder: Path, before: str) -> str:
  """All rows that there are numbers for."""
  kept = {line.split("|")[1].strip(): line for line in before.splitlines() if line.startswith("|")}
  lines = [HEADER]
  for name, (file, cells) in ROWS.items():
    found = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    try:
      line = f"| {name} | {' | '.join(cells(found))} |"
    except KeyError:
      line = kept.get(name, "")
      print(f"{folder / file} has no numbers for: {name}")
    lines += [line] if line else []
  return "\n".join(lines)


Rows = list[tuple[str, list[str]]]


def grid(corner: str, levels: Sequence[float], rows: Rows) -> str:
  """A table with a column for each level."""
  lines = [f"| {corner} | " + " | ".join(f"{100 * level:.3g} % of the MACs" for level in levels) + " |"]
  lines.append("|---" * (1 + len(levels)) + "|")
  return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows)])


def networks(found: Any) -> str:
  """The tasks of ``one_shot.py``."""
  tables = []
  for task, runs in found.items():
    rows = [
      (row, [mean(list(values)) for values in zip(*(run[row] for run in runs), strict=True)]) for row in WAYS
    ]
    tables.append(grid(f"**{task}**, dense {mean([run['dense'] for run in runs])}", LEVELS[task], rows))
  return "\n\n".join(tables)


def peers(found: Any) -> str:
  """``peers.py``: agreement of the encoder by both libraries."""
  rows = [(name, [f"{cell['test']:.1f}" for cell in row.values()]) for name, row in found["rows"].items()]
  levels = [float(level.rstrip("%")) / 100 for level in next(iter(found["rows"].values()))]
  return grid("**encoder**, dense 100", levels, rows)


def series(found: Any) -> str:
  """``ucr.py``: test accuracy on time series."""
  rows = []
  runs = {(run["net"], run["data"]): [] for run in found["runs"]}
  for run in found["runs"]:
    runs[run["net"], run["data"]].append(run)
  for (net, data), some in runs.items():
    for way in ("masks", "one_shot", "gradual"):
      values = zip(*(run[way] for run in some if way in run), strict=True)
      dense = mean([run["dense"] for run in some])
      rows.append((f"{net}, {data}, dense {dense}: {way}", [mean(list(each)) for each in values]))
  return grid("**time series**", (0.5, 0.25, 0.125), rows)


def files(found: Any) -> str:
  """``file_types.py``: agreement of Magika's network."""
  runs = found["seeds"]
  rows = [
    (way, [mean(list(each)) for each in zip(*(run[way]["agreement"] for run in runs), strict=True)])
    for way in ("masks", "one_shot")
  ]
  levels = (0.75, 0.5, 0.25)
  if distilled := found.get("distilled"):
    cells = [distilled.get(str(level), {}).get("agreement") for level in levels]
    minutes = max(each["minutes"] for each in distilled.values())
    shown = ["" if cell is None else f"{cell:.1f}" for cell in cells]
    rows.append((f"one_shot, then distilled for {minutes:g} minutes", shown))
  return grid("**Magika**, dense 100", levels, rows)


TABLES: dict[str, Callable[[Any], str]] = {
  "one_shot": networks,
  "peers": peers,
  "ucr": series,
  "magika": files,
}


def write(page: Path, mark: str, text: str) -> None:
  """Puts a text between two marks of a page."""
  start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
  head, rest = page.read_text().split(start)
  page.write_text(f"{head}{start}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
  readme, page = HERE.parent / "README.md", HERE.parent / "docs" / "benchmarks.md"
  before = readme.read_text().split("<!-- results -->")[1].split("<!-- end of results -->")[0]
  write(readme, "results", table(HERE, before))
  for name, tabled in TABLES.items():
    write(page, name, "\n" + tabled(json.loads((HERE / "results" / f"{name}.json").read_text())) + "\n")


if __name__ == "__main__":
  main()
