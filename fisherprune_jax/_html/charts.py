"""Bars, curves and histograms as HTML and SVG."""

import math
from collections.abc import Sequence
from html import escape

from fisherprune_jax._html.report import Bar, Frame, Histogram, of
from fisherprune_jax._tables import as_number

MOST_NAMED = 6
"""The most connected groups to read aloud."""


def bars(found: Sequence[Bar], label: str, links: Sequence[tuple[int, int]] = ()) -> str:
  """A list of bars on one scale, connected by curves."""
  largest = max([bar.before for bar in found], default=1) or 1
  rows = [_row(at, bar, largest, _connected(at, found, links)) for at, bar in enumerate(found)]
  curves = _curves(len(found), links) if links else ""
  style = ' class="graph"' if links else ""
  return f'<div{style}>{curves}<ul class="bars" aria-label="{escape(label)}">{"".join(rows)}</ul></div>'


def _row(at: int, bar: Bar, largest: float, connected: str) -> str:
  detail = f" <small>{escape(bar.detail)}</small>" if bar.detail else ""
  return (
    f'<li data-at="{at}"><span class="name" title="{escape(bar.whole or bar.label)}">{escape(bar.label)}{detail}</span>'
    f'<span class="track" aria-hidden="true"><span class="before" style="width:{percent(bar.before, largest)}">'
    f'<span class="now" style="width:{percent(bar.now, bar.before)}"></span></span></span>'
    f'<span class="number">{of(bar.now, bar.before)}</span>{connected}</li>'
  )


def _connected(at: int, found: Sequence[Bar], links: Sequence[tuple[int, int]]) -> str:
  """The connected groups of one, for screen readers."""
  others = [found[sum(link) - at].label for link in links if at in link]
  if not others:
    return ""
  rest = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
  return f'<span class="unseen">, connected with {escape(", ".join(others[:MOST_NAMED]))}{rest}</span>'


def _curves(rows: int, links: Sequence[tuple[int, int]]) -> str:
  """An arc for each pair of rows, wider for distant rows."""
  farthest = math.log1p(max(b - a for a, b in links))
  paths = []
  for a, b in links:
    x = 100 - 120 * math.log1p(b - a) / max(farthest, math.log1p(3))
    paths.append(
      f'<path data-of="{a} {b}" d="M100 {a + 0.5}C{x:.0f} {a + 0.5} {x:.0f} {b + 0.5} 100 {b + 0.5}"/>'
    )
  return f'<svg class="curves" viewBox="0 0 100 {rows}" preserveAspectRatio="none" aria-hidden="true">{"".join(paths)}</svg>'


def histogram(found: Histogram) -> str:
  """A histogram as a card: live features on top of masked ones."""
  top = [a + b for a, b in zip(found.live, found.masked, strict=True)]
  live, masked, below = f"{sum(found.live):,} live", f"{sum(found.masked):,} masked", top[0]
  low, high = (as_number(x) if x >= 100 else f"{x:.2g}" for x in (found.low, found.high))
  rest = f", {below:,} below" if below else ""
  label = f"Importance of {found.mask}: {live}, {masked}, from {low} to {high}{rest}"
  return (
    f'<figure class="card"><figcaption title="{escape(found.mask)}">{escape(found.mask)}</figcaption>'
    f'<svg viewBox="0 0 {len(top)} 100" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
    f'<path class="masked" d="{_columns(found.masked, [0] * len(top), max(top))}"/>'
    f'<path class="live" d="{_columns(top, found.masked, max(top))}"/></svg>'
    f'<p class="ends"><span>{"≤ " if below else ""}{low}</span><span>{high}</span></p><p>{live}, {masked}</p></figure>'
  )


def _columns(top: Sequence[int], ground: Sequence[int], tallest: int) -> str:
  """Columns from one height to another, as a path."""
  y = [[round(100 - 100 * n / (tallest or 1), 1) for n in heights] for heights in (top, ground)]
  return "".join(
    f"M{at + 0.06:g} {low:g}V{high:g}h.88V{low:g}z"
    for at, (high, low) in enumerate(zip(*y, strict=True))
    if high != low
  )


def curve(frames: Sequence[Frame]) -> str:
  """The total over the steps, with the target and a cursor."""
  last, first = frames[-1].step or 1, frames[0].total
  points = [(100 * f.step / last, 100 - 100 * f.total.now / (first.before or 1)) for f in frames]
  line = f"M{points[0][0]:.2f} {points[0][1]:.2f}" + "".join(f"H{x:.2f}V{y:.2f}" for x, y in points[1:])
  target = ""
  if first.target is not None:
    y = 100 - 100 * first.target / (first.before or 1)
    target = f'<path class="target" d="M0 {y:.2f}H100"/>'
  label = f"{first.name} over the steps, from {frames[0].total.text} to {frames[-1].total.text}"
  return (
    f'<div class="plot"><span class="top">{as_number(first.before)}</span><span class="bottom">0</span>'
    f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
    f'<path class="area" d="{line}V100H0z"/>{target}<path class="line" d="{line}"/>'
    f'<path id="cursor" d="M{points[-1][0]:.2f} 0V100"/></svg>'
    f'<span class="left">step {frames[0].step:,}</span><span class="right">step {frames[-1].step:,}</span></div>'
  )


def percent(part: float, whole: float) -> str:
  """A part in CSS."""
  return f"{100 * part / whole:.2f}%" if whole else "0%"
