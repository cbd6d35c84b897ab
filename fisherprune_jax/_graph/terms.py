"""Costs as polynomials in the sizes of live sets: integers on the host, or under jit."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.sets import Set, beyond
from fisherprune_jax._graph.spec import Factor, Flops


class Term(NamedTuple):
  """``scale * prod |outer| * max(2 K - 1, 0)``, ``K = taps * prod |inner|``; without inner, the max is 1."""

  scale: int
  outer: tuple[Set, ...]
  inner: tuple[Set, ...] | None = None
  taps: int = 1

  @property
  def key(self) -> Any:
    """Terms with equal keys differ by scale alone."""
    return self[1:]

  @property
  def sets(self) -> tuple[Set, ...]:
    """Its sets; if one is empty, the term is zero."""
    return (*self.outer, *(self.inner or ()))

  def under(self, when: Set) -> "Term":
    """The same under a condition; zero without it."""
    when = beyond(when, self.sets)
    return self if when.is_all else self._replace(outer=_in_order((*self.outer, when)))


def sized(number: int, found: Iterable[Set]) -> Term:
  return Term(*_split_constants(number, found))


def term(flops: Flops, factors: dict[Factor, Set]) -> Term:
  """A rule's count at live sets; full axes become part of the numbers."""
  scale, outer = _split_constants(flops.scale, [factors[f] for f in flops.outer])
  if flops.inner is None:
    return Term(scale, outer)
  taps, inner = _split_constants(flops.taps, [factors[f] for f in flops.inner])
  if inner:
    return Term(scale, outer, inner, taps)
  return Term(scale * max(2 * taps - 1, 0), outer)


def _split_constants(number: int, found: Iterable[Set]) -> tuple[int, tuple[Set, ...]]:
  rest = []
  for s in (part for whole in found for part in whole.factors):
    if s.is_all:
      number *= s.size
    else:
      rest.append(s)
  return int(number), _in_order(rest)


def _in_order(found: Iterable[Set]) -> tuple[Set, ...]:
  return tuple(sorted(found, key=lambda s: s.serial))


class MostExpensive(NamedTuple):
  """The largest of several sums, as of a conditional's branches, with a scale."""

  sums: tuple[tuple[Any, ...], ...]
  scale: int = 1

  @property
  def key(self) -> Any:
    return self.sums

  @property
  def sets(self) -> tuple[Set, ...]:
    """An empty set of one term says nothing about the others."""
    return ()

  def under(self, when: Set) -> "MostExpensive":
    return self._replace(sums=tuple(tuple(t.under(when) for t in terms) for terms in self.sums))


Terms = Iterable[Term | MostExpensive]


def collect(terms: Terms) -> list[Term | MostExpensive]:
  scales: dict[Any, int] = {}
  first: dict[Any, Term | MostExpensive] = {}
  for t in terms:
    key = (type(t), t.key)
    first.setdefault(key, t)
    scales[key] = scales.get(key, 0) + t.scale
  return [t._replace(scale=scales[key]) for key, t in first.items() if scales[key]]


def total(terms: Terms, ev: Evaluation) -> Any:
  """The sum of terms: an int on the host, a float32 scalar under JAX."""
  number = int if ev.xp is np else (lambda n: jnp.asarray(n, jnp.float32))
  out = number(0)
  for t in terms:
    if isinstance(t, MostExpensive):
      out = out + number(t.scale) * _largest([total(sum_, ev) for sum_ in t.sums], ev.xp)
      continue
    value = number(t.scale)
    for s in t.outer:
      value = value * number(ev.count(s))
    if t.inner is not None:
      inner = number(t.taps)
      for s in t.inner:
        inner = inner * number(ev.count(s))
      value = value * number(ev.xp.maximum(2 * inner - 1, 0))
    out = out + value
  return int(out) if ev.xp is np else out


def _largest(values: list[Any], xp: Any) -> Any:
  return max(values) if xp is np else jnp.max(jnp.stack(values), axis=0)
