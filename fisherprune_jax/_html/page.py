"""The page: plain HTML with its style, its script and its charts inside."""

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib import resources

from fisherprune_jax._compaction.report import share
from fisherprune_jax._files import PathLike, check_place, replacing
from fisherprune_jax._html import charts
from fisherprune_jax._html.report import MOST_HISTOGRAMS, MOST_STEPS, Bars, Figure, Frame, Histogram, Report
from fisherprune_jax._tables import Shown, Table, as_number

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser loads nothing from anywhere."""


def write(path: PathLike, make: Callable[[], Report]) -> None:
  """Write a page; raises for a bad place before the report is made."""
  check_place(path, "A report")
  text = page(make())
  with replacing(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
    file.write(text)


def page(report: Report) -> str:
  """The text of the page."""
  sections = [(name, text) for name, text in _sections(report) if text]
  links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in sections)
  body = "".join(f'<section id="{_anchor(name)}"><h2>{name}</h2>{text}</section>' for name, text in sections)
  about = "".join(f"<p>{escape(line)}</p>" for line in report.about)
  missing = f'<p class="missing">{escape(report.missing)}</p>' if report.missing else ""
  title = escape(report.title)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
    f"<title>{title}</title><style>{_file('page.css')}</style></head>\n<body><header><h1>{title}</h1>{about}</header>\n"
    f'<main><div class="figures">{"".join(map(_figure, report.figures))}</div>{missing}'
    f'<nav aria-label="Sections">{links}</nav>\n{body}</main>\n'
    f"<script>{_file('page.js')}</script></body></html>\n"
  )


def _file(name: str) -> str:
  return resources.files("fisherprune_jax._html").joinpath(name).read_text("utf-8")


def _anchor(name: str) -> str:
  return name.lower().replace(" ", "-")


def _sections(report: Report) -> Iterator[tuple[str, str]]:
  yield report.groups.heading, _bars(report.groups, report.links)
  yield report.layers.heading, _bars(report.layers)
  yield "Importance", _importance(report.importance, report.unit) if report.importance else ""
  yield "History", _history(report.groups, report.frames) if len(report.frames) > 1 else ""
  yield "Blockers", "".join(map(_part, report.blockers))


def _figure(figure: Figure) -> str:
  """A card of the headline: the share, a bar, and the numbers."""
  target, mark = "", ""
  if figure.target is not None:
    place = charts.percent(figure.target, figure.before)
    text = f"Target: {as_number(figure.target)} {figure.unit} ({share(figure.target, figure.before)})"
    target = f"<p>{escape(text)}</p>"
    mark = f'<span class="mark" style="left:{place}"></span>'
  width = charts.percent(figure.now, figure.before)
  return (
    f'<div class="card"><h2>{escape(figure.name)}</h2><p class="share">{figure.share}</p>'
    f'<div class="before" aria-hidden="true"><span class="now" style="width:{width}"></span>{mark}</div>'
    f"<p>{escape(figure.text)}</p>{target}</div>"
  )


def _bars(found: Bars, links: Sequence[tuple[int, int]] = ()) -> str:
  rest = f"<p>{escape(found.rest)}</p>" if found.rest else ""
  return f"<p>{escape(found.note)}</p>{charts.bars(found.bars, found.heading, links)}{rest}"


def _importance(found: Sequence[Histogram], unit: str) -> str:
  more = len(found) - MOST_HISTOGRAMS
  rest = f"<p>and {more} more</p>" if more > 0 else ""
  cards = "".join(map(charts.histogram, found[:MOST_HISTOGRAMS]))
  return (
    f"<p>The number of features of each group by their importance ({escape(unit)}), on a logarithmic axis. "
    '<span class="key live">live</span> <span class="key masked">masked</span></p>'
    f'<div class="cards">{cards}</div>{rest}'
  )


def _history(groups: Bars, frames: Sequence[Frame]) -> str:
  """The curve of the total, the slider, and the bars that it moves."""
  last = frames[-1].step or 1
  data = [
    [f"{f.step:,}", f"{f.total.text} ({f.total.share})", round(100 * f.step / last, 2), f.widths]
    for f in frames
  ]
  name = escape(frames[-1].total.name)
  rest = f"<p>The slider stops at {MOST_STEPS} of the pruning steps.</p>" if len(frames) == MOST_STEPS else ""
  bars = [bar._replace(now=now, detail="") for bar, now in zip(groups.bars, frames[-1].widths, strict=True)]
  return (
    f'<div class="controls"><label for="step">Step <output id="at" for="step" aria-live="off">{data[-1][0]}</output></label>'
    f'<input id="step" type="range" min="0" max="{len(frames) - 1}" value="{len(frames) - 1}">'
    f'<p>{name}: <output id="total" for="step" aria-live="off">{escape(str(data[-1][1]))}</output></p></div>{rest}'
    f'{charts.curve(frames)}<div id="widths">{charts.bars(bars, "Widths at the step")}</div>'
    f'<script type="application/json" id="frames">{_json(data)}</script>'
  )


def _json(value: object) -> str:
  return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


class _Parts(Shown):
  """Tables as a notebook shows them."""

  def __init__(self, *parts: Table | str) -> None:
    self._parts = parts

  def tables(self) -> Sequence[Table | str]:
    return self._parts


def _part(part: Table | str) -> str:
  """A table in a box that scrolls; a paragraph, with the breaks of its lines."""
  if isinstance(part, str) and "\n" in part:
    return f'<pre role="region" aria-label="Report" tabindex="0">{escape(part)}</pre>'
  shown = _Parts(part)._repr_html_()
  return (
    shown
    if isinstance(part, str)
    else f'<div class="scroll" role="region" aria-label="Table" tabindex="0">{shown}</div>'
  )
