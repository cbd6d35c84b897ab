"""int8 weights with scales: networks that are pruned and then quantised, and networks that are quantised and then pruned."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp

X = jax.random.normal(jax.random.key(0), (8, 6, 6, 2))


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (3, 3))(x))
    x = nn.relu(nn.Conv(12, (3, 3), strides=2)(x))
    x = nn.tanh(nn.Dense(16)(x.reshape(x.shape[0], -1)))
    return nn.Dense(3)(x)


class Stack:
  """Layers in a loop, which dequantises each layer's kernels inside."""

  def init(self, key, x):
    keys = iter(jax.random.split(key, 4))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])
    layers = {
      "up": {"kernel": normal(3, 12, 16), "bias": jnp.zeros((3, 16))},
      "down": {"kernel": normal(3, 16, 12)},
    }
    return {
      "params": {"first": {"kernel": normal(72, 12)}, "layers": layers, "last": {"kernel": normal(12, 3)}}
    }

  def apply(self, variables, x):
    def layer(x, p):
      p = dequantise(p)
      return x + nn.gelu(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"], None

    p = variables["params"]
    x, _ = jax.lax.scan(layer, x.reshape(x.shape[0], -1) @ dequantise(p["first"])["kernel"], p["layers"])
    return x @ dequantise(p["last"])["kernel"]


def scale_of(w, axes):
  scale = jnp.max(jnp.abs(w), axis=axes, keepdims=True) / 127
  return jnp.where(scale > 0, scale, 1)


def per_output(w):
  """A scale for each output channel, with as many axes as the kernel."""
  scale = scale_of(w, tuple(range(w.ndim - 1)))
  return {"int8": jnp.round(w / scale).astype(jnp.int8), "scale": scale}


def per_channel(w):
  found = per_output(w)
  return {**found, "scale": found["scale"].reshape(-1)}


def per_input(w):
  scale = scale_of(w, (-1,))
  return {"int8": jnp.round(w / scale).astype(jnp.int8), "scale": scale}


def per_tensor(w):
  scale = scale_of(w, tuple(range(w.ndim)))
  return {"int8": jnp.round(w / scale).astype(jnp.int8), "scale": jnp.squeeze(scale)}


def with_zero_point(w):
  """Not symmetric: zero is a number of its own for each output channel."""
  axes = tuple(range(w.ndim - 1))
  low, high = jnp.min(w, axes), jnp.max(w, axes)
  scale = (high - low) / 255
  zero = jnp.round(-128 - low / scale).astype(jnp.int32)
  return {
    "int8": jnp.clip(jnp.round(w / scale) + zero, -128, 127).astype(jnp.int8),
    "scale": scale,
    "zero": zero,
  }


def is_quantised(node):
  return isinstance(node, dict) and "int8" in node


def quantise(tree, way=per_channel):
  def of(path, w):
    names = jax.tree_util.keystr(path)
    if "kernel" not in names:
      return w
    return jax.vmap(way)(w) if "layers" in names else way(w)  # a stack has the kernels of several layers

  return jax.tree_util.tree_map_with_path(of, tree)


def dequantise(tree):
  def of(w):
    return (w["int8"].astype(jnp.float32) - w.get("zero", 0)) * w["scale"] if is_quantised(w) else w

  return jax.tree.map(of, tree, is_leaf=is_quantised)


def apply_of(model):
  """The function of quantised variables."""
  return (
    model.apply if isinstance(model, Stack) else lambda variables, x: model.apply(dequantise(variables), x)
  )


@functools.cache
def network(make):
  model = make()
  variables = model.init(jax.random.key(1), X)
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape).astype(np.float32), variables)


def some_masks(masks, keep=0.6):
  rng = np.random.default_rng(3)

  def of(mask):
    row = np.arange(mask.shape[-1]) < max(1, int(keep * mask.shape[-1]))
    rows = rng.permuted(np.broadcast_to(row, mask.shape), axis=-1)
    return jnp.asarray(rows, jnp.float32)

  return jax.tree.map(of, masks)


