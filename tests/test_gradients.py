"""Per-example gradients of the masks against a loop of ``jax.grad``, one example at a time."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp

B = 5
WEIGHTS = jnp.array([0.5, 0.0, 2.0, 1.0, 0.25])


class Network(nn.Module):
  """A function of an input with Linen layers in it."""

  function: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(3)(self.function(x))


class Block(nn.Module):
  """A layer and its mask, for sharing and stacking."""

  @nn.compact
  def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
    return fp.Mask()(jnp.tanh(nn.Dense(x.shape[-1])(x))), None


def dense(x: jax.Array) -> jax.Array:
  x = fp.Mask()(nn.tanh(nn.Dense(7)(x)))
  return fp.Mask()(nn.tanh(nn.Dense(6)(x)))


def conv(x: jax.Array) -> jax.Array:
  x = fp.Mask()(nn.relu(nn.Conv(4, (3, 3))(x)))
  return x.reshape(x.shape[0], -1)


def coupled_layers(x: jax.Array) -> jax.Array:
  mask = fp.Mask()
  x = mask(nn.tanh(nn.Dense(4)(x)))
  return mask(nn.tanh(nn.Dense(4)(x)) + x)


def shared_weights(x: jax.Array) -> jax.Array:
  block = Block()
  return block(block(x)[0])[0]


def rematerialised(x: jax.Array) -> jax.Array:
  return nn.remat(Block)()(x)[0]


def stacked(x: jax.Array) -> jax.Array:
  lifted = nn.scan(Block, variable_axes={"params": 0, "masks": 0}, split_rngs={"params": True}, length=3)
  return lifted()(x, None)[0]


def heads(x: jax.Array) -> jax.Array:
  x = nn.DenseGeneral((4, 2))(x)
  x = fp.Mask(axis=-2)(jnp.sin(x))
  return jnp.sum(x, axis=1).reshape(x.shape[0], -1)


def time_major(x: jax.Array) -> jax.Array:
  x = jnp.swapaxes(nn.tanh(nn.Dense(4)(x)), 0, 1)
  return jnp.sum(fp.Mask(batch_axis=1)(x), axis=0)


def channels_before_batch(x: jax.Array) -> jax.Array:
  return fp.Mask(axis=0, batch_axis=-1)(nn.tanh(nn.Dense(4)(x)).T).T


NETWORKS: dict[str, tuple[Callable[[jax.Array], jax.Array], tuple[int, ...], list[tuple[int, ...]]]] = {
  "dense": (dense, (B, 4), [(B, 7), (B, 6)]),
  "conv": (conv, (B, 5, 4, 2), [(B, 4)]),
  "coupled_layers": (coupled_layers, (B, 3), [(B, 4)]),
  "shared_weights": (shared_weights, (B, 4), [(B, 4)]),
  "rematerialised": (rematerialised, (B, 4), [(B, 4)]),
  "stacked": (stacked, (B, 4), [(3, B, 4)]),
  "heads": (heads, (B, 3, 5), [(B, 4)]),
  "time_major": (time_major, (B, 6, 3), [(B, 4)]),
  "channels_before_batch": (channels_before_batch, (B, 3), [(B, 4)]),
}


@functools.cache
def setup(name: str) -> tuple[nn.Module, Any, Any, dict[str, jax.Array]]:
  """A network of the table, its parameters and masks (of which one entry is off), and a batch."""
  function, shape, _ = NETWORKS[name]
  model = Network(function)
  rng = np.random.default_rng(0)
  batch = {
    "x": jnp.asarray(rng.normal(size=shape), jnp.float32),
    "y": jnp.asarray(rng.normal(size=(B, 3)), jnp.float32),
  }
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch["x"])
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 2, p.dtype), shapes["params"])
  masks = jax.tree.map(lambda m: jnp.ones(m.shape, m.dtype).at[..., 1].set(0), shapes["masks"])
  return model, params, masks, batch


def losses_of(model: nn.Module, params: Any, masks: Any, batch: Any) -> jax.Array:
  """The loss of every example."""
  y = model.apply({"params": params, "masks": masks}, batch["x"])
  return jnp.sum(jnp.square(y - batch["y"]), axis=-1)


@functools.cache
def one_at_a_time(name: str) -> Any:
  """The slow oracle: the gradient of each example's own loss, from a batch of one and masks as stored."""
  model, params, masks, batch = setup(name)

  @jax.jit
  def gradient(example: Any) -> Any:
    return jax.grad(lambda m: losses_of(model, params, m, example)[0])(masks)

  rows = [gradient({key: x[n : n + 1] for key, x in batch.items()}) for n in range(B)]
  return jax.tree.map(lambda *g: np.stack(g, axis=-2), *rows)


