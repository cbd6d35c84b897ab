"""Which feature goes next."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fisherprune_jax._masks import flatten, unflatten
from fisherprune_jax._types import Masks

State = TypeVar("State")

EPSILON = 1e-6
"""Added to a feature's cost before dividing by it, as the classic optimizer does."""


class Choice(NamedTuple):
  """Masks after a choice; ``chosen`` is one at the feature that went, ``found`` whether there was one."""

  masks: Masks
  chosen: Masks
  found: jax.Array


def rank(signals: Masks, costs: Masks, flops_weight: str | float | jax.Array) -> Masks:
  r"""The score by which features are ranked; the smallest goes first.

  .. math:: signal / (cost + 10^{-6}) \quad\text{or}\quad signal - w \cdot cost

  Args:
    signals: a tree of signals, in nats (or the unit of another criterion).
    costs: a tree of the FLOPs that go with each feature.
    flops_weight: ``"auto"`` for the ratio, or w in nats per FLOP.
  """
  if isinstance(flops_weight, str):
    return jax.tree.map(lambda s, c: s / (c + EPSILON), signals, costs)
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
  chosen = unflatten(hit, masks)
  return Choice(jax.tree.map(lambda m, c: jnp.where(c, jnp.zeros_like(m), m), masks, chosen), chosen, found)


def repeat_while(
  go_on: Callable[[State], jax.Array], step: Callable[[State], State], state: State, times: int
) -> State:
  """Applies ``step`` at most ``times`` times, as long as ``go_on(state)``."""

  def more(carry: tuple[jax.Array, State]) -> jax.Array:
    return (carry[0] < times) & go_on(carry[1])

  def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
    return carry[0] + 1, step(carry[1])

  return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]
