"""The content of a page, whether it comes from a pruner or from a file."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fisherprune_jax._compaction.report import share
from fisherprune_jax._tables import Table, as_number

MOST_BARS, MOST_LAYERS, MOST_HISTOGRAMS, MOST_STEPS, MOST_REASONS = 150, 25, 60, 200, 40
"""The most entries to show."""


class Figure(NamedTuple):
  """A number of the headline.

  Attributes:
    name: what it counts.
    before: its value without masked features.
    now: its value under the masks.
    unit: the unit, in words.
    target: the value to come down to; None without one.
  """

  name: str
  before: float
  now: float
  unit: str = ""
  target: float | None = None

  @property
  def text(self) -> str:
    """Such as ``584 of 1,680 FLOPs``."""
    return f"{of(self.now, self.before)} {self.unit}".strip()

  @property
  def share(self) -> str:
    """Such as ``34.8 %``."""
    return share(self.now, self.before)


class Bar(NamedTuple):
  """A bar: the outline is the size before, the filled part the size now.

  Attributes:
    label: its name.
    before: the size before.
    now: the size now.
    detail: more about it, in small print.
    whole: the full name, if the label is shortened.
  """

  label: str
  before: float
  now: float
  detail: str = ""
  whole: str = ""


class Bars(NamedTuple):
  """A section of bars.

  Attributes:
    heading: its heading.
    note: what the bars are.
    bars: the bars that are shown.
    rest: the number and the size of the others, as text.
  """

  heading: str
  note: str
  bars: Sequence[Bar]
  rest: str = ""


class Histogram(NamedTuple):
  """The importance of the features of a mask.

  Attributes:
    mask: its name.
    live: the number of live features per bin; the first bin is for all below ``low``.
    masked: the number of masked features per bin.
    low: the lower end of the second bin.
    high: the upper end of the last bin.
  """

  mask: str
  live: Sequence[int]
  masked: Sequence[int]
  low: float
  high: float


class Frame(NamedTuple):
  """The network after a step.

  Attributes:
    step: the step.
    total: the number that the curve shows.
    widths: the live features of every bar of the groups.
  """

  step: int
  total: Figure
  widths: Sequence[int]


class Report(NamedTuple):
  """The content of a page.

  Attributes:
    title: the title.
    about: lines under the title.
    figures: the headline.
    groups: a bar per mask.
    links: pairs of groups, by position, that share a variable.
    layers: a bar per source line or variable.
    importance: a histogram per mask.
    unit: the unit of the importance.
    frames: the history.
    blockers: tables and paragraphs.
    missing: what the page does not show, and why.
  """

  title: str
  about: Sequence[str]
  figures: Sequence[Figure]
  groups: Bars
  links: Sequence[tuple[int, int]]
  layers: Bars
  importance: Sequence[Histogram]
  unit: str
  frames: Sequence[Frame]
  blockers: Sequence[Table | str]
  missing: str = ""


def of(now: float, before: float) -> str:
  """A size now and before, as text."""
  return f"{as_number(now)} of {as_number(before)}"


def section(heading: str, note: str, found: Sequence[Bar], most: int) -> Bars:
  """The first bars, and how many more there are."""
  more = found[most:]
  sizes = of(sum(bar.now for bar in more), sum(bar.before for bar in more))
  return Bars(heading, note, found[:most], f"and {len(more)} more: {sizes}" if more else "")


def natural(name: str) -> list[tuple[int, str]]:
  """A key to sort by that puts ``Dense_2`` before ``Dense_10``."""
  return [(int(part or 0), "") if at % 2 else (0, part) for at, part in enumerate(re.split(r"(\d+)", name))]


def thinned(steps: Sequence[int]) -> list[int]:
  """At most ``MOST_STEPS`` of some steps, the first and the last among them."""
  chosen = np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).round()
  return [steps[int(at)] for at in chosen]
