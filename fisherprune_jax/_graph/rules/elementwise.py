"""Elementwise primitives: whether they compute or only move.

Whether zeros stay zero is found by applying them to zeros and constants. So ``max(x, 0)``, ``min(x, 6)``, ``x ** 2``
and ``tanh(x)`` keep zeros; ``x + 1`` and ``exp(x)`` do not.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in
from fisherprune_jax._graph.rules.naming import sized
from fisherprune_jax._graph.rules.probing import Zeros, probe
from fisherprune_jax._graph.rules.weights import weight
from fisherprune_jax._graph.spec import Axes, Factor, Flops, Spec, names_of
from fisherprune_jax._types import Size

COMPUTES = """
  abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
  complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac
  imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne neg
  nextafter not one_minus_square or polygamma population_count pow real regularized_incomplete_beta rem
  round rsqrt shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan
  tanh xor zeta
""".split()
MOVES = """
  convert_element_type copy layout_constraint name pin pvary reduce_precision
  reduced_vary_cast reduced_vary_cast_p reshard select_n sharding_constraint stop_gradient unpin
  vary_unreduced_cast vary_unreduced_cast_p with_memory_space_constraint
""".split()
# Absorbing operands.
PRODUCTS = {"mul": frozenset({0, 1}), "and": frozenset({0, 1}), "div": frozenset({0})}
# Operands whose zeros decide nothing.
PREDICATES = {"select_n": frozenset({0})}


def elementwise(node: Node, infos: Sequence[Info]) -> Spec:
  """The rule of a primitive that works entry by entry.

  Size-1 axes and scalars broadcast. Whether zeros stay zero, and whether their signs show, is found by applying the
  primitive, so it must be implemented. It costs 1 per entry.

  Args:
    node: the application.
    infos: what is known of its operands.

  Returns:
    Its ``Spec``.
  """
  shape = node.outs[0].shape
  ins = tuple(_axes(value.shape, shape) for value in node.ins)
  names = names_of(shape)
  constants = {i for i, info in enumerate(infos) if info.const is not None}
  kills = _kills(node, infos)
  neutral = (PREDICATES.get(node.name, frozenset()) - kills) | constants
  same_as = _same_as(node, infos)
  moves = node.name in MOVES and node.name != "select_n"
  zeros = _zeros(node, infos)
  keeps_zero = zeros.kept or bool(kills)
  others = frozenset(range(len(ins))) - neutral
  alone = others if keeps_zero and len(others) == 1 else frozenset()
  alive = {f for f in names if not keeps_zero or _broadcasts(f, ins, neutral)}
  return Spec(
    ins=ins,
    outs=(names,) * len(node.outs),
    sizes=sized((names, shape)),
    kills=kills | alone,
    neutral=frozenset(neutral),
    alive=frozenset(alive),
    flops=() if node.name in MOVES or same_as is not None else (Flops(names, scale=weight(node)),),
    moves=moves,
    opaque=_opaque(node, infos, keeps_zero, frozenset(neutral) | kills, bool(alive)),
    same_as=same_as,
    sees=zeros.sees,
    blind=zeros.blind,
  )


def _axes(shape: Sequence[Size], out: Sequence[Size]) -> Axes:
  if len(shape) != len(out):  # scalars broadcast
    return ()
  sizes = zip(names_of(out), shape, out, strict=True)
  return tuple(f if n == m else None for f, n, m in sizes)


def _broadcasts(factor: Factor, ins: Sequence[Axes], neutral: frozenset[int]) -> bool:
  """Whether an operand lacks the factor, and so its zeros."""
  return any(factor not in axes for i, axes in enumerate(ins) if i not in neutral)


def _opaque(
  node: Node, infos: Sequence[Info], keeps_zero: bool, harmless: frozenset[int], alive: bool
) -> str:
  """Why dead entries become non-zero for good; empty if another branch may be dead there."""
  if not keeps_zero:
    return f"{node.name} makes zeros non-zero"
  others = [info for operand, info in enumerate(infos) if operand not in harmless]
  if not others:
    return ""
  if not all(info.varies or info.is_masked for info in others):
    return f"{node.name} with a variable makes zeros non-zero"
  if alive:
    return f"{node.name} with an array that lacks the masked axis"
  return ""


def _kills(node: Node, infos: Sequence[Info]) -> frozenset[int]:
  # 0 / 0 is not zero: the numerator's zeros count only if the denominator has none.
  if node.name == "select_n" and _is_product(node, infos):
    return frozenset({0, 2})
  if node.name == "div" and not (infos[1].const is None and _is_everywhere(infos[1])):
    return frozenset()
  return PRODUCTS.get(node.name, frozenset())


def _is_product(node: Node, infos: Sequence[Info]) -> bool:
  """Whether it is like a product: a choice between +0 and another value, as ``where(mask > 0, x, 0)``."""
  zero = infos[1].const
  return len(infos) == 3 and infos[1].is_zero and not np.signbit(np.real(zero))


def _is_everywhere(info: Info) -> bool:
  return info.when.is_all and all(s.is_all for s in info.possible)


def _same_as(node: Node, infos: Sequence[Info]) -> int | None:
  """The operand that a product with a mask equals on live entries."""
  if node.name != "mul" or not any(info.mask for info in infos):
    return None
  operand = 0 if infos[1].mask else 1
  # A mask of one feature may broadcast: then its zero is not on a shared axis.
  mask = 1 - operand
  sizes = zip(infos[mask].possible, node.ins[mask].shape, node.outs[0].shape, strict=False)
  shows = all(s.is_all or n == m for s, n, m in sizes)
  return operand if shows and node.ins[operand].aval.shape == node.outs[0].aval.shape else None


def _zeros(node: Node, infos: Sequence[Info]) -> Zeros:
  if node.name == "select_n":
    kept = all(info.const is None or info.const == 0 for info in infos[1:])
    return Zeros(kept, frozenset(), frozenset({0}))
  return Zeros(True, frozenset(), frozenset()) if node.name in MOVES else probe(node, infos)


def bitcast(node: Node, infos: Sequence[Info]) -> Spec:
  """``a b -> a b``, or ``a b -> a b 2`` between widths; floats show signs of zeros."""
  before, after = node.ins[0].shape, node.outs[0].shape
  longest = before if len(before) > len(after) else after
  names = names_of(longest)
  signed = jnp.issubdtype(node.ins[0].aval.dtype, jnp.inexact)
  return Spec(
    ins=(names[: len(before)],),
    outs=(names[: len(after)],),
    sizes=sized((names, longest)),
    alive=frozenset(names) if signed else frozenset(),
    whole=frozenset(names[min(len(before), len(after)) :]),
    opaque="bitcast_convert_type shows the sign of zeros" if signed else "",
    sees=frozenset({0}),
  )


for name in COMPUTES + MOVES:
  built_in(name, elementwise)
built_in("bitcast_convert_type", bitcast)
