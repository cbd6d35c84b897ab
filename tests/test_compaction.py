"""Compact networks against masked ones: outputs and gradients, at any batch size, exported, shrunk."""

import collections
import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import fisherprune_jax as fp
from tests.models import CASES, random_masks

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def pruned(case, seed, dtype=jnp.float32, alive=0.6):
  """A case with random masks: its apply function, its variables and a batch."""
  variables = case.variables(seed, dtype)
  masks = random_masks(variables["masks"], seed, alive)
  return case.module().apply, variables | {"masks": masks}, case.inputs(seed, dtype)


def close(a, b, rtol):
  """Equal to ``rtol`` of the norm, leaf by leaf."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.shape == y.shape
    assert np.linalg.norm(np.asarray(x - y, np.float64)) <= rtol * (
      np.linalg.norm(np.asarray(x, np.float64)) + 1e-30
    )


def values_of(function):
  """``f(variables, x)``: gradients by the variables, masks aside, and by the input; and outputs."""

  def loss(weights, masks, x):
    y = function({**weights, **masks}, x)
    return jnp.sum(jnp.sin(y.astype(jnp.promote_types(y.dtype, jnp.float32)) + 1.0)), y

  compiled = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))

  def call(variables, x):
    masks = {name: part for name, part in variables.items() if name == "masks"}
    return compiled({name: part for name, part in variables.items() if name != "masks"}, masks, x)

  return call


@functools.cache
def values_with_masks(case):
  """Of the masked network: compiled once for all masks."""
  return values_of(case.module().apply)


def sliced(values, small):
  """Gradients of the masked network as the compact one has them; and outputs."""
  (dv, dx), y = values
  return ({name: small.shrink(part) for name, part in dv.items()}, dx), y


def outputs_and_gradients(masked, small, variables, x):
  """Outputs, and gradients by the variables and the input: masked (then sliced), and compact."""
  return sliced(masked(variables, x), small), values_of(small)(small.variables, x)


DIFFERENTIABLE = pytest.mark.parametrize(
  "case", [case for case in CASES.values() if case.differentiable], ids=lambda case: case.name
)


@DIFFERENTIABLE
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_and_gradients_in_double_precision(case, seed, x64):
  apply, variables, x = pruned(case, seed, jnp.float64)
  small = fp.compact(apply, variables, x)
  close(*outputs_and_gradients(values_with_masks(case), small, variables, x), 1e-10)


@DIFFERENTIABLE
def test_outputs_and_gradients_in_single_precision(case):
  apply, variables, x = pruned(case, 2)
  small = fp.compact(apply, variables, x)
  close(*outputs_and_gradients(values_with_masks(case), small, variables, x), 1e-5)


@DIFFERENTIABLE
def test_outputs_and_gradients_in_half_precision(case):
  """The compact network is about as near to float32 as the masked one is."""
  apply, variables, x = pruned(case, 3, jnp.bfloat16)
  small = fp.compact(apply, variables, x)
  masked, compact = outputs_and_gradients(values_with_masks(case), small, variables, x)
  assert jax.tree.map(lambda a: a.dtype, masked) == jax.tree.map(lambda a: a.dtype, compact)
  variables, x = jax.tree.map(lambda a: a.astype(jnp.float32), (variables, x))
  truth = sliced(values_with_masks(case)(variables, x), small)
  for exact, a, b in zip(*map(jax.tree.leaves, (truth, masked, compact)), strict=True):
    assert distance(exact, b) <= 4 * distance(exact, a) + 0.05 * distance(exact, 0 * exact)


def distance(a, b):
  return np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))


PLAIN = (
  "mlp cnn_with_flatten conv_transposed mobile_net_block_with_one_mask residual_network dense_net u_net gated_unit "
  "batch_norm_before_the_mask mask_on_heads embedding lstm_scanned transformer_block"
).split()


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_is_picked_at_run_time(name):
  """A compact network does what one written with its widths does: all picking was done on the weights."""
  apply, variables, x = pruned(CASES[name], 8)
  small = fp.compact(apply, variables, x)
  masked, compact = primitives(apply, variables, x), primitives(small, small.variables, x)
  del masked["mul"], compact["mul"]  # products with masks are gone
  assert not compact - masked


def primitives(function, *args):
  def names(jaxpr):
    for eqn in jaxpr.eqns:
      subs = list(jaxprs_in_params(eqn.params))
      yield from [eqn.primitive.name] if not subs else (name for sub in subs for name in names(sub))

  return collections.Counter(names(jax.make_jaxpr(function)(*args).jaxpr))


@ALL
def test_all_ones_masks_change_nothing(case):
  variables, x = case.variables(), case.inputs()
  apply = case.module().apply
  small = fp.compact(apply, variables, x)
  rest = {name: part for name, part in variables.items() if name != "masks"}
  if case.name not in ("pad_and_slice", "channels_picked_by_index"):  # there, some entries are never needed
    assert jax.tree.map(jnp.shape, small.variables) == jax.tree.map(jnp.shape, rest)
  close(apply(variables, x), small(small.variables, x), 1e-6)


@ALL
def test_an_empty_mask_is_survived(case):
  apply, variables, x = pruned(case, 4)
  for position in range(len(jax.tree.leaves(variables["masks"]))):
    leaves = jax.tree.leaves(variables["masks"])
    leaves[position] = jnp.zeros_like(leaves[position])
    masks = jax.tree.unflatten(jax.tree.structure(variables["masks"]), leaves)
    small = fp.compact(apply, variables | {"masks": masks}, x)
    expected = apply(variables | {"masks": masks}, x)
    found = small(small.variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@ALL
def test_compacting_twice_is_compacting_once(case):
  apply, variables, x = pruned(case, 5)
  once = fp.compact(apply, variables, x, keep_masks=True)
  twice = fp.compact(once, once.variables, x)
  direct = fp.compact(apply, variables, x)
  close(direct(direct.variables, x), twice(twice.variables, x), 1e-5)
  clamps = 1 / x.shape[0] if case.name == "switch" else 0  # lax.switch makes sure of its index every time
  assert twice.cost - clamps == direct.cost == once.cost
  assert jax.tree.map(jnp.shape, twice.variables) == jax.tree.map(jnp.shape, direct.variables)


ANY_BATCH = [case for case in CASES.values() if case.name not in ("channel_shuffle", "mask_after_flatten")]


@pytest.mark.parametrize("case", ANY_BATCH, ids=lambda case: case.name)
def test_any_batch_size_and_vmap(case):
  apply, variables, x = pruned(case, 6)
  small = fp.compact(apply, variables, x)
  other = jnp.concatenate([x, 2 * x, x[:1]])
  close(apply(variables, other), small(small.variables, other), 1e-5)
  if case.independent:
    one_by_one = jax.vmap(lambda one: small(small.variables, one[None])[0])(other)
    np.testing.assert_allclose(one_by_one, apply(variables, other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ANY_BATCH, ids=lambda case: case.name)
def test_export_has_a_symbolic_batch(case):
  apply, variables, x = pruned(case, 7)
  small = fp.compact(apply, variables, x)
  exported = small.export(x)
  assert str(exported.in_avals[0].shape[0]) == "batch"
  other = jnp.concatenate([x, 2 * x])
  np.testing.assert_allclose(exported.call(other), small(small.variables, other), rtol=1e-4, atol=1e-5)


def test_an_export_runs_without_this_library(tmp_path):
  apply, variables, x = pruned(CASES["cnn_with_flatten"], 8)
  small = fp.compact(apply, variables, x)
  (tmp_path / "model.stablehlo").write_bytes(small.export(x).serialize())
  np.save(tmp_path / "x.npy", x)
  np.save(tmp_path / "y.npy", small(small.variables, x))
  script = """
