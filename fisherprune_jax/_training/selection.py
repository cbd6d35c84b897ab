"""Selection of the features to mask next."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherprune_jax._cost.flat import Priced
from fisherprune_jax._training.bundles import Rows

Score = Callable[[jax.Array, jax.Array], jax.Array]
"""``score(importance, costs)``; the smallest is masked first."""

EPSILON = 1e-6
"""Added to a feature's cost before division, as in the classic optimizer."""
LARGE = 64
"""Importance above 2**LARGE is scaled down."""


def epsilon_for(dense: float) -> float:
  """The number added to a feature's cost: ``EPSILON``, or less if the dense network costs less than 1.

  >>> epsilon_for(1e9), epsilon_for(0.0)
  (1e-06, 1e-06)
  >>> epsilon_for(1e-3) < 1e-14
  True
  """
  return EPSILON * (EPSILON * dense if 0 < dense < 1 else 1)


def scorer(dense: float, cost_weight: str | float | jax.Array) -> Score:
  r"""The score that ranks features; the smallest is masked first.

  .. math:: importance / (cost + \epsilon) \quad\text{or}\quad importance - w \cdot cost

  Costs are first divided by a power of two near ``dense``, so that small quotients do not underflow; scores are clipped
  to float32.

  Args:
    dense: the cost of the dense network.
    cost_weight: ``"auto"`` for the ratio, or w, such as nats per FLOP.

  >>> import jax.numpy as jnp
  >>> scorer(4e15, "auto")(jnp.array([1e-24, 2e-24]), jnp.array([1e15, 1e15])) > 0
  Array([ True,  True], dtype=bool)
  """
  unit = 2.0 ** math.frexp(dense)[1] if 0 < dense < math.inf else 1.0
  most = jnp.finfo(jnp.float32).max

  def score(importance: jax.Array, costs: jax.Array) -> jax.Array:
    shares = costs / unit
    if isinstance(cost_weight, str):
      found = importance / (shares + epsilon_for(dense) / unit)
    else:
      found = importance - cost_weight * unit * shares
    return jnp.clip(found, -most, most)

  return score


def rescaled(importance: jax.Array) -> jax.Array:
  """Importance, scaled by a power of two if sums and quotients could overflow float32."""
  largest = jnp.max(jnp.where(jnp.isfinite(importance), jnp.abs(importance), 0))
  return jnp.ldexp(importance, -jnp.maximum(jnp.frexp(largest)[1] - LARGE, 0))


class Left(NamedTuple):
  """The result of a selection: the live features, their cost, and whether no feature was left that may be masked."""

  alive: jax.Array
  cost: Priced
  exhausted: jax.Array


