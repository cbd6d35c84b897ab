"""The options of ``fisher_prune``: defaults, kinds (``Fixed`` or ``Number``) and checks, in the table ``Options``."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.flat import Priced
from fisherprune_jax._errors import describe, is_number, is_traced, require, warn
from fisherprune_jax._masks import check_masks
from fisherprune_jax._training.bundles import Multiple, Rows, rows_of
from fisherprune_jax._training.criteria import DEFAULT, criterion_of
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.floors import MinFeatures, Widths, check_floors, floors_of
from fisherprune_jax._training.selection import Selection, scorer
from fisherprune_jax._types import AxisNames, Masks

RECOSTS = 2048
"""How often the cost is recomputed, at least, while all features of a large network are masked."""
INJECTED = "or use fp.inject_hyperparams."


@dataclasses.dataclass(frozen=True)
class Fixed:
  """A Python value, known when the transformation is made; ``check(name, value)`` raises if it is invalid."""

  check: Callable[[str, Any], Any] = lambda name, value: None


@dataclasses.dataclass(frozen=True)
class Number:
  """A number, a schedule of the step, or a hyperparameter that is set between steps.

  Attributes:
    allows: whether a number or array is in range.
    range: the range in words.
    word: a valid string; it is fixed.
    remedy: advice in errors.
  """

  allows: Callable[[Any], Any]
  range: str
  word: str | None = None
  remedy: str = ""

  def check(self, name: str, value: Any) -> None:
    """Raise unless a value is in range; tracers pass, schedules are tried at step 1."""
    if getattr(value, "dtype", None) in (jnp.float16, jnp.bfloat16):
      raise TypeError(
        f"{name} must have at least the precision of float32, got {describe(value)}. Under "
        f"optax.inject_hyperparams pass hyperparam_dtype=jnp.float32 (beside static_args), {INJECTED}"
      )
    if isinstance(value, str) and self.word is not None:
      require(value == self.word, f"{name} must be {self.range}", value)
    elif callable(value):
      self.check_scheduled(name, value(jnp.ones([], jnp.int32)), "step 1")
    elif not is_traced(value):
      if not is_number(value):
        raise TypeError(f"{name} must be {self.range}, or a schedule of the step, got {describe(value)}.")
      require(bool(self.allows(value)), f"{name} must be {self.range}", value, self.remedy)

  def check_scheduled(self, name: str, value: Any, when: str) -> None:
    """Raise unless a schedule's value is a number in range; tracers pass."""
    what = f"{name} as a schedule must be {self.range} at every step"
    if jnp.shape(value) != ():
      raise ValueError(f"{what}, got {describe(value)} at {when}.")
    if not is_traced(value):
      remedy = f" {self.remedy}" if self.remedy else ""
      require(bool(self.allows(value)), what, float(value), f"That was at {when}.{remedy}")


def _is_decay(decay: Any) -> Any:
  """Whether a decay is in range in float32, like the running mean."""
  single = decay.astype(jnp.float32) if is_traced(decay) else np.asarray(decay, np.float32)
  return (single >= 0) & (single < 1)


DECAY = Number(_is_decay, "in [0, 1)", remedy="It is a float32 number: 0.9999999 at most.")
COST_WEIGHT = Number(lambda w: w == w, "'auto', a number or a schedule", word="auto")
TARGET = Number(lambda t: t >= 0, "a number in the unit of the cost, at least 0")


def _cost(name: str, value: Any) -> None:
  if not isinstance(value, CostModel):
    raise TypeError(
      f"{name} must be a CostModel, got {describe(value)}. Build one with fp.cost_model or CostModel.from_functions. "
      f"Under optax.inject_hyperparams name it in static_args, {INJECTED}"
    )
  require(bool(jax.tree.leaves(value.masks)), f"{name} must be a cost of at least one mask", value.masks)


def _integer(least: int, optional: bool = False) -> Callable[[str, Any], None]:
  def check(name: str, value: Any) -> None:
    if value is None and optional:
      return
    if isinstance(value, bool) or not isinstance(value, int):
      raise TypeError(
        f"{name} must be a Python int, got {describe(value)}. Under optax.inject_hyperparams name it in "
        f"static_args (and pass hyperparam_dtype=jnp.float32), {INJECTED}"
      )
    require(value >= least, f"{name} must be at least {least}", value)

  return check


def _patterns(name: str, value: Any) -> None:
  if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(p, str) for p in value):
    raise TypeError(
      f"{name} must be a list of glob patterns of mask names, such as ['conv*'], got {value!r}."
    )


def _warn_of_fraction(cost: CostModel, target: Any) -> None:
  """Warn of a target below 1 for a large cost, probably a fraction."""
  if is_number(target) and not is_traced(target) and 0 < target < 1 and cost.dense > 1000:
    warn(
      f"A target of {float(target):g} {cost.unit} is far below the dense cost of {cost.dense:,.0f}. For a "
      f"fraction, pass target={float(target):g} * cost.dense."
    )


def _method(name: str, value: Any) -> None:
  criterion_of(value, name)


def _depth(name: str, value: Any) -> None:
  """A schedule is known only in training."""
  if not callable(value):
    _integer(least=0, optional=True)(name, value)


def _flag(name: str, value: Any) -> None:
  if not isinstance(value, bool | np.bool_ | int):
    raise TypeError(f"{name} must be True or False, got {describe(value)}.")