def scaled(tree: Any, factors: jax.Array) -> Any:
  """Every row times the factor of its example."""
  return jax.tree.map(lambda g: g * factors[:, None], tree)


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_the_gradients_of_single_examples(name):
  model, params, masks, batch = setup(name)

  def loss_fn(params: Any, masks: Any, batch: Any) -> jax.Array:
    return jnp.mean(losses_of(model, params, masks, batch))

  both = jax.jit(lambda *args: (fp.value_and_mask_grads(loss_fn)(*args), jax.value_and_grad(loss_fn)(*args)))
  (value, (grads, mask_grads)), (expected_value, expected_grads) = both(params, masks, batch)
  expected = one_at_a_time(name)
  assert [g.shape for g in jax.tree.leaves(mask_grads)] == NETWORKS[name][2]
  assert value == pytest.approx(float(expected_value), rel=1e-6)
  chex.assert_trees_all_close(grads, expected_grads, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(mask_grads, expected, rtol=1e-4, atol=1e-5)
  # Examples differ, and so do features, those that are off included.
  for g in jax.tree.leaves(mask_grads):
    assert np.unique(np.asarray(g)).size == g.size


REDUCTIONS: dict[str, tuple[Callable[[jax.Array, Any], jax.Array], Any, jax.Array]] = {
  "mean": (lambda losses, batch: jnp.mean(losses), "mean", jnp.ones(B)),
  "sum": (lambda losses, batch: jnp.sum(losses), "sum", jnp.ones(B)),
  "a number": (lambda losses, batch: jnp.sum(losses) / 8, 8, jnp.ones(B)),
  "a scalar array": (lambda losses, batch: jnp.sum(losses) * 1024, jnp.float32(1 / 1024), jnp.ones(B)),
  "a function of the padded batch": (
    lambda losses, batch: jnp.sum(losses * (batch["w"] > 0)) / jnp.sum(batch["w"] > 0),
    lambda batch: jnp.sum(batch["w"] > 0),
    (WEIGHTS > 0).astype(jnp.float32),
  ),
  "weighted losses": (
    lambda losses, batch: jnp.sum(losses * batch["w"]) / jnp.sum(batch["w"]),
    lambda batch: jnp.sum(batch["w"]),
    WEIGHTS,
  ),
  "mean of weighted losses": (lambda losses, batch: jnp.mean(losses * batch["w"]), "mean", WEIGHTS),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_undone(name):
  reduce, reduction, factors = REDUCTIONS[name]
  model, params, masks, batch = setup("dense")

  def loss_fn(params: Any, masks: Any, batch: Any) -> jax.Array:
    return reduce(losses_of(model, params, masks, batch), batch)

  step = fp.value_and_mask_grads(loss_fn, reduction=reduction)
  _, (_, found) = jax.jit(step)(params, masks, batch | {"w": WEIGHTS})
  expected = scaled(one_at_a_time("dense"), factors)
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_loss_scale_may_be_traced():
  model, params, masks, batch = setup("dense")

  @jax.jit
  def step(scale: jax.Array) -> Any:
    def loss_fn(params: Any, masks: Any, batch: Any) -> jax.Array:
      return scale * jnp.sum(losses_of(model, params, masks, batch))

    return fp.value_and_mask_grads(loss_fn, reduction=1 / scale)(params, masks, batch)[1][1]

  chex.assert_trees_all_close(step(jnp.float32(1.0)), step(jnp.float32(4096.0)), rtol=1e-5)


def test_aux_and_further_arguments_pass_through():
  model, params, masks, batch = setup("dense")

  def loss_fn(params: Any, masks: Any, batch: Any, factor: jax.Array, shift: Any) -> Any:
    losses = losses_of(model, params, masks, batch)
    return factor * jnp.mean(losses) + shift["b"], {"losses": losses, "shift": shift}

  step = jax.jit(fp.value_and_mask_grads(loss_fn, has_aux=True))
  (value, aux), (grads, mask_grads) = step(params, masks, batch, jnp.float32(3.0), {"b": jnp.float32(1.0)})
  losses = losses_of(model, params, masks, batch)
  chex.assert_trees_all_close(aux, {"losses": losses, "shift": {"b": 1.0}}, rtol=1e-5)
  assert value == pytest.approx(3 * float(jnp.mean(losses)) + 1, rel=1e-5)
  chex.assert_trees_all_equal_shapes(grads, params)
  expected = scaled(one_at_a_time("dense"), jnp.full(B, 3.0))
  chex.assert_trees_all_close(mask_grads, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_give_float32_gradients():
  model, params, masks, batch = setup("conv")

  def loss_fn(params: Any, masks: Any, batch: Any) -> jax.Array:
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, batch))
    return jnp.mean(losses_of(model, half[0], masks, half[1]).astype(jnp.float32))

  _, (grads, mask_grads) = jax.jit(fp.value_and_mask_grads(loss_fn))(params, masks, batch)
  assert {g.dtype for g in jax.tree.leaves((grads, mask_grads))} == {jnp.dtype("float32")}
  for found, exact in zip(jax.tree.leaves(mask_grads), jax.tree.leaves(one_at_a_time("conv")), strict=True):
    assert np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)


