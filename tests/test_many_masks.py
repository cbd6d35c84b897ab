"""Many masks, long runs, tiny and huge numbers: what is compiled, counted and ranked."""

import collections
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from fisherprune_jax._training.once import MOST_KEPT

LAST = np.iinfo(np.int32).max


def network(count, size=4):
  shape = jax.ShapeDtypeStruct((size, size), jnp.float32)
  variables = {"w": [shape] * count, "masks": [jnp.ones(size)] * count}

  def apply(v, x):
    for w, mask in zip(v["w"], v["masks"], strict=True):
      x = jnp.tanh(x @ w) * mask
    return x

  return fp.cost_model(apply, variables, jax.ShapeDtypeStruct((3, size), jnp.float32))


def update_of(cost, **options):
  tx = fp.fisher_prune(cost, target=0.5 * cost.dense, **options)
  grads = jax.tree.map(lambda m: jax.ShapeDtypeStruct((3, *m.shape), jnp.float32), cost.masks)
  return lambda state, grads: tx.update({}, state, mask_grads=grads)[1], (tx.init({}), grads)


def equations(jaxpr):
  """How many equations a program has, with all programs inside."""
  inner = [
    getattr(p, "jaxpr", p)
    for eqn in jaxpr.eqns
    for value in eqn.params.values()
    for p in (value if isinstance(value, tuple | list) else [value])
  ]
  return len(jaxpr.eqns) + sum(equations(p) for p in inner if hasattr(p, "eqns"))


def test_the_program_grows_little_with_the_number_of_masks():
  counts = []
  for masks in (5, 25):
    update, given = update_of(network(masks))
    counts.append(equations(jax.make_jaxpr(update)(*given).jaxpr))
  assert (counts[1] - counts[0]) / 20 < 25
  assert counts[0] < 1500


def test_vectors_alone_enter_and_leave_the_conditional_that_prunes():
  def arrays(masks):
    update, given = update_of(network(masks))
    found = [eqn for eqn in jax.make_jaxpr(update)(*given).jaxpr.eqns if eqn.primitive.name == "cond"]
    return [(len(eqn.invars), len(eqn.outvars)) for eqn in found if len(eqn.invars) > 2]

  assert len(arrays(3)) == 1
  assert arrays(3) == arrays(9)


def test_no_kernel_is_compiled_for_each_mask():
  def kernels(masks):
    update, given = update_of(network(masks))
    text = jax.jit(update).lower(*given).compile().as_text()
    found = [part.split("}\n")[0] for part in text.split("\n\n") if "fused" in part.split("{")[0]]
    shapes = collections.Counter()
    for body in found:
      steps = [line.split("=")[-1].split(", metadata")[0] for line in body.splitlines()[1:]]
      names = [word for step in steps for word in step.split() if not word.startswith("%")]
      shapes[" ".join(names)] += 1
    return len(shapes)

  few, many = kernels(6), kernels(18)
  assert many - few < 6


@pytest.mark.parametrize("recost_every", [None, 3])
def test_pruning_at_once_compiles_once_for_a_cost(recost_every, caplog):
  cost = network(3)
  importance = [jnp.arange(1.0, 5.0) + at for at in range(3)]
  shares = (0.9, 0.6, 0.4)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    found = [
      fp.select_masks(cost, importance, share * cost.dense, recost_every=recost_every) for share in shares
    ]
  assert [r.getMessage().startswith("Compiling jit(run)") for r in caplog.records].count(True) == 1
  assert len(cost.flat.programs) == 1
  for share, masks in zip(shares, found, strict=True):
    fresh = fp.select_masks(network(3), importance, share * cost.dense, recost_every=recost_every)
    jax.tree.map(np.testing.assert_array_equal, masks, fresh)
    assert not cost.exceeds(masks, share * cost.dense)
  fp.select_masks(cost, importance, 0.9 * cost.dense, recost_every=recost_every, min_features=2)
  assert len(cost.flat.programs) == 2


def constant_cost(each, size=4):
  masks = {"m": jnp.ones(size)}
  return fp.CostModel.from_functions(
    masks, total=lambda m: each * jnp.sum(m["m"]), per_feature=lambda m: {"m": each * m["m"]}
  )


@pytest.mark.parametrize("size", [1e-36, 1e-24, 1.0, 1e24, 8e37])
@pytest.mark.parametrize("each", [1e-15, 1e-3, 1.0, 1e15, 1e30])
def test_ranks_hold_for_numbers_of_any_size(size, each):
  cost, order = constant_cost(each), np.array([3.0, 1.0, 2.0, 4.0])
  importance = {"m": jnp.asarray(order * size, jnp.float32)}
  for options in ({}, {"recost_every": 2}, {"multiple_of": 2}, {"cost_weight": 0.0}):
    for kept, expected in ((3, [1, 0, 1, 1]), (2, [1, 0, 0, 1])):
      if kept == 3 and "multiple_of" in options:
        continue
      found = fp.select_masks(cost, importance, (kept + 0.5) * each, **options)
      np.testing.assert_array_equal(found["m"], expected)


def test_a_weight_in_nats_per_unit_holds_for_small_and_large_costs():
  masks = {"m": jnp.ones(3)}
  for each in (1e-12, 1.0, 1e20):
    prices = each * jnp.array([1.0, 3.0, 2.0])
    cost = fp.CostModel.from_functions(
      masks, lambda m, p=prices: jnp.sum(p * m["m"]), lambda m, p=prices: {"m": p * m["m"]}
    )
    # By score: -1e-24, 1e-24, 0.5e-24, though the second feature matters most.
    importance = {"m": 1e-24 * jnp.array([0.0, 4.0, 2.5])}
    found = fp.select_masks(cost, importance, 5.5 * each, cost_weight=1e-24 / each)
    np.testing.assert_array_equal(found["m"], [0, 1, 1])


def test_counters_stay_at_the_largest_number():
  cost = constant_cost(1.0)
  tx = fp.fisher_prune(cost, prune_every=2)
  last = jnp.int32(LAST)
  state = tx.init({})._replace(step=last, counted=last, skipped=last)
  for value in (1.0, jnp.nan):
    state = tx.update({}, state, mask_grads={"m": jnp.full((1, 4), value)})[1]
    assert (int(state.step), int(state.counted), int(state.skipped)) == (LAST,) * 3


def test_options_may_be_beyond_what_counters_hold():
  cost = constant_cost(1.0)
  grads = {"m": jnp.array([[3.0, 1.0, 2.0, 4.0]])}

  def left(**options):
    tx = fp.fisher_prune(cost, target=2.0, **options)
    return tx.update({}, tx.init({}), mask_grads=grads)[1].masks["m"].tolist()

  assert left(prune_every=2**31) == left(prune_every=1, burn_in=2**40) == [1] * 4
  assert left(prune_every=1, features_per_prune=2**31, recost_every=2**33) == [1, 0, 0, 1]


def test_a_search_over_floors_keeps_few_programs():
  cost = fp.CostModel.from_functions(
    {"m": jnp.ones(20)}, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m
  )
  importance = {"m": jnp.arange(20.0)}
  for floor in (*range(1, 13), 1):
    masks = fp.select_masks(cost, importance, widths={"m": floor})
    assert masks["m"].tolist() == [0.0] * (20 - floor) + [1.0] * floor
    assert len(cost.flat.programs) <= MOST_KEPT
