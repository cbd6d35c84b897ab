"""Writes tables of README.md and ``docs/benchmarks.md`` from the files of the other benchmarks: ``python benchmarks/tables.py``.

A row of README.md without results keeps the numbers that it has. A row that has neither is left out. A table of the page
without a file in ``results/``, or without its mark in the page, is skipped. The scripts print the same tables.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LEVELS = {
  "encoder": (0.75, 0.5, 0.35, 0.25),
  "residual": (0.6, 0.4, 0.25, 0.125),
  "time series": (0.5, 0.25, 0.125),
  "Magika": (0.75, 0.5, 0.25),
  "distillation": (0.5, 0.25, 0.0625),
}
"""Shares of the dense multiply-accumulates."""
DATA = ("GunPoint", "ItalyPowerDemand", "JapaneseVowels", "ArrowHead", "OSULeaf")
PUBLISHED = {
  "FCN": dict(zip(DATA, (100.0, 96.1, 99.3, 84.3, 97.7), strict=True)),
  "ResNet": dict(zip(DATA, (99.1, 96.3, 99.2, 84.5, 97.9), strict=True)),
}
"""Mean test accuracies of ten runs, in percent, of Fawaz et al. (2019, arXiv 1809.04356)."""
HEADER = "| | cost left | before | after |\n|---|---|---|---|"

Cells = Callable[[Any], tuple[str, str, str]]


def mean(values: Sequence[float], digits: int = 1) -> str:
  """Mean, and the standard error if values differ."""
  error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
  return f"{statistics.mean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


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
  "Digits network, in training: accuracy, %": ("results/quality.json", in_training("digits", 0.125)),
  "ResNet-50, one image on a CPU core: speed": ("results/compact_speed.json", speed("resnet50-half", 1)),
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


def means(runs: Iterable[Sequence[float]]) -> list[str]:
  """The cells of a row: at each level, the mean of all runs."""
  return [mean(values) for values in zip(*runs, strict=True)]


def plain(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table of cells."""
  lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
  return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def grid(titles: list[str], levels: Iterable[float], rows: list[list[str]]) -> str:
  """A table with a column for each title and each level."""
  return plain([*titles, *(f"{100 * level:.3g} % of the MACs" for level in levels)], rows)


def networks(found: Any) -> str:
  """The tasks of ``one_shot.py``."""
  tables = []
  for task, runs in found.items():
    ways = [way for way in ("masks", "masks, refitted", "one_shot") if way in runs[0]]
    rows = [[way, *means(run[way] for run in runs)] for way in ways]
    title, levels = f"**{task}**, dense {mean([run['dense'] for run in runs])}", LEVELS[task.split(",")[0]]
    tables.append(grid([title], levels, rows))
  return "\n\n".join(tables)


def trained(found: Any) -> str:
  """The tasks of ``distillation.py``."""
  parts = []
  for task, runs in found.items():
    rows = [[way, *means(run[way] for run in runs)] for way in runs[0] if way != "dense"]
    title = f"**{task}**, dense {mean([run['dense'] for run in runs])}"
    parts.append(grid([title], LEVELS["distillation"], rows))
  return "\n\n".join(parts)


def agreements(found: Any) -> str:
  """``peers.py`` and ``peers_training.py``: agreement of the encoder by both libraries."""
  shown = {name: row for name, row in found["rows"].items() if name != "check"}
  levels = list(dict.fromkeys(level for row in shown.values() for level in row))
  rows = [
    [name, *(f"{row[level]['test']:.1f}" if level in row else "" for level in levels)]
    for name, row in shown.items()
  ]
  return grid(["**encoder**, dense 100"], [float(level.rstrip("%")) / 100 for level in levels], rows)


def series(found: Any) -> str:
  """``ucr.py``: test accuracy on time series, a table for each network."""
  tables = []
  for net, published in PUBLISHED.items():
    rows = []
    for data, accuracy in published.items():
      runs = [run for run in found["runs"] if (run["net"], run["data"]) == (net, data)]
      for way in ("masks", "one_shot", "gradual"):
        if some := [run[way] for run in runs if way in run]:
          rows.append([data, str(accuracy), mean([run["dense"] for run in runs]), way, *means(some)])
    if rows:
      tables.append(grid([f"**{net}**", "published", "dense", "pruning"], LEVELS["time series"], rows))
  return "\n\n".join(tables)


def files(found: Any) -> str:
  """``file_types.py``: agreement of Magika's network."""
  rows = [[way, *means(run[way]["agreement"] for run in found["seeds"])] for way in ("masks", "one_shot")]
  if distilled := found.get("distilled"):
    some = [distilled.get(str(level)) for level in LEVELS["Magika"]]
    minutes = max(each["minutes"] for each in distilled.values())
    shown = [f"{each['agreement']:.1f}" if each else "" for each in some]
    rows.append([f"one_shot, then distilled for {minutes:g} minutes", *shown])
  return grid(["**Magika**, dense 100"], LEVELS["Magika"], rows)


