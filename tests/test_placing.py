"""Sharded variables and moments stay sharded when they shrink: looked at on eight devices of the host."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisherprune_jax as fp

TYPES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
PLACES = {"a": P(None, "d"), "bias": P("d"), "b": P("d", None), "c": P("d", None)}


def apply(v, x):
  p = v["params"]
  h = jnp.tanh(x @ p["a"] + p["bias"]) * v["masks"]["m"]
  return jnp.tanh(h @ p["b"]) @ p["c"]


def network(mesh, alive):
  rng = np.random.default_rng(0)
  shapes = {"a": (6, 64), "bias": (64,), "b": (64, 16), "c": (16, 3)}
  params = {
    name: jax.device_put(rng.normal(size=shape).astype(np.float32), NamedSharding(mesh, PLACES[name]))
    for name, shape in shapes.items()
  }
  mask = jnp.zeros(64).at[rng.permutation(64)[:alive]].set(1)
  return {"params": params, "masks": {"m": jax.device_put(mask, NamedSharding(mesh, P()))}}


def mesh_of(kind, shape=(8,), names=("d",)):
  return jax.make_mesh(shape, names, axis_types=(TYPES[kind],) * len(shape))


def bytes_per_device(leaf):
  return max(shard.data.nbytes for shard in leaf.addressable_shards)


def on_host(tree):
  return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)


@pytest.mark.parametrize("kind", TYPES)
def test_widths_that_divide_stay_split(kind):
  variables = network(mesh_of(kind), alive=24)
  x = jnp.ones((2, 6))
  small = fp.compact(apply, variables, x)
  for name, leaf in small.variables["params"].items():
    dense = variables["params"][name]
    assert leaf.sharding.spec == dense.sharding.spec, name
    assert leaf.sharding.mesh == dense.sharding.mesh
    assert bytes_per_device(leaf) <= bytes_per_device(dense)
  assert small.variables["params"]["a"].shape == (6, 24)
  host = on_host(variables)
  np.testing.assert_allclose(small(on_host(small.variables), x), apply(host, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_moments_stay_split(kind):
  variables = network(mesh_of(kind), alive=40)
  tx = optax.adam(1e-3)
  state = tx.init(variables["params"])
  state = jax.tree.map(lambda s, p: jax.device_put(s, p.sharding), state[0].mu, variables["params"]), state
  mu, (first, *rest) = state
  opt_state = (first._replace(mu=mu, nu=jax.tree.map(jnp.square, mu)), *rest)
  small = fp.compact(apply, variables, jnp.ones((2, 6)))
  shrunk = small.shrink_opt_state(tx, opt_state)
  for moments in (shrunk[0].mu, shrunk[0].nu):
    for name, leaf in moments.items():
      assert leaf.shape == small.variables["params"][name].shape
      assert leaf.sharding.spec == PLACES[name], name


def test_where_a_width_does_not_divide_another_axis_is_split():
  variables = network(mesh_of("automatic"), alive=25)
  with pytest.warns(UserWarning, match=r"along axis \d over the mesh axis 'd'.*multiple_of="):
    small = fp.compact(apply, variables, jnp.ones((2, 6)))
  params = small.variables["params"]
  assert params["b"].shape == (25, 16)
  assert params["b"].sharding.spec == P(None, "d")
  assert bytes_per_device(params["b"]) <= bytes_per_device(variables["params"]["b"])
  assert params["a"].sharding.is_fully_replicated  # (6, 25): nothing divides
  assert params["c"].sharding.spec == P("d", None)


def test_two_mesh_axes_are_kept_apart():
  mesh = mesh_of("automatic", (2, 4), ("x", "y"))
  rng = np.random.default_rng(0)
  params = {
    "a": jax.device_put(rng.normal(size=(8, 64)), NamedSharding(mesh, P("x", "y"))),
    "b": jax.device_put(rng.normal(size=(64, 4)), NamedSharding(mesh, P(("x", "y"), None))),
  }
  mask = {"m": jnp.zeros(64).at[:12].set(1)}
  both = lambda v, x: jnp.tanh(x @ v["params"]["a"]) * v["masks"]["m"] @ v["params"]["b"]
  with pytest.warns(UserWarning, match="'x', 'y'"):
    small = fp.compact(both, {"params": params, "masks": mask}, jnp.ones((2, 8)))
  assert small.variables["params"]["a"].sharding.spec == P("x", "y")
  assert small.variables["params"]["b"].shape == (12, 4)  # neither axis divides by eight
  assert small.variables["params"]["b"].sharding.is_fully_replicated


def test_with_multiples_of_the_mesh_axis_nothing_is_said():
  variables = network(mesh_of("automatic"), alive=64)
  x = jnp.ones((2, 6))
  cost = fp.cost_model(apply, variables, x)
  importance = {"m": jnp.asarray(np.random.default_rng(1).uniform(size=64))}
  masks = fp.select_masks(cost, importance, 0.6 * cost.dense, multiple_of=8)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    small = fp.compact(apply, {**variables, "masks": masks}, x)
  assert small.variables["params"]["b"].sharding.spec == P("d", None)
