"""Stacks of layers that are computed with before the loop over them shrink as those that the loop reads as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp
from tests.fuzz_exactness import OF_STACKS

MASK = np.array([[0, 0, 1, 1, 0, 1], [1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]], np.float32)
LAYERS, HIDDEN = MASK.shape
SHAPES = {"w": (LAYERS, 4, HIDDEN), "v": (LAYERS, HIDDEN, 4), "scale": (LAYERS, 1, HIDDEN), "row": (HIDDEN,)}
SHAPES |= {"left": (LAYERS, 4, 2), "right": (LAYERS, 2, HIDDEN)}
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
X = RNG.normal(size=(2, 4))

pytestmark = pytest.mark.usefixtures("x64")


def network(kind, backwards=False):
  def run(variables, x):
    p = variables["params"]

    def layer(h, each):
      ours, theirs, mask = each
      return h + (jnp.tanh(h @ ours) * mask) @ theirs, None

    kernels = OF_STACKS[kind](p["w"], p)
    return lax.scan(layer, x, (kernels, p["v"], variables["masks"]["m"]), reverse=backwards)[0]

  return run


def variables(kind, mask=MASK):
  needs = {"scaled": ["scale"], "shared row": ["row"], "low rank": ["left", "right"]}.get(kind, [])
  return {
    "params": {name: jnp.asarray(PARAMS[name]) for name in ("w", "v", *needs)},
    "masks": {"m": jnp.asarray(mask)},
  }


def gradients(fn, params, x):
  return jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, x))))(params)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("kind", OF_STACKS)
def test_each_layer_keeps_its_own_features(kind, backwards, freeze):
  fn, given = network(kind, backwards), variables(kind)
  small = fp.compact(fn, given, X, freeze=freeze)
  np.testing.assert_allclose(small(small.variables, X), fn(given, X), rtol=1e-6)
  widest = int(MASK.sum(1).max())
  if not freeze:
    needs_all = kind == "summed too"  # its sum over layers reads all that any layer keeps
    union = int(MASK.any(0).sum())
    assert small.variables["params"]["w"].shape == (LAYERS, 4, union if needs_all else widest)
  assert small.variables["params"]["v"].shape == (LAYERS, widest, 4)
  assert not small.blockers


@pytest.mark.parametrize("kind", ["cast", "scaled", "low rank", "backwards"])
def test_gradients_optimizer_states_and_another_compaction(kind):
  fn, given = network(kind), variables(kind)
  masks = given["masks"]
  small = fp.compact(fn, given, X)
  expected = small.shrink(gradients(lambda p, x: fn({"params": p, "masks": masks}, x), given["params"], X))
  found = gradients(lambda p, x: small({**small.variables, "params": p}, x), small.variables["params"], X)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)
  again = fp.compact(fn, {**given, "masks": {"m": jnp.asarray(MASK * MASK[::-1])}}, X)
  assert again.cost < small.cost


def test_equal_layers_stay_a_loop():
  mask = np.tile(MASK[:1], (LAYERS, 1))
  for kind in ("cast", "scaled", "low rank"):
    small = fp.compact(network(kind), variables(kind, mask), X)
    assert "scan[" in str(jax.make_jaxpr(small)(small.variables, X))


def test_half_of_the_layers():
  """A loop over some of the layers demands nothing of the others."""

  def fn(given, x):
    p, mask = given["params"], given["masks"]["m"]
    layer = lambda h, each: (h + (jnp.tanh(h @ each[0]) * each[2]) @ each[1], None)
    for part in (slice(0, 1), slice(1, 3)):
      x, _ = lax.scan(layer, x, (p["w"].astype(jnp.bfloat16)[part].astype(x.dtype), p["v"][part], mask[part]))
    return x

  small = fp.compact(fn, variables("cast"), X)
  np.testing.assert_allclose(small(small.variables, X), fn(variables("cast"), X), rtol=1e-6)
  assert small.variables["params"]["w"].shape == (LAYERS, 4, 3)


def test_mixed_precision_with_automatic_masks():
  def fn(params, x):
    layer = lambda h, w: (h + jnp.tanh(h @ w["w"]) @ w["v"], None)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    return lax.scan(layer, x.astype(jnp.bfloat16), half)[0].astype(jnp.float32)

  params = {name: jnp.asarray(PARAMS[name], jnp.float32) for name in ("w", "v")}
  auto = fp.auto_mask(fn, params, X)
  (group,) = auto.groups
  assert group.rows == (LAYERS,)
  masked = {"params": params, "masks": {group.name: jnp.asarray(MASK)}}
  cost = auto.cost(measure="params")
  assert cost.exact(masked["masks"]) == 8 * MASK.sum()
  small = auto.compact(masked)
  assert jax.tree.map(jnp.shape, small.variables["params"]) == {"w": (LAYERS, 4, 3), "v": (LAYERS, 3, 4)}
  np.testing.assert_allclose(small(small.variables, X), auto.apply(masked, X), rtol=0.03, atol=0.03)


def repeated_while(f, v, x):
  return lax.while_loop(lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, f(v, carry[1])), (0, x))[1]


def in_iterations(f, v, x):
  return lax.scan(lambda h, y: (f(v, h) + y, jnp.sum(h)), x, jnp.stack([x, 2 * x]))[0]


def under_a_rule(f, v, x):
  run = jax.custom_jvp(f)
  run.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
  return run(v, x)


AROUND = {
  "remat": lambda f, v, x: jax.checkpoint(f)(v, x),
  "remat twice": lambda f, v, x: jax.checkpoint(lambda v, x: jax.checkpoint(f)(v, x) + x)(v, x),
  "counted loop": lambda f, v, x: lax.fori_loop(0, 2, lambda _, h: f(v, h), x),
  "while": repeated_while,
  "scan": in_iterations,
  "scan of remat": lambda f, v, x: in_iterations(jax.checkpoint(f), v, x),
  "cond": lambda f, v, x: lax.cond(x.sum() > 0, lambda x: f(v, x), lambda x: 2 * f(v, 0.5 * x), x),
  "vmap": lambda f, v, x: jax.vmap(lambda one: f(v, one[None])[0])(x),
  "jit": lambda f, v, x: jax.jit(f)(v, x),
  "rule": under_a_rule,
}


@pytest.mark.parametrize("kind", ["plain", "cast", "backwards"])
@pytest.mark.parametrize("around", AROUND)
def test_the_loop_over_layers_may_be_inside_of_others(around, kind):
  def fn(v, x):
    return AROUND[around](network(kind), v, x)

  given = variables(kind)
  masks = given["masks"]
  small = fp.compact(fn, given, X)
  np.testing.assert_allclose(small(small.variables, X), fn(given, X), rtol=1e-9)
  if around != "while":  # JAX has no reverse mode for it
    expected = small.shrink(gradients(lambda p, x: fn({"params": p, "masks": masks}, x), given["params"], X))
    found = gradients(lambda p, x: small({"params": p}, x), small.variables["params"], X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), found, expected)
  # A derivative rule of the whole loop needs what any layer keeps.
  widest = int(MASK.any(0).sum() if around == "rule" else MASK.sum(1).max())
  assert small.variables["params"]["w"].shape == (LAYERS, 4, widest)
  assert small.variables["params"]["v"].shape == (LAYERS, widest, 4)
  assert fp.cost_model(fn, given, X).exact(masks) == round(small.cost * len(X))
  frozen = fp.compact(fn, given, X, freeze=True)
  np.testing.assert_allclose(frozen(frozen.variables, X), fn(given, X), rtol=1e-9)


@pytest.mark.parametrize("around", ["remat", "scan", "while"])
def test_equal_layers_stay_a_loop_inside_of_others(around):
  def fn(v, x):
    return AROUND[around](network("cast"), v, x)

  rows = np.asarray([np.roll(MASK[0], at) for at in range(LAYERS)])
  small = fp.compact(fn, variables("cast", rows), X)
  np.testing.assert_allclose(small(small.variables, X), fn(variables("cast", rows), X), rtol=1e-9)
  assert small.variables["params"]["w"].shape == (LAYERS, 4, 3)
  jaxpr = str(jax.make_jaxpr(small)(small.variables, X))
  assert f"length={LAYERS}" in jaxpr
