"""The target is kept exactly: whole numbers on the device against Python's integers and fractions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fisherprune_jax as fp
from fisherprune_jax._cost.budget import limit_of
from fisherprune_jax._graph import exact, sets
from fisherprune_jax._graph.evaluate import Evaluation
from fisherprune_jax._graph.terms import MostExpensive, Term, total
from tests.compiling import nothing_compiled

BOTH = pytest.mark.parametrize("x64", [False, True])


def value(digits):
  return sum(int(digit) << exact.BITS * place for place, digit in enumerate(digits))


def sizes(ev):
  return lambda sets: jnp.stack([ev.count(s) for s in sets])


def random_number(rng, bits):
  return int.from_bytes(rng.bytes(16), "little") >> (128 - int(rng.integers(1, bits + 1)))


def test_arithmetic_is_that_of_python_up_to_the_last_digit():
  rng = np.random.default_rng(0)
  for _ in range(200):
    a, b = random_number(rng, 80), random_number(rng, 80)
    a, b = (a, b) if rng.random() < 0.8 else (a, a)
    x, y = exact.constant(a, 5), exact.constant(b, 5)
    assert value(exact.add(x, y)) == (a + b) % 2**80
    assert value(exact.times(x, y)) == (a * b) % 2**80
    assert bool(exact.above(x, y)) == (a > b)
  full = exact.constant(2**80 - 1, 5)  # every carry there can be
  assert value(exact.times(full, full)) == (2**80 - 1) ** 2 % 2**80
  assert value(exact.add(full, exact.constant(1, 5))) == 0
  assert value(exact.constant(-1, 5)) == 2**80 - 1


@pytest.mark.parametrize("largest", [0, 1, 2**15, 2**16 - 1, 2**16, 2**31, 2**32, 10**12, 2**64])
def test_there_are_digits_enough(largest):
  assert 2 ** (exact.BITS * exact.digits_for(largest)) > 2 * largest


@BOTH
def test_numbers_of_any_type_become_digits_with_every_bit(x64):
  rng = np.random.default_rng(1)
  with jax.enable_x64(x64):
    kinds = [jnp.float32, jnp.int32, jnp.uint32, jnp.bfloat16, jnp.float16] + (
      [jnp.float64, jnp.int64] if x64 else []
    )
    for kind in kinds:
      for _ in range(30):
        largest = 31 if jnp.issubdtype(kind, jnp.integer) else 15 if kind is jnp.float16 else 60
        number = rng.random() * 2.0 ** rng.integers(-10, largest)
        x = jnp.asarray(number).astype(kind)
        found = Fraction(value(jax.jit(exact.of_array, static_argnums=(1, 2))(x, 5, 2)), 2**32)
        expected = Fraction(np.asarray(x, np.float64 if x.dtype == jnp.bfloat16 else x.dtype).item())
        assert found == Fraction(int(expected * 2**32), 2**32), (kind, number)


def random_terms(rng, masks, depth=2):
  """Terms as a large network has them: factors in common, inner products of nothing, branches."""
  leaves = [sets.leaf(key, mask.size) for key, mask in masks.items()]

  def factors():
    return tuple(leaves[i] for i in rng.integers(0, len(leaves), rng.integers(0, 4)))

  out = []
  for _ in range(int(rng.integers(1, 9))):
    scale = 1 + random_number(rng, 30)
    if depth and rng.random() < 0.2:
      parts = tuple(tuple(random_terms(rng, masks, depth - 1)) for _ in range(int(rng.integers(1, 4))))
      out.append(MostExpensive(parts, scale % 100 + 1))
    elif rng.random() < 0.5:
      out.append(Term(scale, factors()))
    else:
      out.append(Term(scale, factors(), factors(), 1 + random_number(rng, 20)))
  return out


@BOTH
@pytest.mark.parametrize("seed", range(8))
def test_the_sum_on_the_device_is_that_of_the_host(seed, x64):
  rng = np.random.default_rng(seed)
  masks = {(i, 0): rng.random(n) < rng.random() for i, n in enumerate([1, 3, 40, 70_000])}
  terms = random_terms(rng, masks)
  with jax.enable_x64(x64):
    expected = total(terms, Evaluation(masks, np))
    dense = total(terms, Evaluation({k: np.ones_like(m) for k, m in masks.items()}, np))
    digits = exact.digits_for(dense)
    found = jax.jit(lambda masks: exact.total(terms, sizes(Evaluation(masks, jnp)), digits))(masks)
    assert value(found) == expected


def test_no_terms_cost_nothing():
  assert value(exact.total([], sizes(Evaluation({}, jnp)), 2)) == 0


def test_limits_of_targets():
  assert limit_of(3, 4) == limit_of(3.0, 4) == limit_of(np.float32(3), 4) == limit_of(np.array(3), 4) == 12
  assert limit_of(50_000_000.5, 2) == 100_000_001
  assert limit_of(float("inf"), 2) > 10**100
  assert limit_of(float("nan"), 2) > 10**100  # nothing is above what is no number
  for count in range(1, 2000, 7):
    for examples in range(1, 60):
      assert limit_of(count / examples, examples) == count
  for count in (10**12 + 1, 10**15 - 1):
    assert limit_of(count / 7, 7) == count


def network(width, batch=1, features=50):
  """One product of ``width`` terms for each of the features, and a bias: ``2 width`` FLOPs each."""
  apply = lambda v, x: (x @ v["w"] + v["b"]) * v["masks"]["m"]
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  variables = {"w": shape(width, features), "b": shape(features), "masks": {"m": jnp.ones(features)}}
  return fp.cost_model(apply, variables, shape(batch, width))


LARGE = {
  "50 million": (500_000, 1, 50),
  "10 ** 12": (10**8 + 3, 7, 5_000),
  "10 ** 15": (10**9 + 1, 64, 500_000),
}


@BOTH
@pytest.mark.parametrize("name", LARGE)
def test_a_target_is_told_from_one_of_a_flop_more_or_less(name, x64):
  width, batch, features = LARGE[name]
  with jax.enable_x64(x64):
    cost = network(width, batch, features)
    decide = jax.jit(cost.exceeds)
    wrong = 0
    for alive in (features, features - 1, features // 2 + 1):
      masks = {"m": (jnp.arange(features) < alive).astype(jnp.float32)}
      flops_ = 2 * width * alive
      assert cost.exact(masks) == flops_ * batch
      for off in (-1, 0, 1):
        assert bool(cost.exceeds(masks, flops_ + off)) == (off < 0)
        assert bool(cost.exceeds(masks, float(flops_ + off))) == (off < 0)
        wrong += bool(cost(masks) > np.float32(flops_ + off)) != (off < 0)
        array = jnp.asarray(float(flops_ + off))  # as near as its type allows
        assert bool(decide(masks, array)) == (flops_ > Fraction(float(array)))
    assert wrong, "float32 would have done"


@BOTH
def test_a_target_that_is_an_array_counts_with_every_bit(x64):
  with jax.enable_x64(x64):
    cost = network(3, batch=7)  # 6 FLOPs a feature, 42 a batch
    masks = {"m": (jnp.arange(50) < 20).astype(jnp.float32)}
    decide = jax.jit(cost.exceeds)
    targets = [
      120,
      120.0,
      np.nextafter(np.float32(120), 0),
      np.nextafter(np.float32(120), 200),
      0,
      1e30,
      np.inf,
    ]
    arrays = [jnp.asarray(target) for target in (*targets, np.nan)]
    kinds = {array.aval: array for array in arrays}
    assert len(kinds) <= 3
    for array in kinds.values():
      decide(masks, array)
    with nothing_compiled():
      decided = [decide(masks, array) for array in arrays]
    assert [bool(d) for d in decided] == [*(target < 120 for target in targets), False]


def test_a_quotient_that_no_float_holds_is_its_own_target():
  cost = network(5, batch=49)
  per_call = fp.cost_model(
    lambda v, x: (jnp.sum(x) + 1.0) * v["masks"],
    {"masks": jnp.ones(1)},
    jax.ShapeDtypeStruct((49, 3), jnp.float32),
  )
  for model in (cost, per_call):
    assert not model.exceeds(model.masks, model.dense)
    assert model.exceeds(model.masks, model.dense * (1 - 1e-12))


def training(cost, target, **options):
  """The masks in the end, and at which step each feature went: the one of the smallest index first."""
  features = cost.masks["m"].size
  tx = fp.fisher_prune(cost, prune_every=1, target=target, **options)
  grads = {"m": jnp.float32(1) + jnp.arange(features, dtype=jnp.float32)[None]}

  @jax.jit
  def step(state):
    return tx.update({}, state, mask_grads=grads)[1]

  state = step(tx.init({}))
  with nothing_compiled():
    for _ in range(11):
      state = step(state)
  return state


@BOTH
@pytest.mark.parametrize("several", [1, 4])
@pytest.mark.parametrize("gone", [1, 3, 7])
def test_training_stops_at_the_target_to_the_flop(several, gone, x64):
  with jax.enable_x64(x64):
    cost = network(10_000_001, batch=3, features=10)  # 200 million, where float32 knows every sixteenth
    reached = 2 * 10_000_001 * (10 - gone)
    for off in (-1, 0, 1):
      for target in (reached + off, float(reached + off), lambda step, t=reached + off: t):
        state = training(cost, target, features_per_prune=several)
        assert int(jnp.sum(state.masks["m"] == 0)) == gone + (off < 0)


def test_a_schedule_of_arrays_and_a_traced_target_are_compared_as_they_are():
  cost = network(10_000_001, batch=3, features=10)
  above = np.float32(2 * 10_000_001 * 6)
  below = np.nextafter(above, np.float32(0))
  assert int(below) < 2 * 10_000_001 * 6 < int(above)
  for target, gone in ((below, 5), (above, 4)):
    assert int(jnp.sum(training(cost, lambda step, t=target: jnp.float32(t)).masks["m"] == 0)) == gone
  tx = fp.inject_hyperparams(fp.fisher_prune)(cost, prune_every=1, target=float(above))
  state = tx.init({})
  for _ in range(8):
    state = jax.jit(tx.update)({}, state, mask_grads={"m": jnp.ones((1, 10))})[1]
  assert int(jnp.sum(fp.get_masks(state)["m"])) == 6


def test_the_decision_runs_under_every_transformation():
  cost = network(500_000, batch=2)
  target = 2 * 500_000 * 20
  stack = {"m": (jnp.arange(50) < jnp.array([19, 20, 21, 50])[:, None]).astype(jnp.float32)}
  decide = lambda masks: cost.exceeds(masks, target)
  expected = [False, False, True, True]
  assert jax.vmap(decide)(stack).tolist() == expected
  assert jax.lax.map(decide, stack).tolist() == expected
  branch = lambda masks: jax.lax.cond(masks["m"][0] > 0, decide, lambda m: jnp.bool_(False), masks)
  assert jax.jit(jax.vmap(branch))(stack).tolist() == expected

  def fewer(masks):
    return {"m": masks["m"].at[jnp.argmax(masks["m"])].set(0.0)}

  left = jax.jit(lambda masks: jax.lax.while_loop(decide, fewer, masks))(cost.masks)
  assert int(jnp.sum(left["m"])) == 20
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  sharded = jax.shard_map(lambda m: jax.vmap(decide)(m), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
  assert jax.jit(sharded)(stack).tolist() == expected
  whole = jax.shard_map(decide, mesh=mesh, in_specs=P(), out_specs=P())
  assert jax.jit(whole)(cost.masks)


def test_a_users_cost_is_compared_as_it_is():
  cost = fp.CostModel.from_functions(
    {"m": jnp.ones(3)}, total=lambda m: 0.1 * jnp.sum(m["m"]), per_feature=lambda m: m
  )
  assert cost.exceeds(cost.masks, 0.29)
  assert not cost.exceeds(cost.masks, 0.31)
  assert bool(jax.jit(cost.exceeds)(cost.masks, jnp.float32(0.29)))
