"""Real operations per operation: several for complex numbers."""

import jax.numpy as jnp

from fisherprune_jax._graph.program import Node, Value

# Golub and Van Loan, Matrix Computations, 1.1: a complex product takes four products and two sums, a quotient a
# product, a squared modulus and two divisions. A modulus takes two squares, a sum and a root.
PRODUCT, QUOTIENT, MODULUS = 6, 11, 4
COMPLEX = {
  "abs": MODULUS,
  "complex": 1,
  "conj": 1,
  "cumprod": PRODUCT,
  "div": QUOTIENT,
  "imag": 1,
  "integer_pow": PRODUCT,
  "mul": PRODUCT,
  "real": 1,
  "reduce_prod": PRODUCT,
  "scatter-mul": PRODUCT,
  "sort": 1,
  "square": PRODUCT,
}


def weight(node: Node) -> int:
  """Per element: 1 for real numbers; for complex ones by the table, or 2."""
  return COMPLEX.get(node.name, 2) if any(map(is_complex, (*node.ins, *node.outs))) else 1


def is_complex(value: Value) -> bool:
  return jnp.issubdtype(value.aval.dtype, jnp.complexfloating)


def inner_product(left: Value, right: Value) -> tuple[int, int]:
  """Factors of ``2 K - 1`` and of ``K``: it is ``8 K - 2`` if both operands are complex, ``4 K - 2`` if one is."""
  number = is_complex(left) + is_complex(right)
  return 2 if number else 1, 2 if number == 2 else 1
