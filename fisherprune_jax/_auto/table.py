"""Groups, and what was skipped, as tables."""

from collections.abc import Sequence

from fisherprune_jax._auto.groups import Group
from fisherprune_jax._auto.skipping import Skipped, folded
from fisherprune_jax._tables import Table

MOST_SHOWN = 20
"""Rows of what was skipped that are shown."""


def tables(groups: Sequence[Group], skipped: Sequence[Skipped], shares: Sequence[float]) -> list[Table | str]:
  """One row for each group, with the share of the FLOPs that hangs on it, then what was skipped."""
  found = [
    (
      group.name,
      group.kind,
      " x ".join(map(str, (*group.rows, group.size))),
      str(len(group.members)),
      f"{share:.1%}",
    )
    for group, share in zip(groups, shares, strict=True)
  ]
  parts: list[Table | str] = [Table(("group", "kind", "size", "axes", "FLOPs"), found)]
  rows = folded(skipped)
  if rows:
    shown = [(where, str(size), why) for where, size, why in rows[:MOST_SHOWN]]
    parts.append(Table(("skipped", "size", "why"), shown, left=(0, 2)))
  if len(rows) > MOST_SHOWN:
    parts.append(f"and {len(rows) - MOST_SHOWN} more: auto.skipped")
  return parts
