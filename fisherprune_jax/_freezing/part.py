"""A program in two parts: what is computed once, of variables alone, and what is computed at each call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from fisherprune_jax._freezing.folding import MOVES, Fold, folds
from fisherprune_jax._freezing.known import Known, constant, results
from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import CALLS, INLINED, Node, Program, Value, build
from fisherprune_jax._types import Array

Env = dict[Value, Any]


class Slot(NamedTuple):
  """An array that is computed once.

  Attributes:
    known: what it depends on.
    shape: the shape that it is broadcast to.
    axes: its axes in that shape; along others it would repeat itself.
    make: computes it, in that shape or with sizes of 1, of what is known.
    is_shift: whether it is what a fold adds.
  """

  known: Known
  shape: tuple[Any, ...]
  axes: tuple[int, ...]
  make: Callable[[Env], Array]
  is_shift: bool = False

  @property
  def stored(self) -> tuple[Any, ...]:
    """The shape that is stored, but for the iterations of loops."""
    return tuple(self.shape[at] for at in self.axes)

  def once(self, env: Env) -> Array:
    """The array without repetitions."""
    return self.make(env)[tuple(slice(None) if at in self.axes else 0 for at in range(len(self.shape)))]

  def spread(self, x: Array) -> Array:
    """The array in its shape at a call."""
    return x if len(self.axes) == len(self.shape) else lax.broadcast_in_dim(x, self.shape, self.axes)


class Part:
  """A program, or the body of a loop.

  Args:
    program: the program.
    inputs: what is known of its inputs; None for arguments and masks.
    cautious: leave out what may have one entry per example.

  Attributes:
    slots: the arrays that are computed once, those of loops in it last.
  """

  def __init__(self, program: Program, inputs: Sequence[Known | None], cautious: bool) -> None:
    self.program, self._cautious = program, cautious
    pairs = zip(program.inputs, inputs, strict=True)
    self._known = {value: known for value, known in pairs if known is not None}
    self._known |= {value: constant(value) for value, _ in program.consts}
    self._loops: dict[Node, Part] = {}
    for node in program.nodes:
      self._visit(node)
    self._folds = {fold.node: fold for fold in folds(program, self._known)}
    self._folded = {node for fold in self._folds.values() for node in (fold.node, *fold.nodes)}
    self.slots: list[Slot] = []
    self._slot_of: dict[Value, int] = {}
    self._terms: dict[Node, tuple[int, int | None]] = {}
    self._first: dict[Node, int] = {}
    self._moved: set[Node] = set()
    self._makers = {out: node for node in program.nodes for out in node.outs}
    self._plan()

  def _visit(self, node: Node) -> None:
    operands = [self._of(value) for value in node.ins]
    found = None
    if not node.acts and all(operand is not None for operand in operands):
      found = results(node, operands, self._cautious)  # type: ignore[arg-type]
    if found is not None:
      self._known.update(zip(node.outs, found, strict=True))
    elif node.name == "scan":
      (jaxpr,) = compat.sub_jaxprs(node.params)
      body = build(jaxpr, (*node.callers, node.eqn), INLINED | CALLS)
      consts, carried = compat.scan_counts(node.params)
      ins = [self._of(value) for value in node.ins]
      inner = [known and known._replace(stacked=False) for known in ins[:consts]]
      inner += [None] * carried
      inner += [
        known and known._replace(varies=known.varies[1:], stacked=True) for known in ins[consts + carried :]
      ]
      self._loops[node] = Part(body, inner, self._cautious)

  def _of(self, value: Value) -> Known | None:
    return Known(frozenset(), ()) if value.literal is not None else self._known.get(value)

  def _is_stored(self, value: Value) -> bool:
    """Whether an array is computed once, and stored."""
    return value.literal is None and value in self._known and self._known[value].is_stored

  def _plan(self) -> None:
    """The slots: of arrays that are read at each call, of folds, and of loops."""
    program = self.program
    for fold in self._folds.values():
      self._terms[fold.node] = self._add_terms(fold)
    at_calls = [node for node in program.nodes if not self._is_once(node)]
    for value in (*(value for node in at_calls for value in self._reads(node)), *program.outputs):
      self._store(value)
    for node, body in self._loops.items():
      self._first[node] = len(self.slots)
      stacked = any(known.stacked for value in node.ins if (known := self._of(value)))
      for slot in body.slots:
        self.slots.append(slot._replace(known=slot.known._replace(stacked=stacked)))

  def _nodes_at_calls(self) -> list[Node]:
    """Nodes that run at each call: those that are not known, and known ones of constants alone."""
    return [node for node in self.program.nodes if node in self._moved or not self._is_once(node)]

  def _is_once(self, node: Node) -> bool:
    return bool(node.outs) and all(map(self._is_stored, node.outs))

  def _reads(self, node: Node) -> list[Value]:
    """The operands that a node reads at each call; the body of a loop stores what it needs of variables."""
    if node in self._folds:
      return [node.ins[1 - self._folds[node].side]]
    if node in self._loops:
      consts, carried = compat.scan_counts(node.params)
      return node.ins[consts : consts + carried]
    return [] if node in self._folded else node.ins

  def _store(self, value: Value) -> None:
    if not self._is_stored(value):
      return
    value, moves = self._source(value)
    self._moved.update(moves)
    if value not in self._slot_of:
      known = self._known[value]
      axes = _kept(value.shape, known.varies, known.rank - known.stacked)
      self._slot_of[value] = len(self.slots)
      self.slots.append(Slot(known, value.shape, axes, lambda env: env[value]))

  def _source(self, value: Value) -> tuple[Value, list[Node]]:
    """What to store in place of an array, and the nodes that then move it at each call.

    That is the variable that it was moved from, or what entries were picked from to make it larger.
    """
    found: tuple[Value, list[Node]] = (value, [])
    moves: list[Node] = []
    while (node := self._makers.get(value)) is not None:
      larger = _is_picked_larger(node) and not any(map(self._is_stored, node.ins[1:]))
      if node.name not in MOVES and not larger:
        return found
      moves = [*moves, node]
      value = node.ins[0]
      found = (value, moves) if larger else found
    return value, moves

  def _add_terms(self, fold: Fold) -> tuple[int, int | None]:
    """The slots of a fold: its parameters, and what is added to the product, if there is anything."""
    (w, shape), out = (self._known[fold.parameters], fold.parameters.shape), fold.product.shape
    others = [known for step in fold.steps if (known := self._of(step.known))]
    known = w._replace(stacked=any(each.stacked for each in (w, *others)))
    varies = tuple(v or at in fold.features for v, at in zip(w.varies, fold.places, strict=True))
    first = len(self.slots)
    self.slots.append(Slot(known, shape, _kept(shape, varies, len(shape)), lambda env: fold.terms(env)[0]))
    if not fold.shifts:
      return first, None
    leaves = known.leaves.union(*(each.leaves for each in others))
    known = known._replace(leaves=leaves)
    self.slots.append(Slot(known, out, tuple(sorted(fold.features)), lambda env: fold.terms(env)[1], True))
    return first, first + 1

  def compute(self, arrays: Mapping[Value, Any]) -> list[Any]:
    """The arrays of all slots, of those of the known inputs."""
    env: Env = {**dict(self.program.consts), **arrays}
    for node in self.program.nodes:
      if node.outs and all(out in self._known for out in node.outs):
        outs = compat.bind(node.eqn, [_read(env, value) for value in node.ins])
        env.update(zip(node.outs, outs, strict=True))
    found = [slot.once(env) for slot in self.slots[: self._own]]
    for node, body in self._loops.items():
      found += body.compute_all(node, env)
    return found

  @property
  def _own(self) -> int:
    return min(self._first.values(), default=len(self.slots))

  def compute_all(self, node: Node, env: Env) -> list[Any]:
    """The arrays of a loop's slots; those that differ between iterations are stacked."""
    inputs = self.program.inputs
    known = [(inner, outer) for inner, outer in zip(inputs, node.ins, strict=True) if inner in self._known]
    fixed = {inner: _read(env, outer) for inner, outer in known if not self._known[inner].stacked}
    moving = [(inner, outer) for inner, outer in known if self._known[inner].stacked]
    if not moving or not self.slots:
      return self.compute(fixed) if self.slots else []
    axes = [0 if slot.known.stacked else None for slot in self.slots]
    names = [inner for inner, _ in moving]

    def one(row: list[Any]) -> list[Any]:
      return self.compute({**fixed, **dict(zip(names, row, strict=True))})

    return jax.vmap(one, out_axes=axes)([_read(env, outer) for _, outer in moving])

  def run(self, inputs: Mapping[Value, Any], stored: Sequence[Any]) -> list[Any]:
    """The outputs, of the inputs that are not known and the arrays of all slots."""
    env: Env = {**dict(self.program.consts), **inputs}

    def read(value: Value) -> Any:
      if value in self._slot_of:
        at = self._slot_of[value]
        return self.slots[at].spread(stored[at])
      return _read(env, value)

    for node in self._nodes_at_calls():
      with compat.located(node.eqn, node.callers):
        if node in self._folds:
          env[self._folds[node].result] = self._product(node, read, stored)
        elif node in self._loops:
          env.update(zip(node.outs, self._loop(node, read, stored), strict=True))
        elif node not in self._folded:
          env.update(zip(node.outs, compat.bind(node.eqn, list(map(read, node.ins))), strict=True))
    return [read(value) for value in self.program.outputs]

  def _product(self, node: Node, read: Callable[[Value], Any], stored: Sequence[Any]) -> Any:
    """A product with folded parameters, and what is added to it."""
    fold, (weights, shift) = self._folds[node], self._terms[node]
    operands = [read(node.ins[1 - fold.side])]
    operands.insert(fold.side, self.slots[weights].spread(stored[weights]))
    (out,) = compat.bind(node.eqn, operands)
    if shift is not None:
      out = out + self.slots[shift].spread(stored[shift])
    return out if fold.order == tuple(range(out.ndim)) else lax.transpose(out, fold.order)

  def _loop(self, node: Node, read: Callable[[Value], Any], stored: Sequence[Any]) -> list[Any]:
    body, first = self._loops[node], self._first[node]
    consts, carried = compat.scan_counts(node.params)
    inputs, mine = body.program.inputs, stored[first : first + len(body.slots)]
    free = [at for at, inner in enumerate(inputs) if not body._is_stored(inner)]
    fixed = {inputs[at]: read(node.ins[at]) for at in free if at < consts}
    rows = {at: read(node.ins[at]) for at in free if at >= consts + carried}
    places = [at for at, slot in enumerate(body.slots) if slot.known.stacked]

    def step(carry: list[Any], row: tuple[dict[int, Any], list[Any]]) -> tuple[list[Any], list[Any]]:
      given, slices = row
      all_stored = list(mine)
      for at, x in zip(places, slices, strict=True):
        all_stored[at] = x
      moving = dict(zip(inputs[consts : consts + carried], carry, strict=True))
      env = {**fixed, **moving, **{inputs[at]: x for at, x in given.items()}}
      outs = body.run(env, all_stored)
      return outs[:carried], outs[carried:]

    start = [read(value) for value in node.ins[consts : consts + carried]]
    options = {name: node.params[name] for name in ("length", "reverse", "unroll")}
    last, ys = lax.scan(step, start, (rows, [mine[at] for at in places]), **options)
    return [*last, *ys]


def _read(env: Env, value: Value) -> Any:
  return env[value] if value.literal is None else value.literal


def _is_picked_larger(node: Node) -> bool:
  """Whether a node picks entries of an array, more than there are."""
  return node.name in ("gather", "dynamic_slice") and node.outs[0].aval.size > node.ins[0].aval.size


def _kept(shape: Sequence[Any], varies: Sequence[bool], rank: int) -> tuple[int, ...]:
  """The axes that are stored: along which an array varies, or of one entry, but no more of these than it needs for a rank."""
  axes = [at for at, (n, v) in enumerate(zip(shape, varies, strict=True)) if v or n == 1 or n == 0]
  while len(axes) > rank and (ones := [at for at in axes if shape[at] == 1]):
    axes.remove(ones[0])
  return tuple(axes)
