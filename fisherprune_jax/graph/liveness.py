"""Which entries of every array in a program can matter: two passes, one forward and one backward.

Forward, *can be non-zero*: masks are inputs with known zeros, and every primitive's ``Spec`` says what its
zeros come to. Backward, *is asked for*. What is stored of an array is the intersection of both, one set per
axis. An entry that is not stored is zero, or nobody asks for it; so showing it as zero is always right, and
that is all that execution relies on.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fisherprune_jax.graph import compat, flops, sets
from fisherprune_jax.graph.program import Node, Program, Value
from fisherprune_jax.graph.sets import Set
from fisherprune_jax.graph.spec import Factor, Spec, compose, factors_of, project

Box = tuple[Set, ...]
LARGEST_KNOWN = 65_536
"""Integer arrays up to this size are followed by value."""


class Info(NamedTuple):
  """What is known of an array before it is computed.

  Attributes:
    box: per axis, where it can be non-zero.
    const: the value of all its entries, where they are one known number.
    mask: whether its entries are one wherever ``box`` allows them to be non-zero.
    varies: whether it depends on the arguments, not on the variables alone.
    known: its value, if it is a small array of integers that no input decides.
  """

  box: Box
  const: Any = None
  mask: bool = False
  varies: bool = False
  known: np.ndarray | None = None


@dataclass
class Liveness:
  """The facts found about one program, and about the programs it calls."""

  infos: dict[Value, Info] = field(default_factory=dict)
  asked: dict[Value, Box] = field(default_factory=dict)
  specs: dict[Node, Spec] = field(default_factory=dict)
  factors: dict[Node, dict[Factor, Set]] = field(default_factory=dict)
  drop_masks: bool = True

  def stored(self, value: Value) -> Box:
    """Per axis, the entries of an array that are kept."""
    box = self.infos[value].box
    asked = self.asked.get(value)
    if asked is None:
      return tuple(sets.nothing(s.size) for s in box)
    return tuple(sets.intersection(a, b) for a, b in zip(box, asked, strict=True))

  def ask(self, value: Value, box: Box) -> None:
    """Adds to what is asked of an array."""
    if value.literal is None:
      before = self.asked.get(value)
      joined = box if before is None else tuple(map(sets.union, before, box))
      self.asked[value] = joined

  def terms(self, node: Node) -> list[flops.Term]:
    """What one node costs; nothing where its results depend on the variables alone."""
    if node not in self.factors or not any(self.infos[out].varies for out in node.outs):
      return []
    return [flops.term(count, self.factors[node]) for count in self.specs[node].flops]


def whole_box(shape: Sequence[Any]) -> Box:
  """The box that holds everything."""
  return tuple(sets.everything(n) for n in shape)


def analyse(
  program: Program,
  inputs: Sequence[Info],
  asked: Sequence[Box | None],
  rules: Callable[[Node, Sequence[Info]], Spec],
  drop_masks: bool = True,
) -> Liveness:
  """Runs both passes.

  Args:
    program: what to analyse.
    inputs: what is known of each input.
    asked: what is asked of each output; None if nothing is.
    rules: ``rules(node, infos)`` gives the ``Spec`` of a node that calls no program.
    drop_masks: whether multiplying by a mask is left out, as it changes no live entry.
  """
  live = Liveness(drop_masks=drop_masks)
  _forward(program, inputs, live, rules)
  for value, box in zip(program.outputs, asked, strict=True):
    if box is not None:
      live.ask(value, box)
  _backward(program, live)
  return live


def _forward(program: Program, inputs: Iterable[Info], live: Liveness, rules: Any) -> None:
  live.infos.update(zip(program.inputs, inputs, strict=True))
  live.infos.update(
    (value, Info(whole_box(value.shape), known=_known(const))) for value, const in program.consts
  )
  for node in program.nodes:
    infos = [_info(value, live) for value in node.ins]
    if node.sub is not None:
      _forward(node.sub, infos, live, rules)
      live.infos.update(
        (out, live.infos[inner]) for out, inner in zip(node.outs, node.sub.outputs, strict=True)
      )
    else:
      spec = live.specs[node] = rules(node, infos)
      live.infos.update(zip(node.outs, _results(node, spec, infos), strict=True))
  for value in program.outputs:
    _info(value, live)


def _info(value: Value, live: Liveness) -> Info:
  if value.literal is not None:
    const = value.literal if value.shape == () else None
    live.infos[value] = Info(whole_box(value.shape), const, known=_known(value.literal))
  return live.infos[value]


def _results(node: Node, spec: Spec, infos: Sequence[Info]) -> list[Info]:
  factors = {f: _can_be_nonzero(f, spec, infos) for f in spec.sizes}
  varies = any(info.varies for info in infos)
  boxes = [
    tuple(compose(axis, factors, n) for axis, n in zip(axes, out.shape, strict=True))
    for axes, out in zip(spec.outs, node.outs, strict=True)
  ]
  known = _fold(node, infos)
  if spec.moves:
    first = infos[0]
    return [Info(boxes[0], first.const, first.mask and _is_exact(spec, factors, first), varies, known)]
  mask = spec.same_as is not None and all(info.mask for info in infos)
  return [Info(box, mask=mask, varies=varies, known=known) for box in boxes]


def _known(x: Any) -> np.ndarray | None:
  """A small concrete array of integers, such as indices."""
  if (
    not compat.is_concrete(x)
    or np.size(x) > LARGEST_KNOWN
    or not np.issubdtype(compat.dtype_of(x), np.integer)
  ):
    return None
  return np.asarray(x)


def _fold(node: Node, infos: Sequence[Info]) -> np.ndarray | None:
  """The value of a node that computes small integers from known ones, as indexing does."""
  (out, *more) = node.outs
  small = all(map(compat.is_static_size, out.shape)) and math.prod(out.shape) <= LARGEST_KNOWN
  integers = jnp.issubdtype(out.aval.dtype, jnp.integer) or out.aval.dtype == bool
  if more or not small or not integers or any(info.known is None for info in infos):
    return None
  return compat.evaluate(node.eqn, [info.known for info in infos])


def _is_exact(spec: Spec, factors: dict[Factor, Set], info: Info) -> bool:
  """Whether an array moved by ``spec`` is non-zero exactly where its new box says, as its old one did."""
  return all(compose(axis, factors, s.size) is s for axis, s in zip(spec.ins[0], info.box, strict=True))


def _can_be_nonzero(factor: Factor, spec: Spec, infos: Sequence[Info]) -> Set:
  everything = sets.everything(spec.sizes[factor])
  if factor in spec.whole:
    return everything
  seen = [
    (operand, project(axis, s, factor, spec.sizes))
    for operand, (axes, info) in enumerate(zip(spec.ins, infos, strict=True))
    for axis, s in zip(axes, info.box, strict=True)
    if factor in factors_of(axis) and operand not in spec.neutral
  ]
  free = factor in spec.alive or not seen
  base = everything if free else sets.union(*(s for _, s in seen))
  return sets.intersection(base, *(s for operand, s in seen if operand in spec.kills))


def _backward(program: Program, live: Liveness) -> None:
  for node in reversed(program.nodes):
    if not any(out in live.asked for out in node.outs):
      continue
    if node.sub is not None:
      _backward_call(node, live)
    else:
      _backward_spec(node, live)


def _backward_call(node: Node, live: Liveness) -> None:
  assert node.sub is not None
  for out, inner in zip(node.outs, node.sub.outputs, strict=True):
    if out in live.asked:
      live.ask(inner, live.asked[out])
  _backward(node.sub, live)
  for value, inner in zip(node.ins, node.sub.inputs, strict=True):
    if inner in live.asked:
      live.ask(value, live.stored(inner))


def _backward_spec(node: Node, live: Liveness) -> None:
  spec = live.specs[node]
  factors = live.factors[node] = {f: _needed(f, node, spec, live) for f in spec.sizes}
  for operand, (value, axes) in enumerate(zip(node.ins, spec.ins, strict=True)):
    if spec.same_as in (None, operand) or not live.drop_masks:
      live.ask(value, tuple(compose(axis, factors, n) for axis, n in zip(axes, value.shape, strict=True)))


def _needed(factor: Factor, node: Node, spec: Spec, live: Liveness) -> Set:
  """The entries of a factor that a node has to work on."""
  if factor in spec.whole:
    return sets.everything(spec.sizes[factor])
  shown = [
    (out, axis, at)
    for out, axes in zip(node.outs, spec.outs, strict=True)
    for at, axis in enumerate(axes)
    if factor in factors_of(axis)
  ]
  if not shown:  # contracted: what every operand can offer
    offers = [
      project(axis, s, factor, spec.sizes)
      for value, axes in zip(node.ins, spec.ins, strict=True)
      for axis, s in zip(axes, live.infos[value].box, strict=True)
      if factor in factors_of(axis)
    ]
    return sets.intersection(*offers)
  asked = [
    project(axis, live.stored(out)[at], factor, spec.sizes) for out, axis, at in shown if out in live.asked
  ]
  return sets.union(*asked) if asked else sets.nothing(spec.sizes[factor])
