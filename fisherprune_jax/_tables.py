"""Tables as text, and as HTML in notebooks."""

import html
from collections.abc import Sequence
from typing import NamedTuple

Cells = tuple[str, ...]


class Table(NamedTuple):
  """Rows under a heading.

  Attributes:
    heading: the names of the columns.
    rows: the cells of each row.
    left: the left-aligned columns.
  """

  heading: Cells
  rows: Sequence[Cells]
  left: tuple[int, ...] = (0,)


MOST_SHOWN = 20
"""The most rows to print."""


def shortened(table: Table, rest: str) -> list[Table | str]:
  """The first rows of a table and where to find the rest; nothing for an empty table."""
  if not table.rows:
    return []
  more = len(table.rows) - MOST_SHOWN
  shown = table._replace(rows=table.rows[:MOST_SHOWN])
  return [shown, f"and {more} more: {rest}"] if more > 0 else [shown]


class Shown:
  """Base of objects printed as tables and paragraphs, and as HTML in notebooks."""

  def tables(self) -> Sequence[Table | str]:
    """The parts to print."""
    raise NotImplementedError(type(self).__name__)

  def __str__(self) -> str:
    return "\n\n".join(part if isinstance(part, str) else "\n".join(aligned(part)) for part in self.tables())

  def _repr_html_(self) -> str:
    return "\n".join(map(_as_html, self.tables()))


def as_number(x: float) -> str:
  """A number of any size, as text.

  >>> as_number(401216.0), as_number(0.00012345)
  ('401,216', '0.000123')
  """
  return f"{x:,.0f}" if abs(x) >= 100 or x == int(x) else f"{x:.3g}"


def aligned(table: Table) -> list[str]:
  """The lines of a table."""
  rows = [table.heading, *table.rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  places = [(at in table.left, width) for at, width in enumerate(widths)]
  return ["  ".join(map(_cell, row, places)).rstrip() for row in rows]


def _cell(text: str, place: tuple[bool, int]) -> str:
  is_left, width = place
  return text.ljust(width) if is_left else text.rjust(width)


def _as_html(part: Table | str) -> str:
  if isinstance(part, str):
    return f"<p>{html.escape(part)}</p>"
  styles = [f"text-align: {'left' if at in part.left else 'right'}" for at in range(len(part.heading))]

  def row(cells: Cells, tag: str) -> str:
    found = (f'<{tag} style="{s}">{html.escape(c)}</{tag}>' for c, s in zip(cells, styles, strict=True))
    return f"<tr>{''.join(found)}</tr>"

  lines = [row(part.heading, "th"), *(row(cells, "td") for cells in part.rows)]
  return f"<table>{''.join(lines)}</table>"
