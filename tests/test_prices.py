"""Prices of random sums of products of random sets, against switching each feature off."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.prices import Prices
from fisherprune_jax._graph.spec import Flops
from fisherprune_jax._graph.terms import MostExpensive, Term, term, total
from tests.test_sets import entangled_set


def random_term(rng, keys, pool):
  """A term whose factors share masks, and expressions, with each other and with other terms'."""
  outer, inner = (
    {f"{side}{i}": entangled_set(rng, rng.randrange(1, 5), rng.randrange(1, 7), keys, pool) for i in range(n)}
    for side, n in (("o", rng.randrange(3)), ("i", rng.randrange(3)))
  )
  contracts = rng.random() < 0.7
  count = Flops(tuple(outer), tuple(inner) if contracts else None, rng.randrange(1, 4), rng.randrange(4))
  return term(count, outer | inner)


def random_terms(rng, keys, pool, depth=0):
  """A sum, with the largest of other sums in it, as of conditionals in conditionals."""
  terms = [random_term(rng, keys, pool) for _ in range(rng.randrange(1, 5))]
  while depth < 2 and rng.random() < 0.35:
    branches = [tuple(random_terms(rng, keys, pool, depth + 1)) for _ in range(rng.randrange(1, 4))]
    terms.append(MostExpensive(tuple(branches), rng.randrange(1, 3)))
  return terms


def support(terms):
  found = 0
  for t in terms:
    inner = (support(s) for s in t.sums) if isinstance(t, MostExpensive) else ()
    own = () if isinstance(t, MostExpensive) else (s.support for s in (*t.outer, *(t.inner or ())))
    for bits in (*inner, *own):
      found |= bits
  return found


@pytest.mark.parametrize("seed", range(40))
def test_prices_are_what_brute_force_says(seed):
  rng = random.Random(seed)
  terms = random_terms(rng, rng.randrange(1, 4), {})
  keys = sets.keys_of(support(terms)) or [(1, 0)]
  alive = rng.choice([0.3, 0.6, 0.9])
  masks = {key: np.array([rng.random() < alive for _ in range(key[0])], float) for key in keys}
  prices = Prices(terms, {key: key[0] for key in keys})
  features = jnp.asarray(np.concatenate([masks[key] for key in keys]) != 0)
  value, drops = jax.jit(lambda f: (prices.total(f), prices.drops(f)))(features)
  before = total(terms, Evaluation(masks))
  assert value == pytest.approx(before, rel=1e-6)
  expected = [
    before - total(terms, Evaluation({**masks, key: np.where(np.arange(key[0]) == k, 0, masks[key])}))
    for key in keys
    for k in range(key[0])
  ]
  np.testing.assert_allclose(drops, expected, rtol=1e-6)


def test_a_program_of_prices_is_of_one_size():
  def equations(count):
    streams = [sets.leaf(("stream", 0), 8)]
    for at in range(1, count):
      streams.append(
        sets.intersection(sets.union(streams[-1], sets.leaf(("w", at), 8)), sets.leaf(("n", at), 8))
      )
    terms = [Term(3, (a,), (b,), 2) for a, b in zip(streams[1:], streams, strict=False)]
    keys = sets.keys_of(support(terms))
    prices = Prices(terms, dict.fromkeys(keys, 8))
    return len(jax.make_jaxpr(prices.drops)(jnp.ones(8 * len(keys), bool)).eqns)

  assert equations(10) == equations(50)
