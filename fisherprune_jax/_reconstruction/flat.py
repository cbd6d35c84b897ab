"""A network as one flat program, and parts of it as functions of values that are known already."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import Node, Program, Value, trace
from fisherprune_jax._graph.variables import abstract
from fisherprune_jax._reconstruction.unrolling import unrolled
from fisherprune_jax._types import ApplyFn, PyTree

Env = Mapping[Value, Any]
"""Arrays of a program, by value."""


@dataclass(eq=False)
class Flat:
  """A function of variables and arguments without loops, calls and branches.

  Attributes:
    program: what it computes.
    count: how many of its inputs are leaves of the variables; the arguments follow.
    made: the position of the node that makes a value.
    readers: the positions of the nodes that read a value.
    varies: the values that depend on the arguments.
  """

  program: Program
  count: int
  made: dict[Value, int] = field(default_factory=dict)
  readers: dict[Value, list[int]] = field(default_factory=lambda: defaultdict(list))
  varies: set[Value] = field(default_factory=set)

  def __post_init__(self) -> None:
    self.varies.update(self.arguments)
    for at, node in enumerate(self.program.nodes):
      self.made.update(dict.fromkeys(node.outs, at))
      for value in dict.fromkeys(node.ins):
        self.readers[value].append(at)
      if any(value in self.varies for value in node.ins):
        self.varies.update(node.outs)

  @property
  def nodes(self) -> list[Node]:
    """Its nodes, in order of execution."""
    return self.program.nodes

  @property
  def variables(self) -> list[Value]:
    """The values of the leaves of the variables."""
    return self.program.inputs[: self.count]

  @property
  def arguments(self) -> list[Value]:
    """The values of the leaves of the arguments."""
    return self.program.inputs[self.count :]

  @property
  def outputs(self) -> list[Value]:
    """The floating-point outputs that depend on the arguments."""
    floating = [v for v in self.program.outputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]
    return [value for value in floating if value in self.varies]

  def env(self, variables: PyTree, args: Sequence[PyTree] = ()) -> dict[Value, Any]:
    """The arrays of its constants, of variables, and of arguments if they are given."""
    given = [*jax.tree.leaves(variables), *jax.tree.leaves(args)]
    return {**dict(self.program.consts), **dict(zip(self.program.inputs, given, strict=False))}

  def before(self, targets: Iterable[Value], known: Iterable[Value]) -> tuple[list[int], list[Value]]:
    """The positions of the nodes that lead from known values to targets, and which of the known values these read."""
    known, seen, needed, read = set(known), set[Value](), set[int](), dict[Value, None]()
    waiting = list(targets)
    while waiting:
      value = waiting.pop()
      if value in seen or value.literal is not None:
        continue
      seen.add(value)
      if value in known or value not in self.made:
        read[value] = None
        continue
      if self.made[value] not in needed:
        needed.add(self.made[value])
        waiting += self.nodes[self.made[value]].ins
    return sorted(needed), list(read)

  def run(self, positions: Iterable[int], env: Env, added: Env = MappingProxyType({})) -> dict[Value, Any]:
    """All values after the nodes at some positions, where something is added to some of their results."""
    env = dict(env)
    for at in positions:
      node = self.nodes[at]
      arrays = [env[value] if value.literal is None else value.literal for value in node.ins]
      outs = compat.bind(node.eqn, arrays)
      env.update((v, out + added[v] if v in added else out) for v, out in zip(node.outs, outs, strict=True))
    return env

  def get(self, targets: Sequence[Value], env: Env) -> list[Any]:
    """Some values, computed of those that are known."""
    positions, _ = self.before(targets, env)
    found = self.run(positions, env)
    return [found[value] if value.literal is None else value.literal for value in targets]


def flatten_network(apply_fn: ApplyFn, variables: PyTree, args: Sequence[PyTree]) -> Flat:
  """Traces a network as one flat program."""
  program, _ = trace(unrolled(apply_fn), abstract(variables), *abstract(tuple(args)))
  return Flat(program, len(jax.tree.leaves(variables)))


class Compiled:
  """Compiles functions once for each distinct text of their jaxprs: layers of one kind share a program."""

  def __init__(self) -> None:
    self._known: dict[Any, Callable[..., Any]] = {}

  def __call__(self, fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """``fn`` compiled for arguments of these shapes; its arrays must all be arguments."""
    closed, out = compat.trace(fn, *abstract(args))
    _, consts = compat.open_jaxpr(closed)
    if len(consts):
      return jax.jit(fn)
    key = (str(closed), jax.tree.structure(args), jax.tree.structure(out))
    return self._known.setdefault(key, jax.jit(fn))
