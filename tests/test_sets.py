"""Sets against a plain reading of them, and critical features against switching each feature off."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from fisherprune_jax.graph import sets
from fisherprune_jax.graph.evaluate import Evaluation, product_drop


def random_set(rng: random.Random, depth: int, n: int) -> sets.Set:
  """A random expression of ``n`` positions over masks ``("m", size, which)``."""
  kind = rng.choice(["leaf", "and", "or", "take", "concat", "outer", "any"]) if depth and n else "leaf"
  if kind == "leaf":
    choice = rng.random()
    if choice < 0.1:
      return sets.everything(n)
    if choice < 0.2:
      return sets.fixed([rng.random() < 0.5 for _ in range(n)])
    return sets.leaf(("m", n, rng.randrange(2)), n)
  if kind in ("and", "or"):
    combine = sets.intersection if kind == "and" else sets.union
    return combine(random_set(rng, depth - 1, n), random_set(rng, depth - 1, n))
  if kind == "take":
    m = rng.randrange(1, 9)
    return sets.take(random_set(rng, depth - 1, m), [rng.randrange(-1, m) for _ in range(n)])
  if kind == "concat":
    a = rng.randrange(n + 1)
    return sets.concat([random_set(rng, depth - 1, a), random_set(rng, depth - 1, n - a)])
  if kind == "outer":
    d = rng.choice([d for d in range(1, n + 1) if n % d == 0])
    return sets.outer([random_set(rng, depth - 1, d), random_set(rng, depth - 1, n // d)])
  m, keep = rng.randrange(1, 4), rng.randrange(2)
  return sets.any_over(random_set(rng, depth - 1, n * m), (n, m) if keep == 0 else (m, n), keep)


@pytest.mark.parametrize("seed", range(300))
def test_critical_features_are_those_whose_loss_shrinks_the_set(seed):
  rng = random.Random(seed)
  s = random_set(rng, rng.randrange(1, 5), rng.randrange(1, 9))
  masks = {key: np.array([rng.random() < 0.7 for _ in range(key[1])], float) for key in s.leaves}
  ev = Evaluation(masks)
  for key in s.leaves:
    found = ev.drops(s, key, key[1])
    for k in range(key[1]):
      fewer = {**masks, key: np.where(np.arange(key[1]) == k, 0, masks[key])}
      assert found[k] == ev.count(s) - Evaluation(fewer).count(s)
    if seed % 10 == 0:
      on_device = Evaluation({key: jnp.asarray(mask) for key, mask in masks.items()}, jnp)
      np.testing.assert_array_equal(on_device.drops(s, key, key[1]), found)


@pytest.mark.parametrize("seed", range(100))
def test_a_split_product_contains_the_set_and_nothing_it_need_not(seed):
  rng = random.Random(seed)
  shape = (rng.randrange(1, 4), rng.randrange(1, 4), rng.randrange(1, 4))
  s = random_set(rng, 3, int(np.prod(shape)))
  masks = {key: np.array([rng.random() < 0.7 for _ in range(key[1])], float) for key in s.leaves}
  ev = Evaluation(masks)
  bits = ev.bits(s).reshape(shape)
  for axis, part in enumerate(sets.split(s, shape)):
    expected = bits.any(axis=tuple(a for a in range(3) if a != axis))
    found = ev.bits(part)
    if s.kind == sets.OUTER and not bits.any():
      continue  # an empty product does not say which factor is empty
    assert (found >= expected).all()
    if s.kind != sets.OUTER:
      np.testing.assert_array_equal(found, expected)


def test_what_a_reshape_merged_the_next_one_splits_exactly():
  a, b = sets.leaf("a", 3), sets.leaf("b", 4)
  merged = sets.outer([sets.everything(2), a, b])
  assert sets.split(merged, (2, 3, 4)) == [sets.everything(2), a, b]
  assert sets.split(sets.outer([sets.everything(6), b]), (2, 3, 4)) == [
    sets.everything(2),
    sets.everything(3),
    b,
  ]


def test_equal_expressions_are_one_object():
  a, b = sets.leaf("a", 3), sets.leaf("b", 3)
  assert sets.intersection(a, b) is sets.intersection(b, a, a)
  assert sets.union(a, sets.intersection(a, b)) is a
  assert sets.intersection(a, sets.union(a, b)) is a
  assert sets.take(sets.concat([a, b]), [3, 4, 5]) is b
  assert sets.contains(sets.union(a, b), a)
  assert not sets.contains(a, sets.union(a, b))


def test_product_drop_loses_nothing_to_cancellation():
  value, drop = product_drop(
    [(np.float32(1e6), np.float32(0)), (np.float32(1e6), np.float32(1)), (np.float32(3), np.float32(1))]
  )
  assert value == np.float32(3e12)
  assert drop == pytest.approx(1e6 * 1e6 * 3 - 1e6 * (1e6 - 1) * 2, rel=1e-6)
