"""Groups, and what was skipped, as a table."""

from collections.abc import Sequence

from fisherprune_jax._auto.groups import Group
from fisherprune_jax._auto.skipping import Skipped, folded
from fisherprune_jax._tables import align

MOST_SHOWN = 20
"""Rows of what was skipped that are shown."""


def table(groups: Sequence[Group], skipped: Sequence[Skipped], shares: Sequence[float]) -> str:
  """One line for each group, with the share of the FLOPs that hangs on it, then what was skipped."""
  lines = align(
    [
      ("group", "kind", "size", "axes", "FLOPs"),
      *(
        (
          group.name,
          group.kind,
          " x ".join(map(str, (*group.rows, group.size))),
          str(len(group.members)),
          f"{share:.1%}",
        )
        for group, share in zip(groups, shares, strict=True)
      ),
    ]
  )
  rows = folded(skipped)
  if rows:
    left = align([("skipped", "size"), *((where, str(size)) for where, size, _ in rows[:MOST_SHOWN])])
    lines += [
      "",
      *(f"{line}  {why}" for line, why in zip(left, ["why", *(why for *_, why in rows)], strict=False)),
    ]
  if len(rows) > MOST_SHOWN:
    lines.append(f"and {len(rows) - MOST_SHOWN} more: auto.skipped")
  return "\n".join(lines)
