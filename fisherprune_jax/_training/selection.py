"""Which features go next."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherprune_jax._cost.flat import Priced
from fisherprune_jax._training.bundles import Rows

Score = Callable[[jax.Array, jax.Array], jax.Array]
"""``score(importance, costs)``; the smallest goes first."""

EPSILON = 1e-6
"""Added to a feature's cost before dividing by it, as the classic optimizer does."""
LARGE = 64
"""The power of two up to which importance is taken as it is."""


def epsilon_for(dense: float) -> float:
  """What is added to a feature's cost, next to nothing of it: less than ``EPSILON`` where a whole network costs less than one.

  >>> epsilon_for(1e9), epsilon_for(0.0)
  (1e-06, 1e-06)
  >>> epsilon_for(1e-3) < 1e-14
  True
  """
  return EPSILON * (EPSILON * dense if 0 < dense < 1 else 1)


def scorer(dense: float, cost_weight: str | float | jax.Array) -> Score:
  r"""The score by which features are ranked; the smallest goes first.

  .. math:: importance / (cost + \epsilon) \quad\text{or}\quad importance - w \cdot cost

  Costs are divided by the power of two next to ``dense``. That changes no digit of a score, but a small importance over a
  large cost is not lost. What is too large for a float32 is the largest one.

  Args:
    dense: the cost of the whole network.
    cost_weight: ``"auto"`` for the ratio, or w in nats (or the unit of another criterion) per FLOP (or another unit).

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


def tamed(importance: jax.Array) -> jax.Array:
  """Importance as they are; those of which sums and quotients would be too large for a float32, over a power of two."""
  largest = jnp.max(jnp.where(jnp.isfinite(importance), jnp.abs(importance), 0))
  return jnp.ldexp(importance, -jnp.maximum(jnp.frexp(largest)[1] - LARGE, 0))


class Left(NamedTuple):
  """What a selection leaves.

  Attributes:
    alive: which features are.
    cost: what they cost.
    exhausted: whether nothing was left that may go.
  """

  alive: jax.Array
  cost: Priced
  exhausted: jax.Array


class Selection(NamedTuple):
  """How features are selected, from start to end of one prune.

  Attributes:
    rows: how the features lie in rows, and which go together.
    price: ``price(alive)``, what features cost, and whether that is too much.
    score: of features, and of what goes together.
    times: how many may go.
    at_once: how many to try at once. Where that leads so far that none would have to go any more, it is halved, so that
      the last bundle goes alone.
  """

  rows: Rows
  price: Callable[[jax.Array], Priced]
  score: Score
  times: int
  at_once: int

  def run(self, alive: jax.Array, importance: jax.Array, due: jax.Array, exhausted: jax.Array) -> Left:
    """Selects for as long as features cost too much. Programs hold what prices them once: it is most of them.

    Args:
      alive: which features are, of all masks end to end.
      importance: of each; where one is not finite its feature stays.
      due: whether features may go at all.
      exhausted: whether nothing was left that may go when that was last tried; so it stays if nothing is tried.
    """
    times, at_once = (min(n, importance.size) for n in (self.times, self.at_once))

    def more(turn: _Turn) -> jax.Array:
      return turn.more

    def body(turn: _Turn) -> _Turn:
      cost = self.price(turn.tried)
      # At first, what is tried is what there is, which is too much or not.
      fits = turn.first | (turn.size <= 1) | cost.too_much
      left = Left(
        turn.tried, cost, jnp.where(turn.first, exhausted & ~(due & cost.too_much), turn.going == 0)
      )
      left = jax.tree.map(lambda x, y: jnp.where(fits, x, y), left, turn.left)
      gone = turn.gone + jnp.where(fits, turn.going, 0)
      size = jnp.where(fits, turn.size, jnp.maximum(turn.size // 2, 1))
      hit = self._next(left.alive, importance, left.cost.drops, jnp.minimum(size, times - gone), at_once)
      again = due & left.cost.too_much & (gone < times) & ~left.exhausted
      count = jnp.sum(hit, dtype=jnp.int32)
      return _Turn(left, gone, size, left.alive & ~hit, count, jnp.bool_(False), again)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self.price, alive))
    left, zero, on = Left(alive, nothing, exhausted), jnp.int32(0), jnp.bool_(True)
    start = _Turn(left, zero, jnp.int32(at_once), alive, zero, on, on)
    return jax.lax.while_loop(more, body, start).left

  def _next(
    self, alive: jax.Array, importance: jax.Array, cost: jax.Array, count: jax.Array, most: int
  ) -> jax.Array:
    """Which features go next: at least one bundle, and further ones as long as they come to no more than ``count``.

    A *bundle* is what goes together: the features that bring a mask to the next smaller width that it may have, of all rows
    that keep equal widths. Its score is that of its importance and costs added up. A mask loses one bundle at most, or as
    many single features as it can spare. Ties go to the first mask in tree order, then to the lowest index.
    """
    rows, score = self.rows, self.score
    scores = score(importance, cost)
    can_go = alive & jnp.isfinite(importance) & jnp.isfinite(scores)
    if rows.exact.any():  # what has to go in any case goes first, so that others stay
      owed = rows.owed(alive)
      can_go &= owed | ~jnp.any(owed)
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


class _Turn(NamedTuple):
  """Between two choices.

  Attributes:
    left: what fits so far.
    gone: how many features went.
    size: how many to try at once.
    tried: what to try next.
    going: how many features go for it.
    first: whether that is where it began.
    more: whether to go on.
  """

  left: Left
  gone: jax.Array
  size: jax.Array
  tried: jax.Array
  going: jax.Array
  first: jax.Array
  more: jax.Array


def _singles(scores: jax.Array, alive: jax.Array, rows: Rows, count: jax.Array, most: int) -> jax.Array:
  """The features of the smallest scores, without those that their rows cannot spare; no more than ``most`` are looked at."""
  spare = rows.spare(alive)
  if most == 1:
    scores = jnp.where(spare > 0, scores, jnp.inf)
    first = jnp.argmin(scores)  # of equals
    return (jnp.arange(scores.size) == first) & jnp.isfinite(scores[first])
  lowest, at = jax.lax.top_k(-jnp.where(spare > 0, scores, jnp.inf), min(most, scores.size))
  goes = jnp.isfinite(lowest) & (rows.earlier(at) < spare[at])
  goes &= _as_many_as(goes.astype(jnp.float32), count)
  return jnp.zeros(scores.size, bool).at[at].set(goes)


def _as_many_as(sizes: jax.Array, count: jax.Array) -> jax.Array:
  """Which of some bundles, in this order, come to no more than a number of features; the first does in any case."""
  return (jnp.arange(sizes.size) == 0) | (jnp.cumsum(sizes) <= count)
