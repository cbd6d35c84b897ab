"""The report of a pruner, for a state of the optimizer or for masks."""

import re
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import jax
import numpy as np

from fisherprune_jax._auto.auto import AutoMask
from fisherprune_jax._auto.groups import BLOCK, ROWS
from fisherprune_jax._auto.skipping import folded
from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.counted import Row
from fisherprune_jax._cost.measures import analysed, variables_of
from fisherprune_jax._cost.owned import Owned, owned
from fisherprune_jax._graph import sets
from fisherprune_jax._graph.blockers import Blocker
from fisherprune_jax._graph.variables import Key, sizes_of
from fisherprune_jax._html.report import (
  MOST_BARS,
  MOST_LAYERS,
  MOST_REASONS,
  Bar,
  Bars,
  Figure,
  Frame,
  Histogram,
  Report,
  natural,
  section,
  thinned,
)
from fisherprune_jax._masks import COLLECTION, named_rows
from fisherprune_jax._tables import Table, as_number
from fisherprune_jax._training.criteria import criterion_of
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.finding import get_importance
from fisherprune_jax._training.history import history, masks_at
from fisherprune_jax._training.state import FisherPruneState
from fisherprune_jax._types import ApplyFn, BatchAxes, Masks, PyTree

BINS, DECADES = 24, 6
GROUPS = (
  "Each bar is a group of features. Its outline is the width before, its filled part the width now. A curve connects two "
  "groups if a layer reads one and makes the other."
)
LAYERS = "Each bar is a source line of the model. Its outline is the {} before, its filled part the {} now."
UNKNOWN = "No optimizer state was given, so the page shows neither importance nor history."
EARLY = "The optimizer has taken no step yet, so the page shows neither importance nor history."


class Source(NamedTuple):
  """What a report is made of.

  Attributes:
    apply_fn: the function with masks.
    variables: its variables, arrays or shapes, with masks.
    args: its other arguments.
    batch_axes: their example axes.
    auto: the automatic masks; None if the model has its own.
    cost: the cost model.
    target: the cost to come down to.
    method: the criterion.
    schedule: the schedule, in words.
    masks: the masks now.
    state: the pruning state; None if it is not known.
    blockers: what keeps masked features; None if it is not known.
  """

  apply_fn: ApplyFn
  variables: PyTree
  args: tuple[PyTree, ...]
  batch_axes: BatchAxes
  auto: AutoMask | None
  cost: CostModel
  target: float
  method: str | Criterion
  schedule: str
  masks: Masks
  state: FisherPruneState | None
  blockers: Sequence[Blocker] | None


class Vector(NamedTuple):
  """A mask vector: its position among all, its key, its name, and the kind of its group."""

  at: int
  key: Key
  name: str
  kind: str


def report_of(source: Source) -> Report:
  """The content of the page."""
  cost, state, masks = source.cost, source.state, source.masks
  total = _total(source, masks)  # first, as it refuses masks of another network
  analysis, tree, _ = analysed(source.apply_fn, source.variables, source.args, COLLECTION, source.batch_axes)
  parameters = variables_of(analysis, tree)
  vectors = _vectors(source)
  before, now = _widths(cost.masks), _widths(masks)
  bars = [Bar(v.name, before[v.at], now[v.at], v.kind) for v in vectors]
  shown = vectors[:MOST_BARS]
  places = {v.key: at for at, v in enumerate(shown) if v.kind != BLOCK}
  return Report(
    title="Pruning report",
    about=[source.schedule if state is None else f"Step {int(state.step):,}. {source.schedule}"],
    figures=[
      total,
      Figure("Parameters", parameters.dense, parameters.exact(masks)),
      Figure("Features", sum(before), sum(now)),
    ],
    groups=section("Groups", GROUPS, bars, MOST_BARS),
    links=sorted({link for part in owned(analysis, tree) for link in _links(part, places)}),
    layers=_layers(cost, masks),
    importance=[] if state is None else list(_importance(state, vectors)),
    unit=criterion_of(source.method).unit,
    frames=[] if state is None else _frames(source, state, shown),
    blockers=[*_kept(source.blockers), *_skipped(source.auto)],
    missing=UNKNOWN if state is None else EARLY if int(state.step) == 0 else "",
  )


def _total(source: Source, masks: Masks) -> Figure:
  cost = source.cost
  now = cost.exact(masks) / (cost.exact(cost.masks) or 1) * cost.dense
  unit = cost.unit if cost.unit == "parameters" else f"{cost.unit} per example"
  return Figure("Cost", cost.dense, now, unit.strip(), source.target)


def _vectors(source: Source) -> list[Vector]:
  """All mask vectors, in the order of the program as far as it is known."""
  leaves = jax.tree_util.tree_leaves_with_path(source.cost.masks)
  names = [name for name, _ in named_rows(source.cost.masks)]
  keys = list(sizes_of([leaf for _, leaf in leaves]))
  if source.auto is None:
    found = [Vector(at, key, name, "") for at, (key, name) in enumerate(zip(keys, names, strict=True))]
    return sorted(found, key=lambda v: natural(v.name))
  groups = {group.name: (at, group.kind) for at, group in enumerate(source.auto.groups)}
  own = [groups[path[0].key] for path, _ in leaves]
  kinds = [own[leaf][1] if own[leaf][1] in (BLOCK, ROWS) else "" for leaf, _ in keys]
  found = [Vector(at, *v) for at, v in enumerate(zip(keys, names, kinds, strict=True))]
  return sorted(found, key=lambda v: (own[v.key[0]][0], v.key[1]))


