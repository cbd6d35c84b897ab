"""Calibration batches on their way through a network: each keeps the values that are final, and that something still reads.

A value is final if no product before it waits to be refitted. What is kept of all batches is one cut through the network,
or the arguments alone where a cut would take more than ``MOST_BYTES``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.consumers import Consumer
from fisherprune_jax._reconstruction.flat import Compiled, Flat
from fisherprune_jax._reconstruction.settling import settling
from fisherprune_jax._types import PyTree

MOST_BYTES = 2 << 30
"""Of what is held of all batches at a time."""


class Part(NamedTuple):
  """``fn(constant, arrays[number])`` computes values of a batch."""

  fn: Callable[[list[Any], list[Any]], list[Any]]
  constant: list[Any]
  arrays: list[list[Any]]


@dataclass(eq=False)
class Frontier:
  """The values that all batches hold, of one network.

  Attributes:
    flat: the network.
    batches: the leaves of the arguments of each batch.
    kept: the values that are held.
    held: their arrays, batch by batch.
  """

  flat: Flat
  batches: list[list[jax.Array]]
  compiled: Compiled
  kept: list[Value] = field(default_factory=list)
  held: list[list[jax.Array]] = field(default_factory=list)

  def __post_init__(self) -> None:
    self._to_arguments()

  def _to_arguments(self) -> None:
    self.kept, self.held = self.flat.arguments, list(self.batches)

  def move(self, variables: PyTree, kept: Sequence[Value]) -> None:
    """Goes on to other values that are final with these variables."""
    kept = list(dict.fromkeys(kept))
    size = sum(value.aval.size * value.aval.dtype.itemsize for value in kept) * len(self.batches)
    if size > MOST_BYTES:
      self._to_arguments()
      return
    read = self.reader(variables, kept)
    self.held = [read(at) for at in range(len(self.batches))]
    self.kept = kept

  def part(self, variables: PyTree, targets: Sequence[Value]) -> Part:
    """What computes some values of those that are held."""
    flat, env = self.flat, self.flat.env(variables)
    positions, read = flat.before(targets, [*self.kept, *env])
    own = [value for value in read if value not in self.kept]
    mine = [value for value in read if value in self.kept]
    places = [self.kept.index(value) for value in mine]

    def fn(constant: list[Any], arrays: list[Any]) -> list[Any]:
      found = flat.run(positions, dict(zip([*own, *mine], [*constant, *arrays], strict=True)))
      return [found[value] for value in targets]

    return Part(fn, [env[value] for value in own], [[held[at] for at in places] for held in self.held])

  def reader(self, variables: PyTree, targets: Sequence[Value]) -> Callable[[int], list[Any]]:
    """A function from the number of a batch to the arrays of some values."""
    fn, constant, arrays = self.part(variables, targets)
    run = self.compiled(fn, constant, arrays[0])
    return lambda number: run(constant, arrays[number])


def final_values(flat: Flat, pending: Sequence[Consumer]) -> list[Value]:
  """The values that are final before some consumers, and that what is not final reads."""
  waiting = {use.at for consumer in pending for use in consumer.uses}
  ends = [settling(flat, use) for consumer in pending for use in consumer.uses]
  needed, _ = flat.before([*ends, *flat.outputs], flat.program.inputs)
  moving = set[Value]()
  kept: dict[Value, None] = {}
  for at in needed:
    node = flat.nodes[at]
    if at in waiting or any(value in moving for value in node.ins):
      moving.update(node.outs)
      kept.update(dict.fromkeys(v for v in node.ins if v in flat.varies and v not in moving))
  kept.update(dict.fromkeys(v for v in flat.outputs if v not in moving))
  return list(kept)
