"""``flax.nnx``: the same network as in Linen prunes the same features and compacts to the same outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fisherprune_jax as fp

X = np.random.default_rng(0).normal(size=(16, 6, 6, 2)).astype(np.float32)
LABELS = np.arange(16) % 3


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (3, 3), name="conv1")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    x = fp.Mask(name="mask1")(nn.relu(x))
    x = fp.Mask(name="mask2")(nn.relu(nn.Conv(5, (3, 3), strides=2, name="conv2")(x)))
    x = fp.Mask(name="mask3")(nn.relu(nn.Dense(7, name="dense1")(x.reshape(x.shape[0], -1))))
    return nn.Dense(3, name="dense2")(x)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.conv1, self.norm = nnx.Conv(2, 6, (3, 3), rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
    self.conv2 = nnx.Conv(6, 5, (3, 3), strides=2, rngs=rngs)
    self.dense1, self.dense2 = nnx.Linear(45, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
    self.mask1, self.mask2, self.mask3 = fp.nnx.Mask(6), fp.nnx.Mask(5), fp.nnx.Mask(7)

  def __call__(self, x):
    x = self.mask1(nnx.relu(self.norm(self.conv1(x))))
    x = self.mask2(nnx.relu(self.conv2(x)))
    return self.dense2(self.mask3(nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))))


OPTIONS = {"prune_every": 2, "decay": 0.9}


def net_and_variables():
  """The same network twice."""
  variables = Linen().init(jax.random.key(0), X)
  net = Net(nnx.Rngs(0))
  nnx.update(net, variables["params"])
  return net, variables


def linen_run(variables, steps):
  cost = fp.cost_model(Linen().apply, variables, X)
  tx = fp.pruning_sgd(0.1, cost, flops_target=0.3 * cost.dense, **OPTIONS)

  def loss_fn(params, masks, batch, stats):
    variables = {"params": params, "masks": masks, "batch_stats": stats}
    logits, changed = Linen().apply(variables, batch[0], train=True, mutable=["batch_stats"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])), changed["batch_stats"]

  @jax.jit
  def step(state):
    differentiate = fp.value_and_mask_grads(loss_fn, has_aux=True)
    (_, stats), (grads, mask_grads) = differentiate(state.params, state.masks, (X, LABELS), state.batch_stats)
    return state.apply_gradients(grads=grads, mask_grads=mask_grads, batch_stats=stats)

  state = fp.TrainState.create(
    apply_fn=Linen().apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"]
  )
  for _ in range(steps):
    state = step(state)
  return state


def loss_of(model, batch):
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]))


@nnx.jit
def nnx_step(model, optimizer):
  loss, (grads, mask_grads) = fp.nnx.value_and_mask_grads(loss_of)(model, (X, LABELS))
  optimizer.update(model, grads, mask_grads=mask_grads)
  nnx.update(model, fp.get_masks(optimizer.opt_state))  # nothing new where the optimizer is ours
  return loss


def nnx_run(net, steps, kind=nnx.Optimizer, share=0.3):
  net.eval()
  cost = fp.nnx.cost_model(net, X)
  net.train()
  tx = fp.pruning_sgd(0.1, cost, flops_target=share * cost.dense, **OPTIONS)
  optimizer = kind(net, tx, wrt=nnx.Param)
  for _ in range(steps):
    nnx_step(net, optimizer)
  return optimizer


@pytest.mark.parametrize("kind", [nnx.Optimizer, fp.nnx.Optimizer])
def test_linen_and_nnx_prune_the_same_features_and_compact_to_the_same(kind):
  net, variables = net_and_variables()
  state, optimizer = linen_run(variables, 20), nnx_run(net, 20, kind)
  assert len(fp.history(state.opt_state)) >= 7
  assert fp.history(optimizer.opt_state) == fp.history(state.opt_state)
  assert fp.summary(optimizer.opt_state) == fp.summary(state.opt_state)
  for a, b in zip(*map(jax.tree.leaves, (nnx.state(net, nnx.Param), state.params)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(net.norm.mean[...], state.batch_stats["norm"]["mean"], rtol=1e-4, atol=1e-5)

  net.eval()
  small = fp.nnx.compact(net, X)
  linen_small = fp.compact(Linen().apply, state.variables, X)
  assert small.cost == linen_small.cost == float(fp.get_state(optimizer.opt_state).cost)
  np.testing.assert_allclose(small(small.variables, X[:3]), net(X[:3]), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    small(small.variables, X), linen_small(linen_small.variables, X), rtol=1e-3, atol=1e-4
  )
  shapes = jax.tree.map(jnp.shape, (small.variables["params"], linen_small.variables["params"]))
  assert shapes[0] == shapes[1]
  exported = small.export(X)
  np.testing.assert_allclose(exported.call(X[:5]), net(X[:5]), rtol=1e-4, atol=1e-5)


def test_the_cost_is_that_of_the_linen_network():
  net, variables = net_and_variables()
  net.eval()
  ours, linens = fp.nnx.cost_model(net, X), fp.cost_model(Linen().apply, variables, X)
  assert ours.dense == linens.dense
  for a, b in zip(*(jax.tree.leaves(cost.per_feature(cost.masks)) for cost in (ours, linens)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert ours.masks.keys() == linens.masks.keys()


def test_costing_and_compacting_leave_the_model_as_it_was():
  net, _ = net_and_variables()
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net)))
  fp.nnx.cost_model(net, X)
  fp.nnx.compact(net, X, mutable=True)
  after = nnx.to_pure_dict(nnx.state(net))
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(("keep_masks", "share"), [(False, 0.8), (True, 0.3)])
def test_training_goes_on_as_a_smaller_module(keep_masks, share):
  """Down to 80 % nothing is left to prune at step 11; down to 30 %, with masks kept, pruning goes on too."""
  net, _ = net_and_variables()
  target = share * fp.nnx.cost_model(net, X).dense
  optimizer = nnx_run(net, 11, share=share)
  small = fp.nnx.compact(net, X, mutable=True, keep_masks=keep_masks)
  thin = fp.nnx.module(small, net)
  assert thin.conv1.kernel.shape[-1] == int(net.mask1.mask[...].sum())
  thinner = fp.nnx.shrink_optimizer(small, thin, optimizer)
  assert int(thinner.step[...]) == 11
  assert bool(jax.tree.leaves(nnx.state(thin, fp.nnx.MaskVariable))) is keep_masks
  step = nnx_step if keep_masks else plain_step
  if keep_masks:
    thinner.tx = fp.pruning_sgd(0.1, fp.nnx.cost_model(thin, X), flops_target=target, **OPTIONS)
  before = len(fp.history(optimizer.opt_state))
  for _ in range(5):
    np.testing.assert_allclose(step(thin, thinner), nnx_step(net, optimizer), rtol=1e-3)
  alive = np.flatnonzero(small.masks["mask1"]["mask"])
  np.testing.assert_allclose(net.norm.mean[...][alive], thin.norm.mean[...], rtol=1e-3, atol=1e-5)
  went = [p[:2] for p in fp.history(optimizer.opt_state)]
  assert bool(went[before:]) is keep_masks
  if keep_masks:
    assert [p[:2] for p in fp.history(thinner.opt_state)] == went[before:]


@nnx.jit
def plain_step(model, optimizer):
  loss, grads = nnx.value_and_grad(loss_of)(model, (X, LABELS))
  optimizer.update(model, grads)
  return loss


def test_split_and_merge_keep_masks():
  net, _ = net_and_variables()
  graph, masks, rest = nnx.split(net, fp.nnx.MaskVariable, ...)
  assert [m.shape for m in jax.tree.leaves(masks)] == [(6,), (5,), (7,)]
  copy = nnx.merge(graph, masks, rest)
  assert isinstance(copy.mask1.mask, fp.nnx.MaskVariable)
  np.testing.assert_array_equal(copy(X), net(X))


class Dropped(nnx.Module):
  def __init__(self, rngs):
    self.first, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 1, rngs=rngs)
    self.mask, self.drop = fp.nnx.Mask(6), nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.last(self.drop(self.mask(jnp.tanh(self.first(x)))))


def test_random_counters_of_the_model_move_on():
  x = np.ones((3, 4), np.float32)
  net = Dropped(nnx.Rngs(0))
  differentiate = nnx.jit(fp.nnx.value_and_mask_grads(lambda model, x: jnp.sum(model(x)), reduction="sum"))
  first, second = differentiate(net, x)[0], differentiate(net, x)[0]
  assert first != second
  other = Dropped(nnx.Rngs(0))
  assert [first, second] == [jnp.sum(other(x)), jnp.sum(other(x))]
  net.eval()
  small = fp.nnx.compact(net, x)
  np.testing.assert_allclose(small(small.variables, x), net(x), rtol=1e-6)


def test_gradients_are_those_of_single_examples():
  net, _ = net_and_variables()
  net.eval()
  value, (grads, mask_grads) = fp.nnx.value_and_mask_grads(loss_of)(net, (X, LABELS))
  np.testing.assert_allclose(value, loss_of(net, (X, LABELS)), rtol=1e-6)
  plain = nnx.grad(loss_of)(net, (X, LABELS))
  for a, b in zip(*map(jax.tree.leaves, (grads, plain)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  for n in (0, 7):
    one = nnx.grad(loss_of, argnums=nnx.DiffState(0, fp.nnx.MaskVariable))(
      net, (X[n : n + 1], LABELS[n : n + 1])
    )
    for a, b in zip(*map(jax.tree.leaves, (mask_grads, nnx.to_pure_dict(one))), strict=True):
      np.testing.assert_allclose(a[n], b, rtol=1e-3, atol=1e-6)


def test_aux_is_returned():
  net, _ = net_and_variables()
  differentiate = fp.nnx.value_and_mask_grads(lambda m, b: (loss_of(m, b), m(b[0])), has_aux=True)
  (value, logits), _ = differentiate(net, (X, LABELS))
  assert value.shape == ()
  assert logits.shape == (16, 3)


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
    self.mask = fp.nnx.Mask(6)

  def __call__(self, x):
    return x + self.down(self.mask(nnx.relu(self.up(x))))


class Stack(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.vmap(Layer)(rngs.split(3))

  def __call__(self, x):
    return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_stacked_layers_have_widths_of_their_own():
  x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
  net = Stack(nnx.Rngs(0))
  assert fp.nnx.cost_model(net, x).masks["layers"]["mask"]["mask"].shape == (3, 6)
  mask = np.ones((3, 6), np.float32)
  mask[0, :4], mask[2, 5] = 0, 0
  net.layers.mask.mask[...] = jnp.asarray(mask)
  small = fp.nnx.compact(net, x)
  assert small.cost == sum(w * 7 + w + w + 4 * (2 * w - 1) + 4 + 4 for w in (2, 6, 5))
  np.testing.assert_allclose(small(small.variables, x), net(x), rtol=1e-5, atol=1e-6)
  grads = nnx.jit(fp.nnx.value_and_mask_grads(lambda m, x: jnp.mean(m(x))))(net, x)[1][1]
  assert grads["layers"]["mask"]["mask"].shape == (3, 2, 6)


def test_a_linen_model_with_masks_comes_over_the_bridge():
  model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)), X)
  masks = nnx.state(model, fp.nnx.MaskVariable)
  assert [m.shape for m in jax.tree.leaves(masks)] == [(6,), (5,), (7,)]
  assert fp.nnx.cost_model(model, X).dense == fp.cost_model(Linen().apply, net_and_variables()[1], X).dense


def test_another_method_can_be_called():
  class Encoder(nnx.Module):
    def __init__(self, rngs):
      self.linear, self.mask = nnx.Linear(4, 6, rngs=rngs), fp.nnx.Mask(6)

    def encode(self, x):
      return self.mask(self.linear(x))

  net, x = Encoder(nnx.Rngs(0)), np.ones((2, 4), np.float32)
  assert fp.nnx.cost_model(net, x, call=Encoder.encode).dense == 6 * 7 + 6
  small = fp.nnx.compact(net, x, call=Encoder.encode)
  np.testing.assert_allclose(small(small.variables, x), net.encode(x), rtol=1e-6)


@pytest.mark.parametrize(
  ("function", "error", "match"),
  [
    (lambda: fp.nnx.Mask(0), ValueError, "features must be a number of at least 1, got 0"),
    (lambda: fp.nnx.Mask(3, axis=0)(jnp.ones((2, 3))), ValueError, "apart from the example axis"),
    (lambda: fp.nnx.Mask(3)(jnp.ones((2, 4))), ValueError, r"must have shape \(4,\)"),
    (lambda: fp.nnx.cost_model(lambda x: x, X), TypeError, "must be an nnx.Module"),
    (lambda: fp.nnx.cost_model(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), X), ValueError, "must hold masks"),
  ],
)
def test_errors_say_what_is_required(function, error, match):
  with pytest.raises(error, match=match):
    function()
