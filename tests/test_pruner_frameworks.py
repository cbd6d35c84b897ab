"""``fp.Pruner`` in the training scripts of other frameworks, as they are."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import nnx

import fisherprune_jax as fp

RNG = np.random.default_rng(1)
X = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 16))
STEPS = {"keep": 0.4, "start": 2, "stop": 8}


def cross_entropy(logits, y):
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def check(pruner, small, outputs, masked):
  assert small.cost <= 0.4 * pruner.cost.dense
  np.testing.assert_allclose(outputs, masked, rtol=1e-4, atol=1e-5)


class Module(nnx.Module):
  def __init__(self, masked):
    rngs = nnx.Rngs(0)
    self.first, self.norm = nnx.Linear(5, 9, rngs=rngs), nnx.BatchNorm(9, rngs=rngs)
    self.second, self.last = nnx.Linear(9, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    if masked:
      self.mask = fp.nnx.Mask(9)

  def features(self, x):
    x = nnx.relu(self.norm(self.first(x)))
    x = self.mask(x) if hasattr(self, "mask") else x
    return nnx.relu(self.second(self.drop(x)))

  def __call__(self, x):
    return self.last(self.features(x))


@pytest.mark.parametrize("masked", [False, True], ids=["automatic", "layers"])
def test_nnx_with_its_own_optimizer(masked):
  model = Module(masked)
  model.eval()
  pruner = fp.nnx.Pruner(model, X, **STEPS | ({"keep": 0.7} if masked else {}))
  optimizer = nnx.Optimizer(model, pruner.wrap(optax.adam(1e-2)), wrt=nnx.Param)
  model.train()

  def loss_fn(model, batch):
    features = model.features(batch[0])  # any part of the model may be used
    return cross_entropy(model.last(features), batch[1]), features.shape[0]

  @nnx.jit
  def step(model, optimizer, batch):
    (loss, examples), grads = pruner.value_and_grad(loss_fn, has_aux=True)(model, optimizer, batch)
    optimizer.update(model, grads)
    return loss, examples

  before = np.asarray(model.norm.mean[...])
  for _ in range(9):
    loss, examples = step(model, optimizer, (X, Y))
  assert np.isfinite(loss)
  assert examples == 16
  assert np.abs(model.norm.mean[...] - before).max() > 0
  model.eval()
  small = pruner.compact(model, optimizer)
  assert small.cost <= (0.7 if masked else 0.4) * pruner.cost.dense
  np.testing.assert_allclose(
    small(small.variables, X), pruner.apply(model, optimizer, X), rtol=1e-4, atol=1e-5
  )
  assert "step 9" in pruner.summary(optimizer)
  assert pruner.metrics(optimizer)["pruning/cost"] == fp.get_state(optimizer.opt_state).cost
  assert pruner.history(optimizer)
  thin = fp.nnx.module(small, model)
  np.testing.assert_allclose(thin(X), small(small.variables, X), rtol=1e-6)


def test_equinox_with_code_for_one_example_under_vmap():
  model = eqx.nn.MLP(5, 3, 9, 2, key=jax.random.key(0))
  arrays, static = eqx.partition(model, eqx.is_array)

  def loss_fn(arrays, batch):
    x, y = batch
    return cross_entropy(jax.vmap(eqx.combine(arrays, static))(x), y)

  forward = lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)
  pruner = fp.Pruner(forward, arrays, X, **STEPS)
  tx = pruner.wrap(optax.adam(1e-2))
  state = tx.init(arrays)

  @jax.jit
  def step(arrays, state, batch):
    loss, grads = pruner.value_and_grad(loss_fn)(arrays, state, batch)
    updates, state = tx.update(grads, state, arrays)
    return eqx.apply_updates(arrays, updates), state, loss

  for _ in range(9):
    arrays, state, _ = step(arrays, state, (X, Y))
  small = pruner.compact(arrays, state)
  check(pruner, small, small(small.variables, X), pruner.apply(arrays, state, X))


def test_haiku_with_state_and_random_keys():
  def net(x, training):
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Linear(9)(x), training))
    x = jax.nn.relu(hk.Linear(7)(hk.dropout(hk.next_rng_key(), 0.1, x) if training else x))
    return hk.Linear(3)(x)

  init, apply = hk.transform_with_state(net)
  params, stats = init(jax.random.key(0), X, True)
  serve = lambda variables, x: apply(variables["params"], variables["stats"], None, x, False)[0]
  pruner = fp.Pruner(serve, {"params": params, "stats": stats}, X, **STEPS)
  tx = pruner.wrap(optax.adam(1e-2))
  state = tx.init(params)

  def loss_fn(params, stats, key, batch):
    logits, stats = apply(params, stats, key, batch[0], True)
    return cross_entropy(logits, batch[1]), stats

  @jax.jit
  def step(params, state, stats, key):
    (loss, stats), grads = pruner.value_and_grad(loss_fn, has_aux=True)(params, state, stats, key, (X, Y))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, stats, loss

  for at in range(9):
    params, state, stats, _ = step(params, state, stats, jax.random.key(at))
  everything = {"params": params, "stats": stats}
  small = pruner.compact(everything, state)
  check(pruner, small, small(small.variables, X), pruner.apply(everything, state, X))


def test_keras_by_stateless_call():
  layers = keras.layers
  model = keras.Sequential(
    [layers.Input((5,)), layers.Dense(9, "relu"), layers.BatchNormalization(), layers.Dense(3)]
  )
  params = [v.value for v in model.trainable_variables]
  stats = [v.value for v in model.non_trainable_variables]
  serve = lambda v, x: model.stateless_call(v["params"], v["stats"], x, training=False)[0]
  pruner = fp.Pruner(serve, {"params": params, "stats": stats}, X, **STEPS)
  tx = pruner.wrap(optax.adam(1e-2))
  state = tx.init(params)

  def loss_fn(params, stats, x, y):
    logits, stats = model.stateless_call(params, stats, x, training=True)
    return cross_entropy(logits, y), stats

  @jax.jit
  def step(params, state, stats):
    (loss, stats), grads = pruner.value_and_grad(loss_fn, has_aux=True)(params, state, stats, X, Y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, stats, loss

  for _ in range(9):
    params, state, stats, _ = step(params, state, stats)
  everything = {"params": params, "stats": stats}
  small = pruner.compact(everything, state)
  check(pruner, small, small(small.variables, X), pruner.apply(everything, state, X))
