"""Runs a program on live entries alone.

Primitives run as traced, on smaller arrays. Operands are selected from stored entries, with zeros for entries that are
not computed because they are zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import compat, sets
from fisherprune_jax._graph.align import align, select, sources
from fisherprune_jax._graph.boxes import Box, Where, whole_box
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.facts import Factors, Info, box_of
from fisherprune_jax._graph.liveness import Liveness, analyse
from fisherprune_jax._graph.program import Node, Program, Value
from fisherprune_jax._graph.rules import indexing, spec_of
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.spec import Axes, Factor, Pick, Spec
from fisherprune_jax._graph.stack import Held, Stack, entry, padded
from fisherprune_jax._graph.structured import STRUCTURED

Arrays = dict[Value, Any]
"""The stored entries of each value: an array or stack."""


@dataclass
class Run:
  """One program with its liveness, at known masks."""

  program: Program
  live: Liveness
  ev: Evaluation
  _found: dict[Value, tuple[bool, Box]] = field(default_factory=dict, repr=False)

  def __call__(self, inputs: Sequence[Any], held: Sequence[Held], wanted: Sequence[Held]) -> list[Any]:
    """Executes the program on inputs with held entries; returns wanted entries of outputs."""
    return self.call(self.program, inputs, held, wanted)

  def call(
    self, program: Program, xs: Sequence[Any], held: Sequence[Held], wanted: Sequence[Held]
  ) -> list[Any]:
    """Executes an inner program."""
    inputs = [
      self._given(x, box, value) if self.needs(value) else None
      for x, box, value in zip(xs, held, program.inputs, strict=True)
    ]
    return self.run(program, inputs, wanted)

  def needs(self, value: Value) -> bool:
    return self._stored(value)[0]

  def box(self, value: Value) -> Box:
    """What is stored; empty along every axis if nothing is."""
    return self._stored(value)[1]

  def layers(self, value: Value) -> list[Box] | None:
    """What is stored of each layer, if only layers are demanded."""
    wheres = self.live.layers(value)
    return None if wheres is None else [self.ev.box(where) for where in wheres]

  def held(self, value: Value) -> Held:
    """What is stored: of each layer, if only layers are demanded."""
    return self.layers(value) or self.box(value)

  def _stored(self, value: Value) -> tuple[bool, Box]:
    if value not in self._found:
      where = self.live.stored(value)
      self._found[value] = self.ev.holds(where), self.ev.box(where)
    return self._found[value]

  def runs(self, node: Node) -> bool:
    also = self.live.also.get(node, sets.NEVER)
    return node.acts or any(map(self.needs, node.outs)) or self.ev.is_so(also)

  def _given(self, x: jax.Array, held: Held, value: Value) -> "Stack | jax.Array":
    if isinstance(held, list):
      stack = Stack(x, held)
      return stack if self.live.layers(value) is not None else stack.read(self.box(value), self.ev)
    return align(x, held, self.box(value), self.ev)

  def run(self, program: Program, inputs: Sequence[Any], wanted: Sequence[Held]) -> list[Any]:
    """Executes this program or an inner one, on stored inputs."""
    arrays = {value: x for value, x in zip(program.inputs, inputs, strict=True) if self.needs(value)}
    for value, const in program.consts:
      if self.needs(value):
        arrays[value] = align(const, whole_box(value.shape), self.box(value), self.ev)
    loose: list[Any] = []
    for node in program.nodes:
      if self.runs(node):
        outs = _execute(self, node, arrays)
        loose += outs if node in self.live.also and not any(map(self.needs, node.outs)) else ()
    outputs = [
      self.read_held(arrays, value, held) for value, held in zip(program.outputs, wanted, strict=True)
    ]
    return _tied(outputs, loose)

  def read_held(self, arrays: Arrays, value: Value, held: Held) -> jax.Array:
    """Entries of an array; those of layers are padded to the widest."""
    if not isinstance(held, list):
      return self.read(arrays, value, held)
    array = arrays.get(value)
    if isinstance(array, Stack) and all(map(self.is_same, array.boxes, held)):
      return array.array
    return padded([self.read_layer(arrays, value, layer, box) for layer, box in enumerate(held)])

  def read(self, arrays: Arrays, value: Value, box: Box) -> jax.Array:
    """Entries of an array; zeros (mostly none) if nothing is stored."""
    if value.literal is not None:
      return align(jnp.asarray(value.literal, value.aval.dtype), whole_box(value.shape), box, self.ev)
    if value not in arrays:
      return jnp.zeros([self.ev.width(s) for s in box], value.aval.dtype)
    array = arrays[value]
    return (
      array.read(box, self.ev) if isinstance(array, Stack) else align(array, self.box(value), box, self.ev)
    )

  def read_layer(self, arrays: Arrays, value: Value, layer: int, box: Box) -> jax.Array:
    """One layer, at the entries of a box."""
    if value not in arrays:
      return jnp.zeros([self.ev.width(s) for s in box], value.aval.dtype)
    array = arrays[value]
    if isinstance(array, Stack):
      return align(array.layer(layer, self.ev), array.boxes[layer], box, self.ev)
    return align(entry(array, layer), self.box(value)[1:], box, self.ev)

  def stacks(
    self, arrays: Arrays, values: Sequence[Value], layers: Sequence[Sequence[Box]]
  ) -> list[jax.Array] | None:
    """Stacks as they are, if all layers hold just these, of one width; else None."""
    found = []
    for place, value in enumerate(values):
      boxes = [boxes[place] for boxes in layers]
      if len({self._widths(box) for box in boxes}) > 1:
        return None
      array = arrays.get(value)
      if array is None:
        array = jnp.zeros((len(boxes), *self._widths(boxes[0])), value.aval.dtype)
      else:
        held = array.boxes if isinstance(array, Stack) else [self.box(value)[1:]] * len(boxes)
        array = array.array if isinstance(array, Stack) else array
        if len(array) != len(boxes) or not all(map(self.is_same, held, boxes)):
          return None
      found.append(array)
    return found

  def is_same(self, a: Box, b: Box) -> bool:
    """Whether two boxes are equal under these masks."""
    return all(x is y or np.array_equal(self.ev.bits(x), self.ev.bits(y)) for x, y in zip(a, b, strict=True))

  def _widths(self, box: Box) -> tuple[int, ...]:
    return tuple(self.ev.width(s) for s in box)

  def again(self, program: Program, inputs: Sequence[Info], demanded: Sequence[Box]) -> "Run":
    wanted = [Where(box) for box in demanded]
    return Run(program, analyse(program, inputs, wanted, spec_of, self.live.keep_masks), self.ev)


def _execute(run: Run, node: Node, arrays: Arrays) -> Sequence[Any]:
  if node in run.live.layered and (stack := _layers(run, node, arrays)) is not None:
    arrays[node.outs[0]] = stack
    return []
  if node in run.live.subs:
    outs, boxes = STRUCTURED[node.name].execute(run, node, arrays)
  else:
    outs, boxes = _apply(run, node, arrays, run.live.factors[node])
  for out, array, box in zip(node.outs, outs, boxes, strict=True):
    if run.needs(out):
      arrays[out] = array if isinstance(array, Stack) else align(array, box, run.box(out), run.ev)
  return outs


def _tied(outputs: list[Any], loose: Sequence[Any]) -> list[Any]:
  """Ties outputs to unused arrays: otherwise JAX does not call their derivative rules."""
  at = next((at for at, out in enumerate(outputs) if jnp.issubdtype(out.dtype, jnp.inexact)), None)
  if not loose or at is None:
    return outputs
  out = outputs[at]
  nothing = [x.reshape(-1)[:0].astype(out.dtype) for x in loose]
  return [*outputs[:at], jnp.concatenate([out.reshape(-1), *nothing]).reshape(out.shape), *outputs[at + 1 :]]


def _layers(run: Run, node: Node, arrays: Arrays) -> Stack | None:
  """The result layer by layer, if layers hold different entries."""
  boxes = run.layers(node.outs[0]) or []
  if all(run.is_same(box, boxes[0]) for box in boxes):
    return None
  layers = []
  for factors, box in zip(run.live.layered[node], boxes, strict=True):
    layer = jnp.zeros([run.ev.width(s) for s in box], node.outs[0].aval.dtype)
    if factors is not None and layer.size:
      (out,), (held,) = _apply(run, node, arrays, factors)
      layer = align(entry(out, 0), held[1:], box, run.ev)
    layers.append(layer)
  return Stack(padded(layers), boxes)


def _apply(run: Run, node: Node, arrays: Arrays, factors: Factors) -> tuple[Sequence[Any], Sequence[Box]]:
  spec = run.live.specs[node]

  def box(axes: Axes, value: Value) -> Box:
    return box_of(axes, factors, value.shape)

  boxes = [box(axes, out) for axes, out in zip(spec.outs, node.outs, strict=True)]
  if spec.same_as is not None and not run.live.keep_masks:
    kept = node.ins[spec.same_as]
    return [run.read(arrays, kept, box(spec.ins[spec.same_as], kept))], boxes
  operands = [
    run.read(arrays, value, box(axes, value)) for value, axes in zip(node.ins, spec.ins, strict=True)
  ]
  if spec.outs and any(isinstance(axis, Pick) for axis in spec.outs[0]):
    return [_pick(run, spec, factors, operands, boxes[0])], boxes
  if spec.indexed and (live := run.ev.index(factors[spec.indexed])) is not None:
    return [_look_up(node, spec, operands, live, {f: run.ev.width(s) for f, s in factors.items()})], boxes
  if spec.bind is None:
    return compat.bind(node.eqn, operands), boxes
  return spec.bind(node, operands, {f: run.ev.width(s) for f, s in factors.items()}), boxes


def _look_up(
  node: Node, spec: Spec, operands: Sequence[jax.Array], live: np.ndarray, sizes: dict[Factor, Any]
) -> jax.Array:
  """Reads entries by number, where only some are stored."""
  assert spec.indexed is not None
  assert spec.bind is not None
  places = np.full(spec.sizes[spec.indexed], -1)
  places[live] = np.arange(len(live))
  table = operands[0]
  if not len(live):  # XLA reads from no empty array
    table = jnp.zeros(
      [1 if axis == spec.indexed else n for axis, n in zip(spec.ins[0], table.shape, strict=True)],
      table.dtype,
    )
  indices, dead = indexing.renumbered(node, operands[1], places, max(len(live), 1))
  (out,) = spec.bind(node, [table, indices], sizes)
  return indexing.without(node, out, dead)


def _pick(
  run: Run, spec: Spec, factors: dict[Factor, Set], operands: Sequence[jax.Array], box: Box
) -> jax.Array:
  """Selects along picked axes, from live entries of factors."""
  array = operands[0]
  for axis, (picked, wanted) in enumerate(zip(spec.outs[0], box, strict=True)):
    if isinstance(picked, Pick):
      entries = picked.index if (want := run.ev.index(wanted)) is None else picked.index[want]
      size = spec.sizes[picked.factor]
      place = sources(run.ev.index(factors[picked.factor]), None, size)
      place = np.arange(size) if place is None else place
      fill = operands[1] if picked.filled else None
      array = select(array, axis, np.where(entries >= 0, place[entries], -1), fill)
  return array
