"""Masks that act on several axes together, followed by what picks from, cuts up, joins or updates these axes.

The truth is numerical: which slices of the parameters have a gradient, for random parameters and arguments.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp

TABLE = np.array([[2, 0], [0, 2]])
ALIVE = {"six": "011010", "one": "1", "two": "01", "three": "011", "four": "0110"}
MASKS = {name: jnp.array([float(bit) for bit in bits]) for name, bits in ALIVE.items()}


def flat(x):
  return x.reshape(x.shape[0], -1)


def grid_then_table(p, m, x):
  x = x.reshape(3, 2, 1, 4)
  x = (x.reshape(3, 2, 4) * (m["one"][:, None] * m["four"]).reshape(-1)).reshape(x.shape)
  x = jnp.take(x, TABLE, axis=3) * m["two"][:, None]
  return jnp.sum(flat(x).reshape(-1, 2, 4) * p["w"], 1)


def merged_then_updated(p, m, x):
  start = jnp.sum(x)
  x = jax.nn.softmax(x, 2) * m["three"][:, None]
  xs = jnp.moveaxis(x.reshape(2, 15, 2), 1, 0)
  sums = lax.scan(lambda h, one: (jnp.tanh(h + one), jnp.sum(one)), xs[0], xs)[1]
  y = jnp.tanh(sums)
  at = jnp.where(start > 0, 7, 0)
  y = y.at[0:4].set(jnp.sin(lax.dynamic_slice_in_dim(y, at, 4, 0)))
  return (y @ p["w"])[None]


def of_six(f, width):
  """Six features under a mask, seen as two rows of three."""
  return (lambda p, m, x: flat(f((x * m["six"]).reshape(-1, 2, 3), x)) @ p["w"]), (3, 6), (width, 2)


def in_a_scan(p, m, x):
  return lax.scan(lambda c, row: (c + 1.0, jnp.take(row * m["six"], TABLE).reshape(-1) @ p["w"]), 0.0, x)[1]


def before_the_mask(p, m, x):
  y = jnp.sin(x * p["w"]).reshape(3, 2, 3)
  y = jnp.concatenate([y[:, :, 1:], y[:, :, :1]], 2)
  return flat(y * m["six"].reshape(2, 3))


def joint_sum(p, m, x):
  return jnp.einsum("bij,ijk->bk", (x * m["six"]).reshape(3, 2, 3), p["w"].reshape(2, 3, 2))


CASES = {
  "grid, then table": (grid_then_table, (3, 8), (2, 4)),
  "merged, then updated": (merged_then_updated, (2, 5, 3, 2), (15, 3)),
  "strided": of_six(lambda y, x: y[:, :, ::2], 4),
  "reversed": of_six(lambda y, x: y[:, ::-1], 6),
  "rolled": of_six(lambda y, x: jnp.roll(y, 1, 2), 6),
  "padded": of_six(lambda y, x: jnp.pad(y, ((0, 0), (1, 1), (0, 0))), 12),
  "joined": of_six(lambda y, x: jnp.concatenate([y, jnp.sin(y[:, ::-1])], 2), 12),
  "taken, repeated": of_six(lambda y, x: y[:, :, np.array([2, 0, 2])], 6),
  "taken alone": of_six(lambda y, x: jnp.take(y, 1, axis=2), 2),
  "taken by pairs": of_six(lambda y, x: y[:, np.array([0, 1, 0]), np.array([0, 1, 2])], 3),
  "a window set": of_six(lambda y, x: y.at[:, 0:1, 1:3].set(x[:, None, :2]), 6),
  "a list set": of_six(lambda y, x: flat(y).at[:, np.array([4, 1])].set(x[:, :2]), 6),
  "one set": of_six(lambda y, x: flat(y).at[:, 3].set(x[:, 0]), 6),
  "updated": of_six(lambda y, x: lax.dynamic_update_slice(flat(y), jnp.sin(x[:, :2]), (0, 2)), 6),
  "summed": of_six(lambda y, x: y[:, :, 1:].sum(1), 2),
  "in a scan": (in_a_scan, (3, 6), (4, 2)),
  "before the mask": (before_the_mask, (3, 6), (6,)),
  "a sum over both": (joint_sum, (3, 6), (6, 2)),
}
READS = {"grid, then table": ["one", "two", "four"], "merged, then updated": ["three"]}


@pytest.mark.parametrize("name", CASES)
def test_all_that_joint_masks_remove_is_removed(name):
  function, shape, weights = CASES[name]
  rng = np.random.default_rng(0)
  draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  apply = lambda variables, x: function(variables["params"], variables["masks"], x)
  masks = {mask: MASKS[mask] for mask in READS.get(name, ["six"])}
  variables, x = {"params": {"w": draw(weights)}, "masks": masks}, draw(shape)
  gradient = jax.jit(
    jax.grad(lambda w, x: jnp.sum(jnp.sin(1 + apply({"params": {"w": w}, "masks": masks}, x))))
  )
  matters = np.any([np.asarray(gradient(draw(weights), draw(shape))) != 0 for _ in range(8)], 0)
  small = fp.compact(apply, variables, x)
  for axis, kept in enumerate(small.variables["params"]["w"].shape):
    assert kept == np.moveaxis(matters, axis, 0).reshape(weights[axis], -1).any(1).sum()
  assert not any(blocker.holds for blocker in small.blockers)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-5, atol=1e-6)


PADS = [
  ((1, 0), (0, 0)),
  ((0, 2), (0, 0)),
  ((0, 0), (1, 1)),
  ((1, 0), (0, 1)),
  ((0, 0), (-1, 2)),
  ((2, 1), (-1, 0)),
]


@pytest.mark.parametrize("fill", [0.0, 0.7])
@pytest.mark.parametrize("inside", [0, 1])
@pytest.mark.parametrize("pads", PADS)
def test_a_filling_beside_joint_axes_is_not_masked(pads, inside, fill, x64):
  """What is padded in along one axis is there for all entries of the other."""
  rng = np.random.default_rng(0)
  config = [(0, 0, 0), *((low, high, inside) for low, high in pads)]
  padded = jax.eval_shape(lambda x: lax.pad(x, 0.0, config), jax.ShapeDtypeStruct((1, 3, 2), float)).shape
  params = {
    "w": rng.normal(size=(3, 6)),
    "o": rng.normal(size=(padded[2], 4)),
    "p": rng.normal(size=(padded[1], 2)),
  }

  def network(variables, x):
    p = variables["params"]
    h = (jnp.tanh(x @ p["w"]) * variables["masks"]).reshape(-1, 3, 2)
    h = lax.pad(h, fill, config)
    return jnp.einsum("btc,tk->bkc", jnp.tanh(h @ p["o"]), p["p"])

  x = rng.normal(size=(5, 3))
  for mask in ([1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0], [0] * 6):
    variables = {"params": params, "masks": np.asarray(mask, float)}
    small = fp.compact(network, variables, x)
    np.testing.assert_allclose(small(small.variables, x), network(variables, x), atol=1e-12)
    cost = fp.cost_model(network, variables, x)
    assert cost.exact(variables["masks"]) == round(small.cost * len(x))
