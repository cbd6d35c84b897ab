"""Real models of Equinox, Haiku and Keras 3, whose packages know nothing of masks: found, pruned, compact, trained on."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from tests.counting import count
from tests.frameworks import LABELS, NETWORKS, Network

ALL = pytest.mark.parametrize("name", NETWORKS)
SHARE = 0.9


@pytest.fixture(autouse=True, scope="module")
def weights_by_numpy():
  """Keras draws weights as it builds a model, and JAX compiles a program for each shape: most of a minute."""
  zeros = lambda self, shape, dtype=None: jnp.zeros(shape)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)
    yield


class Found(NamedTuple):
  network: Network
  auto: fp.AutoMask
  cost: fp.CostModel
  masked: Any
  """``auto.apply``, compiled."""


@functools.cache
def found(name) -> Found:
  network = NETWORKS[name]()
  auto = fp.auto_mask(network.apply, network.variables, network.x)
  cost = fp.cost_model(auto.apply, auto.variables, network.x)
  return Found(network, auto, cost, jax.jit(auto.apply))


def random_masks(masks):
  random = np.random.default_rng(0)
  draw = {name: random.integers(0, 2, mask.shape).astype(np.float32) for name, mask in masks.items()}
  return {name: jnp.asarray(np.append(mask[:-1], 1)).astype(jnp.float32) for name, mask in draw.items()}


def is_close(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert np.linalg.norm(b) > 1e-3  # something comes out
  return np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


GROUPS = {
  "EquinoxCNN": (3, {"stem": (16, 10), "inner": (24, 3), "head/layers/0": (32, 3)}),
  # Per stage the stream, tied by the shortcuts, and the middle of each of two blocks.
  "ResNet18": (
    12,
    {
      "res_net18/~/initial_conv": (64, 19),
      "res_net18/~/block_group_0/~/block_0/~/conv_0": (64, 6),
      "res_net18/~/block_group_3/~/block_1/~/conv_0": (512, 6),
    },
  ),
  # The stem's depthwise block, 16 expansions, and one stream for each run of blocks without a stride.
  "MobileNetV2": (
    25,
    {"Conv1": (32, 11), "block_1_expand": (96, 11), "block_6_project": (64, 24), "Conv_1": (1280, 6)},
  ),
  # Beside those the bottlenecks of the squeeze-and-excite gates.
  "EfficientNetB0": (
    40,
    {
      "stem_conv": (32, 14),
      "block1a_se_reduce": (8, 3),
      "block2a_expand_conv": (96, 14),
      "block6a_project_conv": (192, 24),
    },
  ),
}


@ALL
def test_groups(name):
  number, some = GROUPS[name]
  groups = {group.name: (group.size, len(group.members)) for group in found(name).auto.groups}
  assert len(groups) == number
  assert {name: groups[name] for name in some} == some


def test_the_members_of_a_group_written_down():
  """A depthwise block of MobileNetV2: what makes it, both norms with their statistics, the kernel, what reads it."""
  (group,) = (group for group in found("MobileNetV2").auto.groups if group.name == "block_1_expand")
  norms = [f"block_1_{which}_BN" for which in ("depthwise", "expand")]
  assert set(group.members) == {
    ("params/block_1_expand/kernel", 3),
    ("params/block_1_depthwise/kernel", 2),
    ("params/block_1_project/kernel", 2),
    *((f"params/{norm}/{what}", 0) for norm in norms for what in ("gamma", "beta")),
    *((f"state/{norm}/moving_{what}", 0) for norm in norms for what in ("mean", "variance")),
  }


@ALL
def test_masks_of_ones_change_nothing(name):
  network, auto, _, masked = found(name)
  np.testing.assert_array_equal(
    masked(auto.variables, network.x), jax.jit(network.apply)(network.variables, network.x)
  )


@ALL
def test_what_is_masked_is_removed_and_counted(name):
  network, auto, cost, masked = found(name)
  variables = {**network.variables, "masks": random_masks(auto.masks)}
  small = fp.compact(auto.apply, variables, network.x)
  assert is_close(small(small.variables, network.x), masked(variables, network.x))
  jaxpr = jax.make_jaxpr(small)(small.variables, network.x)
  leaves = len(jax.tree.leaves(small.variables))
  assert count(jaxpr, [False] * leaves + [True]) == cost.exact(variables["masks"])
  widths = {name: int(mask.sum()) for name, mask in variables["masks"].items()}
  shapes = dict(
    jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: np.array(x.shape), small.variables))
  )
  shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): shape for path, shape in shapes.items()}
  for group in auto.groups:
    alone = [(path, axis) for path, axis in group.members if _belongs_to_one(auto, path, axis)]
    assert alone
    assert all(shapes[path][axis] == widths[group.name] for path, axis in alone)


def _belongs_to_one(auto, path, axis):
  return sum((path, axis) in group.members for group in auto.groups) == 1


# Two minutes of EfficientNetB0 would go into compiling what MobileNetV2, of Keras too, says of training.
TRAINED = [name for name in NETWORKS if name != "EfficientNetB0"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_to_a_target_and_then_on(name):
  """A dense step, steps that prune, then the same steps by the masked and by the compact network."""
  network, auto, cost, masked = found(name)
  loss = auto.wrap(network.train)
  options = {"prune_every": 1, "features_per_prune": 500, "target": SHARE * cost.dense}
  # Deep networks with the statistics of two examples have gradients of any size, and steps ten times as long
  # blow rounding up a thousand times in five: then processors differ, not the networks.
  descent = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-4, momentum=0.9))
  tx = optax.chain(descent, fp.fisher_prune(cost, **options))

  @jax.jit
  def grads_of(variables, masks):
    def loss_fn(params, masks, batch):
      return loss({"params": params, "state": variables["state"], "masks": masks}, *batch)

    differentiate = fp.value_and_mask_grads(loss_fn, has_aux=True)
    return differentiate(variables["params"], masks, (network.x, LABELS))

  update = jax.jit(tx.update)

  def step(variables, opt_state):
    (value, state), (grads, mask_grads) = grads_of(variables, fp.get_masks(opt_state))
    updates, opt_state = update(grads, opt_state, variables["params"], mask_grads=mask_grads)
    return {"params": optax.apply_updates(variables["params"], updates), "state": state}, opt_state, value

  variables, opt_state = network.variables, jax.jit(tx.init)(network.variables["params"])
  for _ in range(10):
    variables, opt_state, _ = step(variables, opt_state)
    if fp.get_state(opt_state).cost <= SHARE * cost.dense:
      break
  assert fp.get_state(opt_state).cost <= SHARE * cost.dense
  everything = {**variables, "masks": fp.get_masks(opt_state)}
  small = fp.compact(loss, everything, network.x, LABELS, state_from=lambda output: {"state": output[1]})
  thin, thin_state = small.variables, small.shrink_opt_state(tx, opt_state)

  @jax.jit
  def thin_grads_of(thin):
    def loss_fn(params):
      return small({"params": params, "state": thin["state"]}, network.x, LABELS)

    return jax.value_and_grad(loss_fn, has_aux=True)(thin["params"])

  def thin_step(thin, opt_state):
    (value, state), grads = thin_grads_of(thin)
    updates, opt_state = tx.update(grads, opt_state, thin["params"])
    return {"params": optax.apply_updates(thin["params"], updates), "state": state}, opt_state, value

  for _ in range(3):
    variables, opt_state, value = step(variables, opt_state)
    thin, thin_state, thin_value = thin_step(thin, thin_state)
    np.testing.assert_allclose(thin_value, value, rtol=1e-3)
  served = fp.compact(auto.apply, {**variables, "masks": everything["masks"]}, network.x)
  assert served.cost <= SHARE * cost.dense
  assert is_close(served(thin, network.x), masked({**variables, "masks": everything["masks"]}, network.x))


class Between(eqx.Module):
  """A layer that is given, between two linear ones; for one example of four rows."""

  first: eqx.nn.Linear
  layer: eqx.Module
  last: eqx.nn.Linear

  def __init__(self, layer):
    self.first, self.last = eqx.nn.Linear(5, 8, key=KEY), eqx.nn.Linear(8, 3, key=KEY)
    self.layer = layer

  def __call__(self, x):
    return jax.vmap(self.last)(self.layer(jnp.tanh(jax.vmap(self.first)(x))))


class Rows(eqx.Module):
  """A layer of vectors, for each row."""

  layer: eqx.Module

  def __call__(self, x):
    return jax.vmap(self.layer)(x)


class Convolved(eqx.Module):
  """A convolution along the rows."""

  layer: eqx.nn.Conv1d

  def __call__(self, x):
    return self.layer(x.T).T


class Attention(eqx.Module):
  layer: eqx.nn.MultiheadAttention

  def __call__(self, x):
    return self.layer(x, x, x)


KEY = jax.random.key(0)
LAYERS = {
  "linear": (lambda: Rows(eqx.nn.Linear(8, 8, key=KEY)), True),
  "convolution": (lambda: Convolved(eqx.nn.Conv1d(8, 8, 3, padding=1, key=KEY)), True),
  "depthwise": (lambda: Convolved(eqx.nn.Conv1d(8, 8, 3, padding=1, groups=8, key=KEY)), False),
  "layer norm": (lambda: Rows(eqx.nn.LayerNorm(8)), False),
  "attention": (lambda: Attention(eqx.nn.MultiheadAttention(2, 8, key=KEY)), False),
}


@pytest.mark.parametrize(("make", "follows"), LAYERS.values(), ids=LAYERS)
def test_which_layers_of_equinox_compute_with_smaller_arrays(make, follows):
  """What its guide says; the compact network is exact for all of them."""
  params, static = eqx.partition(Between(make()), eqx.is_inexact_array)
  x = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)

  def apply(params, x):
    return jax.vmap(eqx.combine(params, static))(x)

  auto = fp.auto_mask(apply, params, x)
  variables = {"params": params, "masks": random_masks(auto.masks)}
  small = fp.compact(auto.apply, variables, x)
  wanted = auto.apply(variables, x)
  assert is_close(small(small.variables, x), wanted)
  try:
    called = apply(small.variables["params"], x)
  except Exception:  # each says so in its own way
    assert not follows
  else:
    assert is_close(called, wanted) == follows
