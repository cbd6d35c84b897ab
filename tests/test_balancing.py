"""The balanced basis of linear bottlenecks: the same network, where leaving out the last features costs the least."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from fisherprune_jax._graph.variables import VariableTree
from fisherprune_jax._reconstruction.balancing import balanced
from fisherprune_jax._reconstruction.fitting import Fit
from tests.fuzz import run_seed
from tests.fuzz_auto import find

KEY = jax.random.key(0)
B, T, D, H, W = 6, 5, 8, 2, 3


def normal(seed, *shape):
  return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def in_balance(apply_fn, variables, *args, more=()):
  fit = Fit(apply_fn, VariableTree(variables, "masks"), [args, *more])
  return balanced(fit.traced[0], variables, fit.compiled)


def attention(params, x, turn=lambda q: q, bend=lambda v: v, tied=False):
  """Attention with ``H`` heads of queries and keys ``(D, H, W)`` and values of another size."""
  q, k, v = (jnp.einsum("btd,dhw->bthw", x, params[name]) + params[name + "_bias"] for name in "qkv")
  k = q if tied else k
  weights = jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", turn(q), turn(k)) / W**0.5)
  return jnp.einsum("bhts,bshw->bthw", weights, bend(v)).reshape(*x.shape[:2], -1) @ params["o"]


def parameters():
  made = {name: normal(at, D, H, w) for at, (name, w) in enumerate([("q", W), ("k", W), ("v", 4)])}
  made |= {f"{name}_bias": normal(5, *made[name].shape[1:]) for name in "qkv"}
  return {**made, "o": normal(6, H * 4, D)}


def balanced_params(fn, params, x):
  auto = fp.auto_mask(fn, {"params": params}, x)
  return in_balance(auto.apply, auto.variables, x)["params"]


def names(before, after):
  """The parameters that differ."""
  return {name for name in before if not np.array_equal(before[name], after[name])}


def test_heads_are_balanced_one_by_one():
  params, x = parameters(), normal(9, B, T, D)
  found = balanced_params(lambda v, x: attention(v["params"], x), params, x)
  assert names(params, found) == {"q", "k", "v", "o", "q_bias", "k_bias", "v_bias"}
  np.testing.assert_allclose(
    attention(found, x), attention(params, x), atol=1e-5 * float(jnp.abs(attention(params, x)).max())
  )
  q, k = (jnp.einsum("btd,dhw->bthw", x, found[name]) + found[name + "_bias"] for name in "qk")
  for head in range(H):
    squares = [y[:, :, head].reshape(-1, W).T @ y[:, :, head].reshape(-1, W) for y in (q, k)]
    np.testing.assert_allclose(squares[0], squares[1], rtol=1e-3, atol=1e-3 * float(squares[0].max()))
    size = np.diagonal(squares[0])
    np.testing.assert_allclose(squares[0], np.diag(size), atol=1e-3 * size.max())
    assert (np.diff(size) < 0).all()


def test_no_other_features_cost_less_to_leave_out():
  """What the first features of a product of two matrices hold is the best approximation of their number (Eckart, Young)."""
  x, a, b = normal(0, 40, 7), normal(1, 7, 5), normal(2, 5, 6)
  found = balanced_params(lambda v, x: x @ v["params"]["a"] @ v["params"]["b"], {"a": a, "b": b}, x)
  assert names({"a": a, "b": b}, found) == {"a", "b"}
  values = np.linalg.svd(x @ a @ b)[1]
  for left in range(1, 5):
    error = x @ found["a"][:, :left] @ found["b"][:left] - x @ a @ b
    np.testing.assert_allclose(np.linalg.norm(error), np.linalg.norm(values[left:]), rtol=1e-3)


def rotary(y):
  """Turns pairs of features by angles of their position."""
  angle = jnp.arange(T, dtype=jnp.float32)[:, None, None]
  first, second = y[..., :1], y[..., 1:2]
  turned = [
    first * jnp.cos(angle) - second * jnp.sin(angle),
    first * jnp.sin(angle) + second * jnp.cos(angle),
  ]
  return jnp.concatenate([*turned, y[..., 2:]], -1)


BENT = {
  "rotary queries": (lambda v, x: attention(v["params"], x, turn=rotary), {"v", "v_bias", "o"}),
  "normed queries": (
    lambda v, x: attention(v["params"], x, turn=lambda q: q / (1 + jnp.abs(q))),
    {"v", "v_bias", "o"},
  ),
  "scaled values": (
    lambda v, x: attention(v["params"], x, bend=lambda y: y * jnp.arange(1.0, 5.0)),
    {"q", "q_bias", "k", "k_bias"},
  ),
  "bent values": (
    lambda v, x: attention(v["params"], x, bend=jax.nn.relu),
    {"q", "q_bias", "k", "k_bias"},
  ),
  "equal queries and keys": (lambda v, x: attention(v["params"], x, tied=True), {"v", "v_bias", "o"}),
  "read twice": (
    lambda v, x: attention(v["params"], x) + (x @ v["params"]["v"].reshape(D, -1)) ** 2,
    {"q", "q_bias", "k", "k_bias"},
  ),
}


@pytest.mark.parametrize("name", BENT)
def test_features_that_are_bent_between_stay(name):
  fn, expected = BENT[name]
  params, x = parameters(), normal(9, B, T, D)
  found = balanced_params(fn, params, x)
  assert names(params, found) == expected
  before, after = (fn({"params": p}, x) for p in (params, found))
  np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.abs(before).max()))


def test_gated_units_stay():
  def gated(variables, x):
    p = variables["params"]
    return (jax.nn.gelu(x @ p["up"]) * (x @ p["gate"])) @ p["down"]

  params = {"up": normal(0, D, 12), "gate": normal(1, D, 12), "down": normal(2, 12, D)}
  assert not names(params, balanced_params(gated, params, normal(9, B, D)))


def test_values_that_heads_share():
  """Values of one head that two read: one basis. Queries of several heads that meet one key in one product stay."""

  def shared(variables, x):
    p = variables["params"]
    q = jnp.einsum("btd,dhw->bthw", x, p["q"])
    k, v = (x @ p[name] for name in "kv")
    weights = jax.nn.softmax(jnp.einsum("bthw,bsw->bhts", q, k))
    return jnp.einsum("bhts,bsw->bthw", weights, v).reshape(*x.shape[:2], -1) @ p["o"]

  params = {"q": normal(0, D, H, W), "k": normal(1, D, W), "v": normal(2, D, 4), "o": normal(3, H * 4, D)}
  x = normal(9, B, T, D)
  found = balanced_params(shared, params, x)
  assert names(params, found) == {"v", "o"}
  before, after = (shared({"params": p}, x) for p in (params, found))
  np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.abs(before).max()))


class Layer(nn.Module):
  """A layer of a stack, of attention with masks of the model itself."""

  @nn.compact
  def __call__(self, x, _):
    q, k = (nn.DenseGeneral((H, W))(x) for _ in range(2))
    weights = jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", fp.Mask()(q), k))
    v = jnp.einsum("bhts,bshw->bthw", weights, nn.DenseGeneral((H, 4))(x))
    return x + nn.DenseGeneral(D, axis=(-2, -1))(fp.Mask()(v)), None


def test_stacked_layers_with_masks_of_their_own():
  split = {"params": True}
  model = nn.scan(Layer, {"params": 0, "masks": 0}, split_rngs=split, length=3)()
  x = normal(9, B, T, D)
  variables = model.init(KEY, x, None)

  def apply(variables, x):
    return model.apply(variables, x, None)[0]

  found = in_balance(apply, variables, x)
  kernels = {name: leaf["kernel"] for name, leaf in variables["params"].items()}
  others = {name: leaf["kernel"] for name, leaf in found["params"].items()}
  assert len(kernels) == 4
  for name, kernel in kernels.items():  # every layer of every kernel
    assert all(not np.array_equal(a, b) for a, b in zip(kernel, others[name], strict=True)), name
  before, after = (apply(v, x) for v in (variables, found))
  np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.abs(before).max()))


@pytest.mark.parametrize("compute", [jnp.bfloat16, jnp.float32])
def test_half_precision_and_placement(compute):
  x = normal(9, B, T, D).astype(compute)
  params = jax.device_put(jax.tree.map(lambda y: y.astype(jnp.bfloat16), parameters()), jax.devices()[0])

  def fn(variables, x):
    return attention(jax.tree.map(lambda y: y.astype(compute), variables["params"]), x)

  found = balanced_params(fn, params, x)
  assert {"q", "k", "v", "o"} <= names(params, found)
  assert jax.tree.map(lambda y: (y.dtype, y.shape), found) == jax.tree.map(
    lambda y: (y.dtype, y.shape), params
  )
  assert all(y.committed for y in found.values())
  before, after = (fn({"params": p}, x).astype(jnp.float32) for p in (params, found))
  assert float(jnp.linalg.norm(after - before)) <= 0.02 * float(jnp.linalg.norm(before))


def test_fused_queries_keys_and_values():
  def fn(variables, x):
    p = variables["params"]
    q, k, v = jnp.moveaxis((x @ p["qkv"] + p["bias"]).reshape(*x.shape[:2], 3, H, W), 2, 0)
    weights = jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", q, k))
    return jnp.einsum("bhts,bshw->bthw", weights, v).reshape(*x.shape[:2], -1) @ p["o"]

  params = {"qkv": normal(0, D, 3 * H * W), "bias": normal(1, 3 * H * W), "o": normal(2, H * W, D)}
  x = normal(9, B, T, D)
  found = balanced_params(fn, params, x)
  changed = np.any(found["qkv"] != params["qkv"], 0).reshape(3, H, W)
  assert changed.all()
  assert names(params, found) == {"qkv", "bias", "o"}
  before, after = (fn({"params": p}, x) for p in (params, found))
  np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.abs(before).max()))


def read_too(p, x, scale):
  """Queries that a norm reads besides, in an output that another one dwarfs."""
  logits = jnp.concatenate([attention(p, x).sum((1, 2))[:, None], jnp.full((len(x), 1), scale)], -1)
  return logits, jax.nn.relu(jnp.einsum("btd,dhw->bthw", x, p["q"])).sum((1, 2, 3))


HIDDEN = {
  "large outputs": ("q", lambda p, x, m: read_too(p, x, -1e30)),
  "integers": ("q", lambda p, x, m: jnp.int32(100 * read_too(p, x, 0.0)[1])),
  "a branch": (
    "q",
    lambda p, x, m: jax.lax.cond(
      jnp.any(m > 0), lambda: read_too(p, x, 0.0)[1], lambda: attention(p, x).sum((1, 2))
    ),
  ),
  "a small part": ("v", lambda p, x, m: 1e6 * x + attention(p, x, bend=lambda v: v + 1e-3)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_differences_that_calibration_would_not_show(name):
  stays, run = HIDDEN[name]
  params, x = {**parameters(), "q_bias": jnp.zeros((H, W))}, normal(9, B, T, D)

  def fn(variables, x, m):
    return run(variables["params"], x, m)

  auto = fp.auto_mask(fn, {"params": params}, x, jnp.zeros(B))
  found = in_balance(auto.apply, auto.variables, x, jnp.zeros(B))["params"]
  for m in (jnp.zeros(B), jnp.ones(B)):
    before, after = (jax.tree.leaves(fn({"params": p}, x, m)) for p in (params, found))
    for a, b in zip(before, after, strict=True):
      np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))
  assert stays not in names(params, found)


def test_a_bias_that_two_products_share():
  def fn(variables, x):
    p = variables["params"]
    return (x @ p["w"] + x @ p["a"] @ p["b"] + p["bias"]) @ p["o"]

  params = {
    "w": normal(0, D, 6),
    "a": normal(1, D, 2),
    "b": normal(2, 2, 6),
    "bias": 1e-3 * normal(3, 6),
    "o": normal(4, 6, D),
  }
  x = normal(9, 40, D)
  found = balanced_params(fn, params, x)
  assert names(params, found) == set(params)
  zero = jnp.zeros((1, D))
  np.testing.assert_allclose(fn({"params": found}, zero), fn({"params": params}, zero), rtol=1e-3, atol=1e-6)


def test_batches_that_are_not_finite_and_sequences_without_keys():
  def plain(variables, x, y):
    p = variables["params"]
    return jnp.einsum("btw,bsw->bts", x @ p["q"], y @ p["k"])

  params = {"q": normal(0, D, W), "k": normal(1, D, W)}
  x, y = normal(8, B, T, D), normal(9, B, T, D)
  auto = fp.auto_mask(plain, {"params": params}, x, y)
  bad, none = (x.at[0].set(jnp.nan), y), (x, y[:, :0])
  for first, second in ((bad, (x, y)), ((x, y), bad), (none, (x, y)), (((x * 1e25), y), (x, y))):
    found = in_balance(auto.apply, auto.variables, *first, more=[second])["params"]
    assert all(np.isfinite(leaf).all() for leaf in found.values())
    before, after = (plain({"params": p}, x, y) for p in (params, found))
    np.testing.assert_allclose(after, before, atol=1e-4 * float(jnp.abs(before).max()))


def test_features_that_are_zero():
  """Dead features stay finite, and are the last ones."""
  params, x = parameters(), normal(9, B, T, D)
  for name in ("q", "q_bias", "v", "v_bias"):
    params[name] = params[name].at[..., 0].set(0)

  def fn(variables, x):
    return attention(variables["params"], x)

  found = balanced_params(fn, params, x)
  assert all(np.isfinite(leaf).all() for leaf in found.values())
  before, after = (fn({"params": p}, x) for p in (params, found))
  np.testing.assert_allclose(after, before, atol=1e-4 * float(jnp.abs(before).max()))
  cut = {**found, "q": found["q"].at[..., -1].set(0), "q_bias": found["q_bias"].at[..., -1].set(0)}
  np.testing.assert_allclose(fn({"params": cut}, x), before, atol=1e-2 * float(jnp.abs(before).max()))


def test_one_shot_leaves_few_features_of_a_product_of_low_rank():
  """Heads whose values have rank one in directions of their own: one feature of each head is left, and nothing is lost."""
  params, x = parameters(), normal(9, 64, T, D)
  params["v"] = jnp.einsum("dh,hw->dhw", normal(20, D, H), normal(21, H, 4))
  params["v_bias"] = jnp.zeros((H, 4))
  pruner = fp.Pruner(lambda v, x: attention(v["params"], x), {"params": params}, x, keep=0.68)
  fitted, masks = pruner.one_shot(params, [x[:32], x[32:]])
  (values,) = [mask for mask in masks.values() if mask.shape == (4,)]
  assert values.sum() == 1
  dense = attention(params, x)
  assert float(jnp.linalg.norm(pruner.apply(fitted, masks, x) - dense)) < 0.02 * float(jnp.linalg.norm(dense))


def check_same(net, other):
  found = find(net, other)
  variables, x = found.variables, net.batch(net.shape[0])
  variables = {**variables, "masks": jax.tree.map(jnp.ones_like, variables["masks"])}
  before, after = (found(v, x) for v in (variables, in_balance(found, variables, x)))
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    if jnp.issubdtype(a.dtype, jnp.floating):
      np.testing.assert_allclose(b, a, atol=1e-3 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("seed", range(7000, 7008))
def test_random_networks(seed):
  run_seed(seed, check_same)
