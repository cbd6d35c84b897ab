"""The rules of the library and of users."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from fisherprune_jax._errors import require
from fisherprune_jax._graph.compat import Primitive
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import INLINED, Node
from fisherprune_jax._graph.spec import Spec
from fisherprune_jax._graph.structured import STRUCTURED

SpecRule = Callable[[Node, Sequence[Info]], Spec | None]
"""``rule(node, infos)`` returns a spec, or None if not covered; ``infos`` describe operands."""

_built_in: dict[str, SpecRule] = {}
_taught: dict[str, SpecRule] = {}
_lock = threading.Lock()


def register_rule(primitive: Primitive | str, rule: SpecRule, *, override: bool = False) -> None:
  """Teaches the engine a primitive: ``rule(node, infos)`` returns the ``Spec`` of one application.

  Liveness, cost and execution follow from it. :mod:`fisherprune_jax.rules` has building blocks and two examples. Each
  spec is checked against its application.

  Register rules before you trace: existing cost models and compact networks keep theirs. (A compact network called with
  other shapes is traced again.)

  Args:
    primitive: a JAX primitive, or its name.
    rule: called for each application in a traced program, maybe from several threads. It must be deterministic; it
      returns None for what it does not cover. ``node`` has ``ins`` and ``outs`` (with ``shape``), ``params`` and
      ``name``; ``infos`` describe operands.
    override: whether to replace a rule of the library. Your rules can be replaced without it.

  Raises:
    ValueError: if ``primitive`` is neither a primitive nor a name, or runs other programs (``scan``, ``cond``, ``jit``,
      ...). Also if the library has a rule and ``override`` is not set, or if ``rule`` is not callable.

  >>> from jax.extend.core import Primitive
  >>> import fisherprune_jax as fp
  >>> softer_p = Primitive("softer_of_the_example")
  >>> fp.register_rule(softer_p, fp.rules.elementwise)

  References:
    Shardy (https://openxla.org/shardy): its sharding rules name factors in the same way.
  """
  name = _name_of(primitive)
  require(
    name not in STRUCTURED and name not in INLINED,
    "register_rule must be given a primitive that runs no programs",
    name,
    "The engine looks into its programs: teach it the primitives that they use.",
  )
  require(
    callable(rule),
    "register_rule must be given a function rule(node, infos) that returns a Spec or None",
    rule,
    "For a primitive that works entry by entry fp.rules.elementwise is one.",
  )
  require(
    override or name not in _built_in,
    "register_rule must be told to replace a rule of the library's own",
    name,
    f"Say override=True; fp.rules.rule_for({name!r}) gives that rule, to build on.",
  )
  with _lock:
    _taught[name] = rule


def built_in(primitive: str, rule: SpecRule) -> None:
  """Registers a rule of the library."""
  _built_in[primitive] = rule


def rule_for(primitive: Primitive | str) -> SpecRule | None:
  """The rule for a primitive or its name; None without one.

  To extend a rule, get it before you register yours; yours calls it and changes the spec.

  >>> import dataclasses
  >>> import fisherprune_jax as fp
  >>> plain = fp.rules.rule_for("tanh")
  >>> def dear(node, infos):  # 10 FLOPs for each entry
  ...   spec = plain(node, infos)
  ...   return dataclasses.replace(spec, flops=tuple(count._replace(scale=10) for count in spec.flops))
  >>> fp.rules.rule_for("no_such_primitive") is None
  True
  """
  return rule_named(_name_of(primitive))


def rule_named(name: str) -> SpecRule | None:
  """The rule for a primitive's name, a user's before the library's."""
  return _taught.get(name) or _built_in.get(name)


def is_taught(primitive: str) -> bool:
  """Whether it has a user's rule."""
  return primitive in _taught


def known() -> frozenset[str]:
  return frozenset(_built_in) | frozenset(_taught)


def _name_of(primitive: Any) -> str:
  name = primitive.name if isinstance(primitive, Primitive) else primitive
  require(
    isinstance(name, str) and bool(name),
    "A primitive must be given as a JAX primitive or as its name",
    primitive,
    "jax.make_jaxpr of a function shows the primitives that it binds, such as jax.lax.sin_p of jax.numpy.sin.",
  )
  return str(name)
