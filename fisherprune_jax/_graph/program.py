"""A traced function as plain data: values, and nodes that compute them.

A program is a jaxpr with calls to jit inlined, and **fresh values for every call**. JAX caches the jaxprs of jitted
helpers. So two calls of ``nn.relu`` share inner variables, and facts about one would overwrite those about the other.

Single entries of a reshaped array are picked before the reshape. So the parts ``x.reshape(n, 3, heads, depth)[:, i]``
have separate axes, as after ``jnp.split``.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax import lax

from fisherprune_jax._graph import compat
from fisherprune_jax._types import PyTree, Size

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "core_closed_call"})
CALLS = frozenset(
  {"remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
)
"""Calls that matter for derivatives alone."""


@dataclass(eq=False, slots=True)
class Value:
  """A literal is a value written into the program."""

  aval: Any
  literal: Any = None

  @property
  def shape(self) -> tuple[Size, ...]:
    return getattr(self.aval, "shape", ())


@dataclass(eq=False, slots=True)
class Node:
  """One application of a primitive, inside the calls ``callers``."""

  eqn: compat.Equation
  ins: list[Value]
  outs: list[Value]
  callers: tuple[compat.Equation, ...] = ()

  @property
  def name(self) -> str:
    return self.eqn.primitive.name

  @property
  def params(self) -> compat.Params:
    return self.eqn.params

  @property
  def acts(self) -> bool:
    """Whether it must run for its outside effects (``io_callback``, but not printing)."""
    return compat.acts(self.eqn)

  @property
  def source(self) -> str:
    found = (compat.source_of(eqn) for eqn in (self.eqn, *reversed(self.callers)))
    return next(filter(None, found), "unknown source")

  @property
  def scope(self) -> str:
    """Its names, such as the Flax modules ``Net/Dense_0``."""
    return "/".join(filter(None, (compat.scope_of(eqn) for eqn in (*self.callers, self.eqn))))


@dataclass(eq=False)
class Program:
  """Inputs, constants, nodes in order, outputs; and whether spelled.py has rewritten it."""

  inputs: list[Value]
  consts: list[tuple[Value, Any]]
  outputs: list[Value] = field(default_factory=list)
  nodes: list[Node] = field(default_factory=list)
  is_spelled: bool = False


def trace(fn: Callable[..., PyTree], *args: PyTree) -> tuple[Program, PyTree]:
  """Returns the program, and the tree of results."""
  jaxpr, out_tree = compat.trace(fn, *args)
  return build(jaxpr), out_tree


def build(
  closed: Any, callers: tuple[compat.Equation, ...] = (), inlined: frozenset[str] = INLINED
) -> Program:
  """From an open or closed jaxpr, with fresh values; ``inlined`` are the calls that it is written without."""
  jaxpr, consts = compat.open_jaxpr(closed)
  env = {var: Value(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)}
  constants = [(env[var], const) for var, const in zip(jaxpr.constvars, consts, strict=True)]
  program = Program([env[var] for var in jaxpr.invars], constants)
  program.outputs = _append(program, jaxpr, env, callers, inlined)
  if any(node.name == "reshape" for node in program.nodes):
    pick_first(program)
  return program


def _append(
  program: Program,
  jaxpr: Any,
  env: dict[Any, Value],
  callers: tuple[compat.Equation, ...],
  inlined: frozenset[str] = INLINED,
) -> list[Value]:

  def read(atom: Any) -> Value:
    return Value(atom.aval, atom.val) if isinstance(atom, compat.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    ins = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name in inlined:
      outs = _inline(program, eqn, ins, (*callers, eqn), inlined)
    else:
      outs = [Value(var.aval) for var in eqn.outvars]
      program.nodes.append(Node(eqn, ins, outs, callers))
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _inline(
  program: Program,
  eqn: compat.Equation,
  ins: Sequence[Value],
  callers: tuple[compat.Equation, ...],
  inlined: frozenset[str],
) -> list[Value]:
  (called,) = compat.sub_jaxprs(eqn.params)
  jaxpr, consts = compat.open_jaxpr(called)
  held = [Value(var.aval) for var in jaxpr.constvars]
  program.consts += zip(held, consts, strict=True)
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*held, *ins), strict=True))
  return _append(program, jaxpr, env, callers, inlined)


def nodes_of(
  program: Program, fn: Callable[..., jax.Array], ins: Sequence[Value], instead: Node
) -> list[Node]:
  """Nodes that compute the result of another by ``fn``."""
  closed, _ = compat.trace(fn, *(jax.ShapeDtypeStruct(value.shape, value.aval.dtype) for value in ins))
  jaxpr, consts = compat.open_jaxpr(closed)
  held = [Value(var.aval) for var in jaxpr.constvars]
  program.consts += zip(held, consts, strict=True)
  found = Program(list(ins), [])
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*held, *ins), strict=True))
  (out,) = _append(found, jaxpr, env, instead.callers)
  if not found.nodes or out not in found.nodes[-1].outs:
    return [instead]
  found.nodes[-1].outs = instead.outs
  return found.nodes


class _Pick(NamedTuple):
  """One entry along an axis of a reshaped array, read by a node.

  Attributes:
    node: the node.
    result: which of its results it is.
    order: the axes of the reshaped array, in the node's order.
    axis: the picked axis.
    at: the position.
    drops: whether the result lacks the axis.
  """

  node: Node
  result: int
  order: tuple[int, ...]
  axis: int
  at: int
  drops: bool


class _Picks(NamedTuple):
  """Nodes that only move a reshaped array or pick from it, the reshape first."""

  moved: list[Node]
  picks: list[_Pick]


def pick_first(program: Program) -> None:
  """Picks before a reshape, if nothing else of its result is read."""
  readers: dict[Value, list[Node]] = defaultdict(list)
  for node in program.nodes:
    for value in node.ins:
      readers[value].append(node)
  kept, instead = [], dict[Value, Value]()
  gone = set[Node]()
  for node in program.nodes:
    node.ins = [instead.get(value, value) for value in node.ins]
    found = _picks_of(node, readers, set(program.outputs)) if node.name == "reshape" else None
    if found:
      gone.update(found.moved)
      for pick in found.picks:
        nodes, instead[pick.node.outs[pick.result]] = _picked(node, pick)
        kept += nodes
    if node not in gone:
      kept.append(node)
  program.nodes = kept
  program.outputs = [instead.get(value, value) for value in program.outputs]


def _picks_of(reshape: Node, readers: dict[Value, list[Node]], outputs: set[Value]) -> _Picks | None:
  """The reads of a reshaped array, if all are single entries along one axis."""
  if reshape.params.get("dimensions") is not None or reshape.params.get("sharding") is not None:
    return None
  moved, picks, ranged = [reshape], list[_Pick](), set[int]()
  axes = tuple(range(len(reshape.outs[0].shape)))
  waiting = [(reshape.outs[0], axes, (0,) * len(axes))]
  for (
    value,
    order,
    starts,
  ) in waiting:  # value, order of its axes, first entries
    if value in outputs:
      return None
    for node in readers[value]:
      moved.append(node)
      if node.name == "transpose":
        permuted = node.params["permutation"]
        moves = [tuple(x[at] for at in permuted) for x in (order, starts)]
        waiting.append((node.outs[0], moves[0], moves[1]))
      elif found := list(_entries(node, order, starts)):
        picks += found
      elif (part := _range(node)) is not None:
        first = tuple(start + (part.start if at == part.axis else 0) for at, start in enumerate(starts))
        ranged.add(order[part.axis])
        waiting.append((node.outs[0], order, first))
      else:
        return None
  if len({pick.axis for pick in picks} | ranged) != 1 or _merged(reshape, picks[0].axis) is None:
    return None
  return _Picks(moved, picks)


def _entries(node: Node, order: tuple[int, ...], starts: tuple[int, ...]) -> Iterator[_Pick]:
  """The single entries along one axis that a node takes, if it does nothing else."""
  if node.name == "unstack" or (node.name == "split" and set(node.params["sizes"]) == {1}):
    drops, axis = node.name == "unstack", node.params["axis"]
    for at in range(len(node.outs)):
      yield _Pick(node, at, order, order[axis], starts[axis] + at, drops)
  elif (part := _range(node)) is not None and node.outs[0].shape[part.axis] == 1:
    yield _Pick(node, 0, order, order[part.axis], starts[part.axis] + part.start, False)


class _Range(NamedTuple):
  axis: int
  start: int


def _range(node: Node) -> _Range | None:
  """What a slice takes, if it cuts one axis without strides."""
  if node.name != "slice":
    return None
  shapes = zip(node.ins[0].shape, node.outs[0].shape, strict=True)
  partly = [at for at, (n, m) in enumerate(shapes) if n is not m and n != m]
  if len(partly) != 1 or {*(node.params["strides"] or ())} - {1}:
    return None
  return _Range(partly[0], int(node.params["start_indices"][partly[0]]))


def _merged(reshape: Node, axis: int) -> tuple[int, int, int] | None:
  """The operand axis that a result axis is part of, and the sizes before and behind it (if there are such)."""
  before, after = reshape.ins[0].shape, reshape.outs[0].shape
  if not all(map(compat.is_static_size, after[axis:])) or 0 in after[axis:]:
    return None
  inner, behind = math.prod(after[axis + 1 :]), 1
  for at in reversed(range(len(before))):
    if not compat.is_static_size(before[at]):
      return None
    if behind * before[at] >= inner * after[axis]:
      rest = inner // behind
      fits = inner % behind == 0 and before[at] % (after[axis] * rest) == 0
      return (at, before[at] // (after[axis] * rest), rest) if fits and rest > 1 else None
    behind *= before[at]
  return None


def _picked(reshape: Node, pick: _Pick) -> tuple[list[Node], Value]:
  """Nodes that pick and then reshape, and their result."""
  (source,), (whole,) = reshape.ins, reshape.outs
  merged = _merged(reshape, pick.axis)
  assert merged is not None
  at, outer, rest = merged

  def fn(x: jax.Array) -> jax.Array:
    shape = (*x.shape[:at], *((outer,) if outer > 1 else ()), x.shape[at] // outer, *x.shape[at + 1 :])
    place = at + (outer > 1)
    x = lax.slice_in_dim(x.reshape(shape), pick.at * rest, (pick.at + 1) * rest, axis=place)
    x = x.reshape([1 if i == pick.axis else n for i, n in enumerate(whole.shape)]).transpose(pick.order)
    return x.squeeze(pick.order.index(pick.axis)) if pick.drops else x

  with compat.located(pick.node.eqn):
    jaxpr, _ = compat.trace(fn, jax.ShapeDtypeStruct(source.shape, source.aval.dtype))
  found = Program([source], [])
  opened, _ = compat.open_jaxpr(jaxpr)
  (out,) = _append(found, opened, {opened.invars[0]: source}, pick.node.callers)
  return found.nodes, out
