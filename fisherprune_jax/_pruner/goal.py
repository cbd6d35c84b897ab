"""What a pruner counts, the cost that it comes down to, and the budget on the way there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.measures import cost_model
from fisherprune_jax._errors import describe, is_number, require, warn
from fisherprune_jax._masks import COLLECTION, check_masks
from fisherprune_jax._tables import as_number
from fisherprune_jax._training.options import KINDS
from fisherprune_jax._types import ApplyFn, BatchAxes, Masks, PyTree

Keep = float | Sequence[float] | None

OWN = {
  "prune_every": "every",
  "burn_in": "start",
  "features_per_prune": "keep, start and stop: the budget says how many",
}
"""Options of ``fisher_prune`` that a pruner sets, and its own names for them."""


def check_options(
  keep: Keep, target: float | None, start: int, stop: int | None, options: Mapping[str, Any]
) -> None:
  """Raises for arguments of the pruner that do not fit each other."""
  require(
    (keep is None) != (target is None), "fp.Pruner needs either keep or target", (keep, target),
    "keep=0.25 keeps a quarter of the dense cost; target= is in the unit of the measure."
  )  # fmt: skip
  for each in _fractions(keep):
    require(is_number(each) and 0 < each <= 1, "keep must be a fraction of the dense cost in (0, 1]", each)
  if stop is not None:
    require(stop > start, f"stop must come after start={start}", stop)
  for name in options:
    if name in OWN:
      raise TypeError(f"fp.Pruner has no option {name}, got {options[name]!r}. Use {OWN[name]}.")
    if name not in KINDS:
      known = sorted(KINDS.keys() - OWN.keys() - {"cost", "target", "method"})
      raise TypeError(f"fp.Pruner has no option {name}, got {options[name]!r}. It has {', '.join(known)}.")


def cost_of(
  measure: Any, apply_fn: ApplyFn, variables: PyTree, args: Any, batch_axes: BatchAxes
) -> CostModel:
  """The cost model that ``measure`` is or names."""
  if isinstance(measure, CostModel):
    check_masks(measure.masks, variables[COLLECTION], "fp.Pruner")
    return measure
  if callable(measure):
    made = measure(variables[COLLECTION])
    if isinstance(made, tuple):
      made = CostModel.from_functions(variables[COLLECTION], *made)
    if not isinstance(made, CostModel):
      raise TypeError(
        "measure as a function of the masks must return a CostModel, or the functions (total, per_feature) of "
        f"CostModel.from_functions, got {describe(made)}."
      )
    return made
  return cost_model(apply_fn, variables, *args, measure=measure, batch_axes=batch_axes)


def _fractions(keep: Keep) -> Sequence[float]:
  return () if keep is None else keep if isinstance(keep, Sequence) else (keep,)


def targets_of(cost: CostModel, keep: Keep, target: float | None) -> tuple[float, ...]:
  """The costs to come down to, in the unit of the cost."""
  if keep is not None:
    require(len(_fractions(keep)) > 0, "keep must hold at least one fraction", keep)
    how = "Choose another measure, such as 'params'."
    require(cost.dense > 0, f"keep needs a network that costs more than 0 {cost.unit}", cost.dense, how)
    return tuple(float(each) * cost.dense for each in _fractions(keep))
  assert target is not None
  fraction = (
    f" For a fraction, use keep={target}." if is_number(target) and 0 < target <= 1 < cost.dense else ""
  )
  valid = is_number(target) and target > 0 and not fraction
  require(
    valid,
    f"target must be a positive number of {cost.unit} ({cost.dense:,.0f} dense)",
    target,
    fraction.strip(),
  )
  return (float(target),)


def check_reachable(cost: CostModel, target: float, floors: Masks) -> None:
  """Raises if every choice of features costs more than the target, and warns if the floors of all masks do."""
  whole = jax.tree.map(
    lambda m, floor: np.where(floor == m.shape[-1], np.ones(m.shape), 0), cost.masks, floors
  )
  smallest = jax.tree.map(
    lambda m, floor: np.where(np.arange(m.shape[-1]) < floor, np.ones(m.shape), 0), cost.masks, floors
  )
  # On the host, where nothing has to be compiled.
  unit = cost.dense / max(cost.exact(cost.masks), 1e-300)
  least, at_floors = (unit * cost.exact(masks) for masks in (whole, smallest))
  text = f"target={as_number(target)} {cost.unit} is below the smallest possible network"
  remedy = "Raise the target, lower min_features, or exclude less."
  if least > target:
    raise ValueError(f"{text} ({as_number(least)} {cost.unit}). {remedy}")
  if at_floors > target:
    warn(f"{text} that keeps min_features of each mask ({as_number(at_floors)} {cost.unit}). {remedy}")


def falling(dense: float, target: float, start: int, stop: int) -> optax.Schedule:
  """The budget at a step: the dense cost up to ``start``, the target from ``stop`` on, and a straight line between.

  A schedule is float32. The target is rounded down, so that it is never exceeded; but one that allows the whole network is
  rounded up, so that it does.

  >>> budget = falling(100.0, 20.0, start=10, stop=50)
  >>> [float(budget(step)) for step in (1, 10, 30, 50, 99)]
  [100.0, 100.0, 60.0, 20.0, 20.0]
  """
  end = _up(dense) if target >= dense else _down(target)
  line = optax.linear_schedule(_up(dense), end, stop - start, start)

  def budget(step: jax.typing.ArrayLike) -> jax.Array:
    # Compiled, a line may miss its end by a rounding error.
    return jnp.where(step >= jnp.asarray(stop), end, jnp.maximum(line(step), end))

  return budget


def _down(number: float) -> float:
  """The largest float32 that is not above a number."""
  near = np.float32(number)
  return float(near if float(near) <= number else np.nextafter(near, np.float32(0)))


def _up(number: float) -> float:
  """The smallest float32 that is not below a number."""
  near = np.float32(number)
  return float(near if float(near) >= number else np.nextafter(near, np.float32(np.inf)))
