"""Tables of groups and skipped axes."""

from collections.abc import Sequence

from fisherprune_jax._auto.groups import Group
from fisherprune_jax._auto.skipping import Skipped, folded
from fisherprune_jax._tables import Table, shortened


def tables(groups: Sequence[Group], skipped: Sequence[Skipped], shares: Sequence[float]) -> list[Table | str]:
  """A row per group, with the share of the FLOPs that depends on it, then skipped axes."""
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
  rest = [(where, str(size), why) for where, size, why in folded(skipped)]
  return [
    Table(("group", "kind", "size", "axes", "FLOPs"), found),
    *shortened(Table(("skipped", "size", "why"), rest, left=(0, 2)), "auto.skipped"),
  ]
