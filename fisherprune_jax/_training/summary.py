"""The pruning state as a table and as metrics."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fisherprune_jax._masks import named_rows
from fisherprune_jax._tables import Table, aligned
from fisherprune_jax._training.criteria import criterion_of
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.finding import get_importance, get_state
from fisherprune_jax._training.state import FisherPruneState

Stats = dict[str, jax.Array]


def summary(opt_state: optax.OptState, name: str | None = None, *, method: str | Criterion = "fisher") -> str:
  """A table of every mask's live features, the range of their importance, and their share of the cost.

  The share sums the marginal costs of live features. Consecutive layers share costs, so shares need not add up to one.

  Args:
    opt_state: see :func:`get_state`.
    name: likewise.
    method: the criterion, for the unit of the importance.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> tx = fp.fisher_prune(cost, prune_every=1)
  >>> _, state = tx.update({}, tx.init({}), mask_grads={"m": jnp.array([[2.0, 4.0]])})
  >>> print(fp.summary(state))
  mask  alive  importance, nats  cost share
  m       1/2  8e+00..8e+00     100.0 %
  step 1, cost 1
  """
  state = get_state(opt_state, name)
  rows = [
    (
      mask,
      f"{int(stats['alive'])}/{size}",
      f"{float(stats['importance_min']):.0e}..{float(stats['importance_max']):.0e}",
      f"{100 * float(stats['cost_share']):.1f} %",
    )
    for mask, size, stats in _stats(state)
  ]
  cost = "unknown until the next update" if math.isnan(state.cost) else _number(float(state.cost))
  notes = [f"step {int(state.step):,}, cost {cost}"]
  if int(state.skipped):
    notes.append(
      f"{int(state.skipped):,} batches skipped, because a mask gradient was not finite or a weight or decay "
      "out of range"
    )
  if bool(state.exhausted):
    notes.append("no feature left that may be masked")
  header = ("mask", "alive", f"importance, {criterion_of(method).unit}", "cost share")
  return "\n".join([*aligned(Table(header, rows)), "; ".join(notes)])


def _number(cost: float) -> str:
  """A cost as text: whole, unless it is below 1."""
  return f"{cost:.3g}" if 0 < cost < 1 else f"{cost:,.0f}"


def metrics(opt_state: optax.OptState, name: str | None = None) -> Stats:
  """A flat dictionary of metrics for any logger; jit-able, so a train step can return it.

  ``jax.device_get(fp.metrics(opt_state))`` fetches all metrics with one transfer.

  Args:
    opt_state: see :func:`get_state`.
    name: likewise.

  Returns:
    Scalar arrays. For the network: ``pruning/step``, ``cost``, ``alive``, ``skipped``, ``exhausted``. For every mask:
    ``pruning/<mask>/alive``, ``importance_min``, ``importance_max`` (of live features, in nats), ``cost_share``. With a
    ``name``, ``pruning/<name>/...``.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(2)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> {name: float(x) for name, x in fp.metrics(fp.fisher_prune(cost).init({})).items()}["pruning/m/alive"]
  2.0
  """
  state = get_state(opt_state, name)
  stats = _stats(state)
  total = {
    "step": state.step,
    "cost": state.cost,
    "alive": sum((s["alive"] for _, _, s in stats), jnp.zeros([])),
    "skipped": state.skipped,
    "exhausted": state.exhausted.astype(jnp.int32),
  }
  each = {f"{mask}/{key}": value for mask, _, row in stats for key, value in row.items()}
  prefix = "pruning" if name is None else f"pruning/{name}"
  return {f"{prefix}/{key}": value for key, value in {**total, **each}.items()}


def _stats(state: FisherPruneState) -> list[tuple[str, int, Stats]]:
  """Name, size and statistics of every mask, row by row for stacks."""
  columns = [
    named_rows(tree)
    for tree in (state.masks, get_importance(state), jax.tree.map(lambda s: s[..., None], state.shares))
  ]
  return [
    (name, mask.size, _stats_of(mask, importance, share[0]))
    for (name, mask), (_, importance), (_, share) in zip(*columns, strict=True)
  ]


def _stats_of(mask: jax.Array, importance: jax.Array, share: jax.Array) -> Stats:
  alive = jnp.sum(mask)

  def of_alive(reduce: Callable[[jax.Array], jax.Array], start: float) -> jax.Array:
    return jnp.where(alive > 0, reduce(jnp.where(mask > 0, importance, start)), 0.0)

  return {
    "alive": alive,
    "importance_min": of_alive(jnp.min, jnp.inf),
    "importance_max": of_alive(jnp.max, -jnp.inf),
    "cost_share": share,
  }
