"""Plots of the pruning history."""

from typing import TYPE_CHECKING

import jax
import numpy as np
import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._masks import named_rows
from fisherprune_jax._training.finding import get_state
from fisherprune_jax._training.history import history, masks_at

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def plot_history(
  opt_state: optax.OptState, cost: CostModel, target: float | None = None, name: str | None = None
) -> "Figure":
  """Plot cost and widths over the steps.

  Args:
    opt_state: see :func:`get_state`.
    cost: the cost model of the pruning.
    target: drawn as a line, in the unit of the cost; None for no line.
    name: see :func:`get_state`.

  Returns:
    A ``matplotlib.figure.Figure``; ``figure.savefig("history.png")`` writes it.

  Raises:
    ImportError: without matplotlib.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> [ax.get_ylabel() for ax in fp.plot_history(fp.fisher_prune(cost).init({}), cost).axes]
  ['FLOPs per example', 'features alive']
  """
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError(
      "plot_history needs matplotlib, which is missing: pip install 'fisherprune-jax[plots]'"
    ) from error
  last = int(get_state(opt_state, name).step)
  steps = sorted({0, *(pruned.step for pruned in history(opt_state, name)), last})
  masks = [masks_at(opt_state, step, name) for step in steps]
  figure = Figure(figsize=(9, 6), layout="constrained")
  top, bottom = figure.subplots(2, sharex=True)
  top.plot(steps, [float(cost(m)) for m in masks], drawstyle="steps-post", label="cost")
  if target is not None:
    top.axhline(target, color="C3", linestyle="--", linewidth=1, label="target")
    top.legend(frameon=False)
  per = "" if cost.unit == "parameters" else " per example"
  top.set(ylabel=f"{cost.unit or 'FLOPs'}{per}", ylim=(0, None))
  alive = [
    {mask: float(np.mean(row)) for mask, row in named_rows(jax.tree.map(np.asarray, m))} for m in masks
  ]
  for mask in alive[0]:
    bottom.plot(steps, [shares[mask] for shares in alive], drawstyle="steps-post", label=mask)
  bottom.set(xlabel="step", ylabel="features alive", ylim=(0, 1.02))
  bottom.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
  if len(alive[0]) <= 12:  # longer legends would hide the plot
    bottom.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
  for ax in (top, bottom):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
  return figure
