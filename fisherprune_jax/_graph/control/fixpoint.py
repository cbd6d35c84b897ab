"""What is live in every turn of a loop: a fixpoint over the values that turns hand on."""

from collections.abc import Sequence
from typing import Any

from fisherprune_jax._graph.facts import (
  Box,
  Info,
  either,
  empty_box,
  join,
  join_merged,
  nonzero_box,
  whole_box,
)
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Program
from fisherprune_jax._graph.together import Together

MOST_PASSES = 8
"""Passes over a loop's body before carried values that still grow are taken as a whole."""


def forward(
  body: Program,
  consts: Sequence[Info],
  init: Sequence[Info],
  each: Sequence[Info],
  live: Liveness,
  again: bool = True,
) -> tuple[list[Info], list[Info]]:
  """What is known of the carried values before any turn, and of the body's outputs."""
  # A value that starts as zeros says nothing of where it can be non-zero.
  carried = [Info(nonzero_box(i), varies=i.varies, together={} if i.is_zero else i.together) for i in init]
  for _ in range(MOST_PASSES):
    outs = live.forward(body, [*consts, *carried, *each])
    grown = list(map(either if again else _as_carried, carried, outs))
    if grown == carried:  # sets are interned, so equal ones are the same object
      return carried, outs
    carried = grown
  carried = [Info(whole_box(_shape(info)), varies=info.varies) for info in carried]
  return carried, live.forward(body, [*consts, *carried, *each])


def _as_carried(before: Info, after: Info) -> Info:
  """What is known before the only turn: it counts as a loop all the same, of which one turn hangs on another."""
  return before._replace(varies=before.varies or after.varies)


def _shape(info: Info) -> list[Any]:
  return [s.size for s in info.possible]


def backward(
  body: Program,
  consts: int,
  carry: int,
  asked: list[Box | None],
  merged: list[Together],
  live: Liveness,
  again: bool = True,
) -> list[Together]:
  """Asks for the outputs of every turn, the carried ones being the inputs of the next.

  Returns what is asked of several axes merged of what the first turn is given.
  """
  inputs = body.inputs[consts : consts + carry]
  for _ in range(MOST_PASSES):
    live.backward(body, asked, merged)
    before = list(asked), list(merged)
    for at, inner in enumerate(inputs):
      if inner in live.asked:
        so_far = asked[at] or empty_box(inner.shape), merged[at]
        asked[at], merged[at] = join_merged(so_far, (live.stored(inner), live.asked_together[inner]))
    if (asked, merged) == before or not again:
      return merged[:carry]
  whole = [whole_box(inner.shape) for inner in inputs]
  live.backward(body, [*whole, *asked[carry:]])
  return [{}] * carry


def carried(node: Node, body: Program, consts: int, carry: int, live: Liveness) -> list[Box]:
  """What is kept of the carried values between turns."""
  return [
    join(live.stored(inner), live.stored(after), live.stored(out))
    for inner, after, out in zip(body.inputs[consts:][:carry], body.outputs, node.outs, strict=False)
  ]