def _widths(masks: Masks) -> list[int]:
  return [int(np.sum(row)) for _, row in named_rows(jax.tree.map(np.asarray, masks))]


def _links(part: Owned, places: dict[Key, int]) -> Iterator[tuple[int, int]]:
  """The groups on two axes of a variable."""
  axes = [[places[key] for key in sets.keys_of(s.support) if key in places] for s in part.where.box]
  for one, other in combinations(axes, 2):
    for a, b in product(one, other):
      if a != b:
        yield min(a, b), max(a, b)


def _layers(cost: CostModel, masks: Masks) -> Bars:
  """A bar per source line, the most expensive first."""
  lines: dict[str, list[Row]] = {}
  for row in sorted(cost.breakdown(masks), key=lambda row: -row.dense):
    lines.setdefault(row.where, []).append(row)
  bars = [
    Bar(
      re.sub(r"^.*[/\\](?=[^/\\]+:\d)", "", where),
      sum(row.dense for row in rows),
      sum(row.now for row in rows),
      ", ".join(row.primitive for row in rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else ""),
      where,
    )
    for where, rows in lines.items()
  ]
  unit = cost.unit or "cost"
  note = LAYERS.format(unit, unit) if bars else "This cost model has no breakdown."
  return section("Cost by layer", note, sorted(bars, key=lambda bar: -bar.before), MOST_LAYERS)


def _importance(state: FisherPruneState, vectors: Sequence[Vector]) -> Iterator[Histogram]:
  """The importance of every mask, and of all residual branches; nothing before the first step."""
  importance, masks = (
    [row for _, row in named_rows(jax.tree.map(np.asarray, tree))]
    for tree in (get_importance(state), state.masks)
  )
  parts: dict[str, list[int]] = {}
  for v in vectors:
    parts.setdefault("all residual branches" if v.kind == BLOCK else v.name, []).append(v.at)
  if any(np.any(row != 0) for row in importance):
    for name, found in parts.items():
      yield histogram(name, *(np.concatenate([rows[at] for at in found]) for rows in (importance, masks)))


def histogram(name: str, importance: np.ndarray, mask: np.ndarray) -> Histogram:
  """Counts on a logarithmic axis of at most ``DECADES``, after a bin for all below."""
  positive = importance[np.isfinite(importance) & (importance > 0)]
  high = float(positive.max(initial=0)) or 1.0
  low = max(float(positive.min(initial=high)), high * 10.0**-DECADES)
  edges = np.geomspace(low, high, BINS + 1)[1:-1]

  def counts(chosen: np.ndarray) -> list[int]:
    bins = np.where(chosen >= low, 1 + np.searchsorted(edges, chosen), 0)
    return np.bincount(bins, minlength=BINS + 1).tolist()

  return Histogram(name, counts(importance[mask > 0]), counts(importance[mask == 0]), low, high)


def _frames(source: Source, state: FisherPruneState, shown: Sequence[Vector]) -> list[Frame]:
  """The steps at which something was masked, between the start and the last step."""
  steps = {0, int(state.step), *(pruned.step for pruned in history(state))}
  frames = []
  for step in thinned(sorted(steps)):
    masks = masks_at(state, step)
    widths = _widths(masks)
    frames.append(Frame(step, _total(source, masks), [widths[v.at] for v in shown]))
  return frames


def _kept(blockers: Sequence[Blocker] | None) -> Iterator[Table | str]:
  """What keeps masked features in the compact network."""
  if blockers is None:
    return
  if not blockers:
    yield "The compact network keeps no masked feature."
    return
  yield "The compact network keeps masked features here, with the FLOPs and parameters that each line alone keeps:"
  yield Table(
    ("reason", "source line", "FLOPs", "parameters", "kept"),
    [
      (
        b.reason,
        b.where,
        as_number(b.flops),
        f"{b.parameters:,}",
        "; ".join(f"{h.path} axis {h.axis}: {h.kept} where masks allow {h.allowed}" for h in b.holds),
      )
      for b in blockers
    ],
    left=(0, 1, 4),
  )


def _skipped(auto: AutoMask | None) -> Iterator[Table | str]:
  """The axes that have no mask."""
  if auto is None:
    yield "The masks are those of the model. Axes without a mask are not listed."
    return
  rows = [(where, f"{size:,}", why) for where, size, why in folded(auto.skipped)]
  if not rows:
    return
  more = len(rows) - MOST_REASONS
  yield "Axes without a mask, and why:" if more <= 0 else f"Axes without a mask, and why (and {more} more):"
  yield Table(("axis", "size", "reason"), rows[:MOST_REASONS], left=(0, 2))
