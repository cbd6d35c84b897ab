"""Sets against a plain reading of them, and critical features against switching each feature off."""

import random
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fisherprune_jax._graph import sets
from fisherprune_jax._graph.circuit import Circuit
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.overlaps import product_drop
from fisherprune_jax._graph.sets import expression


def drops(s, masks, key, xp=np):
  """For each feature of one mask: how many positions leave a set if it goes too, by the set's circuit."""
  circuit = Circuit([s], {k: masks[k].size for k in s.leaves} | {key: masks[key].size})
  live = circuit.live(xp.concatenate([xp.asarray(masks[k]) != 0 for k in circuit.first]), xp)
  weights = np.zeros((1, circuit.size), np.float32)
  np.add.at(weights, (0, circuit.gates[s]), 1)
  found = circuit.drops(live, xp.asarray(weights), xp)[0]
  return found[circuit.first[key] :][: masks[key].size].astype(np.int32)


def contains(big, small):
  """Whether a set is a subset of another for all masks, as far as the expressions show it."""
  return sets.intersection(big, small) is small


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
    found = drops(s, masks, key)
    for k in range(key[1]):
      fewer = {**masks, key: np.where(np.arange(key[1]) == k, 0, masks[key])}
      assert found[k] == ev.count(s) - Evaluation(fewer).count(s)
    if seed % 10 == 0:
      np.testing.assert_array_equal(drops(s, masks, key, jnp), found)


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
    if len(s.factors) > 1 and not bits.any():
      continue  # an empty product does not say which factor is empty
    assert (found >= expected).all()
    if len(s.factors) == 1:
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
  assert contains(sets.union(a, b), a)
  assert not contains(a, sets.union(a, b))


def test_product_drop_loses_nothing_to_cancellation():
  value, drop, excess = product_drop(
    [(np.float32(1e6), np.float32(0)), (np.float32(1e6), np.float32(1)), (np.float32(3), np.float32(1))]
  )
  assert value == np.float32(3e12)
  assert drop == pytest.approx(1e6 * 1e6 * 3 - 1e6 * (1e6 - 1) * 2, rel=1e-6)
  assert excess == 1e6  # of 1e6 * 3 + 1e6 * 1e6, what each loses alone