import sys, numpy as np
from jax import export
model = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
np.testing.assert_allclose(model.call(np.load("x.npy")), np.load("y.npy"), rtol=1e-5, atol=1e-6)
assert not any(name.startswith(("fisherprune", "flax")) for name in sys.modules)
"""
  subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_shapes_are_smaller_where_they_should_be():
  apply, variables, x = pruned(CASES["cnn_with_flatten"], 0)
  widths = [int(jnp.sum(mask)) for mask in jax.tree.leaves(variables["masks"])]
  params = fp.compact(apply, variables, x).variables["params"]
  assert params["Conv_0"]["kernel"].shape == (3, 3, 3, widths[0])
  assert params["Conv_1"]["kernel"].shape == (3, 3, widths[0], widths[1])
  assert params["Dense_0"]["kernel"].shape == (2 * 2 * widths[1], widths[2])
  assert params["Dense_1"]["kernel"].shape == (widths[2], 4)


def test_depthwise_channels_go_with_the_expansion_and_the_projection():
  apply, variables, x = pruned(CASES["mobile_net_block_with_one_mask"], 0)
  (mask,) = jax.tree.leaves(variables["masks"])
  width = int(mask.sum())
  params = fp.compact(apply, variables, x).variables["params"]
  assert [params[f"Conv_{i}"]["kernel"].shape for i in range(3)] == [
    (1, 1, 3, width),
    (3, 3, 1, width),
    (1, 1, width, 3),
  ]


def test_heads_go_with_all_their_weights():
  apply, variables, x = pruned(CASES["mask_on_heads"], 0)
  heads = int(jax.tree.leaves(variables["masks"])[0].sum())
  params = fp.compact(apply, variables, x).variables["params"]
  assert params["DenseGeneral_0"]["kernel"].shape == (3, heads, 3)
  assert params["DenseGeneral_1"]["kernel"].shape == (heads, 3, 3)


def test_relu_keeps_its_derivative_at_zero():
  # max(x, 0) alone would give half the gradient there; nn.relu defines it as zero.
  def apply(variables, x):
    return nn.relu(x * variables["params"]["w"]) * variables["masks"]["m"]

  variables = {"params": {"w": jnp.zeros(3)}, "masks": {"m": jnp.array([1.0, 0.0, 1.0])}}
  small = fp.compact(apply, variables, jnp.ones((2, 3)))
  grads = jax.grad(lambda v: small(v, jnp.ones((2, 3))).sum())(small.variables)
  np.testing.assert_array_equal(grads["params"]["w"], [0.0, 0.0])


@jax.custom_vjp
def clipped_gradient(x):
  return jnp.sin(x)


clipped_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (jnp.clip(ct, -0.1, 0.1) * x,))


def test_custom_gradients_are_kept(x64):
  def apply(variables, x):
    return clipped_gradient(x @ variables["params"]["w"]) * variables["masks"]["m"]

  rng = np.random.default_rng(0)
  variables = {
    "params": {"w": jnp.asarray(rng.normal(size=(4, 5)))},
    "masks": {"m": jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])},
  }
  x = jnp.asarray(rng.normal(size=(3, 4)))
  small = fp.compact(apply, variables, x)
  assert small.variables["params"]["w"].shape == (4, 3)
  close(*outputs_and_gradients(values_of(apply), small, variables, x), 1e-12)


def test_second_derivatives_and_forward_mode(x64):
  apply, variables, x = pruned(CASES["remat_and_jit"], 0, jnp.float64)
  small = fp.compact(apply, variables, x)
  dense = jax.jvp(lambda x: apply(variables, x), (x,), (x,))
  close(dense, jax.jvp(lambda x: small(small.variables, x), (x,), (x,)), 1e-10)
  hessian = jax.hessian(lambda s: apply(variables, s * x).sum())(1.0)
  close(hessian, jax.hessian(lambda s: small(small.variables, s * x).sum())(1.0), 1e-10)


def test_state_for_kept_masks_is_sliced_with_them():
  apply, variables, x = pruned(CASES["mlp"], 1)
  tx = fp.fisher_prune(fp.cost_model(apply, variables, x))
  state = tx.init(variables["params"])._replace(masks=variables["masks"])
  small = fp.compact(apply, variables, x, keep_masks=True)
  shrunk = small.shrink_opt_state(tx, state)
  assert jax.tree.map(jnp.shape, shrunk.masks) == jax.tree.map(jnp.shape, small.variables["masks"])
  assert all(leaf.all() for leaf in jax.tree.leaves(small.variables["masks"]))


def test_keyword_arguments_and_other_inputs_go_in():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x, scale, train):
      x = fp.Mask()(nn.relu(nn.Dense(6)(x)))
      x = nn.Dropout(0.5, deterministic=not train)(x)
      return nn.Dense(2)(x * scale)

  model = Network()
  x, key = jnp.ones((3, 4)), jax.random.key(1)
  variables = model.init(key, x, 2.0, False)
  masks = random_masks(variables["masks"], 0, 0.4)
  variables = variables | {"masks": masks}

  def apply(variables, x, scale, key):
    return model.apply(variables, x, scale, True, rngs={"dropout": key})

  small = fp.compact(apply, variables, x, 2.0, key, batch_axes=(0, None, None))
  close(apply(variables, x, 2.0, key), small(small.variables, x, 2.0, key), 1e-6)
  partial = functools.partial(model.apply, train=False)
  assert (
    fp.compact(partial, variables, x, 2.0, batch_axes=(0, None)).cost
    < fp.cost_model(partial, variables, x, 2.0).dense
  )


def test_report_shows_widths_and_reasons():
  apply, variables, x = pruned(CASES["layer_norm_over_the_mask"], 0)
  text = fp.compact(apply, variables, x).report()
  width = int(jax.tree.leaves(variables["masks"])[0].sum())
  assert ["params/Dense_0/kernel", "6x7", f"6x{width}"] in [line.split()[:3] for line in text.splitlines()]
  assert "lacks the masked axis" in text
  assert "tests/models.py" in text


def test_a_made_up_primitive_is_kept_whole_and_announced():
  from jax.extend.core import Primitive
  from jax.interpreters import mlir

  twice = Primitive("made_up_twice")
  twice.def_abstract_eval(lambda x: x)
  twice.def_impl(lambda x: 2 * x)
  mlir.register_lowering(twice, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))

  def apply(variables, x):
    return twice.bind(x @ variables["params"]["w"]) * variables["masks"]["m"]

  variables = {"params": {"w": jnp.ones((4, 5))}, "masks": {"m": jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])}}
  x = jnp.ones((3, 4))
  with pytest.warns(UserWarning, match="no rule for the primitive `made_up_twice`"):
    small = fp.compact(apply, variables, x)
  assert small.variables["params"]["w"].shape == (4, 5)
  close(apply(variables, x), small(small.variables, x), 1e-6)
  assert "no rule for made_up_twice" in small.report()
  with pytest.raises(ValueError, match="made_up_twice"):
    fp.compact(apply, variables, x, strict=True)
  fp.register_rule(twice, fp.rules.elementwise)
  taught = fp.compact(apply, variables, x, strict=True)
  assert taught.variables["params"]["w"].shape == (4, 3)
  close(apply(variables, x), taught(taught.variables, x), 1e-6)


def test_a_tree_of_another_structure_is_refused():
  apply, variables, x = pruned(CASES["mlp"], 0)
  small = fp.compact(apply, variables, x)
  with pytest.raises(ValueError, match=r"small\.variables"):
    small(variables, x)
  with pytest.raises(ValueError, match="structure"):
    small.shrink({"other": jnp.ones(3)})


class Trained(nn.Module):
  """Convolutions with batch norm in training form."""

  @nn.compact
  def __call__(self, x, train=True):
    for features in (6, 5):
      x = nn.Conv(features, (3, 3), use_bias=False, param_dtype=x.dtype)(x)
      x = nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(x)
      x = fp.Mask()(nn.relu(x))
    return nn.Dense(3, param_dtype=x.dtype)(x.mean(axis=(1, 2)))


def test_batch_statistics_come_back_in_compact_shapes(x64):
  model = Trained()
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 2)))
  variables = model.init(jax.random.key(0), x)
  variables = variables | {"masks": random_masks(variables["masks"], 0, 0.5)}
  widths = [int(mask.sum()) for mask in jax.tree.leaves(variables["masks"])]
  train = functools.partial(model.apply, mutable=["batch_stats"])
  small = fp.compact(train, variables, x, state_from=lambda out: out[1])
  assert small.variables["params"]["Conv_0"]["kernel"].shape == (3, 3, 2, widths[0])
  assert small.variables["batch_stats"]["BatchNorm_1"]["mean"].shape == (widths[1],)
  expected, stats = train(variables, x)
  found, new = small(small.variables, x)
  close(expected, found, 1e-10)
  close(small.shrink(stats["batch_stats"]), new["batch_stats"], 1e-10)
  inference = functools.partial(model.apply, train=False)
  served = fp.compact(inference, variables | {"batch_stats": stats["batch_stats"]}, x)
  assert jax.tree.map(jnp.shape, served.variables) == jax.tree.map(jnp.shape, {**small.variables, **new})
  whole = fp.compact(train, variables, x)  # without `updates` every output keeps its full shape
  close(train(variables, x), whole(whole.variables, x), 1e-10)


def test_updates_must_name_variables():
  model = Trained()
  x = jnp.ones((4, 6, 6, 2))
  variables = model.init(jax.random.key(0), x)
  train = functools.partial(model.apply, mutable=["batch_stats"])
  with pytest.raises(ValueError, match="state_from must pick"):
    fp.compact(train, variables, x, state_from=lambda out: out)
