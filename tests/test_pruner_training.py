"""``fp.Pruner`` in the ways that people train: restarts, mixed and micro-batched data, parameters over several devices."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fisherprune_jax as fp
from tests.test_pruner import BATCH, X, Y, cross_entropy, made, pruner_of, step_of, trained

NET, VARIABLES = made()
PARAMS = VARIABLES["params"]


def loss_fn(params, batch):
  return cross_entropy(NET, params, batch)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def with_orbax(folder, state, fresh):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "state", state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder / "state", jax.eval_shape(lambda: fresh))


def with_flax(folder, state, fresh):
  (folder / "state").write_bytes(flax.serialization.to_bytes(state))
  return flax.serialization.from_bytes(fresh, (folder / "state").read_bytes())


@pytest.mark.parametrize("through", [with_orbax, with_flax])
@pytest.mark.parametrize("at", [1, 5])
def test_a_restart_goes_on_as_if_nothing_had_happened(through, at, tmp_path):
  expected = trained(pruner_of(NET, VARIABLES), loss_fn, PARAMS, BATCH, steps=9)
  saved = trained(pruner_of(NET, VARIABLES), loss_fn, PARAMS, BATCH, steps=at)
  pruner = pruner_of(*made())  # another process makes its own
  tx = pruner.wrap(optax.sgd(0.1))
  params, state = through(tmp_path, saved, (PARAMS, tx.init(PARAMS)))
  step = step_of(pruner, tx, loss_fn)
  for _ in range(9 - at):
    params, state, _ = step(params, state, BATCH)
  same((params, state), expected)
  assert [went.step for went in pruner.history(state)] == [went.step for went in pruner.history(expected[1])]


def mixed(batch, order, share):
  """Mixup, before any variable is involved."""
  one_hot = jax.nn.one_hot(batch["y"], 3)
  return {
    "x": share * batch["x"] + (1 - share) * batch["x"][order],
    "y": share * one_hot + (1 - share) * one_hot[order],
  }


def soft_loss(params, batch):
  logits = NET.apply({"params": params}, batch["x"])
  return optax.softmax_cross_entropy(logits, batch["y"]).mean()


def test_mixup_inside_the_loss_is_that_of_mixed_data():
  order, share = jax.random.permutation(jax.random.key(1), 16), 0.7
  inside = lambda params, batch: soft_loss(params, mixed(batch, order, share))
  found = trained(pruner_of(NET, VARIABLES), inside, PARAMS, BATCH)
  expected = trained(pruner_of(NET, VARIABLES), soft_loss, PARAMS, mixed(BATCH, order, share))
  assert len(fp.history(found[1])) > 3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


def test_micro_batches_in_a_scan_are_the_batch():
  def inside(params, batch):
    parts = jax.tree.map(lambda a: a.reshape(4, 4, *a.shape[1:]), batch)
    _, losses = jax.lax.scan(lambda carry, part: (carry, loss_fn(params, part)), None, parts)
    return losses.mean()

  found = trained(pruner_of(NET, VARIABLES), inside, PARAMS, BATCH)
  expected = trained(pruner_of(NET, VARIABLES), loss_fn, PARAMS, BATCH)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


def test_accumulated_gradients_are_those_of_optax():
  """Parameters move every second step, by the mean; importance is that of all micro-batches."""
  halves = [jax.tree.map(lambda a, at=at: a[at : at + 8], BATCH) for at in (0, 8)]
  pruner = pruner_of(NET, VARIABLES, start=20, stop=30)
  tx = pruner.wrap(optax.MultiSteps(optax.sgd(0.1), 2))
  step, params, state = step_of(pruner, tx, loss_fn), PARAMS, tx.init(PARAMS)
  plain, plain_state = PARAMS, optax.sgd(0.1).init(PARAMS)
  for n in range(6):
    params, state, _ = step(params, state, halves[n % 2])
    if n % 2:
      grads = jax.tree.map(lambda a, b: (a + b) / 2, *(jax.grad(loss_fn)(plain, half) for half in halves))
      updates, plain_state = optax.sgd(0.1).update(grads, plain_state)
      plain = optax.apply_updates(plain, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, plain)
  assert int(fp.get_state(state).counted) == 6


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_sharded_parameters_give_the_masks_of_one_device():
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

  class Wide:
    """Sizes that divide by the mesh."""

    @staticmethod
    def apply(variables, x):
      p = variables["params"]
      return jnp.tanh(x @ p["up"]) @ p["down"]

  rng = np.random.default_rng(3)
  sizes = {"up": (5, 12), "down": (12, 3)}
  params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}

  def loss(params, batch):
    logits = Wide.apply({"params": params}, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

  options = {"keep": 0.4, "start": 1, "stop": 7}
  expected = trained(fp.Pruner(Wide.apply, {"params": params}, X, **options), loss, params, BATCH)
  places = {"up": PartitionSpec(None, "model"), "down": PartitionSpec("model", None)}
  split = {name: jax.device_put(params[name], NamedSharding(mesh, places[name])) for name in params}
  batch = jax.device_put({"x": X, "y": Y}, NamedSharding(mesh, PartitionSpec("data")))
  pruner = fp.Pruner(Wide.apply, {"params": split}, X, **options)
  found = trained(pruner, loss, split, batch)
  assert found[0]["up"].sharding.spec == places["up"]
  same(pruner.masks(found[1]), pruner.masks(expected[1]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[0], expected[0])


def test_a_target_that_nothing_reaches_is_an_error_and_one_below_the_floors_a_warning():
  with pytest.raises(
    ValueError, match=r"below the smallest possible network \(\d+ FLOPs\)\. Raise the target"
  ):
    pruner_of(NET, VARIABLES, keep=0.5, exclude=["*"])
  with pytest.warns(UserWarning, match=r"smallest possible network that keeps min_features .*\(140 FLOPs\)"):
    pruner_of(NET, VARIABLES, keep=0.3, min_features=5)


def test_a_cost_of_two_functions():
  total = lambda m: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(m))
  measure = lambda masks: (total, lambda m: jax.tree.map(jnp.ones_like, m), "features")
  pruner = pruner_of(NET, VARIABLES, measure=measure, keep=0.5)
  _, state = trained(pruner, loss_fn, PARAMS, BATCH, steps=10)
  assert (pruner.cost.dense, pruner.cost.unit) == (16, "features")
  assert float(fp.get_state(state).cost) == 8


def test_exact_widths_are_reached_when_the_budget_is():
  pruner = pruner_of(NET, VARIABLES, keep=0.9, widths={"Dense_1": 3})
  _, state = trained(pruner, loss_fn, PARAMS, BATCH, steps=10)
  assert {name: int(m.sum()) for name, m in pruner.masks(state).items()} == {"Dense_0": 9, "Dense_1": 3}


def test_an_unknown_option_is_an_error_that_lists_those_there_are():
  with pytest.raises(
    TypeError, match=r"no option flops_target, got 3. It has axis_name, cost_weight, .*widths"
  ):
    pruner_of(NET, VARIABLES, flops_target=3)