def test_bfloat16_maps_are_summed_in_float32():
  rng = np.random.default_rng(0)
  x, cotangent = (jnp.asarray(rng.random((2, 4096, 3)), jnp.bfloat16) for _ in range(2))

  def loss_fn(params: Any, masks: Any, x: jax.Array) -> jax.Array:
    return jnp.vdot(fp.Mask().apply({"masks": masks}, x).astype(jnp.float32), cotangent.astype(jnp.float32))

  _, (_, g) = fp.value_and_mask_grads(loss_fn, reduction="sum")({}, {"mask": jnp.ones(3)}, x)
  exact = np.einsum("btc,btc->bc", np.asarray(x, np.float64), np.asarray(cotangent, np.float64))
  np.testing.assert_allclose(g["mask"], exact, rtol=1e-5)


def test_half_precision_masks_get_float32_gradients():
  def loss_fn(params: Any, masks: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(masks["m"] * x)

  masks = {"m": jnp.ones(3, jnp.float16)}
  _, (_, g) = fp.value_and_mask_grads(loss_fn)({}, masks, jnp.ones((2, 3), jnp.float16))
  assert g["m"].dtype == jnp.float32


class Normalised(nn.Module):
  """Batch norm that takes its statistics from the batch, so that examples interact."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = fp.Mask()(nn.tanh(nn.Dense(4)(x)))
    x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
    return nn.Dense(3)(x)


def test_with_batch_statistics_rows_are_gradients_of_the_summed_loss():
  _, _, _, batch = setup("dense")
  model = Normalised()
  variables = jax.jit(model.init)(jax.random.key(0), batch["x"])
  params, masks, stats = variables["params"], variables["masks"], variables["batch_stats"]

  def loss_fn(params: Any, masks: Any, batch: Any) -> Any:
    y, new = model.apply(
      {"params": params, "masks": masks, "batch_stats": stats}, batch["x"], mutable=["batch_stats"]
    )
    losses = jnp.sum(jnp.square(y - batch["y"]), axis=-1)
    return jnp.mean(losses), (losses, new)

  @jax.jit
  def of_one_mask(row: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of the summed loss, and of the example's own, by the mask of example ``n`` alone."""

    def losses(row: jax.Array) -> jax.Array:
      masks = {"Mask_0": {"mask": jnp.ones((B, 4)).at[n].set(row)}}
      return loss_fn(params, masks, batch)[1][0]

    return jax.grad(lambda row: jnp.sum(losses(row)))(row), jax.grad(lambda row: losses(row)[n])(row)

  (_, (_, new)), (_, found) = jax.jit(fp.value_and_mask_grads(loss_fn, has_aux=True))(params, masks, batch)
  summed, own = (
    jnp.stack(rows) for rows in zip(*(of_one_mask(jnp.ones(4), n) for n in range(B)), strict=True)
  )
  np.testing.assert_allclose(found["Mask_0"]["mask"], summed, rtol=1e-4, atol=1e-5)
  assert np.linalg.norm(summed - own) > 0.1 * np.linalg.norm(own)
  chex.assert_trees_all_equal_shapes(new["batch_stats"], stats)


def toy_loss(params: jax.Array, masks: Any, batch: Any) -> jax.Array:
  return jnp.mean(params * masks["m"] * batch["x"])


@pytest.mark.parametrize(
  ("batch", "found"),
  [
    ({"x": jnp.ones((2, 3)), "rate": jnp.float32(0.1)}, r"float32\[\]"),
    ({"x": jnp.ones((2, 3)), "rate": 0.1}, "float"),
    ({"x": jnp.ones((2, 3)), "y": jnp.ones(4)}, r"float32\[2, 3\], float32\[4\]"),
    ({}, "no array"),
  ],
  ids=["a scalar array", "a number", "unequal lengths", "nothing"],
)
def test_a_batch_must_lead_with_the_example_axis(batch, found):
  with pytest.raises(ValueError, match=f"`batch`.*{found}"):
    fp.value_and_mask_grads(toy_loss)(jnp.ones(3), {"m": jnp.ones(3)}, batch)


@pytest.mark.parametrize("reduction", ["max", "", None, True, [2.0], np.ones(2)], ids=repr)
def test_an_unknown_reduction_is_refused_at_once(reduction):
  with pytest.raises(ValueError, match=r"reduction must be .*got"):
    fp.value_and_mask_grads(toy_loss, reduction=reduction)


def test_per_example_masks_keep_tree_dtype_and_values():
  masks = {
    "a": jnp.array([1.0, 0.0]),
    "b": (jnp.arange(6, dtype=jnp.float16).reshape(2, 3), np.ones((2, 1, 3), np.int32)),
  }
  found = fp.per_example(masks, batch_size=4)
  shapes = jax.tree.map(lambda m: (m.shape, str(m.dtype)), found)
  assert shapes == {"a": ((4, 2), "float32"), "b": (((2, 4, 3), "float16"), ((2, 1, 4, 3), "int32"))}
  for n in range(4):
    chex.assert_trees_all_equal(jax.tree.map(lambda m: m[..., n, :], found), masks)  # noqa: B023


def test_a_scalar_is_no_mask():
  with pytest.raises(ValueError, match="feature axis, got a scalar"):
    fp.per_example({"m": jnp.float32(1)}, 2)