def serving(found: Any) -> str:
  """``serving_form.py``: compact networks without and with ``freeze=True``."""
  scales = {"parameters": 1e6, "megabytes": 1, "ms": 1}
  rows = [
    [
      row["network"],
      *(
        f"{row[f'compact_{what}'] / scale:.2f} to {row[f'frozen_{what}'] / scale:.2f}"
        for what, scale in scales.items()
      ),
    ]
    for row in found["rows"]
  ]
  return plain(["network", "parameters, million", "file, MB", "one call, ms"], rows)


def shapes(found: Any) -> str:
  """``llm_shapes.py``: what one host needs for large models."""
  head = ["model", "parameters, billion", "masks", "features", "pruning state, MB"]
  rows = [
    [
      row["model"],
      f"{row['parameters'] / 1e9:.1f}",
      f"{row['masks']}",
      f"{row['features']:,}",
      f"{12 * row['features'] / 1e6:.1f}",
      *(f"{row[what]:.1f}" for what in ("groups_s", "cost_s", "select_first_s")),
      f"{row['peak_gigabytes']:.2f}",
    ]
    for row in found["rows"]
  ]
  return plain([*head, "groups, s", "cost, s", "selection, s", "memory, GB"], rows)


def quantised(found: Any) -> str:
  """``quantisation.py``: accuracy and file size, pruned, in int8 and both."""

  def cell(way: str, level: str) -> str:
    some = [run[way][level] for run in found["runs"] if level in run[way]]
    if not some:
      return ""
    size = statistics.mean(each["kilobytes"] for each in some)
    return f"{mean([each['accuracy'] for each in some])}, {size:.0f} kB"

  levels = ["dense", *map(str, found["levels"])]
  head = ["accuracy, file", "dense", *(f"{100 * level:.3g} % of the FLOPs" for level in found["levels"])]
  return plain(head, [[way, *(cell(way, level) for level in levels)] for way in found["runs"][0]])


def decoders(found: Any) -> str:
  """``decoding.py``: widths, sizes and speed of a step for one token."""
  sizes = found["sizes"]
  whole = {
    "layers.heads.0": sizes["shared"],
    "layers.heads.1": sizes["heads"] // sizes["shared"],
    "layers/q.depth": sizes["depth"] // 2,
    "layers/v.depth": sizes["depth"],
    "layers/gate": sizes["hidden"],
  }
  head = ["sequences x context", "network", "heads", "depth", "MLP", "weights, MB", "cache, MB", "tokens/s"]
  rows = []
  for row in found["rows"]:
    shared, each, pairs, depth, hidden = {**whole, **row.get("left", {})}.values()
    rows.append(
      [
        f"{row['batch']} x {row['context']:,}",
        row["network"].replace("flops", "FLOPs"),
        f"{shared} x {each}",
        f"{2 * pairs}, {depth}",
        f"{hidden:,}",
        f"{row['weights_mb']:.1f}",
        f"{row['cache_mb']:.1f}",
        f"{row['tokens_per_second']:.0f}",
      ]
    )
  return plain(head, rows)


def layers(found: Any) -> str:
  """``depth.py``: bits per byte with half of the layers."""
  runs = found["runs"]

  def bits(way: str) -> str:
    return mean([run[way] for run in runs], 2)

  ways = [way for way in runs[0] if f"{way}, refitted" in runs[0]]
  rows = [[f"all {found['layers']} layers", bits("dense"), ""]]
  rows += [[way, bits(way), bits(f"{way}, refitted")] for way in ways]
  return plain(["what stays", "as it is", "refitted"], rows)


TABLES: dict[str, Callable[[Any], str]] = {
  "one_shot": networks,
  "peers": agreements,
  "peers_training": agreements,
  "ucr": series,
  "magika": files,
  "distillation": trained,
  "serving_form": serving,
  "llm_shapes": shapes,
  "quantisation": quantised,
  "decoding": decoders,
  "depth": layers,
}
PAGES = {
  "distillation": "distillation.md",
  "serving_form": "serving.md",
  "llm_shapes": "fsdp.md",
  "quantisation": "quantisation.md",
  "decoding": "decoding.md",
  "depth": "exact-sizes.md",
}
"""Where tables are that are not on the page of benchmarks."""


def write(page: Path, mark: str, text: str) -> None:
  """Puts a text between two marks of a page."""
  start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
  head, found, rest = page.read_text().partition(start)
  if found:
    page.write_text(f"{head}{start}\n{text}\n{end}{rest.split(end)[1]}")
  else:
    print(f"{page} has no mark: {start}")


def main() -> None:
  readme, docs = HERE.parent / "README.md", HERE.parent / "docs"
  before = readme.read_text().split("<!-- results -->")[1].split("<!-- end of results -->")[0]
  write(readme, "results", table(HERE, before))
  for name, tabled in TABLES.items():
    if (file := HERE / "results" / f"{name}.json").exists():
      write(docs / PAGES.get(name, "benchmarks.md"), name, "\n" + tabled(json.loads(file.read_text())) + "\n")
    else:
      print(f"{file} does not exist, so its table stays as it is")


if __name__ == "__main__":
  main()
