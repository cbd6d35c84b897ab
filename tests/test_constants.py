"""Scalars of JAX that were made before tracing: their values are known inside a caller's trace, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp

ROWS = ((3, 1), (1, 1), ((1, 1), (0, 0)))
USES = {
  "where": lambda h, c: jnp.where(h > 0, h, c),
  "select": lambda h, c: lax.select(h > 0, h, jnp.broadcast_to(c, h.shape)),
  "clip": lambda h, c: jnp.clip(h, c, 2),
  "clamp": lambda h, c: lax.clamp(c, h, np.float32(2)),
  "nan_to_num": lambda h, c: jnp.nan_to_num(h, nan=c),
  "pad": lambda h, c: lax.pad(h, c, ((1, 0, 0), (0, 0, 0)))[1:],
  "maximum": lambda h, c: jnp.maximum(h, c),
  "quotient": lambda h, c: h / (c - 1),
  "maximum of windows": lambda h, c: lax.reduce_window(h, c, lax.max, *ROWS),
  "windows": lambda h, c: lax.reduce_window(h, c, lambda a, b: a + jnp.abs(b), *ROWS),
  "update": lambda h, c: h.at[0].set(c),
  "scan": lambda h, c: lax.scan(lambda h, _: (jnp.where(h > 0, h, c), None), h, None, length=2)[0],
  "while": lambda h, c: lax.fori_loop(0, 2, lambda _, h: jnp.where(h > 0, h, c), h),
  "cond": lambda h, c: lax.cond(h[0, 1] > 0, lambda h: jnp.where(h > 0, h, c), jnp.sin, h),
  "checkpoint": lambda h, c: jax.checkpoint(lambda h: jnp.where(h > 0, h, c))(h),
  "vmap": lambda h, c: jax.vmap(lambda h: jnp.where(h > 0, h, c))(h),
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
PARAMS = {
  "w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)), jnp.float32),
  "v": jnp.asarray(np.random.default_rng(2).normal(size=(6, 2)), jnp.float32),
}
VARIABLES = {"params": PARAMS, "masks": {"m": jnp.arange(6.0) % 2}}


def network(use, constant):
  def apply(variables, x):
    h = use(jnp.tanh(x @ variables["params"]["w"]), constant)
    return fp.apply_mask(h, variables["masks"]["m"]) @ variables["params"]["v"]

  return apply


def cost_and_outputs(apply, variables, x):
  small = fp.compact(apply, variables, x)
  assert small.variables["params"]["w"].shape == (3, 3)
  return fp.cost_model(apply, variables, x).dense, small(small.variables, x)


@pytest.mark.parametrize(("name", "number"), [*((name, -0.5) for name in USES), ("where", 0.0), ("pad", 0.0)])
def test_a_scalar_of_jax_is_as_good_as_one_of_numpy(name, number):
  dense, outputs = cost_and_outputs(network(USES[name], np.float32(number)), VARIABLES, X)
  made_before = jnp.float32(number)
  found = {}

  def traced(x):
    found["dense"], y = cost_and_outputs(network(USES[name], made_before), VARIABLES, x)
    return y

  np.testing.assert_allclose(jax.jit(traced)(X), outputs, rtol=1e-5, atol=1e-6)
  assert found["dense"] == dense
  np.testing.assert_allclose(outputs, network(USES[name], number)(VARIABLES, X), rtol=1e-5, atol=1e-6)


def run(constant, x):
  return cost_and_outputs(network(USES["where"], constant), VARIABLES, x)[1]


TRACES = {
  "jit": lambda: jax.jit(run)(jnp.float32(-0.5), X),
  "vmap": lambda: jax.vmap(run, (0, None))(jnp.full(1, -0.5), X)[0],
  "scan": lambda: lax.scan(lambda c, _: (c, run(c, X)), jnp.float32(-0.5), None, length=1)[1][0],
  "grad": lambda: jax.value_and_grad(lambda c: run(c, X)[0, 0])(jnp.float32(-0.5))[0],
}


@pytest.mark.parametrize("name", TRACES)
def test_a_constant_that_a_caller_traces(name):
  found = TRACES[name]()
  expected = network(USES["where"], -0.5)(VARIABLES, X)
  np.testing.assert_allclose(found, expected if found.shape else expected[0, 0], rtol=1e-5)


def test_automatic_masks():
  floor = jnp.float32(-0.5)
  net = lambda p, x: jnp.where(x @ p["w"] > 0, x @ p["w"], floor) @ p["v"]
  auto = fp.auto_mask(net, PARAMS, X)
  (group,) = auto.groups
  variables = {**PARAMS, "masks": {group.name: VARIABLES["masks"]["m"]}}
  small = fp.compact(auto.apply, variables, X)
  assert small.variables["w"].shape == (3, 3)
  np.testing.assert_allclose(small(small.variables, X), jax.jit(auto.apply)(variables, X), rtol=1e-5)