def bytes_of(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("make", "way"),
  [
    (Net, per_channel),
    (Net, per_input),
    (Net, per_tensor),
    (Net, with_zero_point),
    (Stack, per_channel),
    (Stack, per_input),
  ],
)
def test_a_quantised_network_shrinks_with_its_scales_and_outputs_stay(make, way):
  model, variables = network(make)
  given, apply = quantise(variables, way), apply_of(model)
  floats = fp.auto_mask(model.apply, variables, X)
  auto = fp.auto_mask(apply, given, X)
  assert [group.size for group in auto.groups] == [group.size for group in floats.groups]
  for group in auto.groups:
    assert any(path.endswith("int8") for path, _ in group.members)
    assert any(path.endswith("scale") for path, _ in group.members) or way is per_tensor
  masks = some_masks(auto.masks)
  small = auto.compact({**given, "masks": masks})
  masked = auto.apply({**given, "masks": masks}, X)
  np.testing.assert_allclose(small(small.variables, X), masked, atol=1e-5)
  assert small.blockers == []
  as_floats = floats.compact({**variables, "masks": dict(zip(floats.masks, masks.values(), strict=True))})
  for node, kernel in zip(
    jax.tree.leaves(small.variables, is_leaf=is_quantised), jax.tree.leaves(as_floats.variables), strict=True
  ):
    if is_quantised(node):
      assert node["int8"].dtype == jnp.int8
      assert node["int8"].shape == kernel.shape
  memory = auto.cost("memory")
  assert memory.exact(masks) == bytes_of(small.variables)


@pytest.mark.parametrize("method", ["outputs", "fisher", "taylor"])
def test_importance_with_int8_parameters(method):
  """They are not differentiated: importance equals that of float parameters of the same values."""
  model, variables = network(Net)
  given, apply = quantise(variables), apply_of(model)
  auto = fp.auto_mask(apply, given, X)

  def of(params):
    def outputs(p, masks, x):
      return auto.apply({**quantised(p), "masks": masks}, x)

    def quantised(p):
      return jax.tree.map(lambda a, b: a.astype(b.dtype), p, given)

    def loss(p, masks, x):
      return jnp.mean(jnp.sum(outputs(p, masks, x) ** 2, -1))

    how = {} if method == "outputs" else {"cost": auto.cost()}
    return fp.estimate_importance(
      outputs if method == "outputs" else loss, params, auto.masks, [X], method=method, **how
    )

  floats = jax.tree.map(lambda w: w.astype(jnp.float32), given)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), of(given), of(floats))


def test_one_shot_of_an_int8_network():
  model, variables = network(Net)
  given, apply = quantise(variables), apply_of(model)
  pruner = fp.Pruner(apply, given, X, keep=0.5)
  params, masks = pruner.one_shot(given, [X], reconstruct=False)
  small = pruner.compact(params, masks)
  assert small.cost <= 0.5 * pruner.cost.dense
  np.testing.assert_allclose(
    small(small.variables, X), pruner.auto.apply({**params, "masks": masks}, X), atol=1e-5
  )
  with pytest.warns(UserWarning, match="left these products as they are"):
    refitted, again = pruner.one_shot(given, [X])
  assert {leaf.dtype for leaf in jax.tree.leaves(refitted)} == {leaf.dtype for leaf in jax.tree.leaves(given)}
  assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(masks)))


def test_products_of_int8_with_scales_behind_them():
  """Scales of the activations are fixed, those of the weights multiply the int32 result; masks are in the model."""
  rng = np.random.default_rng(0)
  sizes = (72, 20, 24, 3)
  given = [per_channel(jnp.asarray(rng.normal(size=s), jnp.float32)) for s in itertools.pairwise(sizes)]

  def apply(variables, x):
    x = x.reshape(x.shape[0], -1)
    for layer, mask in zip(variables["layers"], (None, *variables["masks"].values()), strict=True):
      x = x if mask is None else fp.apply_mask(x, mask)
      rounded = jnp.clip(jnp.round(x * 30), -127, 127).astype(jnp.int8)
      product = jax.lax.dot(rounded, layer["int8"], preferred_element_type=jnp.int32)
      x = jnp.tanh(product * layer["scale"] / 300)
    return x

  masks = some_masks({"a": jnp.ones(20), "b": jnp.ones(24)})
  variables = {"layers": given, "masks": masks}
  small = fp.compact(apply, variables, X, strict=True)
  np.testing.assert_allclose(small(small.variables, X), apply(variables, X), atol=1e-6)
  assert sorted(leaf.shape for leaf in jax.tree.leaves(small.variables) if leaf.dtype == jnp.int8) == [
    (12, 14),
    (14, 3),
    (72, 12),
  ]


def test_importance_of_a_quantised_network_is_that_of_its_floats():
  model, variables = network(Net)
  given = quantise(variables)
  auto = fp.auto_mask(lambda v, x: model.apply(dequantise(v), x), given, X)
  floats = fp.auto_mask(model.apply, dequantise(given), X)
  found = fp.estimate_importance(
    lambda _, masks, x: auto.apply({**given, "masks": masks}, x), {}, auto.masks, [X], method="outputs"
  )
  expected = fp.estimate_importance(
    lambda params, masks, x: floats.apply({"params": params, "masks": masks}, x),
    dequantise(given)["params"],
    floats.masks,
    [X],
    method="outputs",
  )
  for a, b in zip(found.values(), expected.values(), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)
  cost = auto.cost()
  masks = fp.select_masks(cost, found, 0.4 * cost.dense)
  assert auto.compact({**given, "masks": masks}).cost <= 0.4 * cost.dense


