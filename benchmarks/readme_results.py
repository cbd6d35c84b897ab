"""Writes the results table of README.md from the files of the other benchmarks: ``python benchmarks/readme_results.py``.

A row without results keeps the numbers that README.md has. A row that has neither is left out.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from one_shot import LEVELS

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
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
  "Sentence encoder, one-shot: agreement, 100 x cosine": ("one_shot.json", one_shot("encoder", 0.5)),
  "Residual network, one-shot: accuracy, %": ("one_shot.json", one_shot("residual", 0.25)),
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--folder", type=Path, default=HERE, help="where the results are")
  parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
  options = parser.parse_args()
  head, rest = options.readme.read_text().split(START)
  before, tail = rest.split(END)
  options.readme.write_text(f"{head}{START}\n{table(options.folder, before)}\n{END}{tail}")


if __name__ == "__main__":
  main()
