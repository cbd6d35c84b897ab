"""Which features go next."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fisherprune_jax._masks import flatten, unflatten
from fisherprune_jax._training.bundles import Rows
from fisherprune_jax._types import Masks

State = TypeVar("State")
Score = Callable[[Masks, Masks], Masks]
"""``score(signals, costs)``; the smallest goes first."""

EPSILON = 1e-6
"""Added to a feature's cost before dividing by it, as the classic optimizer does."""


class Choice(NamedTuple):
  """Masks after a choice; ``chosen`` is one at the features that went, ``found`` whether there were any."""

  masks: Masks
  chosen: Masks
  found: jax.Array


def epsilon_for(dense: float) -> float:
  """What is added to a feature's cost, next to nothing of it: less than ``EPSILON`` where a whole network costs less than one.

  >>> epsilon_for(1e9), epsilon_for(0.0)
  (1e-06, 1e-06)
  >>> epsilon_for(1e-3) < 1e-14
  True
  """
  return EPSILON * (EPSILON * dense if 0 < dense < 1 else 1)


def rank(
  signals: Masks, costs: Masks, flops_weight: str | float | jax.Array, epsilon: float = EPSILON
) -> Masks:
  r"""The score by which features are ranked; the smallest goes first.

  .. math:: signal / (cost + \epsilon) \quad\text{or}\quad signal - w \cdot cost

  Args:
    signals: a tree of signals, in nats (or the unit of another criterion).
    costs: a tree of what goes with each feature, in FLOPs or another unit.
    flops_weight: ``"auto"`` for the ratio, or w in nats per FLOP.
    epsilon: see ``epsilon_for``.
  """
  if isinstance(flops_weight, str):
    return jax.tree.map(lambda s, c: s / (c + epsilon), signals, costs)
  return jax.tree.map(lambda s, c: s - flops_weight * c, signals, costs)


def prune_one(masks: Masks, scores: Masks, floors: Masks) -> Choice:
  """Switches off the live feature with the smallest score, if some mask can spare one.

  Ties go to the first mask in tree order, then to the lowest index. A score that is not finite never goes.

  Args:
    masks: a tree of masks ``(..., C)``.
    scores: a tree like it.
    floors: how many features each mask (each row of a stack) keeps, a tree with leaves ``(..., 1)``.
  """

  def eligible(mask: jax.Array, score: jax.Array, floor: jax.Array) -> jax.Array:
    spare = jnp.sum(mask, axis=-1, keepdims=True) > floor
    return (mask > 0) & spare & jnp.isfinite(score)

  can_go = flatten(jax.tree.map(eligible, masks, scores, floors))
  ranked = jnp.where(can_go, flatten(scores), jnp.inf)
  found = jnp.any(can_go)
  # Where all that can go is finite, argmin takes the first of the smallest: the tie rule.
  hit = (jnp.arange(ranked.size) == jnp.argmin(ranked)) & found
  return _without(masks, hit)


def prune_some(
  masks: Masks, signals: Masks, costs: Masks, score: Score, rows: Rows, count: jax.Array, most: int
) -> Choice:
  """Switches off at least one bundle, and further ones as long as they come to no more than ``count`` features.

  A *bundle* is what goes together: the features that bring a mask to the next smaller width that it may have, of all rows
  that keep equal widths. Its score is that of its signals and costs added up. A mask loses one bundle at most, or as many
  single features as it can spare.

  Args:
    masks: a tree of masks ``(..., C)``.
    signals: a tree like it; where one is not finite its feature stays.
    costs: a tree like it.
    score: of features, and of what goes together.
    rows: how the features lie in rows, and which go together.
    count: how many features may go.
    most: the largest that ``count`` can be.
  """
  alive, signal, cost = flatten(masks) > 0, flatten(signals), flatten(costs)
  scores = score(signal, cost)
  can_go = alive & jnp.isfinite(signal) & jnp.isfinite(scores)
  scores = jnp.where(can_go, scores, jnp.inf)
  if rows.are_single:
    return _without(masks, _singles(scores, alive, rows, count, most))
  taken = rows.places(scores) < rows.next_bundle(alive)
  size, price, merit = (rows.add_up(jnp.where(taken, x, 0)) for x in (jnp.ones_like(scores), cost, signal))
  ready = rows.all_of(can_go | ~taken) & rows.all_ready(alive)
  merit = jnp.where(ready, score(merit, price), jnp.inf)
  order = jnp.argsort(merit, stable=True)
  goes = _as_many_as(size[order], count) & jnp.isfinite(merit[order])
  return _without(masks, taken & jnp.zeros(merit.size, bool).at[order].set(goes)[rows.unit])


def _singles(scores: jax.Array, alive: jax.Array, rows: Rows, count: jax.Array, most: int) -> jax.Array:
  """The features of the smallest scores, without those that their rows cannot spare; no more than ``most`` are looked at."""
  spare = rows.spare(alive)
  lowest, at = jax.lax.top_k(-jnp.where(spare > 0, scores, jnp.inf), min(most, scores.size))
  goes = jnp.isfinite(lowest) & (rows.earlier(at) < spare[at])
  goes &= _as_many_as(goes.astype(jnp.float32), count)
  return jnp.zeros(scores.size, bool).at[at].set(goes)


def _as_many_as(sizes: jax.Array, count: jax.Array) -> jax.Array:
  """Which of some bundles, in this order, come to no more than a number of features; the first does in any case."""
  return (jnp.arange(sizes.size) == 0) | (jnp.cumsum(sizes) <= count)


def _without(masks: Masks, hit: jax.Array) -> Choice:
  chosen = unflatten(hit, masks)
  return Choice(
    jax.tree.map(lambda m, c: jnp.where(c, jnp.zeros_like(m), m), masks, chosen), chosen, jnp.any(hit)
  )


def repeat_while(
  go_on: Callable[[State], jax.Array], step: Callable[[State], State], state: State, times: int
) -> State:
  """Applies ``step`` at most ``times`` times, as long as ``go_on(state)``."""

  def more(carry: tuple[jax.Array, State]) -> jax.Array:
    return (carry[0] < times) & go_on(carry[1])

  def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
    return carry[0] + 1, step(carry[1])

  return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]


def repeat_in_steps(
  go_on: Callable[[State], jax.Array],
  step: Callable[[State, jax.Array], tuple[State, jax.Array]],
  state: State,
  times: int,
  at_once: int,
) -> State:
  """Lets features go several at once, and fewer where that would be too many, as long as ``go_on(state)``.

  Args:
    go_on: whether features have to go.
    step: ``step(state, count)``, the state without ``count`` more, and how many they are; one bundle at least.
    state: where to begin.
    times: how many may go.
    at_once: how many to try at once. Where that leads so far that none would have to go any more, it is halved, so that
      the last bundle goes alone.
  """

  def more(carry: tuple[jax.Array, jax.Array, State]) -> jax.Array:
    gone, _, state = carry
    return (gone < times) & go_on(state)

  def body(carry: tuple[jax.Array, jax.Array, State]) -> tuple[jax.Array, jax.Array, State]:
    gone, size, state = carry
    tried, went = step(state, jnp.minimum(size, times - gone))
    fits = (size <= 1) | go_on(tried)
    state = jax.tree.map(lambda new, old: jnp.where(fits, new, old), tried, state)
    return gone + jnp.where(fits, went, 0), jnp.where(fits, size, jnp.maximum(size // 2, 1)), state

  return jax.lax.while_loop(more, body, (jnp.int32(0), jnp.int32(at_once), state))[2]
