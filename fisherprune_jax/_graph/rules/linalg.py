"""Fourier transforms and dense linear algebra: indivisible along mixed axes.

Counts are those of Golub and Van Loan, *Matrix Computations*, for ``m`` by ``n`` matrices, where ``k`` is the smaller
side. Transforms take ``5 N log2 N`` (Cooley and Tukey). Complex matrices take four times as much.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.compat import Params
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import SpecRule, built_in
from fisherprune_jax._graph.rules.naming import apart, sizes_in
from fisherprune_jax._graph.rules.weights import is_complex
from fisherprune_jax._graph.spec import Flops, Spec

THIRD = Fraction(1, 3)
Number = int | Fraction
Count = Callable[[int, int, Params], Number]


def fft(node: Node, infos: Sequence[Info]) -> Spec:
  """``b s -> b t``: linear, so zeros give zeros."""
  lengths = node.params["fft_lengths"]
  numbers = math.prod(lengths) if all(map(compat.is_static_size, lengths)) else 0
  real = not all(map(is_complex, (*node.ins, *node.outs)))
  flops = round((2.5 if real else 5) * numbers * math.log2(max(numbers, 1)))
  return _batched(node, len(lengths), flops, alive=False)


def matrices(count: Count) -> SpecRule:
  """``b m n -> b ..``: something of each matrix, at a cost of ``count(m, n, params)``.

  What zero matrices give (mostly NaN) is unknown.
  """

  def rule(node: Node, infos: Sequence[Info]) -> Spec:
    m, n = node.ins[0].shape[-2:]
    spec = _batched(node, 2, _of_matrices(node, lambda: count(m, n, node.params)), alive=True)
    # A reflection depends on the sign of a zero.
    return replace(spec, sees=frozenset(range(len(node.ins))))

  return rule


def triangular_solve(node: Node, infos: Sequence[Info]) -> Spec:
  """``b m m, b m r -> b m r`` (or ``b r m`` from the right): zero where a right-hand side is."""
  rows = node.ins[0].shape[-1]
  at = -1 if node.params["left_side"] else -2
  return _solve(node, 2, at, _of_matrices(node, lambda: rows * rows))


def tridiagonal_solve(node: Node, infos: Sequence[Info]) -> Spec:
  """``b m, b m, b m, b m r -> b m r``: zero where a right-hand side is."""
  rows = node.ins[0].shape[-1]
  return _solve(node, 1, -1, _of_matrices(node, lambda: 8 * rows))


def _solve(node: Node, core: int, at: int, flops: int) -> Spec:
  """A solve with independent right-hand sides along axis ``at`` of the last operand."""
  spec = _batched(node, core, flops, alive=True)
  ((*shown,),), side = spec.outs, str(spec.ins[-1][at])
  whole, shown[at] = shown[at], side
  return replace(
    spec,
    outs=(tuple(shown),),
    sizes={f: n for f, n in spec.sizes.items() if f != whole},
    neutral=frozenset(range(len(node.ins) - 1)),
    whole=spec.whole - {side, str(whole)},
    flops=(Flops((*sorted(spec.alive), side), scale=flops),),
  )


def _batched(node: Node, core: int, flops: int, alive: bool) -> Spec:
  """Leading axes (all but ``core`` of the first operand) are elementwise, others indivisible."""
  batch = tuple(f"b{i}" for i in range(len(node.ins[0].shape) - core))
  ins, outs = (
    tuple((*batch, *own) for own in apart(letter, values, len(batch)))
    for letter, values in (("i", node.ins), ("o", node.outs))
  )
  sizes = sizes_in(node, ins, outs)
  return Spec(
    ins=ins,
    outs=outs,
    sizes=sizes,
    alive=frozenset(batch) if alive else frozenset(),
    whole=frozenset(f for f in sizes if f not in batch),
    flops=(Flops(batch, scale=flops),) if flops else (),
    opaque=f"{node.name} along the masked axis",
  )


def ormqr(node: Node, infos: Sequence[Info]) -> Spec:
  """``b m k, b k, b m n -> b m n``: ``k`` reflections, each a product and a rank-one update."""
  (m, k), sides = node.ins[0].shape[-2:], node.ins[2].shape[-1 if node.params["left"] else -2]
  return _batched(node, 2, _of_matrices(node, lambda: 4 * m * sides * k - 2 * sides * k * k), alive=True)


def permutation(node: Node, infos: Sequence[Info]) -> Spec:
  """``b k -> b m``: swaps of rows as an order, which costs nothing."""
  return _batched(node, 1, 0, alive=True)


def _of_matrices(node: Node, count: Callable[[], Number]) -> int:
  """The count as an integer; 0 if symbolic, as in an export, which counts nothing."""
  sizes = [n for value in node.ins for n in value.shape]
  if not all(map(compat.is_static_size, sizes)):
    return 0
  return round(count() * (4 if is_complex(node.ins[0]) else 1))


def _lu(m: int, n: int, params: Params) -> Number:
  k = min(m, n)
  return k * k * (max(m, n) - k * THIRD)


def _qr(m: int, n: int, params: Params) -> Number:
  return 2 * _lu(m, n, params)


def _q(m: int, n: int, params: Params) -> Number:
  return 2 * n * n * (m - n * THIRD)


def _eigh(m: int, n: int, params: Params) -> Number:
  return 9 * n**3  # reduced to a tridiagonal matrix, then QR steps, with eigenvectors


def _eig(m: int, n: int, params: Params) -> Number:
  vectors = params["compute_left_eigenvectors"] or params["compute_right_eigenvectors"]
  return (25 if vectors else 10) * n**3


def _svd(m: int, n: int, params: Params) -> Number:
  large, small = max(m, n), min(m, n)
  if not params["compute_uv"]:
    return 4 * large * small**2 - 4 * THIRD * small**3
  if params["full_matrices"]:
    return 4 * large**2 * small + 8 * large * small**2 + 9 * small**3
  return 14 * large * small**2 + 8 * small**3


MATRICES: dict[str, Count] = {
  "cholesky": lambda m, n, params: n**3 * THIRD,
  "cholesky_update": lambda m, n, params: 2 * n**2,
  "eig": _eig,
  "eigh": _eigh,
  "geqp3": _qr,
  "geqrf": _qr,
  "hessenberg": lambda m, n, params: 10 * n**3 * THIRD,
  "householder_product": _q,
  "lu": _lu,
  "qr": _qr,
  "schur": lambda m, n, params: (25 if params["compute_schur_vectors"] else 10) * n**3,
  "svd": _svd,
  "symmetric_product": lambda m, n, params: m * m * n,
  "tridiagonal": lambda m, n, params: 4 * n**3 * THIRD,
}

built_in("fft", fft)
built_in("lu_pivots_to_permutation", permutation)
built_in("ormqr", ormqr)
built_in("triangular_solve", triangular_solve)
built_in("tridiagonal_solve", tridiagonal_solve)
for name, count in MATRICES.items():
  built_in(name, matrices(count))
