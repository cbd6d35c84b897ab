"""Loops under ``vmap`` that end at another turn for every example: the condition is a vector there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 3)))
MASK = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])


def until_small(w, c):
  """One example: how many turns it takes hangs on its values."""

  def run(y):
    start = (y @ w * c, jnp.int32(0), y)
    turn = lambda s: (s[0] * 0.5 + 0.01 * jnp.tanh(s[0]) * c, s[1] + 1, s[2])
    value, turns, rest = lax.while_loop(lambda s: jnp.sum(jnp.abs(s[0])) > 0.5, turn, start)
    return value, turns, rest

  return run


def network(v, x):
  value, turns, rest = jax.vmap(until_small(v["params"]["w"], v["masks"]["m"]))(x)
  return value @ v["params"]["out"], turns, rest


def nested(v, x):
  """Two axes of examples, one outside of the other."""
  run = jax.vmap(jax.vmap(until_small(v["params"]["w"], v["masks"]["m"])))
  value, turns, _ = run(jnp.stack([x, 2 * x], axis=1))
  return value @ v["params"]["out"], turns


def conjugate_gradients(v, x):
  y = x @ v["params"]["w"] * v["masks"]["m"]
  grams = (
    jnp.eye(2) + jnp.einsum("nc,nd,c->ndc", y[:, :2], y[:, 1:3], v["params"]["out"][:2, 0])[..., :2] * 0.1
  )
  grams = grams @ jnp.swapaxes(grams, 1, 2)
  solve = lambda a, b: jax.scipy.sparse.linalg.cg(lambda x: a @ x, b, maxiter=5)[0]
  return jax.vmap(solve)(grams, y[:, 3:]) + jnp.sum(y, 1, keepdims=True)


@pytest.mark.parametrize("apply", [network, nested, conjugate_gradients])
def test_the_compact_loop_ends_where_each_example_does(apply):
  params = {"w": jnp.asarray(RNG.normal(size=(3, 5))), "out": jnp.asarray(RNG.normal(size=(5, 2)))}
  variables = {"params": params, "masks": {"m": MASK}}
  small = fp.compact(apply, variables, X)
  for scale in (0.1, 1.0, 30.0):
    found, expected = small(small.variables, scale * X), apply(variables, scale * X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  if apply is not conjugate_gradients:
    assert small.variables["params"]["w"].shape == (3, 3)
    assert np.unique(apply(variables, X)[1]).size > 1, "all examples end at one turn"
  tangents = [jax.jvp(lambda x, f=f, v=v: f(v, x), (X,), (jnp.ones_like(X),))[1][0] for f, v in (
    (apply, variables), (small, small.variables))]  # fmt: skip
  np.testing.assert_allclose(*tangents, rtol=1e-4, atol=1e-6)
  cost = fp.cost_model(apply, variables, X)
  assert small.cost == float(cost(variables["masks"])) > 0
