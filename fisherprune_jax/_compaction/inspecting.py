"""The content of a file, as tables."""

import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fisherprune_jax._compaction import files
from fisherprune_jax._compaction.files import Content
from fisherprune_jax._compaction.loading import history_of, originals_of, read
from fisherprune_jax._compaction.report import share, times
from fisherprune_jax._compaction.saving import ALL, NONE, VARIABLES
from fisherprune_jax._files import PathLike
from fisherprune_jax._tables import Cells, Table, aligned
from fisherprune_jax._training.history import Pruned

BY = {ALL: "variables and arguments", VARIABLES: "variables alone", NONE: "nothing"}


def show(path: PathLike) -> None:
  """Print the content of a file, with ``rich`` on a terminal if it is installed; raises as ``read``."""
  parts = described(path)
  if importlib.util.find_spec("rich") and sys.stdout.isatty():
    _show_rich(parts)
  else:
    print("\n\n".join("\n".join(_lines(part)) for part in parts))


def described(path: PathLike) -> list[Table | list[str]]:
  """Tables and lines of text on the content of a file."""
  files.check_installed()
  content = read(path)
  masks = [
    (name, f"{before:,}", f"{after:,}", share(after, before))
    for name, before, after in content.header["widths"]
  ]
  parts: list[Table | list[str]] = [
    first_lines(path, content),
    Table(("mask", "before", "after", "kept"), masks),
    Table(("variable", "before", "after", "kept"), _variable_rows(content)),
    Table(("in all", "before", "after", "kept"), _totals(content)),
  ]
  stays = content.header["stays"] or ["Everything that is masked was removed."]
  past = history_of(content)
  return [*parts, stays, *([Table(("step", "mask", "features masked"), _went(past))] if past else [])]


def first_lines(path: PathLike, content: Content) -> list[str]:
  header = content.header
  return [
    f"{os.fspath(path)}: a compact network, {os.path.getsize(path):,} bytes, format {header['version']}",
    f"program of {len(content.arrays['program']):,} bytes for {', '.join(header['platforms'])}, by JAX {header['jax']}",
    f"called with {', '.join(header['takes'][len(header['leaves']) :]) or 'nothing but variables'}",
    f"differentiated by {BY[header.get('derivative', ALL)]}",
  ]


class Variable(NamedTuple):
  """A variable of a file: its name, its array, and its shapes before and after."""

  name: str
  array: np.ndarray
  before: tuple[int, ...]
  after: tuple[int, ...]


def variables_of(content: Content) -> list[Variable]:
  """All variables except masks."""
  return [
    Variable(
      line["array"].removeprefix("variables/"),
      content.arrays[line["array"]],
      original.shape,
      original.compact_shape,
    )
    for line, original in zip(content.header["leaves"], originals_of(content), strict=True)
    if not line["mask"]
  ]


def _variable_rows(content: Content) -> list[Cells]:
  """Shapes of all variables except masks, before and after."""
  return [
    (v.name, times(v.before), times(v.after), share(math.prod(v.after), math.prod(v.before)))
    for v in variables_of(content)
  ]


def _totals(content: Content) -> list[Cells]:
  numbers, size = [0, 0], [0, 0]
  for v in variables_of(content):
    both = [math.prod(v.before), math.prod(v.after)]
    numbers = [have + n for have, n in zip(numbers, both, strict=True)]
    size = [have + n * v.array.nbytes // max(both[1], 1) for have, n in zip(size, both, strict=True)]
  rows: list[tuple[str, Sequence[float]]] = [
    ("FLOPs per example", (content.header["dense"], content.header["cost"])),
    ("parameters", numbers),
    ("bytes of all parameters", size),
  ]
  return [(name, f"{before:,.0f}", f"{after:,.0f}", share(after, before)) for name, (before, after) in rows]


def _went(past: Iterable[Pruned]) -> list[Cells]:
  """The features pruned at each step, by mask."""
  groups = itertools.groupby(past, key=lambda went: (went.step, went.mask))
  return [
    (f"{step:,}", mask, " ".join(str(went.feature) for went in group)) for (step, mask), group in groups
  ]


def _lines(part: Table | Sequence[str]) -> Sequence[str]:
  return aligned(part) if isinstance(part, Table) else part


def _show_rich(parts: Sequence[Table | Sequence[str]]) -> None:
  from rich import box, console, table, text

  out = console.Console()
  for part in parts:
    if not isinstance(part, Table):
      out.print(text.Text("\n".join(part) + "\n"))  # plain: brackets are no markup
      continue
    shown = table.Table(box=box.SIMPLE_HEAD)
    for at, name in enumerate(part.heading):
      shown.add_column(name, justify="left" if at == 0 else "right", overflow="fold")
    for row in part.rows:
      shown.add_row(*map(text.Text, row))
    out.print(shown)
