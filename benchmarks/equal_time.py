"""What networks keep when they are pruned by measured time, against by FLOPs, at equal measured time.

  python benchmarks/equal_time.py --out benchmarks/equal_time
  python benchmarks/equal_time.py --tasks digits --seeds 1

The networks, data and schedules of ``quality.py``, with Fisher's criterion over a cost in FLOPs or in seconds. Networks of
the widths that come out at each budget are timed, all taking turns, on one thread. Writes ``equal_time.json`` and
``equal_time.png``; what is there already is not run again. Accuracies are of test examples that no choice was made on.
"""

import argparse
import functools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import compact_speed  # noqa: F401 (one core, before JAX starts its threads)
import jax
import jax.numpy as jnp
import numpy as np
from quality import CRITERIA, Bench, Net
from quality_results import LEVELS, Runs, panels
from quality_tasks import TASKS, Widths
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fisherprune_jax as fp
from fisherprune_jax._latency.clock import machine, medians

SHARES = (0.8, 0.6, 0.45, 0.35, 0.27)
"""Of the dense network's time: budgets, and where curves are read."""


class Budget(NamedTuple):
  """What networks are pruned by.

  Attributes:
    timed: a cost in seconds, not in FLOPs.
    multiple_of: widths stay multiples of it.
    levels: shares of the cost.
  """

  timed: bool
  multiple_of: int
  levels: tuple[float, ...] = LEVELS


BUDGETS = {
  "FLOPs": Budget(timed=False, multiple_of=1),
  "FLOPs, multiples of 4": Budget(timed=False, multiple_of=4),
  "time, multiples of 4": Budget(timed=True, multiple_of=4, levels=SHARES),
}


@dataclass(frozen=True, eq=False)
class Timed(Bench):
  """A task whose networks are pruned by a budget of some kind."""

  budget: Budget = BUDGETS["FLOPs"]
  cache: Path | None = None

  @functools.cached_property
  def batch(self) -> Any:
    """What is timed."""
    return jax.device_put(self.data[0][0][: self.task.batch])

  @functools.cached_property
  def cost(self) -> fp.CostModel:
    apply, params, masks = self.network
    given = apply, Net(params, masks)._asdict()
    if not self.budget.timed:
      return fp.cost_model(*given, self.batch[:1])
    return fp.measure_latency(*given, self.batch, multiple_of=self.budget.multiple_of, cache=self.cache)

  def options(self, criterion: str) -> dict[str, Any]:
    return CRITERIA[criterion] | {
      "multiple_of": self.budget.multiple_of,
      "min_features": self.budget.multiple_of,
    }


def run_seed(name: str, benches: dict[str, Timed], seed: int, runs: Runs, tick: Any) -> None:
  """One dense network, pruned by each kind of budget."""
  missing = {
    kind: bench for kind, bench in benches.items() if not runs.get(name, kind, bench.levels[-1], seed)
  }
  if not missing:
    return
  first = next(iter(missing.values()))
  dense = first.dense(seed, first.epochs[0])
  runs.put(first.result(dense), name, "dense", 1.0, seed)
  for kind, bench in missing.items():
    for level, net in zip(bench.levels, bench.pruned(dense, "fisher", seed), strict=True):
      runs.put(bench.result(net), name, kind, level, seed)
      tick()


def untrained(bench: Timed, widths: Widths) -> Any:
  """A call of a network of some widths, to be timed: what it computes does not matter."""
  made = []

  def shapes() -> Any:
    made.append(bench.task.start(0, widths))
    return made[0].params

  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), jax.eval_shape(shapes)
  )
  return partial(jax.jit(made[0].apply), {"params": params}, bench.batch)


def times_of(bench: Timed, found: dict[str, Any]) -> dict[str, float]:
  """Of all widths, as text, the time of a network that has them over the dense one's; all take turns."""
  rows = [row for kinds in found.values() for seeds in kinds.values() for row in seeds.values()]
  widths = sorted({tuple(row["widths"]) for row in rows}, reverse=True)
  seconds = medians([untrained(bench, these) for these in widths], 41)
  return {str(list(these)): time / seconds[0] for these, time in zip(widths, seconds.tolist(), strict=True)}


