"""What is live in every iteration: a fixpoint over carried values."""

import functools
from collections.abc import Sequence
from typing import Any

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.boxes import Where, join, nowhere, whole, whole_box
from fisherprune_jax._graph.facts import Info, either, info_of
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Program

MOST_PASSES, EXACT_PASSES = 12, 4
"""Passes until values that still grow are carried whole, and until their conditions are dropped."""


def forward(
  body: Program,
  consts: Sequence[Info],
  init: Sequence[Info],
  each: Sequence[Info],
  live: Liveness,
  again: bool = True,
) -> tuple[list[Info], list[Info]]:
  """What is known of carried values before any iteration, and of the body's outputs."""
  # Initial zeros add nothing to where values may be non-zero.
  carried = [info_of(i.nonzero, i.varies) for i in init]
  for iteration in range(MOST_PASSES):
    outs = live.forward(body, [*consts, *carried, *each])
    grown = list(map(either if again else _as_carried, carried, outs))
    if iteration >= EXACT_PASSES:
      grown = [info._replace(when=sets.ALWAYS) for info in grown]
    if grown == carried:  # sets are interned, so equal ones are the same object
      return carried, outs
    carried = grown
  carried = [Info(whole_box(_shape(info)), varies=info.varies) for info in carried]
  return carried, live.forward(body, [*consts, *carried, *each])


def _as_carried(before: Info, after: Info) -> Info:
  """A single iteration still counts as a loop, where iterations depend on others."""
  return before._replace(varies=before.varies or after.varies)


def _shape(info: Info) -> list[Any]:
  return [s.size for s in info.possible]


def backward(
  body: Program, consts: int, carry: int, demanded: list[Where | None], live: Liveness, again: bool = True
) -> list[Where | None]:
  """Demands the outputs of every iteration; carried ones are the next one's inputs.

  Returns the demand on carried values, before or after iterations.
  """
  inputs = body.inputs[consts : consts + carry]
  for iteration in range(MOST_PASSES):
    live.backward(body, demanded)
    before = list(demanded)
    for at, inner in enumerate(inputs):
      if inner in live.demanded:
        joined = join(demanded[at] or nowhere(inner.shape), live.stored(inner))
        demanded[at] = joined._replace(when=sets.ALWAYS) if iteration >= EXACT_PASSES else joined
    if demanded == before or not again:
      return demanded[:carry]
  everything = [whole(inner.shape) for inner in inputs]
  live.backward(body, [*everything, *demanded[carry:]])
  return list(everything)


def carried(node: Node, body: Program, consts: int, carry: int, live: Liveness) -> list[Where]:
  """What is carried between iterations."""
  return [
    functools.reduce(join, (live.stored(inner), live.stored(after), live.stored(out)))
    for inner, after, out in zip(body.inputs[consts:][:carry], body.outputs, node.outs, strict=False)
  ]