class Selection(NamedTuple):
  """How features are selected in one pruning step.

  Attributes:
    rows: the rows of the masks.
    price: ``price(alive)``: the total cost, whether it is too high, and marginal costs.
    score: ranks features and bundles.
    times: how many features may be masked.
    at_once: features masked before the cost is recomputed; halved when the target would be passed, so that the last
      bundle is masked alone.
    depth: the number of residual blocks to keep; None if blocks are features like others.
  """

  rows: Rows
  price: Callable[[jax.Array], Priced]
  score: Score
  times: int
  at_once: int
  depth: jax.typing.ArrayLike | None = None

  def run(self, alive: jax.Array, importance: jax.Array, due: jax.Array, exhausted: jax.Array) -> Left:
    """Mask features while the cost is too high; the loop has one call of ``price``, as that is most of the program.

    Args:
      alive: the live features, of all masks concatenated.
      importance: of each feature; if it is not finite, the feature is kept.
      due: whether features may be masked.
      exhausted: the value to keep if no feature is tried.
    """
    times, at_once = (min(n, importance.size) for n in (self.times, self.at_once))

    def more(iteration: _Iteration) -> jax.Array:
      return iteration.more

    def body(iteration: _Iteration) -> _Iteration:
      cost = self.price(iteration.tried)
      # The first iteration only prices the initial masks.
      fits = iteration.first | (iteration.size <= 1) | cost.too_much
      left = Left(
        iteration.tried,
        cost,
        jnp.where(iteration.first, exhausted & ~(due & cost.too_much), iteration.going == 0),
      )
      left = jax.tree.map(lambda x, y: jnp.where(fits, x, y), left, iteration.left)
      gone = iteration.gone + jnp.where(fits, iteration.going, 0)
      size = jnp.where(fits, iteration.size, jnp.maximum(iteration.size // 2, 1))
      hit = self._next(left.alive, importance, left.cost.drops, jnp.minimum(size, times - gone), at_once)
      again = due & left.cost.too_much & (gone < times) & ~left.exhausted
      count = jnp.sum(hit, dtype=jnp.int32)
      return _Iteration(left, gone, size, left.alive & ~hit, count, jnp.bool_(False), again)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self.price, alive))
    left, zero, on = Left(alive, nothing, exhausted), jnp.int32(0), jnp.bool_(True)
    start = _Iteration(left, zero, jnp.int32(at_once), alive, zero, on, on)
    return jax.lax.while_loop(more, body, start).left

  def _next(
    self, alive: jax.Array, importance: jax.Array, cost: jax.Array, count: jax.Array, most: int
  ) -> jax.Array:
    """The next features to mask: at least one bundle, and more up to ``count`` features.

    A *bundle* brings all rows of a tied group to the next smaller width; its score is that of its summed importance and
    costs. A mask loses one bundle, or as many single features as it can spare. Ties go to the first mask in tree order,
    then to the lowest index.
    """
    rows, score = self.rows, self.score
    scores = score(importance, cost)
    can_go = alive & jnp.isfinite(importance) & jnp.isfinite(scores)
    if rows.exact.any():  # exact widths come first, so that other masks keep more
      owed = rows.owed(alive)
      can_go &= owed | ~jnp.any(owed)
    if self.depth is not None:
      # Blocks come first, one at a time: as long as there are too many, their number is the budget.
      surplus = rows.surplus(alive, self.depth)
      too_deep = jnp.any(surplus)
      can_go = jnp.where(too_deep, alive & surplus & jnp.isfinite(importance), can_go & ~rows.is_block())
      scores = jnp.where(too_deep, importance, scores)
      cost, count = jnp.where(too_deep, 0, cost), jnp.where(too_deep, 1, count)
    scores = jnp.where(can_go, scores, jnp.inf)
    if rows.are_single:
      return _singles(scores, alive, rows, count, most)
    taken = rows.places(scores) < rows.next_bundle(alive)
    size, price, merit = (
      rows.add_up(jnp.where(taken, x, 0)) for x in (jnp.ones_like(scores), cost, importance)
    )
    ready = rows.all_of(can_go | ~taken) & rows.all_ready(alive)
    merit = jnp.where(ready, score(merit, price), jnp.inf)
    order = jnp.argsort(merit, stable=True)
    goes = _as_many_as(size[order], count) & jnp.isfinite(merit[order])
    return taken & jnp.zeros(merit.size, bool).at[order].set(goes)[rows.unit]


class _Iteration(NamedTuple):
  """The state between two iterations.

  Attributes:
    left: the last accepted result.
    gone: number of features masked.
    size: number of features to try next.
    tried: the next trial: its live features.
    going: number of features that it masks.
    first: whether it is the first iteration.
    more: whether to continue.
  """

  left: Left
  gone: jax.Array
  size: jax.Array
  tried: jax.Array
  going: jax.Array
  first: jax.Array
  more: jax.Array


def _singles(scores: jax.Array, alive: jax.Array, rows: Rows, count: jax.Array, most: int) -> jax.Array:
  """The lowest-scored features that their rows can spare, among the ``most`` lowest."""
  spare = rows.spare(alive)
  if most == 1:
    scores = jnp.where(spare > 0, scores, jnp.inf)
    first = jnp.argmin(scores)  # of ties
    return (jnp.arange(scores.size) == first) & jnp.isfinite(scores[first])
  lowest, at = jax.lax.top_k(-jnp.where(spare > 0, scores, jnp.inf), min(most, scores.size))
  goes = jnp.isfinite(lowest) & (rows.earlier(at) < spare[at])
  goes &= _as_many_as(goes.astype(jnp.float32), count)
  return jnp.zeros(scores.size, bool).at[at].set(goes)


def _as_many_as(sizes: jax.Array, count: jax.Array) -> jax.Array:
  """Whether each bundle, in order, fits into ``count`` features in total; the first always does."""
  return (jnp.arange(sizes.size) == 0) | (jnp.cumsum(sizes) <= count)