def entangled_set(
  rng: random.Random, depth: int, n: int, keys: int, pool: dict[int, list[sets.Set]]
) -> sets.Set:
  """A random expression of ``n`` positions that uses others again, over masks ``(size, which)``."""
  if pool.get(n) and rng.random() < 0.25:
    return rng.choice(pool[n])
  kinds = ["leaf", "and", "or", "or", "take", "concat", "outer", "any", "split"]
  kind = rng.choice(kinds) if depth and n else "leaf"

  def of(size):
    return entangled_set(rng, depth - 1, size, keys, pool)

  m = rng.randrange(1, 5)
  if kind == "leaf":
    found = sets.leaf((n, rng.randrange(keys)), n)
    if (choice := rng.random()) < 0.1:
      found = sets.everything(n) if choice < 0.05 else sets.fixed([rng.random() < 0.5 for _ in range(n)])
  elif kind in ("and", "or"):
    combine = sets.intersection if kind == "and" else sets.union
    found = combine(*(of(n) for _ in range(rng.randrange(2, 4))))
  elif kind == "take":
    found = sets.take(of(2 * m), [rng.randrange(-1, 2 * m) for _ in range(n)])
  elif kind == "concat":
    a = rng.randrange(n + 1)
    found = sets.concat([of(a), of(n - a)])
  elif kind == "outer":
    d = rng.choice([d for d in range(1, n + 1) if n % d == 0])
    found = sets.outer([of(d), of(n // d)])
  elif kind == "any":
    found = sets.any_of(of(m * n), [rng.randrange(-1, n) for _ in range(m * n)], n)
  else:
    found = sets.split(of(m * n), (m, n))[1]
  pool.setdefault(n, []).append(found)
  return found


@pytest.mark.parametrize("seed", range(300))
def test_critical_features_of_sets_that_share_what_they_are_made_of(seed):
  rng = random.Random(seed)
  pool: dict[int, list[sets.Set]] = {}
  s = [entangled_set(rng, rng.randrange(2, 6), rng.randrange(1, 9), 3, pool) for _ in range(3)][-1]
  masks = {key: np.array([rng.random() < 0.6 for _ in range(key[0])], float) for key in s.leaves}
  ev = Evaluation(masks)
  for key in s.leaves:
    found = drops(s, masks, key)
    for k in range(key[0]):
      fewer = {**masks, key: np.where(np.arange(key[0]) == k, 0, masks[key])}
      assert found[k] == ev.count(s) - Evaluation(fewer).count(s)


@pytest.mark.parametrize("laid", ["taken twice", "laid beside itself"])
def test_a_feature_at_two_positions_goes_with_what_hangs_on_either(laid):
  a, b = sets.leaf("a", 1), sets.leaf("b", 2)
  twice = sets.take(a, [0, 0]) if laid == "taken twice" else sets.concat([a, a])
  found = sets.any_of(sets.union(twice, b), [0, 0], 1)
  masks = {"a": np.ones(1), "b": np.zeros(2)}
  assert drops(found, masks, "a").tolist() == [1]  # both positions are alive, and a is critical to both
  assert drops(found, {**masks, "b": np.array([0.0, 1])}, "a").tolist() == [0]


@pytest.mark.parametrize("seed", range(100))
def test_simplifying_changes_nothing(seed):
  """Every constructor against what it means, on the bits of its operands."""
  rng = random.Random(seed)
  n, pool = rng.randrange(1, 9), {}
  a, b, c = (entangled_set(rng, 3, n, 2, pool) for _ in range(3))
  index = np.array([rng.randrange(-1, n) for _ in range(rng.randrange(1, 9))])
  groups = np.array([rng.randrange(-1, 3) for _ in range(n)])
  keys = set().union(*(s.leaves for s in (a, b, c)))
  ev = Evaluation({key: np.array([rng.random() < 0.6 for _ in range(key[0])]) for key in keys})
  x, y, z = map(ev.bits, (a, b, c))
  expected = {
    sets.union(a, b, c): x | y | z,
    sets.intersection(a, b, c): x & y & z,
    sets.union(a, sets.intersection(b, c)): x | (y & z),
    sets.intersection(sets.union(a, b), sets.union(a, c)): (x | y) & (x | z),
    sets.take(sets.concat([a, b]), index + n * (index >= 0)): np.where(index >= 0, y[index], False),
    sets.take(sets.union(a, b), index): np.where(index >= 0, (x | y)[index], False),
    sets.union(sets.take(a, index), sets.take(b, index)): np.where(index >= 0, (x | y)[index], False),
    sets.any_of(a, groups, 3): [bool((x & (groups == g)).any()) for g in range(3)],
    sets.any_of(sets.any_of(a, groups, 3), [1, -1, 1], 2): [
      False,
      bool((x & (groups != 1) & (groups >= 0)).any()),
    ],
    sets.union(sets.outer([a, b]), sets.outer([a, c])): (x[:, None] & (y | z)).reshape(-1),
    sets.union(sets.outer([a, b]), sets.outer([b, c])): ((x[:, None] & y) | (y[:, None] & z)).reshape(-1),
    sets.union(sets.concat([a, b]), sets.concat([b, c])): np.concatenate([x | y, y | z]),
  }
  for s, bits in expected.items():
    np.testing.assert_array_equal(ev.bits(s), bits)


def test_nesting_and_order_make_no_difference():
  a, b, c, d = (sets.leaf(name, 3) for name in "abcd")
  for combine in (sets.union, sets.intersection):
    assert combine(combine(a, b), combine(c, d)) is combine(d, combine(b, combine(c, a)))
  assert sets.union(sets.intersection(a, b), c, sets.intersection(d, c), b) is sets.union(c, b)
  stream = sets.union(a, b)
  assert sets.union(stream, sets.intersection(stream, c)) is stream
  assert sets.intersection(stream, sets.union(d, stream)) is stream
  assert contains(sets.union(stream, c), sets.intersection(a, d))


def test_what_was_cut_and_laid_together_is_the_same_again():
  a = sets.leaf("a", 8)
  halves = [sets.take(a, np.arange(4)), sets.take(a, np.arange(4, 8))]
  assert sets.concat(halves) is a
  assert sets.concat([sets.take(half, [1, 3]) for half in halves]) is sets.take(a, [1, 3, 5, 7])
  assert sets.any_of(sets.take(a, [2, 0, 1]), [2, 0, 1], 3) is sets.take(a, [0, 1, 2])


@pytest.mark.parametrize("sizes", [(49, 32), (32, 49), (7, 224), (14, 112), (1568, 1), (1, 1568), (3, 5)])
def test_products_are_cut_where_they_do_not_divide(sizes):
  m = sets.leaf("m", 32)
  merged = sets.outer([m, sets.everything(49)])
  if np.prod(sizes) != merged.size:
    merged = sets.outer([sets.leaf("k", 5), sets.everything(3)])
  ev = Evaluation({"m": np.arange(32) % 5 == 0, "k": np.arange(5) == 1})
  bits = ev.bits(merged).reshape(sizes)
  for axis, part in enumerate(sets.split(merged, sizes)):
    np.testing.assert_array_equal(ev.bits(part), bits.any(1 - axis))


def test_expressions_as_deep_as_a_network_need_no_recursion():
  stream = sets.leaf(("stream", 0), 4)
  for at in range(5000):
    stream = sets.intersection(sets.union(stream, sets.leaf(("write", at), 4)), sets.leaf(("after", at), 4))
  masks = {key: np.ones(4) for key in stream.leaves}
  masks["write", 4000] = np.array([1, 0, 1, 0])
  for at in range(4001, 5000):
    masks["write", at] = np.zeros(4)
  masks["after", 3999] = np.zeros(4)
  ev = Evaluation(masks)
  assert ev.bits(stream).tolist() == [True, False, True, False]
  assert drops(stream, masks, ("write", 4000)).tolist() == [1, 0, 1, 0]
  assert drops(stream, masks, ("after", 4500)).tolist() == [1, 0, 1, 0]
  assert not drops(stream, masks, ("write", 17)).any()
  assert len(repr(stream)) < 1_000_000
  assert hash(stream) == hash(stream)


def test_streams_that_are_cut_alike_combine_however_deep_they_are():
  """The streams of two towers of ShuffleNet units, added."""

  def tower(name):
    stream = sets.leaf((name, "in"), 8)
    for at in range(1000):
      left, right = sets.take(stream, range(4)), sets.take(stream, range(4, 8))
      units = [left, sets.intersection(right, sets.leaf((name, at), 4))]
      stream = sets.take(sets.concat(units), np.arange(8).reshape(2, 4).T.reshape(-1))
    return stream

  a, b = tower("a"), tower("b")
  rng = np.random.default_rng(0)
  masks = {key: rng.random(8 if key[1] == "in" else 4) < 0.9995 for key in a.leaves | b.leaves}
  ev = Evaluation(masks)
  assert 0 < ev.bits(a).sum() < 8
  np.testing.assert_array_equal(ev.bits(sets.union(a, b)), ev.bits(a) | ev.bits(b))
  np.testing.assert_array_equal(ev.bits(sets.intersection(a, b)), ev.bits(a) & ev.bits(b))


def by_its_gates(s, masks):
  """The bits of a set by the second reading."""
  circuit = Circuit([s], {key: mask.size for key, mask in masks.items()})
  features = np.concatenate([np.zeros(0, bool), *(mask != 0 for mask in masks.values())])
  return circuit.live(features, np)[circuit.gates[s]]


@pytest.mark.parametrize("seed", range(150))
def test_both_readings_of_a_set_say_the_same(seed):
  rng = random.Random(seed)
  pool: dict[int, list[sets.Set]] = {}
  for _ in range(3):
    entangled_set(rng, rng.randrange(1, 6), rng.randrange(1, 9), 3, pool)
  for s in [*(s for found in pool.values() for s in found), sets.weak(3)]:
    masks = {key: np.array([rng.random() < 0.6 for _ in range(key[0])], float) for key in s.leaves}
    bits = Evaluation(masks).bits(s)
    np.testing.assert_array_equal(by_its_gates(s, masks), bits)
    if seed % 30 == 0:
      on_device = {key: jnp.asarray(mask) for key, mask in masks.items()}
      np.testing.assert_array_equal(Evaluation(on_device, jnp).bits(s), bits)


class Rolled(sets.Set):
  """Another set with its positions moved on by one: a kind that the library does not have."""

  __slots__ = ()

  def bits(self, ev):
    return ev.xp.roll(ev.bits(self.parts[0]), 1)

  def gates(self, builder):
    found, once = builder.of(self.parts[0])
    return np.roll(found, 1), once


@pytest.mark.parametrize("seed", range(20))
def test_another_kind_is_another_class_and_nothing_else(seed):
  rng = random.Random(seed)
  n = rng.randrange(1, 9)
  base = random_set(rng, 3, n)
  s = expression.make(Rolled, n, [base])
  assert s is expression.make(Rolled, n, [base])
  other, index = random_set(rng, 3, n), [rng.randrange(-1, n) for _ in range(n)]
  made = [
    sets.union(s, sets.take(s, index)),
    sets.outer([s, sets.intersection(other, s)]),
    sets.concat([s, other]),
    *sets.split(sets.outer([s, other]), (n, n)),
    *sets.split(s, (1, n)),
    sets.nonempty(s),
    s,
  ]
  masks = {
    key: np.array([rng.random() < 0.7 for _ in range(key[1])], float) for key in s.leaves | other.leaves
  }
  ev = Evaluation(masks)
  np.testing.assert_array_equal(ev.bits(s), np.roll(ev.bits(base), 1))
  for found in made:
    bits = ev.bits(found)
    np.testing.assert_array_equal(by_its_gates(found, masks), bits)
    for key in found.leaves:
      for k, drop in enumerate(drops(found, masks, key)):
        fewer = {**masks, key: np.where(np.arange(key[1]) == k, 0, masks[key])}
        assert drop == ev.count(found) - Evaluation(fewer).count(found)


def test_a_kind_without_a_reading_says_so():
  class Silent(sets.Set):
    __slots__ = ()

  s = expression.make(Silent, 3)
  with pytest.raises(NotImplementedError, match="Silent"):
    Evaluation({}).bits(s)
  with pytest.raises(NotImplementedError, match="Silent"):
    Circuit([s], {})


def test_sets_that_are_gone_leave_nothing_behind():
  def build():
    found = sets.leaf("x", 5)
    for at in range(300):
      found = sets.union(found, sets.take(sets.leaf("x", 5), [at % 5, -1, 0, 1, at % 3]))
    return found

  build()
  alive, numbers = len(expression._interned), expression._numbers
  for _ in range(5):
    build()
  assert len(expression._interned) <= alive
  assert expression._numbers == numbers


def test_what_is_going_is_not_found_again():
  """Whatever another thread builds while an expression goes: no two that are alive have one number."""
  make = lambda n: sets.take(sets.leaf("going", 7), [n % 7, -1, n // 7])
  kept = [sets.leaf("going", 7)]
  going = make(1)

  def meanwhile(frame, event, arg):
    if event == "call" and "expression" in frame.f_code.co_filename:
      sys.setprofile(None)
      kept.append(make(1))

  sys.setprofile(meanwhile)
  del going
  sys.setprofile(None)
  kept += [make(n) for n in range(2, 12)]
  assert len(kept) == 12  # it went
  assert len({s.number for s in kept}) == len(kept)
