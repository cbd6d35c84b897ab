"""Exact counts on the device: float32 is exact to 16 million, and wider integers need a global switch.

A number is a list of digits in base 65536, lowest first, each a uint32 array for many numbers. Overflow falls away, as
in machine integers: a result that fits is right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.nested import MAIN, Group, Sums, choices
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.terms import MostExpensive, Term
from fisherprune_jax._types import Array

BITS = 16
BASE = 1 << BITS  # so many digits add up to less than 2 ** 32

Digits = Sequence[Array]
"""One number, or many side by side."""
Terms = Sequence[Term | MostExpensive]
Counts = Callable[[Sequence[Set]], jax.Array]


def digits_for(largest: int) -> int:
  """The digits for numbers up to the largest, and a spare bit."""
  return largest.bit_length() // BITS + 1


def constant(number: int, digits: int) -> Digits:
  return [np.asarray(number >> BITS * place & BASE - 1, np.uint32) for place in range(digits)]


def carried(columns: Digits) -> Digits:
  """Digits from columns that hold more, but with the carry less than 2 ** 32."""
  out, carry = [], jnp.uint32(0)
  for column in columns:
    column = column + carry
    out.append(column & BASE - 1)
    carry = column >> BITS
  return out


def add(a: Digits, b: Digits) -> Digits:
  return carried([x + y for x, y in zip(a, b, strict=True)])


def times(a: Digits, b: Digits) -> Digits:
  """The product, with as many digits as the first number."""
  out = constant(0, len(a))
  for place, digit in enumerate(b[: len(a)]):
    # One after the other: a product of digits leaves room for a carry, not for another product.
    product = carried([x * digit for x in a[: len(a) - place]])
    out = add(out, [*constant(0, place), *product])
  return out


def above(a: Digits, b: Digits) -> jax.Array:
  out: Any = jnp.bool_(False)
  for x, y in zip(a, b, strict=True):  # from the lowest: the highest digit that differs decides
    out = (x > y) | ((x == y) & out)
  return out


def of_array(x: jax.Array, digits: int, behind: int) -> Digits:
  """A non-negative number, with ``behind`` digits behind the point and ``digits`` before."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    places = range(0, jnp.iinfo(x.dtype).bits, BITS)
    found = [(x >> place & BASE - 1).astype(jnp.uint32) for place in places]
    return [*constant(0, behind), *found, *constant(0, digits)][: behind + digits]
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  x = jnp.ldexp(x, BITS * behind)  # exact, as are the powers of two and parts below
  out = []
  for _ in range(behind + digits):
    rest = jnp.floor(x / BASE)
    out.append((jnp.floor(x) - rest * BASE).astype(jnp.uint32))
    x = rest
  return out


def total(terms: Terms, counts: Counts, digits: int) -> Digits:
  """The exact sum of terms; ``counts`` gives the sizes of sets as a vector."""
  sums = Sums(terms)
  values = _values(sums.all_terms, counts, digits) if sums.all_terms else [jnp.zeros(0, jnp.uint32)] * digits
  main, own = constant(0, digits), len(sums.terms[MAIN])
  for start in range(0, own, BASE):
    part = slice(start, min(start + BASE, own))
    main = add(main, carried([jnp.sum(column[part], dtype=jnp.uint32) for column in values]))
  if not sums.levels:
    return main
  more = [jnp.concatenate([column, jnp.zeros(1, jnp.uint32)])[sums.inner] for column in values]
  others = carried([jnp.sum(column, axis=1, dtype=jnp.uint32) for column in more])
  totals: Digits = [jnp.concatenate([jnp.asarray(x)[None], y]) for x, y in zip(main, others, strict=True)]
  for level in sums.levels:
    totals = _with_groups(totals, level)
  return [column[MAIN] for column in totals]


def _with_groups(totals: Digits, level: list[Group]) -> Digits:
  """Adds the largest of nested sums."""
  largest = _largest([[column[places] for column in totals] for places in choices(level).T])
  scales = [group.scale for group in level]
  largest = times(largest, _column(scales, digits_for(max(scales))))
  parents = np.array([group.parent for group in level])
  # Columns do not overflow: there are fewer groups than digit values.
  return carried([jnp.asarray(x).at[parents].add(y) for x, y in zip(totals, largest, strict=True)])


def _largest(numbers: Sequence[Digits]) -> Digits:
  out, *others = numbers
  for other in others:
    larger = above(other, out)
    out = [jnp.where(larger, x, y) for x, y in zip(other, out, strict=True)]
  return out


def _values(terms: Sequence[Term], counts: Counts, digits: int) -> Digits:
  sets = list(dict.fromkeys(s for t in terms for s in (*t.outer, *(t.inner or ()))))
  found = jnp.concatenate(
    [jnp.ones(1, jnp.uint32), *([jnp.asarray(counts(sets), jnp.uint32)] if sets else ())]
  )
  of_count = [found & BASE - 1, found >> BITS][: digits_for(max((s.size for s in sets), default=1))]
  place = {s: 1 + at for at, s in enumerate(sets)}

  def multiplied(number: Digits, factors: Sequence[tuple[Set, ...]]) -> Digits:
    for at in range(max(map(len, factors))):
      index = np.asarray([place[own[at]] if at < len(own) else 0 for own in factors])
      number = times(number, [digit[index] for digit in of_count])
    return number

  inner = multiplied(_column([t.taps for t in terms], digits), [t.inner or () for t in terms])
  none = ~jnp.any(jnp.stack(inner) > 0, axis=0)
  less = add(times(inner, constant(2, 1)), constant(-1, digits))  # 2 K - 1
  sums = np.asarray([t.inner is not None for t in terms])
  last = [
    jnp.where(sums, jnp.where(none, np.uint32(0), x), one)
    for x, one in zip(less, constant(1, digits), strict=True)
  ]
  scale = _column([t.scale for t in terms], digits_for(max(t.scale for t in terms)))
  return multiplied(times(last, scale), [t.outer for t in terms])


def _column(numbers: Sequence[int], digits: int) -> Digits:
  return [np.asarray(column) for column in zip(*(constant(n, digits) for n in numbers), strict=True)]