@pytest.mark.parametrize("make", [Net, Stack])
def test_a_pruned_network_is_quantised_in_one_file(make, tmp_path):
  safetensors = pytest.importorskip("safetensors.numpy")
  model, variables = network(make)
  pruner = fp.Pruner(model.apply, variables, X, keep=0.5)
  small = pruner.compact(variables["params"], some_masks(pruner.cost.masks))
  light = quantise(small.variables, per_output)

  def apply(variables, x):
    return small(dequantise(variables), x)

  expected = small(small.variables, X)
  found = apply(light, X)
  assert jnp.linalg.norm(found - expected) < 0.03 * jnp.linalg.norm(expected)
  kernels = [node for node in jax.tree.leaves(light, is_leaf=is_quantised) if is_quantised(node)]
  weights = sum(node["int8"].size for node in kernels)
  scales = sum(node["scale"].size for node in kernels)
  assert bytes_of(light) == bytes_of(small.variables) - 3 * weights + 4 * scales
  assert bytes_of(light) < 0.25 * bytes_of(variables)
  files = [
    len(safetensors.save({str(at): np.asarray(leaf) for at, leaf in enumerate(jax.tree.leaves(tree))}))
    for tree in (light, small.variables)
  ]
  assert files[0] < 0.5 * files[1]
  auto = fp.auto_mask(apply, light, X)
  whole = auto.compact(auto.variables)
  whole.save(tmp_path / "int8.safetensors")
  loaded = fp.load(tmp_path / "int8.safetensors")
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, light)
  np.testing.assert_allclose(loaded(loaded.variables, X), found, atol=1e-5)


def test_scales_train_while_the_network_is_pruned_to_the_end():
  """int8 kernels in a collection of their own: scales and biases are parameters."""
  model, variables = network(Net)
  given = quantise(variables)["params"]
  is_int8 = lambda leaf: leaf.dtype == jnp.int8
  parts = {
    "params": jax.tree.map(lambda leaf: None if is_int8(leaf) else leaf, given),
    "int8": jax.tree.map(lambda leaf: leaf if is_int8(leaf) else None, given),
  }

  def apply(variables, x):
    merge = lambda a, b: b if a is None else a
    params = jax.tree.map(merge, variables["params"], variables["int8"], is_leaf=lambda leaf: leaf is None)
    return model.apply(dequantise({"params": params}), x)

  pruner = fp.Pruner(apply, parts, X, keep=0.5, stop=4)
  tx = pruner.wrap(optax.adam(1e-3))

  def loss_fn(params, kernels, x):
    return jnp.mean(jnp.square(apply({"params": params, "int8": kernels}, x)))

  @jax.jit
  def step(params, state):
    _, grads = pruner.value_and_grad(loss_fn)(params, state, parts["int8"], X)
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  params, state = parts["params"], tx.init(parts["params"])
  for _ in range(6):
    params, state = step(params, state)
  small = pruner.compact({**parts, "params": params}, state)
  assert small.cost <= 0.5 * pruner.cost.dense
  masked = pruner.apply({**parts, "params": params}, state, X)
  np.testing.assert_allclose(small(small.variables, X), masked, atol=1e-5)


def test_qwix_arrays_shrink_too():
  qwix = pytest.importorskip("qwix")
  model, variables = network(Net)
  of = lambda w: qwix.quantize(w, jnp.int8, channelwise_axes=(w.ndim - 1,)) if w.ndim > 1 else w
  given = jax.tree.map(of, variables)
  is_array = lambda node: isinstance(node, qwix.QArray)

  def apply(variables, x):
    floats = jax.tree.map(lambda w: qwix.dequantize(w) if is_array(w) else w, variables, is_leaf=is_array)
    return model.apply(floats, x)

  auto = fp.auto_mask(apply, given, X)
  masks = some_masks(auto.masks)
  small = auto.compact({**given, "masks": masks})
  kernel = small.variables["params"]["Conv_1"]["kernel"]
  assert is_array(kernel)
  assert kernel.qvalue.shape[-1] == kernel.scale.size == 7
  np.testing.assert_allclose(small(small.variables, X), auto.apply({**given, "masks": masks}, X), atol=1e-5)
