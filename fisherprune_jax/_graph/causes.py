"""Why entries stay: what is live, held against what would be if nothing were in the way.

In the way are uses that cannot do without dead entries (``Spec.opaque``), sums of their own along an axis (the
statistics of a norm, not the products of a layer), and outputs. ``ideal.in_nobodys_way`` gives their specs without
that: they keep zeros zero, and ask *weakly*, for an axis of which nobody else asks more precisely.
Where an axis of a variable then holds less, the way from there to the nearest node where the two analyses part
is followed: forwards as long as more is asked for, backwards where more is possible.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.spec import Axes, Axis, Factor, compose, factors_of
from fisherprune_jax._graph.structured import links
from fisherprune_jax._graph.windows import linked

Place = tuple[Value, int]
"""One axis of one value."""


class Stay(NamedTuple):
  """What stays along one axis of a value although masks would allow less.

  Attributes:
    kept: how many entries there are, in all layers of a stack.
    allowed: how many there would be.
    cause: the nearest node that keeps them; None if it is that an output is made of them.
  """

  kept: int
  allowed: int
  cause: Node | None


class Causes:
  """Compares two analyses of one program, under given masks.

  Args:
    program: the program.
    live: what is live in it.
    free: what would be live if nothing were in the way, of the same values.
    ev: the masks.
  """

  def __init__(self, program: Program, live: Liveness, free: Liveness, ev: Evaluation) -> None:
    self._live, self._free, self._ev = live, free, ev
    self._readers: dict[Value, list[Node]] = {}
    self._maker: dict[Value, Node] = {}
    self._onwards: dict[Value, list[Value]] = {}
    self._back: dict[Value, list[Value]] = {}
    self._index(program)

  def _index(self, program: Program) -> None:
    for node in program.nodes:
      if node in self._live.specs:
        for value in node.ins:
          self._readers.setdefault(value, []).append(node)
        self._maker.update(dict.fromkeys(node.outs, node))
      for link in links(node, self._live):
        self._index(link.program)
        for giver, taker in (*link.ins, *((b, a) for a, b in link.outs), *((b, a) for a, b in link.turns)):
          self._onwards.setdefault(giver, []).append(taker)
          self._back.setdefault(taker, []).append(giver)

  def of(self, value: Value, axis: int) -> Stay | None:
    """What stays along an axis of a variable; None if nothing does that need not."""
    if value not in self._live.asked or value not in self._free.asked:
      return None
    pairs = self._layers(value, axis)
    if not any(self._more(kept, allowed) for kept, allowed in pairs):
      return None
    kept, allowed = (sum(int(self._ev.count(s)) for s in column) for column in zip(*pairs, strict=True))
    return Stay(kept, allowed, self._seer(self._forwards((value, axis))))

  def entries(self, value: Value) -> int:
    """How many entries of a variable are kept."""
    layers = self._live.layers(value)
    wheres = [self._live.stored(value)] if layers is None else layers
    return sum(math.prod(int(self._ev.count(s)) for s in self._ev.box(where)) for where in wheres)

  def _seer(self, cause: Node | None) -> Node | None:
    """Of a node that is computed as it was, for the signs of its zeros, the nearest one that sees them."""
    pending = deque([v for v in (cause.outs if cause else ()) if v in self._live.signed])
    seen = set(pending)
    while pending:
      value = pending.popleft()
      further = list(self._onwards.get(value, []))
      for reader in self._readers.get(value, []):
        if any(reader.ins[at] is value for at in self._live.specs[reader].sees):
          return reader
        further += reader.outs
      pending += [v for v in further if v in self._live.signed and v not in seen]
      seen |= {*further}
    return cause

  def _layers(self, value: Value, axis: int) -> list[tuple[Set, Set]]:
    """What is stored along an axis in both analyses, of each layer if it is a stack of them."""
    both = (self._live, self._free)
    layers = [live.layers(value) for live in both]
    if not axis or layers == [None, None]:
      kept, allowed = (self._ev.box(live.stored(value)) for live in both)
      return [(kept[axis], allowed[axis])]
    wheres = [
      r or [live.stored(value).in_a_turn()] * value.shape[0] for r, live in zip(layers, both, strict=True)
    ]
    boxes = zip(*(map(self._ev.box, r) for r in wheres), strict=True)
    return [(kept[axis - 1], allowed[axis - 1]) for kept, allowed in boxes]

  def works_on_dead(self, node: Node) -> bool:
    """Whether a node that is in the way works on entries that are zero, or that nobody asks for."""
    spec, factors = self._live.specs.get(node), self._live.factors.get(node)
    if spec is None or factors is None or not spec.opaque:
      return False
    if not self._ev.is_so(self._live.when(node)):
      return False
    offered = [(v, axes, self._live.info(v).where) for v, axes in zip(node.ins, spec.ins, strict=True)]
    results = zip(node.outs, spec.outs, strict=True)
    wanted = [(v, axes, self._live.asked[v]) for v, axes in results if v in self._live.asked]
    return any(
      self._more(compose(axis, factors, n), bound)
      for value, axes, where in offered + wanted
      for axis, n, bound in zip(axes, value.shape, where.box, strict=True)
      if bound.support
    )

  def _more(self, big: Set, small: Set) -> bool:
    """Whether one set holds what another does not, under the masks."""
    if big is small:
      return False
    return bool((self._ev.bits(big) & ~self._ev.bits(small)).any())

  def _asked_more(self, place: Place) -> bool:
    value, axis = place
    asked = [
      self._ev.box(live.asked[value])[axis] for live in (self._live, self._free) if value in live.asked
    ]
    return len(asked) == 2 and (asked[1].is_weak or self._more(*asked))

  def _possibly_more(self, place: Place) -> bool:
    value, axis = place
    if value.literal is not None:
      return False
    return self._more(*(self._ev.box(live.info(value).where)[axis] for live in (self._live, self._free)))

  def _forwards(self, start: Place) -> Node | None:
    """The nearest node behind a place that asks for more of it than it need."""
    pending, seen = deque([start]), {start}
    while pending:
      value, axis = pending.popleft()
      further = [p for p in self._along(self._onwards, value, axis) if self._asked_more(p)]
      for node in self._readers.get(value, []):
        cause, made = self._through(node, value, axis)
        if cause is not None:
          return cause
        further += made
      pending += [place for place in further if place not in seen]
      seen |= {*further}
    return None

  def _along(self, ways: dict[Value, list[Value]], value: Value, axis: int) -> Iterator[Place]:
    """The same axis on the other side of a call or a loop, whose turns are an axis in front."""
    for other in ways.get(value, []):
      there = axis + len(other.shape) - len(value.shape)
      if there >= 0:
        yield other, there

  def _through(self, node: Node, value: Value, axis: int) -> tuple[Node | None, list[Place]]:
    """The node, if it is here that more is asked of an operand, or what it makes of it that more is asked of."""
    spec, further = self._live.specs[node], []
    for operand, axes in zip(node.ins, spec.ins, strict=True):
      if operand is not value or not self._asks_more(node, axes[axis], (value, axis)):
        continue
      along = linked(spec.windows, factors_of(axes[axis]))
      made = list(_with(along, node.outs, spec.outs))
      asked = [place for place in made if self._asked_more(place)]
      possible = [p for p in (*made, *_with(along, node.ins, spec.ins)) if self._possibly_more(p)]
      if not asked:
        return (self._backwards(possible[0]) if possible else None) or node, []
      further += asked
    return None, further

  def _asks_more(self, node: Node, axis: Axis, place: Place) -> bool:
    """Whether a node itself works on more of an operand than need be."""
    value, at = place
    if node not in self._live.factors:
      return False
    if not self._ev.is_so(self._live.when(node)):
      return False
    used = compose(axis, self._live.asked_by(node), value.shape[at])
    enough = self._ev.box(self._free.stored(value))[at]
    return enough.is_weak or self._more(used, enough)

  def _backwards(self, place: Place) -> Node | None:
    """The node in front of a place that makes more of it possible than need be."""
    nearest, seen, ahead = None, set(), [place]
    while ahead:
      value, axis = ahead[0]
      seen.add(ahead[0])
      before = list(self._along(self._back, value, axis))
      if node := self._maker.get(value):
        nearest, spec = node, self._live.specs[node]
        along = linked(spec.windows, factors_of(spec.outs[node.outs.index(value)][axis]))
        before += _with(along, node.ins, spec.ins)
      ahead = [p for p in before if p not in seen and self._possibly_more(p)]
    return nearest


def _with(linked: set[Factor], values: Sequence[Value], all_axes: Sequence[Axes]) -> Iterator[Place]:
  """The axes that hold any of these factors."""
  for value, axes in zip(values, all_axes, strict=True):
    for at, axis in enumerate(axes):
      if linked & {*factors_of(axis)}:
        yield value, at
