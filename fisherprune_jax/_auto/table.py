"""Groups, and what was skipped, as a table."""

from collections.abc import Sequence

from fisherprune_jax._auto.groups import Group, Skipped
from fisherprune_jax._tables import align

MOST_SHOWN = 20
"""Rows of what was skipped that are shown."""


def table(groups: Sequence[Group], skipped: Sequence[Skipped], shares: Sequence[float]) -> str:
  """One line for each group, with the share of the FLOPs that hangs on it, then one for each axis that was skipped."""
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
  if skipped:
    rows = [(f"{one.path}, axis {one.axis}", str(one.size)) for one in skipped[:MOST_SHOWN]]
    left = align([("skipped", "size"), *rows])
    lines += [
      "",
      *(f"{line}  {why}" for line, why in zip(left, ["why", *(one.why for one in skipped)], strict=False)),
    ]
  if len(skipped) > MOST_SHOWN:
    lines.append(f"and {len(skipped) - MOST_SHOWN} more: auto.skipped")
  return "\n".join(lines)
