"""Batches that must not count, and axes that must be named: seen where they can be, harmless where they cannot."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import fisherprune_jax as fp
from tests.test_transform import B, K, T, as_tree, cost, draw, every_state, last

OPTIONS = {"prune_every": 2, "features_per_prune": 2}
BAD_ROWS = {
  "a negative weight": [1.0, -0.5, 1.0, 1.0],
  "negative weights alone": [-1.0, -1.0, -1.0, -1.0],
  "weights that add up to a positive one all the same": [3.0, 3.0, -1.0, 3.0],
  "a weight of nan": [1.0, np.nan, 1.0, 1.0],
  "an infinite weight": [1.0, np.inf, 1.0, 1.0],
  "no weight at all": [0.0, 0.0, 0.0, 0.0],
}


def assert_only_skipped(found, expected, bad):
  """The states of a run in which some batches are left out, against one whose gradients are NaN there."""
  chex.assert_trees_all_close(found, expected, rtol=1e-6)
  assert found.skipped.tolist() == np.cumsum(np.isin(np.arange(T), bad)).tolist()
  assert last(found).cost < cost().dense


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_weights_that_cannot_be_seen_skip_the_batch(name):
  bad, weights, g = [3, 4, 11], np.ones((T, B), np.float32), draw(0)
  weights[bad] = BAD_ROWS[name]
  broken = g.copy()
  broken[bad] = np.nan
  tx = fp.fisher_prune(cost(), **OPTIONS)
  run = jax.jit(lambda g, w: every_state(tx, g, w))
  ones = np.ones((T, B), np.float32)
  assert_only_skipped(run(as_tree(g, True), weights), run(as_tree(broken, True), ones), bad)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_weights_on_one_device_skip_the_batch_on_all(name):
  tx = fp.fisher_prune(cost(), axis_name="i")
  g = as_tree(np.stack([draw(n)[0] for n in range(2)]), True)
  weights = jnp.stack([jnp.ones(B), jnp.array(BAD_ROWS[name])])
  update = jax.vmap(
    lambda g, w: tx.update({}, tx.init({}), mask_grads=g, example_weights=w)[1], axis_name="i"
  )
  skipped = 0 if name == "no weight at all" else 1  # a device may hold nothing but padding
  assert jax.jit(update)(g, weights).skipped.tolist() == [skipped, skipped]


BAD_NUMBERS = [1.0, -0.1, 1.5, np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_decays_out_of_range_skip_the_batch(value):
  bad, g = [3, 4, 11], draw(0)
  broken = g.copy()
  broken[bad] = np.nan
  is_bad = lambda n: jnp.isin(n, jnp.array(bad) + 1)
  tx = fp.fisher_prune(cost(), decay=lambda n: jnp.where(is_bad(n), value, 0.9), **OPTIONS)
  plain = fp.fisher_prune(cost(), decay=0.9, **OPTIONS)
  found = jax.jit(lambda g: every_state(tx, g))(as_tree(g, True))
  assert_only_skipped(found, jax.jit(lambda g: every_state(plain, g))(as_tree(broken, True)), bad)


def test_an_injected_decay_out_of_range_skips_the_batch():
  tx = fp.inject_hyperparams(fp.fisher_prune)(cost(), decay=0.9)
  update = jax.jit(lambda state, g: tx.update({}, state, {}, mask_grads=g)[1])
  g = as_tree(draw(0)[0], True)
  state = tx.init({})
  state.hyperparams["decay"] = jnp.float32(1.5)
  assert fp.get_state(update(state, g)).skipped == 1
  state.hyperparams["decay"] = jnp.float32(0.5)
  assert fp.get_state(update(state, g)).skipped == 0


@pytest.mark.parametrize("option", ["target", "cost_weight"])
@pytest.mark.parametrize("value", [np.nan, -1.0])
def test_other_schedules_out_of_range_prune_nothing_at_that_step(option, value):
  """A weight may be negative; a target below zero is no target to prune everything for."""
  good = {"target": 20.0, "cost_weight": 0.1}
  schedule = lambda n: jnp.where(n == 4, value, good[option])
  tx = fp.fisher_prune(cost(), **OPTIONS, **{**good, option: schedule})
  states = jax.jit(lambda g: every_state(tx, g))(as_tree(draw(0), True))
  prunes = option == "cost_weight" and value == -1.0
  assert (states.cost[3] < states.cost[2]) == prunes
  assert not states.exhausted[3]
  assert last(states).skipped == 0
  assert states.cost[5] < states.cost[4]


# Mapped axes.


def replicas(seed=0):
  return np.stack([draw(seed + n)[0] for n in range(4)])


def step_of(tx):
  return lambda g: tx.update({}, tx.init({}), mask_grads=g)[1]


def mesh():
  return jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])


def over_shards(f):
  """Without account of what differs between devices."""
  one = lambda g: jax.tree.map(lambda x: x[None], f(jax.tree.map(lambda x: x[0], g)))
  return jax.shard_map(one, mesh=mesh(), in_specs=P("i"), out_specs=P("i"), check_vma=False)


NAMED = {
  "vmap": lambda f: jax.vmap(f, axis_name="i"),
  "vmap of jit": lambda f: jax.vmap(jax.jit(f), axis_name="i"),
  "jit of vmap": lambda f: jax.jit(jax.vmap(f, axis_name="i")),
  "scan in vmap": lambda f: jax.vmap(
    lambda g: jax.lax.scan(lambda c, _: (c, f(g)), 0.0, jnp.arange(1))[1], axis_name="i"
  ),
  "vmap in vmap": lambda f: jax.vmap(
    lambda g: jax.vmap(f)(jax.tree.map(lambda x: x[None], g)), axis_name="i"
  ),
  "pmap": lambda f: jax.pmap(f, axis_name="i"),
  "shard_map without account": over_shards,
}


@functools.cache
def not_mapped():
  """The states after one step on the batches of all replicas together, and on that of each alone."""
  step = jax.jit(step_of(fp.fisher_prune(cost(), prune_every=1)))
  return step(as_tree(replicas().reshape(-1, K), True)), [step(as_tree(one, True)) for one in replicas()]


@pytest.mark.parametrize("how", NAMED)
def test_an_axis_with_a_name_has_to_be_said(how):
  mapped = NAMED[how]
  g = as_tree(replicas(), True)
  with pytest.raises(ValueError, match=r"got axis_name=None under 'i'.*axis_name='i'.*axis_name=\(\)"):
    mapped(step_of(fp.fisher_prune(cost(), prune_every=1)))(g)
  whole, each = not_mapped()
  together = jax.jit(mapped(step_of(fp.fisher_prune(cost(), prune_every=1, axis_name="i"))))(g)
  own = jax.jit(mapped(step_of(fp.fisher_prune(cost(), prune_every=1, axis_name=()))))(g)
  histories = set()
  for n in range(4):
    pick = lambda state: jax.tree.map(lambda x, like: jnp.reshape(x[n], jnp.shape(like)), state, whole)  # noqa: B023
    chex.assert_trees_all_close(pick(together), whole, rtol=1e-5)
    chex.assert_trees_all_close(pick(own), each[n], rtol=1e-5)
    histories.add(str(fp.history(each[n])))
  assert len(histories) > 1, "the replicas prune the same: nothing can be told"


def test_an_axis_without_a_name_in_pmap_has_to_get_one():
  f = step_of(fp.fisher_prune(cost()))
  with pytest.raises(ValueError, match=r"axis_name=None under pmap.*axis_name='batch'.*the same axis_name"):
    jax.pmap(f)(as_tree(replicas(), True))


def test_ensembles_over_axes_without_names_prune_each_on_its_own():
  f = step_of(fp.fisher_prune(cost(), prune_every=1))
  found = jax.jit(jax.vmap(f))(as_tree(replicas(), True))
  for n in range(4):
    alone = f(as_tree(replicas()[n], True))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[n], found), alone, rtol=1e-6)  # noqa: B023


def test_one_named_axis_of_two_is_taken_at_its_word():
  """An ensemble of replicas: the importance is averaged over the one axis and not over the other."""
  f = step_of(fp.fisher_prune(cost(), prune_every=1, axis_name="i"))
  g = as_tree(np.stack([replicas(0), replicas(9)]), True)
  found = jax.vmap(jax.vmap(f, axis_name="i"), axis_name="ensemble")(g)
  for n, seed in enumerate((0, 9)):
    whole = step_of(fp.fisher_prune(cost(), prune_every=1))(as_tree(replicas(seed).reshape(-1, K), True))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[n, 0], found), whole, rtol=1e-5)  # noqa: B023
