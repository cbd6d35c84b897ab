"""What a pruner shows of a state: masks, tables, numbers, history, a plot."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fisherprune_jax._auto.auto import AutoMask
from fisherprune_jax._compaction.compact import Compact
from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._errors import same_structure
from fisherprune_jax._files import PathLike
from fisherprune_jax._html.page import write
from fisherprune_jax._html.pruner import Source, report_of
from fisherprune_jax._html.report import Report
from fisherprune_jax._masks import check_masks, named_rows
from fisherprune_jax._tables import Shown, Table, as_number
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.finding import get_masks, get_state
from fisherprune_jax._training.history import Pruned, history
from fisherprune_jax._training.plots import plot_history
from fisherprune_jax._training.summary import metrics, summary
from fisherprune_jax._types import ApplyFn, BatchAxes, Masks, PyTree

if TYPE_CHECKING:
  from matplotlib.figure import Figure


class Monitor(Shown):
  """The part of a pruner that reads states; its methods take the state of the wrapped optimizer."""

  auto: AutoMask | None
  cost: CostModel
  target: float
  _method: str | Criterion
  _start: int
  _stop: int | None
  _every: int
  _apply: ApplyFn
  _shapes: PyTree
  _args: tuple[PyTree, ...]
  _batch_axes: BatchAxes
  compact: Callable[..., Compact]

  def masks(self, opt_state: PyTree) -> Masks:
    """The masks in the state of the wrapped optimizer; masks are returned as they are.

    Args:
      opt_state: the state, or masks.
    """
    if same_structure(opt_state, self.cost.masks):
      check_masks(opt_state, self.cost.masks, "fp.Pruner")
      return opt_state
    return get_masks(self._state(opt_state))

  def config(self, opt_state: PyTree) -> dict[str, int | tuple[int, ...]]:
    """The width of every mask by name, for a model's configuration.

    Args:
      opt_state: the state of the wrapped optimizer, or masks.

    Returns:
      Numbers of live features. A stack of masks, as of ``nn.scan``, has one number if all layers are equally wide, otherwise
      one for each layer.
    """
    widths: dict[str, list[int]] = {}
    for name, row in named_rows(self.masks(opt_state)):
      widths.setdefault(name.split("[")[0], []).append(int(jnp.sum(row)))
    return {name: found[0] if len({*found}) == 1 else tuple(found) for name, found in widths.items()}

  def summary(self, opt_state: PyTree) -> str:
    """A table of masks: live features, importance, share of the cost; see :func:`summary`."""
    return summary(self._state(opt_state), method=self._method)

  def metrics(self, opt_state: PyTree) -> dict[str, jax.Array]:
    """Numbers for a logger, under ``jit`` too; see :func:`metrics`."""
    return metrics(self._state(opt_state))

  def history(self, opt_state: PyTree) -> list[Pruned]:
    """Which features were masked at which steps; see :func:`history`."""
    return history(self._state(opt_state))

  def plot(self, opt_state: PyTree) -> "Figure":
    """Cost and widths over the steps; see :func:`plot_history`."""
    return plot_history(self._state(opt_state), self.cost, self.target)

  def report_html(self, path: PathLike, opt_state: PyTree = None, variables: PyTree = None) -> None:
    """Write one HTML page that needs no network: groups, cost by layer, importance, history, blockers.

    Args:
      path: the file to write; an older one is replaced.
      opt_state: the state of the wrapped optimizer, or masks; None for the network before pruning. Only a state has
        importance and history.
      variables: the variables, as for ``compact``, to list what keeps masked features; None leaves that out.

    Raises:
      OSError: if the folder does not exist, or ``path`` is a folder.
      ValueError: for the state or the variables of another network.

    >>> import pathlib, tempfile, jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> params = {"w": jnp.ones((3, 8)), "v": jnp.ones((8, 2))}
    >>> pruner = fp.Pruner(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, jnp.ones((1, 3)), keep=0.5)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "report.html")
    >>> pruner.report_html(path, {"w": jnp.arange(8.0) % 2}, params)
    >>> "50.0 %" in path.read_text("utf-8")
    True
    """

    def report() -> Report:
      masks = self.cost.masks if opt_state is None else self.masks(opt_state)
      has_masks = opt_state is None or same_structure(opt_state, self.cost.masks)
      return report_of(
        Source(
          self._apply,
          self._shapes,
          self._args,
          self._batch_axes,
          self.auto,
          self.cost,
          self.target,
          self._method,
          f"Schedule: {self._schedule()}.",
          masks,
          None if has_masks else get_state(self._state(opt_state)),
          None if variables is None else self.compact(variables, masks).blockers,
        )
      )

    write(path, report)

  def _state(self, opt_state: Any) -> PyTree:
    """The optimizer state in what a user has of it."""
    return opt_state

  def tables(self) -> list[Table | str]:
    """The groups, the cost and the schedule."""
    rows = [(name, str(row.size)) for name, row in named_rows(self.cost.masks)]
    groups = self.auto.tables() if self.auto else [Table(("mask", "features"), rows)]
    unit, dense = self.cost.unit, self.cost.dense
    cost = f"cost {as_number(dense)} to {as_number(self.target)} {unit} ({self.target / dense:.1%})"
    return [*groups, f"{cost}, {self._schedule()}"]

  def _schedule(self) -> str:
    if not self._stop:
      return "no stop: one-shot pruning"
    every = f"{self._every} steps" if self._every > 1 else "step"
    return f"from step {self._start} to step {self._stop}, every {every}"

  def __repr__(self) -> str:
    masks = jax.tree.leaves(self.cost.masks)
    return (
      f"Pruner({len(masks)} masks, {self.cost.dense:,.0f} to {self.target:,.0f} {self.cost.unit}, "
      f"start={self._start}, stop={self._stop}, every={self._every}, method={self._method!r})"
    )
