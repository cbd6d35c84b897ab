"""Several prunings in one optimizer, told apart by name."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp

PARAMS = {"generator": jnp.ones(3), "discriminator": jnp.ones(2)}
SIZES = {"generator": 5, "discriminator": 4}


def cost(size, price):
  return fp.CostModel.from_functions(
    {"m": jnp.ones(size)},
    lambda m: price * jnp.sum(m["m"]),
    lambda m: jax.tree.map(lambda x: price * x, m),
  )


COSTS = {"generator": cost(5, 3.0), "discriminator": cost(4, 7.0)}


def gradients(step):
  rng = np.random.default_rng(step)
  return {name: {"m": jnp.asarray(rng.normal(size=(6, size)), jnp.float32)} for name, size in SIZES.items()}


def pruning(of, **options):
  return fp.fisher_prune(COSTS[of], prune_every=2, decay=0.9, **options)


def train(name):
  return optax.chain(optax.sgd(0.1, momentum=0.9), pruning(name, name=name))


OWN = {name: name for name in PARAMS}
"""Every parameter is labelled by its own name."""
TOGETHER = {
  "chain": optax.chain(*(pruning(name, name=name) for name in PARAMS), optax.adam(0.1)),
  "named_chain": optax.named_chain(*((f"optimizer of {name}", train(name)) for name in PARAMS)),
  "partition": optax.partition({name: train(name) for name in PARAMS}, OWN),
  "masked": optax.chain(
    *(optax.masked(train(name), {key: key == name for key in PARAMS}) for name in PARAMS)
  ),
  "inside inject_hyperparams": optax.chain(
    *(
      fp.inject_hyperparams(fp.fisher_prune)(COSTS[name], prune_every=2, decay=0.9, name=name)
      for name in PARAMS
    )
  ),
}


def run(tx, state, steps, grads_of=gradients, **extra):
  update = jax.jit(lambda s, g: tx.update(PARAMS, s, PARAMS, mask_grads=g, **extra)[1])
  for step in steps:
    state = update(state, grads_of(step))
  return state


def alone(name, steps, weights=None):
  tx = pruning(name)
  return run(tx, tx.init(PARAMS), steps, lambda step: gradients(step)[name], example_weights=weights)


@pytest.mark.parametrize("how", TOGETHER)
def test_each_prunes_as_it_would_alone(how):
  tx = TOGETHER[how]
  state = run(tx, tx.init(PARAMS), range(5))
  for name in PARAMS:
    expected = alone(name, range(5))
    chex.assert_trees_all_close(fp.get_state(state, name), expected, rtol=1e-5)
    assert expected.cost < COSTS[name].dense
    chex.assert_trees_all_equal(fp.get_masks(state, name), expected.masks)
    chex.assert_trees_all_close(fp.get_importance(state, name), fp.get_importance(expected), rtol=1e-5)
    assert fp.history(state, name) == fp.history(expected)
    assert fp.summary(state, name) == fp.summary(expected)
    chex.assert_trees_all_equal(fp.masks_at(state, 2, name), fp.masks_at(expected, 2))
    assert {key.replace(f"pruning/{name}/", "pruning/") for key in fp.metrics(state, name)} == set(
      fp.metrics(expected)
    )
    figure = fp.plot_history(state, COSTS[name], name=name)
    assert figure.axes[0].lines[0].get_ydata()[-1] == expected.cost


@pytest.mark.parametrize("how", TOGETHER)
def test_masks_of_one_are_set_and_the_others_stay(how):
  tx = TOGETHER[how]
  state = run(tx, tx.init(PARAMS), range(5))
  ones = COSTS["generator"].masks
  new = jax.jit(lambda s: fp.set_masks(s, ones, "generator"))(state)
  chex.assert_trees_all_equal(fp.get_masks(new, "generator"), ones)
  chex.assert_trees_all_equal(fp.get_state(new, "discriminator"), fp.get_state(state, "discriminator"))
  after = run(tx, new, [5])
  assert fp.get_state(after, "generator").cost == 3.0 * 4


def test_example_weights_may_be_for_all_or_for_each():
  tx = TOGETHER["chain"]
  weights = {"generator": jnp.array([1.0, 0, 1, 1, 0, 1]), "discriminator": jnp.array([0.0, 1, 1, 1, 1, 1])}
  state = run(tx, tx.init(PARAMS), range(3), example_weights=weights)
  for name, own in weights.items():
    chex.assert_trees_all_close(fp.get_state(state, name), alone(name, range(3), own), rtol=1e-5)
  state = run(tx, tx.init(PARAMS), range(3), example_weights=weights["generator"])
  for name in PARAMS:
    chex.assert_trees_all_close(
      fp.get_state(state, name), alone(name, range(3), weights["generator"]), rtol=1e-5
    )


def test_states_without_names_are_told_apart_by_their_paths():
  one, two = pruning("generator").init(PARAMS), pruning("discriminator").init(PARAMS)
  step = lambda state, n: state._replace(step=jnp.int32(n))
  state = {"G": (step(one, 1), {"x": step(two, 2)}), "D": [[step(one, 3)]], "G/ema": step(one, 4)}
  for name, n in {"G/0": 1, "G/1": 2, "1/x": 2, "x": 2, "D": 3, "D/0/0": 3, "G/ema": 4, "ema": 4}.items():
    assert fp.get_state(state, name).step == n
  for name in ("G", "0", "H", "", "/", "G/0/0"):
    with pytest.raises(ValueError, match=f"one FisherPruneState called {name!r}, got [023]"):
      fp.get_state(state, name)
  with pytest.raises(ValueError, match="one FisherPruneState called 'G', got 0"):
    fp.get_state({"other": one}, "G")


def test_the_error_lists_names_that_work():
  states = {
    "partition": optax.partition(
      {"g": optax.chain(optax.sgd(0.1), pruning("generator")), "d": pruning("discriminator")},
      {"generator": "g", "discriminator": "d"},
    ).init(PARAMS),
    "chain": optax.chain(pruning("generator"), optax.sgd(0.1), pruning("generator")).init(PARAMS),
    "chains": optax.chain(
      optax.chain(pruning("generator"), pruning("generator")), optax.chain(pruning("generator"))
    ).init(PARAMS),
    "named": TOGETHER["masked"].init(PARAMS),
  }
  expected = {
    "partition": ["d", "g"],
    "chain": ["0", "2"],
    "chains": ["0/0", "0/1", "1/0"],
    "named": ["generator", "discriminator"],
  }
  for how, state in states.items():
    for find in (fp.get_state, fp.get_masks, fp.get_importance, fp.summary, fp.history, fp.metrics):
      with pytest.raises(ValueError, match=r"one FisherPruneState, got [23]. Choose one with name=") as error:
        find(state)
    names = re.findall("'(.*?)'", str(error.value))
    assert names == expected[how]
    for name in names:
      assert isinstance(fp.get_state(state, name), fp.FisherPruneState)


def test_a_compact_one_beside_another_needs_no_gradients():
  tx = TOGETHER["chain"]
  state = tx.init(PARAMS)
  inert = state[0]["generator"]._replace(scores={}, masks={}, pruned_at={}, shares={})
  state = ({"generator": inert}, *state[1:])
  _, after = tx.update(PARAMS, state, PARAMS, mask_grads={"discriminator": gradients(0)["discriminator"]})
  assert [int(fp.get_state(after, name).step) for name in PARAMS] == [1, 1]
