"""The report and ``strict`` against a slow truth: which slices of the variables have a gradient under the masks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from tests.models import CASES, random_masks

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)


class Chain(nn.Module):
  """Layers one after the other; functions among them are called on what came before."""

  steps: tuple

  @nn.compact
  def __call__(self, x):
    for at, step in enumerate(self.steps):
      x = fp.Mask(name=f"mask_{at}")(x) if step == "mask" else nn.Dense(step, name=f"dense_{at}")(x) if isinstance(step, int) else step(x)  # fmt: skip
    return x


def pruned(*steps, x=X, seed=0):
  model = Chain(steps)
  variables = model.init(jax.random.key(0), x)
  masks = random_masks(variables["masks"], seed, 0.5)
  return model.apply, {**variables, "masks": masks}, x


def rms(x):
  return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 0.1)


BEFORE = {
  "layer norm": (lambda x: nn.LayerNorm(name="norm")(x), "reduce_sum", "norm"),
  "rms norm": (rms, "reduce_sum", ""),
  "group norm": (lambda x: nn.GroupNorm(num_groups=2, name="norm")(x), "reduce_sum", "norm"),
  "softmax": (jax.nn.softmax, "reduce", ""),
  "maximum": (lambda x: x - jnp.max(x, -1, keepdims=True), "reduce_max", ""),
  "sort": (lambda x: jnp.sort(x, -1), "sort", ""),
  "cumulative sum": (lambda x: jnp.cumsum(x, -1), "cumsum", ""),
  "norm of a vector": (lambda x: x / (1 + jnp.linalg.norm(x, axis=-1, keepdims=True)), "reduce_sum", ""),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_sees_all_features_before_their_mask_is_named(name):
  use, primitive, layer = BEFORE[name]
  apply, variables, x = pruned(8, use, nn.relu, "mask", 2)
  alive = int(variables["masks"]["mask_3"]["mask"].sum())
  small = fp.compact(apply, variables, x)
  assert small.variables["params"]["dense_0"]["kernel"].shape == (5, 8)
  held = {(h.path, h.axis): (h.kept, h.allowed, b) for b in small.blockers for h in b.holds}
  kept, allowed, blocker = held["params/dense_0/kernel", 1]
  assert (kept, allowed) == (8, alive)
  assert primitive in blocker.primitive
  assert layer in blocker.layer
  assert "test_report.py" in blocker.where
  assert blocker.flops > 0
  assert f"params/dense_0/kernel axis 1: 8 stay where masks allow {alive}" in small.report()
  for build in (fp.cost_model, fp.compact):
    with pytest.raises(ValueError, match=r"strict=True(.|\n)*params/dense_0/kernel axis 1"):
      build(apply, variables, x, strict=True)


AFTER = {
  "exp": jnp.exp,
  "shift": lambda x: x + 1.0,
  "sigmoid": nn.sigmoid,
  "a bias": lambda x: nn.Dense(8, name="own")(jnp.zeros_like(x)) + x,
  "softmax": jax.nn.softmax,
  "layer norm": lambda x: nn.LayerNorm(name="norm")(x),
  "the sign of zero": lambda x: jnp.copysign(1.0, x),
}


@pytest.mark.parametrize("name", AFTER)
def test_what_brings_dead_features_to_life_is_named(name):
  apply, variables, x = pruned(8, "mask", AFTER[name], 2)
  small = fp.compact(apply, variables, x)
  held = {(h.path, h.axis): h for b in small.blockers for h in b.holds}
  alive = int(variables["masks"]["mask_1"]["mask"].sum())
  assert held["params/dense_3/kernel", 0][2:] == (8, alive)
  assert "test_report.py" in small.blockers[0].where
  with pytest.raises(ValueError, match="strict=True"):
    fp.compact(apply, variables, x, strict=True)


def test_an_output_that_is_masked_only_where_it_is_read():
  class Cached(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.relu(nn.Dense(8)(x))
      return nn.Dense(2)(fp.Mask()(h)), h

  model = Cached()
  variables = model.init(jax.random.key(0), X)
  variables = {**variables, "masks": random_masks(variables["masks"], 0, 0.5)}
  small = fp.compact(model.apply, variables, X)
  (blocker,) = small.blockers
  assert blocker.primitive == "output"
  assert {(h.path, h.axis) for h in blocker.holds} == {
    ("params/Dense_0/kernel", 1),
    ("params/Dense_0/bias", 0),
  }
  assert blocker.flops > 0
  with pytest.raises(ValueError, match="an output is made of it"):
    fp.compact(model.apply, variables, X, strict=True)


class Wrapped(nn.Module):
  """A layer with a weight norm of Flax around it, between two masks."""

  wrap: object

  @nn.compact
  def __call__(self, x):
    x = fp.Mask(name="first")(nn.relu(nn.Dense(8, name="before")(x)))
    x = self.wrap(nn.Dense(6, name="inner"))(x)
    return nn.Dense(2, name="after")(fp.Mask(name="second")(nn.relu(x)))


def spectral_norm(layer):
  return lambda x: nn.SpectralNorm(layer)(x, update_stats=False)


WRAPPED = {
  "spectral norm": (spectral_norm, {("params/inner/kernel", 0): (8, 4), ("params/inner/kernel", 1): (6, 3)}),
  "weight norm": (lambda layer: nn.WeightNorm(layer), {("params/inner/kernel", 0): (8, 4)}),
  "weight norm of rows": (
    lambda layer: nn.WeightNorm(layer, feature_axes=-2),
    {("params/inner/kernel", 1): (6, 3)},
  ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_variables_alone_sum_over_is_named(name):
  wrap, expected = WRAPPED[name]
  model = Wrapped(wrap)
  variables = model.init(jax.random.key(0), X)
  variables = {**variables, "masks": jax.tree.map(lambda m: jnp.arange(m.size) % 2.0, variables["masks"])}
  small = fp.compact(model.apply, variables, X)
  found = {(h.path, h.axis): (h.kept, h.allowed) for b in small.blockers for h in b.holds}
  assert {key: found[key] for key in found if key[0].startswith("params/inner/kernel")} == expected
  assert sum(b.parameters for b in small.blockers) >= 3 * 4  # entries of the kernel alone
  assert "parameters" in small.report()
  np.testing.assert_allclose(small(small.variables, X), model.apply(variables, X), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="strict=True"):
    fp.compact(model.apply, variables, X, strict=True)


def test_parameters_that_stay_are_counted_once():
  """Of a kernel held along both axes: what it has, less what masks allow."""
  net = lambda v, x: jnp.tanh(x * v["masks"]["a"]) @ (v["w"] / jnp.linalg.norm(v["w"])) * v["masks"]["b"]
  masks = {"a": jnp.array([1.0, 0, 1, 0, 1]), "b": jnp.array([1.0, 0, 0, 0])}
  small = fp.compact(net, {"w": jnp.ones((5, 4)), "masks": masks}, X)
  assert sum(b.parameters for b in small.blockers) == 5 * 4 - 3 * 1


SILENT = {
  "plain": (8, nn.relu, "mask", 4, "mask", 2),
  "masked output": (8, "mask"),
  "re-masked": (8, "mask", lambda x: x + 1.0, jnp.exp, "mask", 2),
  "a sum over the mask": (8, "mask", lambda x: x * jnp.sum(x, -1, keepdims=True), 3),
  "norm of what is left": (8, "mask", rms, 2),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_where_nothing_stays(name):
  apply, variables, x = pruned(*SILENT[name])
  small = fp.compact(apply, variables, x, strict=True)
  assert small.blockers == []
  fp.cost_model(apply, variables, x, strict=True)


def test_an_inverted_bottleneck_is_silent():
  case = CASES["mobile_net_block"]
  variables = case.variables()
  for seed in range(3):
    masks = random_masks(variables["masks"], seed, 0.5)
    small = fp.compact(case.module().apply, {**variables, "masks": masks}, case.inputs(), strict=True)
    assert "on the table" not in small.report()


def test_layers_of_a_stack_are_told_apart():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      h = nn.LayerNorm(name="norm")(nn.Dense(6, name="up")(x))
      return x + nn.Dense(5, name="down")(fp.Mask()(h)), None

  stack = nn.scan(Block, variable_axes={"params": 0, "masks": 0}, split_rngs={"params": True}, length=3)

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return stack(name="blocks")(x, None)[0]

  model = Net()
  variables = model.init(jax.random.key(0), X)
  masks = jax.tree.map(lambda m: jnp.asarray(np.eye(3, 6), jnp.float32), variables["masks"])
  small = fp.compact(model.apply, {**variables, "masks": masks}, X)
  held = {(h.path, h.axis): h[2:] for b in small.blockers for h in b.holds}
  assert held["params/blocks/up/kernel", 2] == (18, 3)


def test_masks_that_nothing_reads_are_named():
  model = Chain((4, "mask", 2))
  variables = model.init(jax.random.key(0), X)
  masks = {**variables["masks"], "forgotten": {"mask": jnp.ones(3)}}
  for build in (fp.cost_model, fp.compact):
    with pytest.raises(ValueError, match="nothing reads: masks/forgotten/mask"):
      build(model.apply, {**variables, "masks": masks}, X)


def slices_that_matter(case, masks, draws=12):
  """Per variable axis, how many slices have a gradient under the masks, of any of some random networks and inputs."""
  apply = case.module().apply

  @jax.jit
  def gradients(rest, x):
    return jax.grad(
      lambda rest: sum(jnp.sum(jnp.sin(y + 1.0)) for y in jax.tree.leaves(apply({**rest, "masks": masks}, x)))
    )(rest)

  found = None
  for seed in range(draws):
    rest = {name: part for name, part in case.variables(seed, jnp.float64).items() if name != "masks"}
    grads = jax.tree.map(lambda g: np.asarray(g) != 0, gradients(rest, case.inputs(seed, jnp.float64)))
    found = grads if found is None else jax.tree.map(np.logical_or, found, grads)
  return {
    (jax.tree_util.keystr(path, simple=True, separator="/"), axis): int(
      leaf.any(tuple(a for a in range(leaf.ndim) if a != axis)).sum()
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    for axis in range(leaf.ndim)
  }


DIFFERENTIABLE = [case for case in CASES.values() if case.differentiable]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_what_stays_without_a_gradient_is_in_the_report(case, x64):
  """Every slice that is kept has a gradient under the masks, or the report says why it stays."""
  variables, x = case.variables(1, jnp.float64), case.inputs(1, jnp.float64)
  masks = random_masks(variables["masks"], 1, 0.5)
  small = fp.compact(case.module().apply, {**variables, "masks": masks}, x)
  needed = slices_that_matter(case, masks)
  dense = slices_that_matter(case, jax.tree.map(jnp.ones_like, masks))
  full = {
    (jax.tree_util.keystr(path, simple=True, separator="/"), axis): n
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    for axis, n in enumerate(leaf.shape)
  }
  said = {(h.path, h.axis) for b in small.blockers for h in b.holds}
  for path, leaf in jax.tree_util.tree_leaves_with_path(small.variables):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for axis, kept in enumerate(leaf.shape):
      never = full[name, axis] - dense[name, axis]  # without a gradient though nothing is masked
      assert kept <= needed[name, axis] + never or (name, axis) in said, (
        name,
        axis,
        kept,
        needed[name, axis],
      )


@pytest.mark.parametrize("of", ["triangular", "symmetric", "any"])
def test_solving_for_as_many_columns_as_rows(of):
  solve = {
    "triangular": lambda a, b: jax.scipy.linalg.solve_triangular(a, b, lower=True),
    "symmetric": lambda a, b: jax.scipy.linalg.solve(a, b, assume_a="pos"),
    "any": jnp.linalg.solve,
  }[of]

  def use(x):
    square = x.T @ x
    return x @ solve(square + 9 * jnp.eye(8), square)

  apply, variables, x = pruned(8, "mask", use, 2)
  small = fp.compact(apply, variables, x)
  held = {(h.path, h.axis) for b in small.blockers for h in b.holds}
  alive = int(variables["masks"]["mask_1"]["mask"].sum())
  rows = len(small.variables["params"]["dense_3"]["kernel"])
  assert (rows, ("params/dense_3/kernel", 0) in held) == ((alive, False) if of == "triangular" else (8, True))
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-4, atol=1e-5)
