"""Why entries are kept: compares the liveness with that of ideal.py.

Entries are kept by uses that need dead ones (``Spec.opaque``), by a node's sums along an axis (a norm's statistics, not
a layer's products), and by outputs. ideal.py frees them: they keep zeros zero and demand *weakly*, so that other
demands take precedence. If an axis of a variable then holds less, the nearest node where the analyses differ is
searched: forwards while more is demanded, backwards while more may be non-zero.
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


class Stay(NamedTuple):
  """What an axis of a value keeps although masks allow less.

  Attributes:
    kept: the entries, in all layers of a stack.
    allowed: those that masks allow.
    cause: the nearest node that keeps them; None for outputs.
  """

  kept: int
  allowed: int
  cause: Node | None


class Causes:
  """Compares a liveness with a free one, of the same values, where no use keeps dead entries."""

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
        for giver, taker in (
          *link.ins,
          *((b, a) for a, b in link.outs),
          *((b, a) for a, b in link.iterations),
        ):
          self._onwards.setdefault(giver, []).append(taker)
          self._back.setdefault(taker, []).append(giver)

  def of(self, value: Value, axis: int) -> Stay | None:
    """What an axis of a variable keeps needlessly, or None."""
    if value not in self._live.demanded or value not in self._free.demanded:
      return None
    pairs = self._layers(value, axis)
    if not any(self._more(kept, allowed) for kept, allowed in pairs):
      return None
    kept, allowed = (sum(int(self._ev.count(s)) for s in column) for column in zip(*pairs, strict=True))
    return Stay(kept, allowed, self._seer(self._forwards((value, axis))))

  def entries(self, value: Value) -> int:
    entries = self._live.entries(value)
    wheres = entries if isinstance(entries, list) else [entries]
    return sum(math.prod(int(self._ev.count(s)) for s in self._ev.box(where)) for where in wheres)

  def _seer(self, cause: Node | None) -> Node | None:
    """For a node that keeps signs of zeros, the nearest sign-sensitive one."""
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
    """What both analyses store along an axis, per layer."""
    both = (self._live, self._free)
    layers = [live.layers(value) for live in both]
    if not axis or layers == [None, None]:
      kept, allowed = (self._ev.box(live.stored(value)) for live in both)
      return [(kept[axis], allowed[axis])]
    wheres = [
      r or [live.stored(value).in_an_iteration()] * value.shape[0]
      for r, live in zip(layers, both, strict=True)
    ]
    boxes = zip(*(map(self._ev.box, r) for r in wheres), strict=True)
    return [(kept[axis - 1], allowed[axis - 1]) for kept, allowed in boxes]

  def works_on_dead(self, node: Node) -> bool:
    """Whether a node that keeps entries works on zeros, or on undemanded entries."""
    spec, factors = self._live.specs.get(node), self._live.factors.get(node)
    if spec is None or factors is None or not spec.opaque:
      return False
    if not self._ev.is_so(self._live.when(node)):
      return False
    offered = [(v, axes, self._live.info(v).where) for v, axes in zip(node.ins, spec.ins, strict=True)]
    results = zip(node.outs, spec.outs, strict=True)
    wanted = [(v, axes, self._live.demanded[v]) for v, axes in results if v in self._live.demanded]
    return any(
      self._more(compose(axis, factors, n), bound)
      for value, axes, where in offered + wanted
      for axis, n, bound in zip(axes, value.shape, where.box, strict=True)
      if bound.support
    )

  def _more(self, big: Set, small: Set) -> bool:
    if big is small:
      return False
    return bool((self._ev.bits(big) & ~self._ev.bits(small)).any())

  def _demanded_more(self, place: Place) -> bool:
    value, axis = place
    demanded = [
      self._ev.box(live.demanded[value])[axis] for live in (self._live, self._free) if value in live.demanded
    ]
    return len(demanded) == 2 and (demanded[1].is_weak or self._more(*demanded))

  def _possibly_more(self, place: Place) -> bool:
    value, axis = place
    if value.literal is not None:
      return False
    return self._more(*(self._ev.box(live.info(value).where)[axis] for live in (self._live, self._free)))

  def _forwards(self, start: Place) -> Node | None:
    """The nearest later node that demands too much."""
    pending, seen = deque([start]), {start}
    while pending:
      value, axis = pending.popleft()
      further = [p for p in self._along(self._onwards, value, axis) if self._demanded_more(p)]
      for node in self._readers.get(value, []):
        cause, made = self._through(node, value, axis)
        if cause is not None:
          return cause
        further += made
      pending += [place for place in further if place not in seen]
      seen |= {*further}
    return None

  def _along(self, ways: dict[Value, list[Value]], value: Value, axis: int) -> Iterator[Place]:
    """The same axis across a call or loop, whose iterations are a leading axis."""
    for other in ways.get(value, []):
      there = axis + len(other.shape) - len(value.shape)
      if there >= 0:
        yield other, there

  def _through(self, node: Node, value: Value, axis: int) -> tuple[Node | None, list[Place]]:
    """The cause, if excess demand on an operand starts here; else the results with excess demand."""
    spec, further = self._live.specs[node], []
    for operand, axes in zip(node.ins, spec.ins, strict=True):
      if operand is not value or not self._asks_more(node, axes[axis], (value, axis)):
        continue
      along = linked(spec.windows, factors_of(axes[axis]))
      made = list(_with(along, node.outs, spec.outs))
      demanded = [place for place in made if self._demanded_more(place)]
      possible = [p for p in (*made, *_with(along, node.ins, spec.ins)) if self._possibly_more(p)]
      if not demanded:
        return (self._backwards(possible[0]) if possible else None) or node, []
      further += demanded
    return None, further

  def _asks_more(self, node: Node, axis: Axis, place: Place) -> bool:
    """Whether a node itself works on too much of an operand."""
    value, at = place
    if node not in self._live.factors:
      return False
    if not self._ev.is_so(self._live.when(node)):
      return False
    used = compose(axis, self._live.demanded_by(node), value.shape[at])
    enough = self._ev.box(self._free.stored(value))[at]
    return enough.is_weak or self._more(used, enough)

  def _backwards(self, place: Place) -> Node | None:
    """The earlier node where too much becomes non-zero."""
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
  for value, axes in zip(values, all_axes, strict=True):
    for at, axis in enumerate(axes):
      if linked & {*factors_of(axis)}:
        yield value, at
