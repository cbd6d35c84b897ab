"""Which rule speaks for which primitive: the library's own rules, and those of its users."""

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
"""``rule(node, infos) -> Spec``, or None for what it does not cover; ``infos`` are the operands' ``Info``."""

_built_in: dict[str, SpecRule] = {}
_taught: dict[str, SpecRule] = {}
_lock = threading.Lock()


def register_rule(primitive: Primitive | str, rule: SpecRule, *, override: bool = False) -> None:
  """Teaches the engine a primitive: ``rule(node, infos)`` returns the ``Spec`` of one application.

  Liveness, cost and execution follow from the ``Spec``; :mod:`fisherprune_jax.rules` has what rules are made of, and
  two worked examples. What a rule returns is checked against the operands and results of each application.

  A rule speaks in what is traced after it was registered. Cost models and compact networks that exist already keep
  the rules that they were made with (a compact network that is called with other shapes is traced anew): teach
  first, then trace.

  Args:
    primitive: a JAX primitive, or its name.
    rule: called for the applications found in a traced program, from several threads if there are several; may
      return None for one that it does not cover. ``node`` has ``ins`` and ``outs`` (with ``shape``), ``params`` and
      ``name``; ``infos`` tell what is known of each operand. It must say the same whenever it is asked the same.
    override: whether it may replace a rule of the library's own. One's own rule can be registered anew without.

  Raises:
    ValueError: if ``primitive`` is neither a primitive nor a name, if it runs programs of its own (``scan``, ``cond``,
      ``jit``, ...), if the library has a rule for it and ``override`` is not set, or if ``rule`` cannot be called.

  >>> from jax.extend.core import Primitive
  >>> import fisherprune_jax as fp
  >>> softer_p = Primitive("softer_of_the_example")
  >>> fp.register_rule(softer_p, fp.rules.elementwise)

  References:
    Shardy (https://openxla.org/shardy), whose sharding rules name the factors that the axes of operands and results
    share in the same way.
  """
  name = _name_of(primitive)
  require(
    name not in STRUCTURED and name not in INLINED,
    "register_rule must be given a primitive that runs no programs of its own",
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
  """Registers a rule of the library's own."""
  _built_in[primitive] = rule


def rule_for(primitive: Primitive | str) -> SpecRule | None:
  """The rule that speaks for a primitive, given by itself or by its name; None if there is none.

  To replace a rule by one that builds on it: take it from here first, call it in one's own, and change what it says.

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
  """The rule that speaks for the primitive of a name, a user's before the library's own; None if there is none."""
  return _taught.get(name) or _built_in.get(name)


def is_taught(primitive: str) -> bool:
  """Whether the rule for a primitive is a user's."""
  return primitive in _taught


def known() -> frozenset[str]:
  """The names of all primitives that there is a rule for."""
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
