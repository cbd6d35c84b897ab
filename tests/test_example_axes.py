"""Example axes in other places than the first, against a loop over examples; and what says so where they are wrong."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisherprune_jax as fp
from tests.models import random_masks

B, T, C = 4, 4, 6
"""As many steps as examples: a mask along the wrong axis would not be seen by its shape."""


@pytest.mark.parametrize("axis", range(-3, 3))
@pytest.mark.parametrize("batch_axis", range(-3, 3))
def test_apply_mask_against_a_loop(axis, batch_axis):
  if axis % 3 == batch_axis % 3:
    with pytest.raises(ValueError, match=r"apart from the example axis.*batch_axis=None.*vmap"):
      fp.apply_mask(jnp.ones((3, 3, 3)), jnp.ones(3), axis, batch_axis)
    return
  rng = np.random.default_rng(0)
  x, one, each = rng.normal(size=(3, 3, 3)), rng.integers(2, size=3), rng.integers(2, size=(3, 3))
  for mask in (one, each):
    expected = x.copy()
    for at in np.ndindex(x.shape):
      feature = at[axis]
      expected[at] *= mask[feature] if mask.ndim == 1 else mask[at[batch_axis], feature]
    found = fp.apply_mask(jnp.asarray(x, jnp.float32), jnp.asarray(mask), axis, batch_axis)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_apply_mask_defaults_and_lists():
  np.testing.assert_array_equal(fp.apply_mask(jnp.ones((2, 3)), [1, 0, 1]), [[1, 0, 1]] * 2)
  np.testing.assert_array_equal(
    fp.apply_mask(jnp.ones((2, 2, 2)), [[1, 0], [0, 1]]), [[[1, 0], [1, 0]], [[0, 1], [0, 1]]]
  )


@pytest.mark.parametrize("shape", [(3,), (2, 3), (5, 2, 3)])
def test_without_an_example_axis_there_is_one_mask(shape):
  x, mask = jnp.ones(shape), jnp.array([1.0, 0.0, 1.0])
  layer = fp.Mask(batch_axis=None)
  assert layer.init(jax.random.key(0), x)["masks"]["mask"].shape == (3,)
  np.testing.assert_array_equal(layer.apply({"masks": {"mask": mask}}, x), x * mask)
  np.testing.assert_array_equal(fp.nnx.Mask(3, batch_axis=None)(x), x)
  for apply in (
    lambda m: layer.apply({"masks": {"mask": m}}, x),
    lambda m: fp.apply_mask(x, m, batch_axis=None),
  ):
    with pytest.raises(ValueError, match=r"shape \(3,\).*got \(5, 3\).*jax.vmap\(one, in_axes=\(-2, 0\)\)"):
      apply(jnp.ones((5, 3)))


def test_examples_folded_into_rows_are_refused_with_the_way_out():
  with pytest.raises(ValueError, match=r"got \(4, 6\).*unfold them first: x.reshape\(B, -1, C\)"):
    fp.apply_mask(jnp.ones((B * T, C)), jnp.ones((B, C)))


class Sequence(nn.Module):
  """One example, ``(T, features)``, with a stack of layers among its own."""

  @nn.compact
  def __call__(self, x):
    x = fp.Mask(batch_axis=None)(nn.relu(nn.Dense(C)(x)))
    x = x + nn.Dense(C)(jnp.cumsum(x, axis=0))
    axes = {"params": 0, "masks": 0}
    x, _ = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)()(x, None)
    return nn.Dense(2)(x.mean(axis=0))


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(C)(fp.Mask(batch_axis=None)(nn.relu(nn.Dense(5)(x)))), None


@functools.cache
def mapped():
  x = jax.random.normal(jax.random.key(0), (B, T, 3))
  return Sequence(), Sequence().init(jax.random.key(1), x[0]), x


def test_a_mapped_model_has_the_gradients_of_its_examples():
  model, variables, x = mapped()

  def one(params, masks, x):
    return jnp.sum(model.apply({"params": params, "masks": masks}, x) ** 2)

  def loss(params, masks, x):
    return jnp.mean(jax.vmap(one, in_axes=(None, -2, 0))(params, masks, x))

  params, masks = variables["params"], random_masks(variables["masks"], 0)
  _, (_, found) = jax.jit(fp.value_and_mask_grads(loss))(params, masks, x)
  for n in range(B):
    expected = jax.grad(one, argnums=1)(params, masks, x[n])
    rows = jax.tree.map(lambda g: g[..., n, :], found)  # noqa: B023
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), rows, expected)


def test_a_mapped_model_is_costed_and_compacted_exactly(x64):
  model, variables, x = mapped()
  batched = lambda variables, x: jax.vmap(lambda x: model.apply(variables, x))(x)
  variables = {**variables, "masks": random_masks(variables["masks"], 1)}
  small = fp.compact(batched, variables, x)
  np.testing.assert_allclose(small(small.variables, x), batched(variables, x), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(small(small.variables, x[:2]), batched(variables, x[:2]), rtol=1e-5, atol=1e-6)
  cost = fp.cost_model(batched, variables, x)
  assert cost.exact(variables["masks"]) == small.cost * B < cost.dense * B
  leaves, tree = jax.tree.flatten(variables["masks"])
  for at, drops in enumerate(jax.tree.leaves(cost.per_feature(variables["masks"]))):
    for k in np.ndindex(drops.shape):
      fewer = jax.tree.unflatten(tree, [m.at[k].set(0) if n == at else m for n, m in enumerate(leaves)])
      assert drops[k] * B == cost.exact(variables["masks"]) - cost.exact(fewer)


def test_masks_along_time_are_silently_others_where_lengths_agree():
  """What the guide warns of: nothing can see it, so the right axis has to be said."""
  x, mask = jnp.ones((T, B, 2)), jnp.arange(8.0).reshape(B, 2) % 3 > 0
  right, wrong = (fp.apply_mask(x, mask, batch_axis=axis) for axis in (1, 0))
  assert right.shape == wrong.shape
  assert not np.array_equal(right, wrong)
  np.testing.assert_array_equal(right[0], mask)


def test_a_module_is_mapped_over_its_masks():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.inner, self.mask = nnx.Linear(3, C, rngs=rngs), fp.nnx.Mask(C, batch_axis=None)

    def __call__(self, x):
      return jnp.sum(self.mask(nnx.relu(self.inner(x))))

  apply, variables = fp.nnx.functional(Net(nnx.Rngs(0)))
  x = jax.random.normal(jax.random.key(0), (B, 3))
  one = lambda params, masks, x: apply({**variables, "params": params, "masks": masks}, x) ** 2
  loss = lambda params, masks, x: jnp.sum(jax.vmap(one, in_axes=(None, -2, 0))(params, masks, x))
  params, masks = variables["params"], variables["masks"]
  _, (_, found) = fp.value_and_mask_grads(loss, reduction="sum")(params, masks, x)
  for n in range(B):
    expected = jax.grad(one, argnums=1)(params, masks, x[n])
    np.testing.assert_allclose(found["mask"]["mask"][n], expected["mask"]["mask"], rtol=1e-5)
