"""Small networks that once came out wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp


@pytest.mark.parametrize("alive", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1), (1,)])
def test_a_mask_of_one_feature_that_broadcasts_still_counts(alive, shape):
  # Nothing tells which of the axes of size 1 a reshaped mask of one feature belongs to.
  def apply(variables, x):
    return x * variables["masks"]["m"].reshape(shape) @ variables["params"]["w"]

  variables = {"params": {"w": jnp.ones((3, 2))}, "masks": {"m": jnp.array([alive])}}
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 3)))
  small = fp.compact(apply, variables, x)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-6)


def test_a_dynamic_slice_costs_nothing():
  def apply(variables, x):
    at = jnp.argmax(x[0])
    return jax.lax.dynamic_slice(x * variables["masks"]["m"], (at * 0, 0), (1, 3))

  variables = {"params": {}, "masks": {"m": jnp.array([1.0, 0.0, 1.0])}}
  x = jnp.arange(6.0).reshape(2, 3)
  cost = fp.cost_model(apply, variables, x)
  assert {row.primitive for row in cost.breakdown(variables["masks"])} == {"argmax", "mul", "lt", "add"}
  small = fp.compact(apply, variables, x)
  names = [eqn.primitive.name for eqn in _eqns(jax.make_jaxpr(small)(small.variables, x))]
  assert names.count("lt") <= 2
  np.testing.assert_array_equal(small(small.variables, x), apply(variables, x))


def test_a_slice_of_everything_is_taken_from_what_is_left():
  def apply(variables, x):
    y = x * variables["masks"]["m"]
    return jax.lax.slice(y, (0, 0), (2, 3))[:, ::2] * 2

  variables = {"params": {}, "masks": {"m": jnp.array([1.0, 0.0, 0.0])}}
  x = jnp.arange(6.0).reshape(2, 3)
  small = fp.compact(apply, variables, x)
  np.testing.assert_array_equal(small(small.variables, x), apply(variables, x))


def test_one_turn_of_a_scan_may_be_all_that_is_asked_for():
  def apply(variables, x):
    def turn(carry, each):
      return carry * variables["masks"]["m"] + each, jnp.sum(each)

    _, sums = jax.lax.scan(turn, x[0], x)
    return sums[1:]

  variables = {"params": {}, "masks": {"m": jnp.array([1.0, 0.0])}}
  x = jnp.arange(6.0).reshape(3, 2)
  small = fp.compact(apply, variables, x)
  np.testing.assert_array_equal(small(small.variables, x), apply(variables, x))


def _eqns(closed):
  jaxpr = getattr(closed, "jaxpr", closed)
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      if hasattr(value, "eqns"):
        yield from _eqns(value)


def test_export_of_examples_that_are_merged_with_positions():
  # Into groups of a convolution: sizes are products with a symbol.
  layout = ("WCN", "WIO", "WNC")

  def apply(variables, x):
    def one(y):
      return lax.conv_general_dilated(
        y[None], variables["params"]["w"], (1,), "VALID", dimension_numbers=layout, batch_group_count=2
      )

    y = jax.vmap(one)(x * variables["masks"]["m"])
    return y.reshape(x.shape[0], -1) @ variables["params"]["v"]

  x = jax.random.normal(jax.random.key(0), (3, 4, 6))
  params = {"w": jnp.ones((1, 4, 4)), "v": jnp.ones((12, 2))}
  variables = {"params": params, "masks": {"m": jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])}}
  small = fp.compact(apply, variables, x)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-5)
  exported = small.export(x)
  for batch in (x, x[:2], jnp.concatenate([x, 2 * x])):
    np.testing.assert_allclose(exported.call(batch), apply(variables, batch), rtol=1e-5)


def test_a_batch_for_which_more_is_needed_than_was_kept_is_an_error():
  def apply(variables, x):
    h = x @ variables["w"]
    if x.shape[0] > 3:
      h = jax.nn.softmax(h)
    return (h * variables["masks"]["m"]) @ variables["v"]

  variables = {"w": jnp.ones((4, 5)), "v": jnp.ones((5, 2)), "masks": {"m": jnp.array([1.0, 0, 1, 1, 0])}}
  small = fp.compact(apply, variables, jnp.ones((2, 4)))
  np.testing.assert_allclose(small(small.variables, jnp.ones((3, 4))), apply(variables, jnp.ones((3, 4))))
  with pytest.raises(ValueError, match="must need no more of its variables"):
    small(small.variables, jnp.ones((4, 4)))


@pytest.mark.parametrize("array", [np.array, jnp.array])
@pytest.mark.parametrize("index", [[0, 3, 2, 0], [-1, 0, -4, 1]])
def test_indices_that_were_made_before_tracing(index, array):
  # Which of NumPy's are negative is worked out before tracing too, and comes as a constant of its own.
  places = array(index)

  def apply(variables, x):
    return (x @ variables["params"]["w"])[:, places] * variables["masks"]["m"]

  rng = np.random.default_rng(0)
  variables = {
    "params": {"w": jnp.asarray(rng.normal(size=(3, 5)))},
    "masks": {"m": jnp.array([0.0, 0.0, 1.0, 1.0])},
  }
  x = jnp.asarray(rng.normal(size=(4, 3)))
  small = fp.compact(apply, variables, x, strict=True)
  assert small.variables["params"]["w"].shape == (3, len({*np.arange(5)[index][2:]}))
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-5)


SUMS = {
  "cumsum": lambda x: lax.cumsum(x, 1),
  "cumsum reversed": lambda x: lax.cumsum(x, 1, reverse=True),
  "window sum": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME"),
  "cumsum of a padded array": lambda x: lax.cumsum(lax.pad(x, 0.0, ((0, 0, 0), (1, 1, 0))), 1),
  "cumsum in a loop": lambda x: lax.scan(lambda c, _: (c + lax.cumsum(x, 1), None), 0 * x, None, length=2)[0],
  "cumulative maximum": lambda x: lax.cummax(x, 1),
}


@pytest.mark.parametrize("alive", range(5))
@pytest.mark.parametrize("name", SUMS)
def test_one_feature_is_left_in_the_middle_of_a_running_sum(name, alive):
  # XLA compiles a running sum of a padded array of one entry wrongly: the truth is that of the whole one.
  def apply(variables, x):
    return SUMS[name](x * variables["params"]["w"] * variables["masks"]["m"])

  mask = jnp.zeros(5).at[alive].set(1.0)
  variables = {"params": {"w": jnp.arange(1.0, 6.0)}, "masks": {"m": mask}}
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
  small = fp.compact(apply, variables, x)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-5)
  gradient = lambda f, v: jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(f(v, x) + 1.0))))(v)
  whole = gradient(lambda v, x: apply({**v, "masks": variables["masks"]}, x), {"params": variables["params"]})
  np.testing.assert_allclose(
    gradient(small, small.variables)["params"]["w"], small.shrink(whole)["params"]["w"], rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("alive", range(5))
@pytest.mark.parametrize("name", [name for name in SUMS if "padded" not in name])
def test_one_entry_is_read_of_a_running_sum(name, alive):
  # The gradient of what picks it is such a padded array.
  def apply(variables, x):
    return SUMS[name](x * variables["params"]["w"]) * variables["masks"]["m"]

  variables = {
    "params": {"w": jnp.arange(1.0, 6.0)},
    "masks": {"m": jnp.zeros(5).at[alive].set(1.0)},
  }
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
  small = fp.compact(apply, variables, x)
  gradient = lambda f, v: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(v, x) + 1.0))))(x)
  np.testing.assert_allclose(
    gradient(small, small.variables), gradient(apply, variables), rtol=1e-5, atol=1e-6
  )
