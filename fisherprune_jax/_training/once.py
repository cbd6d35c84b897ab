"""One-shot pruning without training."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.flat import Limit, Priced
from fisherprune_jax._errors import (
  is_known,
  is_number,
  is_traced,
  require,
  require_same_tree,
  require_shapes,
  warn,
)
from fisherprune_jax._masks import flatten, named_rows, unflatten
from fisherprune_jax._training.floors import Widths
from fisherprune_jax._training.options import Options
from fisherprune_jax._training.selection import rescaled
from fisherprune_jax._types import Masks

ALLOWED = ("cost_weight", "min_features", "exclude", "multiple_of", "tie", "depth", "recost_every", "masks")
"""Options of ``fisher_prune`` that ``select_masks`` takes."""
MOST_KEPT = 8
"""The number of compiled programs that are kept for one cost."""


def select_masks(
  cost: CostModel,
  importance: Masks,
  target: float | Sequence[float] | None = None,
  widths: Widths | None = None,
  **options: Any,
) -> Any:
  """Select masks that meet a target, without training; features go in the order of :func:`fisher_prune`.

  Args:
    cost: the cost model.
    importance: one number per feature, a tree like the masks, such as :func:`estimate_importance` returns.
    target: the cost per example to come down to, in the unit of the cost. A sequence gives nested masks, one set per
      target. None with ``widths`` or ``depth`` alone.
    widths: a mapping from glob patterns of mask names to exact numbers of features, such as
      ``{"conv*": 16, "head": 10}``. Without a target, other masks keep all features.
    **options: options of :func:`fisher_prune`: ``cost_weight``, ``min_features``, ``exclude``, ``multiple_of``,
      ``tie``, ``depth``, ``recost_every``, and ``masks`` to start from.

  Returns:
    0/1 masks, float32; a list for a sequence of targets.

  Raises:
    ValueError, TypeError: for a target that is not positive, importance that is not finite or not like the masks, or
      options out of range.

  Warns:
    UserWarning: if the target cannot be met.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> cost = fp.CostModel.from_functions(
  ...   {"m": jnp.ones(4)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  >>> fp.select_masks(cost, {"m": jnp.array([3.0, 1.0, 4.0, 2.0])}, target=2.0)["m"]
  Array([1., 0., 1., 0.], dtype=float32)
  >>> fp.select_masks(cost, {"m": jnp.array([3.0, 1.0, 4.0, 2.0])}, widths={"m": 3})["m"]
  Array([1., 0., 1., 1.], dtype=float32)

  References:
    Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
    <https://arxiv.org/abs/1801.05787>`_, 2018
  """
  if unknown := sorted(options.keys() - {*ALLOWED}):
    raise TypeError(f"fp.select_masks takes the options {', '.join(ALLOWED)}, got {', '.join(unknown)}.")
  if isinstance(target, np.ndarray) and target.ndim:
    target = target.tolist()
  if isinstance(target, Sequence) and not isinstance(target, str):
    return _family(cost, importance, target, widths, options)
  if target is not None or (widths is None and options.get("depth") is None):
    remedy = "To come down to given numbers of features instead, leave it out and pass widths or depth."
    valid = target is not None and is_number(target) and target > 0
    require(valid, "target must be a positive number", target, remedy)
  chosen = Options(
    cost,
    target=0.0 if target is None else target,
    prune_every=1,
    debias=False,
    features_per_prune=flatten(cost.masks).size,
    widths=widths,
    **options,
  )
  how = "Pass what fp.estimate_importance returns, or a tree of one number per feature."
  require_same_tree(importance, cost.masks, "importance", "the cost model's masks", how)
  require_shapes(
    importance, cost.masks, lambda shape, path: f"importance must have the shape {shape} of a mask", how
  )
  require_finite(jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), importance), "importance")
  masks = cost.masks if chosen.masks is None else chosen.masks
  weight = chosen.at("cost_weight", jnp.int32(1))
  limit = None if target is None else cost.flat.limit(target)
  left, exhausted = _program(chosen, weight)(
    masks, importance, limit, None if isinstance(weight, str) else weight
  )
  left = unflatten(left, masks)
  if target is not None and not is_traced(exhausted) and bool(exhausted):
    warn(
      f"The target of {target:,g} {cost.unit} was not met: no feature is left that may be masked, at {float(cost(left)):,g}. Lower "
      "min_features, exclude less, or raise the target."
    )
  return left


def _family(
  cost: CostModel, importance: Masks, targets: Sequence[float], widths: Widths | None, options: dict[str, Any]
) -> list[Masks]:
  """Masks for several targets, in their order; each selection continues from that of the next larger target."""
  found: dict[int, Masks] = {}
  for at in sorted(range(len(targets)), key=lambda at: -targets[at]):
    found[at] = select_masks(cost, importance, targets[at], widths, **options)
    options = {**options, "masks": found[at]}
  return [found[at] for at in range(len(targets))]


def _program(options: Options, weight: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """The compiled selection for a cost and options; targets, weights and importance are its arguments."""
  flat, word = options.cost.flat, weight if isinstance(weight, str) else None
  depth = options.depth_at(jnp.int32(1))
  key = (word, options.at_once, options.widths is None, options.depth, *options.rows.key)

  def run(masks: Masks, importance: Masks, limit: Limit | None, weight: Any) -> tuple[jax.Array, jax.Array]:
    def price(alive: jax.Array) -> Priced:
      found = flat.price(alive, limit)
      return found._replace(
        too_much=options.must_go_on(alive, found.too_much, limit is not None, True, depth)
      )

    select = options.selection(price, weight if word is None else word, depth)
    vector = rescaled(flatten(importance).astype(jnp.float32))
    left = select.run(flatten(masks) > 0, vector, jnp.bool_(True), jnp.bool_(False))
    return left.alive.astype(jnp.float32), left.exhausted

  if key not in flat.programs:
    if len(flat.programs) == MOST_KEPT:  # a search over widths must not keep all programs
      flat.programs.pop(next(iter(flat.programs)))
    flat.programs[key] = jax.jit(run)
  return flat.programs[key]


def require_finite(importance: Masks, what: str) -> None:
  """Raise if the importance of a feature is NaN or infinite; tracers pass."""
  if not all(map(is_known, jax.tree.leaves(importance))):
    return
  for name, row in named_rows(jax.tree.map(np.asarray, importance)):
    for feature in np.flatnonzero(~np.isfinite(row))[:1]:
      raise ValueError(
        f"{what} must be finite, got {row[feature]} at feature {feature} of the mask {name}. Look for NaN in the parameters "
        "and the data. To leave a mask alone, pass finite numbers and name it in exclude."
      )
