"""Where examples lie: costs per example whatever the layout, per call where there are none, and errors that say so."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisherprune_jax as fp

W, MASK = jnp.ones((3, 4)), jnp.array([1.0, 0.0, 1.0, 0.0])
VARIABLES = {"params": {"w": W}, "masks": {"m": MASK}}
PER_EXAMPLE = 4 * 5 + 4  # a dense layer of 3 to 4 and its activation


def layer(variables, x):
  return jnp.tanh(x @ variables["params"]["w"]) * variables["masks"]["m"]


def noisy(variables, key, x):
  return layer(variables, x) + jax.random.normal(key, ())


def graph(variables, nodes, edges):
  """Nodes of several graphs in one array."""
  return jax.ops.segment_sum(layer(variables, nodes)[edges[:, 0]], edges[:, 1], nodes.shape[0])


X = jnp.ones((8, 3))
SEQUENCES = jnp.ones((5, 8, 3))
KEYS = {"typed": jax.random.key(0), "raw": jax.random.PRNGKey(0)}


@pytest.mark.parametrize(
  ("apply", "args", "axes", "expected"),
  [
    pytest.param(layer, (X,), 0, PER_EXAMPLE, id="batch first"),
    pytest.param(layer, (X,), -2, PER_EXAMPLE, id="from behind"),
    pytest.param(layer, (X,), (0,), PER_EXAMPLE, id="one for each"),
    pytest.param(layer, (X,), [0], PER_EXAMPLE, id="a list"),
    pytest.param(layer, (SEQUENCES,), 1, 5 * PER_EXAMPLE, id="time-major"),
    pytest.param(layer, (X,), None, 8 * PER_EXAMPLE, id="per call"),
    # and two operations on each index that might be negative
    pytest.param(graph, (X, jnp.zeros((6, 2), int)), None, 8 * PER_EXAMPLE + 6 * 4 + 12, id="a graph"),
    pytest.param(
      lambda v, batch: layer(v, batch["x"]) + batch["shift"],
      ({"shift": jnp.ones(4), "x": X},),
      ({"shift": None, "x": 0},),
      PER_EXAMPLE + 4,
      id="a tree of axes",
    ),
  ],
)  # fmt: skip
def test_the_cost_is_per_example_wherever_examples_lie(apply, args, axes, expected):
  cost = fp.cost_model(apply, VARIABLES, *args, batch_axes=axes)
  assert cost.dense == expected
  small = fp.compact(apply, VARIABLES, *args, batch_axes=axes)
  assert small.cost == float(cost(VARIABLES["masks"])) < cost.dense
  np.testing.assert_allclose(small(small.variables, *args), apply(VARIABLES, *args), rtol=1e-6)


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_may_come_first(kind):
  costs = [
    fp.cost_model(noisy, VARIABLES, KEYS[kind], jnp.ones((n, 3)), batch_axes=(None, 0), primitives=("tanh",)).dense
    for n in (1, 8)
  ]  # fmt: skip
  assert costs == [4, 4]
  with pytest.raises(ValueError, match=r"must lead with the example axis.*batch_axes=\(None, 0\)"):
    fp.cost_model(noisy, VARIABLES, KEYS[kind], X)
  with pytest.raises(ValueError, match=r"must lead with the example axis.*batch_axes=\(None, 0\)"):
    fp.compact(noisy, VARIABLES, KEYS[kind], X)


def test_a_pair_of_integers_is_no_key():
  apply = lambda v, ids: v["params"]["w"][ids] * v["masks"]["m"] + 1.0
  assert fp.cost_model(apply, VARIABLES, jnp.zeros(2, jnp.uint32), primitives=("add",)).dense == 4


@pytest.mark.parametrize(
  ("args", "axes", "message"),
  [
    ((), 0, r"got no argument with one.*x\[None\].*batch_axes=\(None, 0\).*per call"),
    ((jnp.float32(1),), 0, r"got axis 0 of float32\[\]"),
    ((X,), 2, r"got axis 2 of float32\[8, 3\]"),
    ((X,), -3, r"got axis -3 of float32\[8, 3\]"),
    ((jnp.ones((0, 3)),), 0, "at least one example, got 0"),
    ((X, SEQUENCES), (0, 0), r"must have one length, got \[8, 5\] with batch_axes=\(0, 0\).*None"),
    ((X, X), (0,), r"batch_axes must fit the arguments like jax.vmap's in_axes, got \(0,\) for 2"),
    ((X, X), (0, "first"), r"batch_axes must hold integers or None, got \(0, 'first'\)"),
    ((X,), 0.5, r"batch_axes must hold integers or None, got 0.5"),
  ],
)
def test_what_does_not_fit_is_said_with_the_way_out(args, axes, message):
  for build in (fp.cost_model, fp.compact):
    with pytest.raises(ValueError, match=message):
      build(lambda v, *xs: layer(v, X), VARIABLES, *args, batch_axes=axes)


def test_without_an_example_axis_a_call_without_arguments_has_a_cost():
  apply = lambda v: v["params"]["w"] * v["masks"]["m"]
  assert fp.cost_model(apply, VARIABLES, batch_axes=None).dense == 0  # it hangs on variables alone


def test_a_target_is_per_example_too():
  cost = fp.cost_model(layer, VARIABLES, SEQUENCES, batch_axes=1)
  assert cost.exceeds(cost.masks, 5 * PER_EXAMPLE - 1)
  assert not cost.exceeds(cost.masks, 5 * PER_EXAMPLE)


def test_modules_of_nnx_take_it_as_well():
  model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), fp.nnx.Mask(4, batch_axis=1))
  assert fp.nnx.cost_model(model, SEQUENCES, batch_axes=1).dense == 5 * (4 * 5 + 4)
  assert fp.nnx.cost_model(model, SEQUENCES, batch_axes=None).dense == 8 * 5 * (4 * 5 + 4)
  model.layers[1].mask[...] = MASK
  small = fp.nnx.compact(model, SEQUENCES, batch_axes=1)
  assert small.cost == 5 * (2 * 5 + 2)


def test_linen_with_time_first():
  model = nn.Sequential([nn.Dense(4), fp.Mask(batch_axis=1), nn.Dense(2)])
  variables = model.init(jax.random.key(0), SEQUENCES)
  first = fp.cost_model(model.apply, variables, SEQUENCES, batch_axes=1)
  assert first.dense == fp.cost_model(model.apply, variables, jnp.ones((3, 5, 3))).dense
  masks = {"layers_1": {"mask": MASK}}
  drops = first.per_feature(masks)["layers_1"]["mask"]
  small = fp.compact(model.apply, variables | {"masks": masks}, SEQUENCES, batch_axes=1)
  assert small.cost == float(first(masks))
  np.testing.assert_allclose(drops, jnp.array([5 * (6 + 4), 0, 5 * (6 + 4), 0]))
  assert small.export(SEQUENCES).call(jnp.ones((5, 3, 3))).shape == (5, 3, 2)
