"""``fp.Pruner``: an untouched training script, the masks of the functional API, any optimizer, clear errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fisherprune_jax as fp
from fisherprune_jax._pruner.goal import falling

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 16))
BATCH = {"x": X, "y": Y}


class Net(nn.Module):
  masked: bool = False
  norm: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    for width in (9, 7):
      x = nn.Dense(width)(x)
      if self.norm:
        x = nn.BatchNorm(use_running_average=not train)(x)
      x = nn.relu(x)
      if self.masked:
        x = fp.Mask()(x)
      if self.norm:
        x = nn.Dropout(0.1, deterministic=not train)(x)
    return nn.Dense(3)(x)


def made(**options):
  net = Net(**options)
  return net, net.init(jax.random.key(0), X)


def cross_entropy(net, params, batch):
  logits = net.apply({"params": params}, batch["x"])
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def pruner_of(net, variables, **options):
  return fp.Pruner(net.apply, variables, X, **{"keep": 0.4, "start": 2, "stop": 9, **options})


def step_of(pruner, tx, loss_fn):
  @jax.jit
  def step(params, opt_state, *rest):
    loss, grads = pruner.value_and_grad(loss_fn)(params, opt_state, *rest)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def trained(pruner, loss_fn, params, *rest, steps=9, optimizer=None):
  """Parameters and optimizer state after some steps."""
  tx = pruner.wrap(optimizer or optax.sgd(0.1))
  state, step = tx.init(params), step_of(pruner, tx, loss_fn)
  for _ in range(steps):
    params, state, _ = step(params, state, *rest)
  return params, state


@pytest.mark.parametrize("method", ["fisher", "fisher_magnitude", "taylor", "magnitude"])
@pytest.mark.parametrize("masked", [False, True], ids=["automatic", "layers"])
def test_masks_are_those_of_the_functional_api_at_every_step(masked, method):
  net, variables = made(masked=masked)
  loss_fn = functools.partial(cross_entropy, net)
  pruner = pruner_of(net, variables, method=method)
  tx = pruner.wrap(optax.adam(1e-2))
  params, state = variables["params"], tx.init(variables["params"])
  step = step_of(pruner, tx, loss_fn)

  auto = None if masked else fp.auto_mask(net.apply, {"params": params}, X)
  cost = fp.cost_model(net.apply, variables, X) if masked else fp.cost_model(auto.apply, auto.variables, X)
  budget = lambda n: jnp.interp(n, jnp.array([2.0, 9.0]), jnp.array([1.0, 0.4])) * cost.dense
  most = sum(m.size for m in jax.tree.leaves(cost.masks))
  plain = optax.chain(
    optax.adam(1e-2),
    fp.fisher_prune(cost, prune_every=1, burn_in=2, features_per_prune=most, target=budget, method=method),
  )
  needs_rows = method != "magnitude"

  def masked_loss(params, masks, batch):
    if auto is None:
      logits = net.apply({"params": params, "masks": masks}, batch["x"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    wrapped = auto.wrap(lambda v, batch: loss_fn(v["params"], batch))
    return wrapped({"params": params, "masks": masks}, batch)

  @jax.jit
  def plain_step(params, state, batch):
    _, (grads, rows) = fp.value_and_mask_grads(masked_loss)(params, fp.get_masks(state), batch)
    extra = {"mask_grads": rows} if needs_rows else {}
    updates, state = plain.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  other, other_state = params, plain.init(params)
  for _ in range(12):
    params, state, _ = step(params, state, BATCH)
    other, other_state = plain_step(other, other_state, BATCH)
    jax.tree.map(np.testing.assert_array_equal, pruner.masks(state), fp.get_masks(other_state))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, other)
  assert 0 < float(fp.get_state(state).cost) <= 0.4 * cost.dense


class State(train_state.TrainState):
  batch_stats: dict


@pytest.mark.parametrize("masked", [False, True], ids=["automatic", "layers"])
def test_batch_norm_dropout_and_flax_own_train_state(masked):
  net, variables = made(masked=masked, norm=True)
  pruner = pruner_of(net, variables)

  def loss_fn(params, batch_stats, batch, key):
    logits, new = net.apply(
      {"params": params, "batch_stats": batch_stats}, batch["x"], train=True,
      mutable=["batch_stats"], rngs={"dropout": key},
    )  # fmt: skip
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, new["batch_stats"]

  tx = pruner.wrap(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)))
  fields = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
  state = State.create(apply_fn=net.apply, tx=tx, **fields)

  @jax.jit
  def step(state, batch, key):
    compute = pruner.value_and_grad(loss_fn, has_aux=True)
    (loss, stats), grads = compute(state.params, state.opt_state, state.batch_stats, batch, key)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss

  for at in range(10):
    state, loss = step(state, BATCH, jax.random.key(at))
  assert np.isfinite(loss)
  with pytest.raises(ValueError, match="batch_stats"):
    pruner.compact(state.params, state.opt_state)
  everything = {"params": state.params, "batch_stats": state.batch_stats}
  small = pruner.compact(everything, state.opt_state)
  np.testing.assert_allclose(
    small(small.variables, X), pruner.apply(everything, state.opt_state, X), rtol=1e-4, atol=1e-5
  )
  assert small.cost <= 0.4 * pruner.cost.dense


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    def layer(scope, x, _):
      return x + nn.Dense(5, name="down")(fp.Mask(name="mask")(nn.relu(nn.Dense(6, name="up")(x)))), None

    class Layer(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return layer(self, x, _)

    axes = {"params": 0, "masks": 0}
    x, _ = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)(name="layers")(x, None)
    return nn.Dense(3)(x)


def test_stacked_layers_get_their_own_rows():
  net = Stack()
  variables = net.init(jax.random.key(0), X)
  pruner = pruner_of(net, variables)
  tx = pruner.wrap(optax.sgd(0.1))
  params, state = variables["params"], tx.init(variables["params"])
  _, grads = pruner.value_and_grad(functools.partial(cross_entropy, net))(params, state, BATCH)
  masks = pruner.masks(state)

  def loss(params, masks, batch):
    logits = net.apply({"params": params, "masks": masks}, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

  _, (expected, rows) = fp.value_and_mask_grads(loss)(params, masks, BATCH)
  jax.tree.map(np.testing.assert_array_equal, grads.params, expected)
  jax.tree.map(np.testing.assert_array_equal, grads.mask_grads, rows)


def labels(params):
  return {name: "biased" if name == "Dense_0" else "rest" for name in params}


OPTIMIZERS = {
  "clip": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
  "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
  "masked": lambda: optax.chain(
    optax.masked(optax.add_decayed_weights(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    optax.sgd(0.1),
  ),
  "partition": lambda: optax.partition({"biased": optax.sgd(0.1), "rest": optax.adam(1e-2)}, labels),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
  "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
  "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
  "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_gets_ordinary_gradients_and_loses_nothing(name):
  """Beside a pruner that never prunes, every optimizer does what it does alone."""
  net, variables = made()
  loss_fn = functools.partial(cross_entropy, net)
  pruner = pruner_of(net, variables, keep=1.0)
  tx, alone = pruner.wrap(OPTIMIZERS[name]()), OPTIMIZERS[name]()
  params = other = variables["params"]
  state, other_state = tx.init(params), alone.init(params)
  step = step_of(pruner, tx, loss_fn)

  @jax.jit
  def alone_step(params, state, batch):
    updates, state = alone.update(jax.grad(loss_fn)(params, batch), state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(5):
    params, state, _ = step(params, state, BATCH)
    other, other_state = alone_step(other, other_state, BATCH)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), params, other)
  assert int(fp.get_state(state).counted) == 5
  assert jax.tree.structure(state.optimizer) == jax.tree.structure(other_state)


def test_lookahead_has_its_own_parameters():
  net, variables = made()
  pruner = pruner_of(net, variables)
  tx = pruner.wrap(optax.lookahead(optax.sgd(0.1), 3, 0.5))
  params = optax.LookaheadParams.init_synced(variables["params"])
  state = tx.init(params)
  compute = jax.jit(pruner.value_and_grad(functools.partial(cross_entropy, net)))
  for _ in range(9):
    _, grads = compute(params.fast, state, BATCH)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  assert pruner.compact(params.slow, state).cost <= 0.4 * pruner.cost.dense


def test_a_line_search_evaluates_the_masked_network():
  net, variables = made()
  pruner = pruner_of(net, variables)
  tx = pruner.wrap(optax.lbfgs())
  params, state = variables["params"], tx.init(variables["params"])
  compute = pruner.value_and_grad(functools.partial(cross_entropy, net))

  @jax.jit
  def step(params, state):
    value, grads = compute(params, state, BATCH)
    value_fn = lambda p: compute(p, state, BATCH)[0]
    updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
    return optax.apply_updates(params, updates), state, value

  values = []
  for _ in range(8):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[1] < values[0]
  assert pruner.compact(params, jax.jit(lambda s: s)(state)).cost < pruner.cost.dense


def test_training_goes_on_with_the_compact_network():
  net, variables = made()
  pruner = pruner_of(net, variables)
  tx = pruner.wrap(optax.adam(1e-2))
  loss_fn = functools.partial(cross_entropy, net)
  params, state = variables["params"], tx.init(variables["params"])
  step = step_of(pruner, tx, loss_fn)
  for _ in range(9):
    params, state, _ = step(params, state, BATCH)
  small = pruner.compact(params, state)
  shrunk = small.shrink_opt_state(tx, state)
  with pytest.raises(ValueError, match="compact network"):
    pruner.value_and_grad(loss_fn)(small.variables["params"], shrunk, BATCH)

  def small_loss(params, batch):
    logits = small({"params": params}, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

  thin = small.variables["params"]
  for _ in range(3):
    grads = jax.grad(small_loss)(thin, BATCH)
    updates, shrunk = tx.update(grads, shrunk, thin)
    thin = optax.apply_updates(thin, updates)
    params, state, _ = step(params, state, BATCH)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    small.shrink({"params": params})["params"],
    thin,
  )


def test_steps_in_a_scan_and_example_weights():
  net, variables = made()
  pruner = pruner_of(net, variables)
  tx = pruner.wrap(optax.sgd(0.1))
  compute = pruner.value_and_grad(functools.partial(cross_entropy, net))

  def step(carry, batch):
    params, state = carry
    loss, grads = compute(params, state, batch)
    updates, state = tx.update(grads, state, params, example_weights=jnp.ones(16))
    return (optax.apply_updates(params, updates), state), loss

  batches = jax.tree.map(lambda x: jnp.stack([x] * 10), BATCH)
  start = (variables["params"], tx.init(variables["params"]))
  (params, state), losses = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(start, batches)
  assert losses.shape == (10,)
  assert pruner.compact(params, state).cost <= 0.4 * pruner.cost.dense


def test_bfloat16_parameters():
  net, variables = made()
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  pruner, loss_fn = pruner_of(net, low), functools.partial(cross_entropy, net)
  params, state = trained(pruner, loss_fn, low["params"], BATCH)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(fp.get_state(state).scores))
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))


def test_sharded_batches_give_the_masks_of_one_device():
  net, variables = made()
  mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
  found = []
  for spec in (PartitionSpec(), PartitionSpec("data")):
    batch = jax.device_put(BATCH, NamedSharding(mesh, spec))
    pruner, loss_fn = pruner_of(net, variables), functools.partial(cross_entropy, net)
    found.append(pruner.masks(trained(pruner, loss_fn, variables["params"], batch)[1]))
  jax.tree.map(np.testing.assert_array_equal, *found)


def parallel(pruner, tx, loss_fn, average):
  def step(params, state, batch):
    loss, grads = pruner.value_and_grad(loss_fn)(params, state, batch)
    updates, state = tx.update(average(grads), state, params)
    return optax.apply_updates(params, updates), state, jax.lax.pmean(loss, "data")

  return jax.pmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None, devices=jax.devices()[:4])


def test_pmap_averages_parameters_and_importance():
  net, variables = made()
  loss_fn = functools.partial(cross_entropy, net)
  pruner = pruner_of(net, variables, axis_name="data")
  tx = pruner.wrap(optax.sgd(0.1))
  step = parallel(pruner, tx, loss_fn, lambda grads: grads.average("data"))
  params, state = variables["params"], tx.init(variables["params"])
  shards = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), BATCH)
  one = pruner_of(net, variables)
  other, other_state = trained(one, loss_fn, params, BATCH)
  for _ in range(9):
    params, state, _ = step(params, state, shards)
  jax.tree.map(np.testing.assert_array_equal, pruner.masks(state), one.masks(other_state))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, other)


@pytest.mark.parametrize("reduce", [jax.lax.pmean, jax.lax.psum], ids=["pmean", "psum"])
def test_averaging_all_gradients_over_devices_is_an_error(reduce):
  net, variables = made()
  pruner = pruner_of(net, variables, axis_name="data")
  tx = pruner.wrap(optax.sgd(0.1))
  step = parallel(pruner, tx, functools.partial(cross_entropy, net), lambda grads: reduce(grads, "data"))
  shards = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), BATCH)
  with pytest.raises(TypeError, match=r"grads\.average"):
    step(variables["params"], tx.init(variables["params"]), shards)


def test_shard_map_with_an_axis_name():
  net, variables = made()
  mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
  loss_fn = functools.partial(cross_entropy, net)
  pruner = pruner_of(net, variables, axis_name="data")
  tx = pruner.wrap(optax.sgd(0.1))

  def step(params, state, batch, reduce):
    # The gradients of replicated parameters are added up by shard_map itself.
    loss, grads = pruner.value_and_grad(lambda p, b: loss_fn(p, b) / 4, reduction=16.0)(params, state, batch)
    updates, state = tx.update(reduce(grads), state, params)
    return optax.apply_updates(params, updates), state, jax.lax.psum(loss, "data")

  def mapped(reduce):
    spec = PartitionSpec()
    return jax.jit(
      jax.shard_map(
        functools.partial(step, reduce=reduce),
        mesh=mesh,
        in_specs=(spec, spec, PartitionSpec("data")),
        out_specs=spec,
      )
    )

  one, params = pruner_of(net, variables), variables["params"]
  _, other_state = trained(one, loss_fn, params, BATCH)
  state, run = tx.init(params), mapped(lambda grads: grads)
  for _ in range(9):
    params, state, _ = run(params, state, BATCH)
  jax.tree.map(np.testing.assert_array_equal, pruner.masks(state), one.masks(other_state))
  with pytest.raises(TypeError, match=r"grads\.average"):
    mapped(lambda grads: jax.lax.pmean(grads, "data"))(params, state, BATCH)


def test_gradients_of_micro_batches_are_not_added_up_by_hand():
  net, variables = made()
  pruner = pruner_of(net, variables)
  tx = pruner.wrap(optax.sgd(0.1))
  _, grads = pruner.value_and_grad(functools.partial(cross_entropy, net))(
    variables["params"], tx.init(variables["params"]), BATCH
  )
  with pytest.raises(TypeError, match="MultiSteps"):
    jax.tree.map(jnp.add, grads, grads)
  assert optax.tree.norm(grads.params) > 0
  assert "Dense_0" in grads
  doubled = grads.replace(jax.tree.map(lambda g: 2 * g, grads.params))
  jax.tree.map(np.testing.assert_array_equal, doubled.mask_grads, grads.mask_grads)


def test_other_gradients_and_other_parameters_are_errors():
  net, variables = made()
  pruner = pruner_of(net, variables)
  tx = pruner.wrap(optax.adam(0.1))
  params, state = variables["params"], tx.init(variables["params"])
  loss_fn = functools.partial(cross_entropy, net)
  with pytest.raises(TypeError, match=r"pruner\.value_and_grad"):
    tx.update(jax.grad(loss_fn)(params, BATCH), state, params)
  compute = pruner.value_and_grad(loss_fn)
  with pytest.raises(ValueError, match=r"Dense_0/bias|Dense_0/kernel"):
    compute(jax.tree.map(lambda x: x[..., :2], params), state, BATCH)
  with pytest.raises(ValueError, match="Dense_2"):
    compute({name: params[name] for name in ("Dense_0", "Dense_1")}, state, BATCH)
  with pytest.raises(ValueError, match="batch after the parameters"):
    compute(params, state, jax.random.key(0))
  with pytest.raises(ValueError, match="FisherPruneState"):
    compute(params, optax.adam(0.1).init(params), BATCH)
  with pytest.raises(TypeError, match="own init"):
    tx.update(compute(params, state, BATCH)[1], state.pruning, params)


def test_arguments_out_of_range_are_errors():
  net, variables = made()
  build = functools.partial(fp.Pruner, net.apply, variables, X)
  for options, text in [
    ({}, "either keep or target"),
    ({"keep": 0.5, "target": 100}, "either keep or target"),
    ({"keep": 1.5}, "fraction"),
    ({"keep": 0}, "fraction"),
    ({"target": 0.25}, r"use keep=0\.25"),
    ({"target": -3}, "positive"),
    ({"keep": 0.5, "start": 5, "stop": 5}, "start=5"),
  ]:
    with pytest.raises(ValueError, match=text):
      build(**options)
  with pytest.raises(TypeError, match="Use every"):
    build(keep=0.5, prune_every=10)
  with pytest.raises(ValueError, match="stop="):
    build(keep=0.5).wrap(optax.sgd(0.1))


def test_a_function_of_all_its_variables():
  """No Linen, no "params": what the optimizer trains is all there is, as with Equinox's arrays."""
  variables = {
    "w": jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
  }
  for tree in (variables, [variables["w"], variables["v"]]):

    def model(p, x, names=("w", "v") if tree is variables else (0, 1)):
      return jnp.tanh(x @ p[names[0]]) @ p[names[1]]

    def loss_fn(p, x, y, model=model):
      return optax.softmax_cross_entropy_with_integer_labels(model(p, x), y).mean()

    pruner = fp.Pruner(model, tree, X, keep=0.5, stop=6)
    params, state = trained(pruner, loss_fn, tree, X, Y, steps=6)
    small = pruner.compact(params, state)
    assert small.cost <= 0.5 * pruner.cost.dense
    np.testing.assert_allclose(
      small(small.variables, X), pruner.apply(params, state, X), rtol=1e-5, atol=1e-6
    )


