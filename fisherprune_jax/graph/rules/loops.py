"""Control flow: kept whole, and costed by what is inside."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fisherprune_jax.graph import flops, program
from fisherprune_jax.graph.evaluate import Evaluation
from fisherprune_jax.graph.liveness import Info, analyse, whole_box
from fisherprune_jax.graph.program import Node
from fisherprune_jax.graph.rules.opaque import opaque, spec_of
from fisherprune_jax.graph.spec import Flops, Spec, register_rule


def scan(node: Node, infos: Sequence[Info]) -> Spec:
  """Every iteration counts."""
  cost = _cost(node.params["jaxpr"], infos) * node.params["length"]
  return _loop(node, cost, "a scan is kept whole")


def while_(node: Node, infos: Sequence[Info]) -> Spec:
  """One turn counts: how many there will be is not known."""
  body = _cost(node.params["body_jaxpr"], infos) + _cost(node.params["cond_jaxpr"], infos)
  return _loop(node, body, "a while loop is kept whole, and one turn of it is counted")


def cond(node: Node, infos: Sequence[Info]) -> Spec:
  """The dearest branch counts."""
  cost = max(_cost(branch, infos) for branch in node.params["branches"])
  return _loop(node, cost, "a conditional is kept whole")


def _loop(node: Node, cost: int, reason: str) -> Spec:
  return opaque(node, reason, (Flops((), scale=cost),))


def _cost(jaxpr: Any, infos: Sequence[Info]) -> int:
  """What a program costs when everything in it is alive."""
  inner = program.build(jaxpr)
  varies = any(info.varies for info in infos)
  inputs = [Info(whole_box(value.shape), varies=varies) for value in inner.inputs]
  live = analyse(inner, inputs, [whole_box(value.shape) for value in inner.outputs], spec_of)
  return flops.total((term for node in live.factors for term in live.terms(node)), Evaluation({}, np))


register_rule("scan", scan)
register_rule("while", while_)
register_rule("cond", cond)