def _name(name: str, value: Any) -> None:
  """Names become parts of a path."""
  if value is not None and (not isinstance(value, str) or not value or "/" in value):
    raise ValueError(f"{name} must be a string without '/', such as 'generator', or None, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class Options:
  """The checked options of one transformation."""

  cost: Annotated[CostModel, Fixed(_cost)]
  prune_every: Annotated[int, Fixed(_integer(least=1))] = 100
  burn_in: Annotated[int, Fixed(_integer(least=0))] = 0
  decay: Annotated[optax.ScalarOrSchedule, DECAY] = 0.96
  cost_weight: Annotated[str | optax.ScalarOrSchedule, COST_WEIGHT] = "auto"
  target: Annotated[optax.ScalarOrSchedule, TARGET] = 0.0
  method: Annotated[str | Criterion, Fixed(_method)] = DEFAULT
  debias: Annotated[bool, Fixed(_flag)] = True
  features_per_prune: Annotated[int, Fixed(_integer(least=1))] = 1
  min_features: Annotated[MinFeatures, Fixed()] = 1
  exclude: Annotated[Sequence[str], Fixed(_patterns)] = ()
  # None rather than 1: Optax would treat a number as a hyperparameter.
  multiple_of: Annotated[Multiple | None, Fixed()] = None
  tie: Annotated[Sequence[str], Fixed(_patterns)] = ()
  widths: Annotated[Widths | None, Fixed()] = None
  depth: Annotated[int | optax.Schedule | None, Fixed(_depth)] = None
  recost_every: Annotated[int | None, Fixed(_integer(least=1, optional=True))] = None
  axis_name: Annotated[AxisNames, Fixed()] = None
  masks: Annotated[Masks | None, Fixed()] = None
  name: Annotated[str | None, Fixed(_name)] = None

  def __post_init__(self) -> None:
    for name, kind in KINDS.items():
      kind.check(name, getattr(self, name))
    _warn_of_fraction(self.cost, self.target)
    _ = (
      self.rows,
      self.criterion,
    )  # raise if rows do not fit the masks, or the criterion the cost
    if self.depth is not None:
      self._check_depth(self.depth)
    if self.masks is not None:
      check_masks(self.masks, self.cost.masks, "the cost model")
      check_floors(self.masks, floors_of(self.cost.masks, self.min_features, widths=self.widths))

  def _check_depth(self, depth: int | optax.Schedule) -> None:
    """Raise unless the number of residual blocks can come down to a depth."""
    blocks = self.rows.blocks
    floors = self.rows.floors[blocks]
    if not floors.size:
      raise ValueError(
        f"depth={depth} needs masks of residual blocks, got a cost without any. Pass blocks=True to fp.Pruner or fp.auto_mask."
      )
    if callable(depth):
      return
    require(
      depth <= floors.size, f"depth must be at most {floors.size}, the number of residual blocks", depth
    )
    kept = int(np.sum(floors))
    require(
      depth >= kept, f"depth must be at least {kept}, the blocks that min_features and exclude keep", depth
    )
    left = floors.size - int(np.sum(self.rows.exact[blocks] & (floors == 0)))
    require(depth <= left, f"depth must be at most {left}, the blocks that widths leaves", depth)

  @functools.cached_property
  def floors(self) -> Masks:
    return floors_of(self.cost.masks, self.min_features, self.exclude, self.widths)

  @functools.cached_property
  def rows(self) -> Rows:
    multiple_of = 1 if self.multiple_of is None else self.multiple_of
    return rows_of(self.cost.masks, self.floors, multiple_of, self.tie, self.widths or {})

  def selection(self, price: Callable[[jax.Array], Priced], weight: Any, depth: Any = None) -> Selection:
    score = scorer(self.cost.dense, weight)
    return Selection(self.rows, price, score, self.features_per_prune, self.at_once, depth)

  def depth_at(self, step: jax.Array) -> Any:
    """The number of residual blocks to keep at a step, or None."""
    return self.depth(step) if callable(self.depth) else self.depth

  @property
  def at_once(self) -> int:
    """How many features are masked before the cost is recomputed."""
    if self.recost_every is not None:
      return self.recost_every
    return max(1, min(self.features_per_prune, int(self.rows.starts[-1])) // RECOSTS)

  def is_settled(self, target: Any, step: jax.Array) -> Any:
    """Whether the target has stopped falling; exact widths wait for that."""
    waits = self.widths is not None and callable(self.target)
    return self.at("target", step + 1) >= target if waits else True

  def must_go_on(self, alive: jax.Array, above: Any, has_target: Any, settled: Any, depth: Any) -> jax.Array:
    """Whether more features have to be masked.

    Args:
      alive: the live features, of all masks concatenated.
      above: whether the cost is above the target.
      has_target: without a target, all features may be masked, or only those of ``widths`` and ``depth``.
      settled: see ``is_settled``.
      depth: see ``depth_at``.
    """
    if self.widths is None and depth is None:
      return above | jnp.logical_not(has_target)
    more = (above & has_target) | (settled & jnp.any(self.rows.owed(alive)))
    return more if depth is None else more | jnp.any(self.rows.surplus(alive, depth))

  @functools.cached_property
  def criterion(self) -> Criterion:
    return criterion_of(self.method, cost=self.cost)

  def at(self, name: str, step: jax.Array) -> Any:
    """The value of an option, or of its schedule at a step."""
    value, kind = getattr(self, name), KINDS[name]
    if isinstance(kind, Number) and callable(value):
      value = value(step)
      kind.check_scheduled(name, value, f"step {step}")
    return value


KINDS: dict[str, Fixed | Number] = {
  name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()
}


def is_static(name: str, value: Any) -> bool:
  """Whether an option cannot be set between steps."""
  return isinstance(KINDS.get(name), Fixed) or (name in KINDS and (value is None or isinstance(value, str)))