def curves(found: dict[str, Any], kind: str, times: dict[str, float]) -> list[tuple[np.ndarray, np.ndarray]]:
  """Of each seed, shares of the time in rising order and test accuracies, the dense network's among them."""
  out = []
  for seed, dense in found["dense"]["1.0"].items():
    rows = [seeds[seed] for seeds in found[kind].values()] + [dense]
    points = sorted((times[str(row["widths"])], row["test"]) for row in rows)
    out.append(tuple(map(np.array, zip(*points, strict=True))))
  return out


def at_shares(found: dict[str, Any], kind: str, times: dict[str, float]) -> np.ndarray:
  """Of each seed, the accuracy at each of the shares; between networks along the logarithm of time, NaN beyond them."""
  rows = [
    np.interp(np.log(SHARES), np.log(taken), accuracies, left=np.nan)
    for taken, accuracies in curves(found, kind, times)
  ]
  return np.array(rows)


def table(name: str, found: dict[str, Any], times: dict[str, float]) -> Table:
  """Accuracies at equal time; in brackets the mean difference to FLOPs of the same seeds and its standard error."""
  out = Table(
    "pruned by",
    *(f"{share:.0%}" for share in SHARES),
    title=f"{name}: test accuracy, %, by share of the time",
  )
  base = at_shares(found, "FLOPs", times)
  for kind in BUDGETS:
    values = at_shares(found, kind, times)
    cells = []
    for here, there in zip(values.T, base.T, strict=True):
      both = (here - there)[~np.isnan(here - there)]
      error = both.std(ddof=1) / len(both) ** 0.5 if len(both) > 1 else np.nan
      mean = here[~np.isnan(here)].mean() if not np.isnan(here).all() else np.nan
      cells.append(
        f"{mean:.1f}" + (f" ({both.mean():+.1f} ± {error:.1f})" if kind != "FLOPs" and len(both) else "")
      )
    out.add_row(kind, *cells)
  return out


def plot(path: Path, results: dict[str, Any], times: dict[str, dict[str, float]]) -> None:
  """Accuracy against measured time, a line for each kind of budget."""
  for ax, name, found in panels(path, results):
    for at, kind in enumerate(BUDGETS):
      levels = [list(seeds.values()) for seeds in found[kind].values()]
      taken = [np.mean([times[name][str(row["widths"])] for row in rows]) for rows in levels]
      accuracy = [np.mean([row["test"] for row in rows]) for rows in levels]
      errors = [np.std([row["test"] for row in rows]) / len(rows) ** 0.5 for rows in levels]
      ax.errorbar(
        taken,
        accuracy,
        errors,
        marker="o",
        markersize=4,
        capsize=2,
        color=f"C{at}",
        label=f"pruned by {kind}",
      )
    dense = np.mean([row["test"] for row in found["dense"]["1.0"].values()])
    ax.axhline(dense, color="0.6", linestyle="--", linewidth=1, label="dense")
    ax.set(xlabel="measured time over the dense network's", ylabel=TASKS[name].unit)


def main() -> None:
  """Runs what is missing, prints the tables, draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--tasks",
    nargs="+",
    default=["digits", "mnist1d"],
    choices=[name for name, task in TASKS.items() if task.scratch],
  )
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument(
    "--epochs", nargs=2, type=int, help="dense, and at each budget; by default those of each task"
  )
  parser.add_argument("--out", type=Path, default=Path("equal_time"))
  options = parser.parse_args()
  options.out.mkdir(parents=True, exist_ok=True)
  runs, console = Runs(options.out / "equal_time.json"), Console()
  with Progress(console=console) as progress:
    for name in options.tasks:
      given, cache = (TASKS[name], tuple(options.epochs or TASKS[name].epochs)), options.out / "times.json"
      benches = {kind: Timed(*given, b.levels, budget=b, cache=cache) for kind, b in BUDGETS.items()}
      each = len(BUDGETS) * len(LEVELS)
      for bench in benches.values():
        _ = bench.cost  # measured first, while the machine is as quiet as it was
      bar = progress.add_task(name, total=options.seeds * each)
      for seed in range(options.seeds):
        run_seed(name, benches, seed, runs, partial(progress.advance, bar))
        progress.update(bar, completed=(seed + 1) * each)
      runs.put(times_of(benches["FLOPs"], runs.found[name]), "times", name)
  found, times = {name: runs.found[name] for name in options.tasks}, runs.found["times"]
  for name in options.tasks:
    console.print(table(name, found[name], times[name]))
  console.print(machine())
  plot(options.out / "equal_time.png", found, times)


if __name__ == "__main__":
  main()
