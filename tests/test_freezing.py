"""The serving form: the outputs of the masked network, from arrays that are computed once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import fisherprune_jax as fp
from tests.auto_models import UNMASKED
from tests.models import CASES, random_masks
from tests.test_auto_models import setup

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")


def count(variables):
  """The number of parameters; tables of constants are none."""
  return sum(x.size for name in variables if name != "constants" for x in jax.tree.leaves(variables[name]))


def agree(a, b, tolerance):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


def frozen(apply, variables, *args, tolerance=1e-10):
  """The frozen compact network, after a comparison with the masked one, at two batch sizes where that can be had."""
  small = fp.compact(apply, variables, *args, freeze=True)
  plain = fp.compact(apply, variables, *args)
  more = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), args)
  agree(small(small.variables, *args), apply(variables, *args), tolerance)
  try:
    expected = apply(variables, *more)
  except TypeError:  # a model with its batch size inside
    expected = None
  if expected is not None:
    agree(small(small.variables, *more), expected, tolerance)
  assert small.cost <= plain.cost
  assert count(small.variables) <= count(plain.variables)
  return small, plain


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_computes_what_the_masked_network_does(case, x64):
  variables = case.variables(0, jnp.float64)
  variables["masks"] = random_masks(variables["masks"], 0)
  x = case.inputs(0, jnp.float64)
  apply = case.module().apply
  if case.independent:
    frozen(apply, variables, x)
  else:
    small = fp.compact(apply, variables, x, freeze=True)
    agree(small(small.variables, x), apply(variables, x), 1e-10)


@pytest.mark.parametrize("name", UNMASKED)
def test_it_computes_what_a_network_with_automatic_masks_does(name, x64):
  found = setup(name)
  variables = {**found.variables, "masks": found.masks}
  small = fp.compact(found.auto.apply, variables, *found.args, freeze=True)
  agree(small(small.variables, *found.args), found.auto.apply(variables, *found.args), 1e-9)
  assert small.cost <= found.small.cost
  assert count(small.variables) <= count(found.small.variables)


def standardized(w):
  mean = w.mean(tuple(range(w.ndim - 1)))
  return (w - mean) * jax.lax.rsqrt(w.var(tuple(range(w.ndim - 1))) + 1e-6)


def pruned(apply, variables, *args, keep=0.5, **options):
  """A network with automatic masks, of which a random half is masked."""
  auto = fp.auto_mask(apply, variables, *args, **options)
  rng = np.random.default_rng(0)

  def draw(mask):
    row = rng.permuted(np.arange(mask.shape[-1]) < keep * mask.shape[-1])
    return jnp.asarray(np.broadcast_to(row, mask.shape), jnp.float32)

  return auto.apply, {**auto.variables, "masks": jax.tree.map(draw, auto.masks)}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


def test_standardized_weights_shrink_where_they_stayed_whole():
  def apply(v, x):
    for name in ("a", "b"):
      x = jax.nn.relu(x @ standardized(v[name]))
    return x @ v["out"]

  variables = {"a": normal(0, 8, 16), "b": normal(1, 16, 12), "out": normal(2, 12, 3)}
  network, masked = pruned(apply, variables, normal(3, 4, 8))
  small, plain = frozen(network, masked, normal(3, 4, 8), tolerance=1e-5)
  assert plain.variables["b"].shape == (16, 6)
  assert {name: x.shape for name, x in small.variables.items()} == {
    "a": (8, 8),
    "b": (8, 6),
    "out": (6, 3),
  }
  assert not small.blockers


class Block(nn.Module):
  """Convolution, batch norm, layer scale."""

  features: int

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv")(x)
    x = nn.BatchNorm(use_running_average=True, name="norm")(x)
    return x * self.param("gamma", nn.initializers.normal(1.0), (self.features,))


class Images(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(Block(8, name="stem")(x))
    for at in range(2):
      x = nn.relu(x + Block(8, name=f"block{at}")(x))
    return nn.Dense(3, name="head")(x.mean((1, 2)))


def randomized(variables, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype), variables)


@pytest.fixture(scope="module")
def images():
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  variables = randomized(Images().init(jax.random.key(1), x))
  return *pruned(Images().apply, variables, x), x


def test_batch_norm_and_layer_scale_are_folded(images):
  network, variables, x = images
  small, plain = frozen(network, variables, x, tolerance=1e-5)
  block = small.variables["params"]["block0"]
  assert sorted(block) == ["conv"]
  assert {name: leaf.ndim for name, leaf in block["conv"].items()} == {"kernel": 4, "bias": 1}
  assert "batch_stats" not in small.variables
  text = str(jax.make_jaxpr(small)(small.variables, x))
  assert " mul" not in text
  assert " rsqrt" not in text
  assert small.dense == plain.dense


def test_files_and_exported_programs_hold_the_serving_form(images, tmp_path):
  pytest.importorskip("safetensors")
  network, variables, x = images
  small = fp.compact(network, variables, x, freeze=True)
  small.save(tmp_path / "small.safetensors")
  fp.compact(network, variables, x).save(tmp_path / "plain.safetensors")
  loaded = fp.load(tmp_path / "small.safetensors")
  more = jnp.concatenate([x, x])
  expected = network(variables, more)
  agree(loaded(loaded.variables, more), expected, 1e-4)
  agree(small.export(x).call(more), expected, 1e-4)
  assert (tmp_path / "small.safetensors").stat().st_size < (tmp_path / "plain.safetensors").stat().st_size


def test_layers_under_a_scan_are_folded_one_by_one():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      h = nn.Dense(16, name="up")(x)
      h = nn.BatchNorm(use_running_average=True, name="norm")(h)
      kernel = standardized(self.param("down", nn.initializers.normal(1.0), (16, 8)))
      return x + nn.relu(h) @ kernel, None

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes = {"params": 0, "batch_stats": 0}
      layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
      return layers(name="layers")(x, None)[0]

  x = normal(0, 4, 8)
  variables = randomized(Network().init(jax.random.key(0), x))
  variables["params"]["layers"]["down"] = jax.random.normal(jax.random.key(1), (3, 16, 8))
  network, masked = pruned(Network().apply, variables, x)
  small, _ = frozen(network, masked, x, tolerance=1e-4)
  assert jax.tree.map(jnp.shape, small.variables) == {
    "params": {"layers": {"up": {"kernel": (3, 8, 8), "bias": (3, 8)}, "down": (3, 8, 8)}}
  }
  assert "scan" in str(jax.make_jaxpr(small)(small.variables, x))


def test_spectral_norm_and_queries_are_computed_once():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.SpectralNorm(nn.Dense(16, name="first"), name="norm")(x, update_stats=False)
      keys = nn.Dense(6, name="keys")(nn.relu(h))
      query = nn.Dense(6, name="query")(self.param("query_input", nn.initializers.normal(1.0), (5, 4)))
      scores = jnp.einsum("qd,btd->bqt", query, keys)
      return jax.nn.softmax(scores) @ keys

  x = jax.random.normal(jax.random.key(0), (2, 7, 3))
  variables = randomized(Network().init(jax.random.key(1), x))
  network, masked = pruned(Network().apply, variables, x)
  small, _ = frozen(network, masked, x, tolerance=1e-4)
  params = small.variables["params"]
  assert sorted(params) == ["first", "keys", "query", "query_input"] or sorted(params) == [
    "first",
    "keys",
    "query",
  ]
  assert "batch_stats" not in small.variables


def test_tables_of_angles_are_stored_once():
  def apply(v, x):
    at = jnp.arange(x.shape[1])[:, None] * 0.01 ** jnp.linspace(0, 1, 4)
    h = (x @ v["w"]).reshape(*x.shape[:2], 2, 4)
    return (h * jnp.cos(at)[None, :, None] + h[..., ::-1] * jnp.sin(at)[None, :, None]).sum(2)

  x = jax.random.normal(jax.random.key(0), (2, 7, 3))
  variables = {"w": normal(1, 3, 8)}
  masked = {"params": variables, "masks": {"m": jnp.array([1.0, 0.0, 1.0])}}
  network = lambda v, x: apply(v["params"], fp.apply_mask(x, v["masks"]["m"]))
  small, _ = frozen(network, masked, x, tolerance=1e-5)
  assert sorted(x.shape for x in jax.tree.leaves(small.variables["constants"])) == [(7, 4), (7, 4)]
  text = str(jax.make_jaxpr(small)(small.variables, x))
  assert " cos" not in text
  with pytest.raises(
    ValueError, match=r"shapes that it was frozen with, but for the batch size.*freeze another one"
  ):
    small(small.variables, x[:, :5])


@pytest.mark.parametrize("op", ["x * s + t", "t - x * s", "(x - t) / s", "t - (t - x) * s", "x + t + t"])
def test_affine_maps_in_any_order(op):
  def apply(v, x):
    h = jnp.einsum("bthi,hij->bhtj", x, v["w"])
    return eval(op, {"x": h, "s": v["s"][:, None], "t": v["t"][:, None]}) @ v["out"]

  v = {"w": normal(0, 2, 3, 5), "s": 1 + normal(1, 2, 5) ** 2, "t": normal(2, 2, 5), "out": normal(3, 5, 2)}
  x = jax.random.normal(jax.random.key(4), (2, 7, 2, 3))
  network, masked = pruned(apply, v, x)
  small, _ = frozen(network, masked, x, tolerance=1e-5)
  assert sorted(small.variables) == ["bias", "out", "w"]


def test_half_precision_keeps_its_dtypes():
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), jnp.bfloat16)
  variables = randomized(Images().init(jax.random.key(1), x))
  variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  network, masked = pruned(Images().apply, variables, x)
  small = fp.compact(network, masked, x, freeze=True)
  assert {leaf.dtype for leaf in jax.tree.leaves(small.variables)} == {jnp.dtype(jnp.bfloat16)}
  found, expected = small(small.variables, x), network(masked, x)
  assert found.dtype == expected.dtype
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), masked)
  reference = network(exact, x.astype(jnp.float32))
  error, rounding = (np.abs(np.asarray(y, np.float32) - reference).max() for y in (found, expected))
  assert error < 2 * rounding + 1e-2


def test_masks_anywhere_and_kept_masks(images):
  apply = lambda v, x: (x @ v["layer"]["w"] * v["layer"]["mask"]) @ v["out"]
  variables = {
    "layer": {"w": normal(0, 3, 4), "mask": jnp.array([1.0, 0.0, 1.0, 1.0])},
    "out": normal(1, 4, 2),
  }
  x = normal(2, 2, 3)
  options = {"masks": lambda path: getattr(path[-1], "key", "") == "mask"}
  small = fp.compact(apply, variables, x, freeze=True, **options)
  agree(small(small.variables, x), apply(variables, x), 1e-5)
  network, masked, x = images
  kept = fp.compact(network, masked, x, freeze=True, keep_masks=True)
  agree(kept(kept.variables, x), network(masked, x), 1e-4)
  assert all(mask.all() for mask in jax.tree.leaves(kept.variables["masks"]))


def test_bad_input_is_refused(images):
  network, variables, x = images
  shapes = jax.eval_shape(lambda: variables["params"])
  with pytest.raises(ValueError, match=r"freeze=True needs arrays as variables.*params/block0/conv/kernel"):
    fp.compact(network, {**variables, "params": shapes}, x, freeze=True)
  with pytest.raises(ValueError, match=r"freeze=True .* state_from must be None"):
    fp.compact(network, variables, x, freeze=True, state_from=lambda out: out)
  small = fp.compact(network, variables, x, freeze=True)
  with pytest.raises(ValueError, match="A tree to shrink must have the structure"):
    small.shrink(variables["params"])


def test_prints_are_dropped_and_callbacks_run():
  seen = []

  def note(y):
    seen.append(y.shape)
    return np.float32(0)

  def apply(v, x):
    w = standardized(v["w"])
    jax.debug.print("shift {}", v["shift"])
    zero = io_callback(note, jax.ShapeDtypeStruct((), jnp.float32), v["shift"])
    return jnp.tanh(x @ w) @ v["out"] + zero

  x = normal(2, 4, 8)
  network, masked = pruned(apply, {"w": normal(0, 8, 6), "out": normal(1, 6, 2), "shift": jnp.ones(2)}, x)
  expected = network(masked, x)
  small = fp.compact(network, masked, x, freeze=True)
  seen.clear()
  agree(small(small.variables, x), expected, 1e-5)
  assert seen == [(2,)]


def nested(v, x):
  def inner(h, w):
    return h + jnp.tanh(h @ standardized(w["a"]) * w["s"] + w["t"]) @ w["b"], None

  def outer(h, w):
    return jax.lax.scan(inner, h, w)[0], None

  return jax.lax.scan(outer, x, v)[0]


def shared(v, x):
  def body(h, s):
    return h + jnp.tanh(h @ standardized(v["a"]) * s) @ v["b"], None

  return jax.lax.scan(body, x, v["s"])[0]


def backwards(v, x):
  h, ys = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), h @ standardized(w)), x, v["w"], reverse=True)
  return jnp.tanh((h + ys.sum(0)) @ v["a"]) @ v["b"]


@pytest.mark.parametrize(
  ("apply", "shapes", "left"),
  [
    (
      nested,
      {"a": (2, 3, 6, 8), "b": (2, 3, 8, 6), "s": (2, 3, 8), "t": (2, 3, 8)},
      {"a": (2, 3, 6, 4), "b": (2, 3, 4, 6), "bias": (2, 3, 4)},
    ),
    (shared, {"a": (6, 8), "b": (8, 6), "s": (3, 8)}, {"a": (3, 6, 4), "b": (4, 6)}),
    (
      backwards,
      {"w": (3, 6, 6), "a": (6, 8), "b": (8, 2)},
      {"w": (3, 6, 6), "w_2": (3, 6, 6), "a": (6, 4), "b": (4, 2)},
    ),
  ],
)
def test_loops_in_loops_shared_kernels_and_loops_that_run_backwards(apply, shapes, left):
  variables = {name: 0.4 * normal(at, *shape) for at, (name, shape) in enumerate(shapes.items())}
  x = normal(9, 3, 6)
  network, masked = pruned(apply, variables, x)
  small = fp.compact(network, masked, x, freeze=True)
  for data in (x, jnp.concatenate([x, x[:1]])):
    agree(small(small.variables, data), network(masked, data), 1e-4)
  assert jax.tree.map(jnp.shape, small.variables) == left
  found = jax.grad(lambda x: jnp.sum(jnp.sin(small(small.variables, x))))(x)
  agree(found, jax.grad(lambda x: jnp.sum(jnp.sin(network(masked, x))))(x), 1e-4)
