"""Stacks of layers of one width stay loops when they are compacted; others are unrolled. Both are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp

LAYERS, WIDTH, HIDDEN = 6, 8, 16


def params(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}
  return {name: jnp.asarray(rng.normal(size=shape) / 4) for name, shape in shapes.items()}


def network(reverse=False, index=False):
  def apply(v, x):
    def layer(x, own):
      p, mask = own
      h = fp.apply_mask(jnp.tanh(x @ p["up"]), mask)
      # Picked by position: which features that are hangs on the layer's own mask.
      more = h[:, jnp.array([0, 3, 5])].sum(-1, keepdims=True) if index else 0.0
      return x + h @ p["down"] + more, h.sum(-1)

    return jax.lax.scan(layer, x, (v["params"], v["masks"]["m"]), reverse=reverse)

  return apply


def masks(widths, seed=0, alike=False):
  rng, m = np.random.default_rng(seed), np.zeros((LAYERS, HIDDEN))
  order = rng.permutation(HIDDEN)
  for at, width in enumerate(widths):
    m[at, (order if alike else rng.permutation(HIDDEN))[:width]] = 1
  return {"m": jnp.asarray(m)}


def primitives(jaxpr):
  names = []
  for eqn in jaxpr.eqns:
    inner = [part for part in eqn.params.values() if hasattr(part, "eqns")]
    names += [
      eqn.primitive.name,
      *(name for part in inner for name in primitives(getattr(part, "jaxpr", part))),
    ]
  return names


CASES = {
  "one width": (network(), masks([5] * LAYERS), True),
  "all features": (network(), masks([HIDDEN] * LAYERS), True),
  "backwards": (network(reverse=True), masks([5] * LAYERS), True),
  "none left": (network(), masks([0] * LAYERS), True),
  "other widths": (network(), masks([3, 4, 5, 6, 7, 8]), False),
  "other widths, backwards": (network(reverse=True), masks([3, 4, 5, 6, 7, 8]), False),
  "the same features, picked": (network(index=True), masks([9] * LAYERS, alike=True), True),
  "other features, picked": (network(index=True), masks([9] * LAYERS), False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loop_stays_one_where_all_turns_are_alike(case, x64):
  apply, drawn, stays = CASES[case]
  variables = {"params": params(), "masks": drawn}
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, WIDTH)))
  small = fp.compact(apply, variables, x)
  found = primitives(jax.make_jaxpr(small)(small.variables, x).jaxpr)
  assert ("scan" in found) == stays
  if stays:
    assert found.count("tanh") <= 1  # one body, whatever the number of layers

  def with_gradients(call, rest, x):
    loss = lambda rest, x: sum(jnp.sum(jnp.sin(y + 1)) for y in jax.tree.leaves(call(rest, x)))
    return call(rest, x), jax.grad(loss, argnums=(0, 1))(rest, x)

  outs, (d_params, d_x) = with_gradients(lambda p, x: apply({"params": p, "masks": drawn}, x), params(), x)
  own_outs, (own_params, own_x) = with_gradients(small, small.variables, x)
  expected = (outs, small.shrink(d_params), d_x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
    (own_outs, own_params["params"], own_x),
    expected,
  )
  y = jnp.asarray(np.random.default_rng(2).normal(size=(5, WIDTH)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
    small(small.variables, y),
    apply(variables, y),
  )


PLACES = jnp.array([0, 3, 5])


def picked(h):
  return h[:, PLACES].sum(-1, keepdims=True)


def with_own_jvp():
  call = jax.custom_jvp(lambda h: picked(h))
  call.defjvp(lambda primals, tangents: (picked(*primals), picked(*tangents)))
  return call


def with_own_vjp():
  call = jax.custom_vjp(lambda h: picked(h))
  backward = lambda zeros, g: (zeros.at[:, PLACES].add(g),)
  call.defvjp(lambda h: (picked(h), jnp.zeros_like(h)), backward)
  return call


def counted(h):
  step = lambda state: (state[0] + 1, state[1] + picked(h))
  return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, jnp.zeros((len(h), 1))))[1]


INSIDE = {
  "jit": jax.jit(picked),
  "checkpoint": jax.checkpoint(picked),
  "custom_jvp": with_own_jvp(),
  "custom_vjp": with_own_vjp(),
  "cond": lambda h: jax.lax.cond(h.sum() > -1e9, picked, lambda h: 0 * picked(h), h),
  "while": counted,
  "vmap": lambda h: jax.vmap(lambda row: row[PLACES].sum(keepdims=True))(h),
}


@pytest.mark.parametrize("way", INSIDE)
def test_turns_that_differ_by_a_constant_inside_are_told_apart(way, x64):
  """Each layer keeps one of the places, as the first, second or third of its features: programs of one text."""

  def apply(v, x):
    def layer(x, own):
      p, mask = own
      h = fp.apply_mask(jnp.tanh(x @ p["up"]), mask)
      return x + h @ p["down"] + INSIDE[way](h), None

    return jax.lax.scan(layer, x, (v["params"], v["masks"]["m"]))[0]

  drawn, others = np.zeros((LAYERS, HIDDEN)), np.setdiff1d(np.arange(HIDDEN), PLACES)
  for at, row in enumerate(drawn):
    row[[PLACES[at % 3], *np.random.default_rng(at).permutation(others)[:8]]] = 1
  variables = {"params": params(), "masks": {"m": jnp.asarray(drawn)}}
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, WIDTH)))
  small = fp.compact(apply, variables, x)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-10, atol=1e-12)


def test_turns_that_differ_in_the_middle_of_a_long_constant_are_told_apart(x64):
  """Text shows the ends of a long array alone."""
  width, rng = 3000, np.random.default_rng(0)
  order = jnp.asarray(rng.permutation(width))
  drawn = np.ones((3, width))
  drawn[[0, 1, 2], order[1400:1430:10]] = 0
  variables = {
    "params": {"up": jnp.asarray(rng.normal(size=(3, 2, width))), "w": jnp.asarray(rng.normal(size=width))},
    "masks": {"m": jnp.asarray(drawn)},
  }

  def apply(v, x):
    def layer(x, own):
      h = fp.apply_mask(jnp.tanh(x @ own[0]), own[1])
      return x + (h[:, order] * v["params"]["w"]).sum(-1, keepdims=True) / width, None

    return jax.lax.scan(layer, x, (v["params"]["up"], v["masks"]["m"]))[0]

  x = jnp.asarray(rng.normal(size=(2, 2)))
  small = fp.compact(apply, variables, x)
  assert small.variables["params"]["up"].shape == (3, 2, width - 1)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-10)
  assert "scan" not in primitives(jax.make_jaxpr(small)(small.variables, x).jaxpr)


def test_pruned_with_uniform_nothing_is_padded():
  apply = network()
  variables = {"params": params(), "masks": masks([HIDDEN] * LAYERS)}
  x = jnp.ones((3, WIDTH))
  cost = fp.cost_model(apply, variables, x)
  importance = {"m": jnp.asarray(np.random.default_rng(3).uniform(0.1, 1, (LAYERS, HIDDEN)))}
  pruned = fp.select_masks(cost, importance, 0.5 * cost.dense, tie=["m"])
  small = fp.compact(apply, {**variables, "masks": pruned}, x)
  held = sum(leaf.size for leaf in jax.tree.leaves(small.variables))
  params_ = fp.cost_model(apply, variables, x, measure="params")
  assert held == params_.exact(pruned)
  assert "scan" in primitives(jax.make_jaxpr(small)(small.variables, x).jaxpr)
  ragged = fp.select_masks(cost, importance, 0.5 * cost.dense)
  unrolled = fp.compact(apply, {**variables, "masks": ragged}, x)
  assert "scan" not in primitives(jax.make_jaxpr(unrolled)(unrolled.variables, x).jaxpr)
