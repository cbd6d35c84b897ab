"""How many operations on real numbers one operation takes: one, unless its numbers are complex."""

import jax.numpy as jnp

from fisherprune_jax._graph.program import Node, Value

# A product of complex numbers is four products and two sums, a quotient a product, a squared modulus and two divisions
# (Golub and Van Loan, Matrix Computations, 1.1); a modulus two squares, a sum and a root.
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
  """Of one application per element: 1 for real numbers; for complex ones that of the table, or 2."""
  return COMPLEX.get(node.name, 2) if any(map(is_complex, (*node.ins, *node.outs))) else 1


def is_complex(value: Value) -> bool:
  """Whether an array's numbers are complex."""
  return jnp.issubdtype(value.aval.dtype, jnp.complexfloating)


def inner_product(left: Value, right: Value) -> tuple[int, int]:
  """Factors of ``2 K - 1`` and of ``K`` in it: ``8 K - 2`` if both operands are complex, ``4 K - 2`` if one is."""
  number = is_complex(left) + is_complex(right)
  return 2 if number else 1, 2 if number == 2 else 1
