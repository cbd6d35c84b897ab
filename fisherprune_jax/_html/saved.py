"""The report of a network in a file."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from fisherprune_jax._compaction import files
from fisherprune_jax._compaction.files import Content
from fisherprune_jax._compaction.inspecting import first_lines, variables_of
from fisherprune_jax._compaction.loading import history_of, read
from fisherprune_jax._compaction.report import times
from fisherprune_jax._files import PathLike
from fisherprune_jax._html.report import (
  MOST_BARS,
  MOST_LAYERS,
  Bar,
  Figure,
  Frame,
  Report,
  natural,
  section,
  thinned,
)
from fisherprune_jax._training.history import Pruned

GROUPS = "Each bar is a mask. Its outline is the width before, its filled part the width now."
LAYERS = (
  "Each bar is a variable. Its outline is the number of entries before, its filled part the number now."
)
UNKNOWN = "A file holds neither importance nor the cost of each layer, so the page does not show them."


def report_of(path: PathLike) -> Report:
  """The content of the page; raises as ``read``."""
  files.check_installed()
  content = read(path)
  header, past = content.header, history_of(content)
  masks = sorted((Bar(name, before, now) for name, before, now in header["widths"]), key=_order)
  variables = sorted(_variable_bars(content), key=lambda bar: -bar.before)
  return Report(
    title=f"Report on {os.path.basename(os.fspath(path))}",
    about=first_lines(path, content),
    figures=[
      Figure("Cost", header["dense"], header["cost"], "FLOPs per example"),
      Figure("Parameters", sum(bar.before for bar in variables), sum(bar.now for bar in variables)),
      Figure("Features", sum(bar.before for bar in masks), sum(bar.now for bar in masks)),
    ],
    groups=section("Groups", GROUPS, masks, MOST_BARS),
    links=[],
    layers=section("Variables", LAYERS, variables, MOST_LAYERS),
    importance=[],
    unit="",
    frames=_frames(past, masks) if past else [],
    blockers=["\n".join(header["stays"]) or "Everything that is masked was removed."],
    missing=UNKNOWN if past else f"{UNKNOWN} It was saved without a history.",
  )


def _order(bar: Bar) -> list[tuple[int, str]]:
  return natural(bar.label)


def _variable_bars(content: Content) -> Iterator[Bar]:
  """All variables except masks."""
  for v in variables_of(content):
    shapes = f"{times(v.before)} to {times(v.after)}" if v.before != v.after else times(v.after)
    yield Bar(v.name, math.prod(v.before), math.prod(v.after), shapes)


def _frames(past: Sequence[Pruned], masks: Sequence[Bar]) -> list[Frame]:
  """The widths after every step; the cost of earlier steps is not known."""
  frames, whole = [], sum(bar.before for bar in masks)
  for step in thinned(sorted({0, *(pruned.step for pruned in past)})):
    gone = Counter(pruned.mask for pruned in past if pruned.step <= step)
    widths = [int(bar.before) - gone[bar.label] for bar in masks]
    frames.append(Frame(step, Figure("Features", whole, sum(widths)), widths[:MOST_BARS]))
  return frames
