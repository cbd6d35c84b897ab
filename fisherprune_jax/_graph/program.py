"""A traced function as plain data: values, and nodes that compute them.

A ``Program`` is a jaxpr with calls to ``jit`` flattened away and **fresh values for every call**. The second
point matters: JAX caches the jaxprs of jitted helpers, so two calls of ``nn.relu`` on one shape share the
variables of their inner jaxpr, and facts about one call would overwrite facts about the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fisherprune_jax._graph import compat
from fisherprune_jax._types import PyTree, Size

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "core_closed_call"})


@dataclass(eq=False, slots=True)
class Value:
  """One array of a program. ``literal`` holds the value where it is written into the program."""

  aval: Any
  literal: Any = None

  @property
  def shape(self) -> tuple[Size, ...]:
    """Its full shape; sizes may be symbolic."""
    return getattr(self.aval, "shape", ())


@dataclass(eq=False, slots=True)
class Node:
  """One application of a primitive; ``callers`` are the equations that it is inside of."""

  eqn: compat.Equation
  ins: list[Value]
  outs: list[Value]
  callers: tuple[compat.Equation, ...] = ()

  @property
  def name(self) -> str:
    """The primitive's name."""
    return self.eqn.primitive.name

  @property
  def params(self) -> compat.Params:
    """The primitive's parameters."""
    return self.eqn.params

  @property
  def acts(self) -> bool:
    """Whether it acts on the world outside, as an ``io_callback`` does, so that it has to run; printing does not."""
    return compat.acts(self.eqn)

  @property
  def source(self) -> str:
    """The user's line that it came from."""
    found = (compat.source_of(eqn) for eqn in (self.eqn, *reversed(self.callers)))
    return next(filter(None, found), "unknown source")

  @property
  def scope(self) -> str:
    """The names that it was traced under, such as the Flax modules ``Net/Dense_0``; empty if there are none."""
    return "/".join(filter(None, (compat.scope_of(eqn) for eqn in (*self.callers, self.eqn))))


@dataclass(eq=False)
class Program:
  """Inputs, constants, nodes in order of execution, and outputs."""

  inputs: list[Value]
  consts: list[tuple[Value, Any]]
  outputs: list[Value] = field(default_factory=list)
  nodes: list[Node] = field(default_factory=list)


def trace(fn: Callable[..., PyTree], *args: PyTree) -> tuple[Program, PyTree]:
  """Traces ``fn`` at ``args`` (arrays or abstract); returns its program and the tree of its results."""
  jaxpr, out_tree = compat.trace(fn, *args)
  return build(jaxpr), out_tree


def build(closed: Any, callers: tuple[compat.Equation, ...] = ()) -> Program:
  """Turns an open or closed jaxpr, called from ``callers``, into a program of its own fresh values."""
  jaxpr, consts = compat.open_jaxpr(closed)
  env = {var: Value(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)}
  constants = [(env[var], const) for var, const in zip(jaxpr.constvars, consts, strict=True)]
  program = Program([env[var] for var in jaxpr.invars], constants)
  program.outputs = _append(program, jaxpr, env, callers)
  return program


def _append(
  program: Program, jaxpr: Any, env: dict[Any, Value], callers: tuple[compat.Equation, ...]
) -> list[Value]:
  """Appends the equations of ``jaxpr`` to ``program``; returns its outputs."""

  def read(atom: Any) -> Value:
    return Value(atom.aval, atom.val) if isinstance(atom, compat.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    ins = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name in INLINED:
      outs = _inline(program, eqn, ins, (*callers, eqn))
    else:
      outs = [Value(var.aval) for var in eqn.outvars]
      program.nodes.append(Node(eqn, ins, outs, callers))
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _inline(
  program: Program, eqn: compat.Equation, ins: Sequence[Value], callers: tuple[compat.Equation, ...]
) -> list[Value]:
  (called,) = compat.sub_jaxprs(eqn.params)
  jaxpr, consts = compat.open_jaxpr(called)
  held = [Value(var.aval) for var in jaxpr.constvars]
  program.consts += zip(held, consts, strict=True)
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*held, *ins), strict=True))
  return _append(program, jaxpr, env, callers)