def test_it_prints_what_a_user_wants_to_know():
  net, variables = made()
  pruner = pruner_of(net, variables)
  text = str(pruner)
  for part in ("Dense_0", "Dense_1", "40.0%", "step 2", "step 9", "FLOPs"):
    assert part in text
  assert "start=2" in repr(pruner)
  assert [group.size for group in pruner.groups] == [9, 7]
  state = pruner.wrap(optax.sgd(0.1)).init(variables["params"])
  assert "Dense_0" in pruner.summary(state)
  assert pruner.history(state) == []
  assert pruner.metrics(state)["pruning/cost"] == pruner.cost.dense
  assert "Mask_0" in str(pruner_of(*made(masked=True)))


@pytest.mark.parametrize("steps", range(1, 50))
def test_a_compiled_budget_ends_at_its_target(steps):
  budget = jax.jit(falling(16.0, 8.0, 2, 2 + steps))
  assert float(budget(1)) == float(budget(2)) == 16
  assert float(budget(2 + steps)) == float(budget(3 + steps)) == 8
  assert all(float(budget(2 + n)) >= 8 for n in range(steps))


@pytest.mark.parametrize("dense", [33_554_433.0, 33_554_435.0, 100.0])
def test_a_budget_in_float32_is_never_above_its_target_nor_below_the_whole_network(dense):
  assert float(falling(dense, dense, 2, 9)(20)) >= dense
  assert min(float(falling(dense, dense, 2, 9)(step)) for step in range(12)) >= dense
  for target in (0.3 * dense, dense - 1):
    assert target * (1 - 2e-7) <= float(falling(dense, target, 2, 9)(20)) <= target


def test_a_network_without_a_cost():
  variables = {"params": {}, "masks": {"m": jnp.ones(3)}}
  with pytest.raises(ValueError, match="keep needs a network that costs more than 0 FLOPs"):
    fp.Pruner(lambda v, x: x * v["masks"]["m"], variables, jnp.ones((2, 3)), keep=0.5)
