"""Exported networks: derivatives, symbols of the caller's own, fixed sizes, and what cannot be pickled."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend import core

import fisherprune_jax as fp
from tests.auto_models import UNMASKED
from tests.models import CASES, random_masks


def pruned(name):
  case = CASES[name]
  variables = case.variables()
  variables = {**variables, "masks": random_masks(variables["masks"], 0)}
  apply, x = case.module().apply, case.inputs()
  return apply, variables, x, fp.compact(apply, variables, x)


WITH_RULES = [
  "mlp",
  "cnn_with_flatten",
  "mobile_net_block",
  "residual_network",
  "scanned_layers",
  "lstm_scanned",
]


@pytest.mark.parametrize("name", WITH_RULES)
def test_the_derivative_is_exported_too_at_any_batch_size(name):
  apply, variables, x, small = pruned(name)
  loaded = export.deserialize(bytearray(small.export(x).serialize(vjp_order=1)))
  other = jnp.concatenate([x, 2 * x])

  def gradient(function):
    return jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(x))))(other)

  np.testing.assert_allclose(
    gradient(loaded.call), gradient(lambda x: apply(variables, x)), rtol=1e-4, atol=1e-5
  )


class Sequences(nn.Module):
  """Attention over a sequence of any length."""

  @nn.compact
  def __call__(self, x):
    x = fp.Mask()(nn.relu(nn.Dense(8)(x)))
    x = nn.MultiHeadDotProductAttention(num_heads=2)(nn.Dense(8)(x))
    return nn.Dense(3)(fp.Mask()(nn.gelu(nn.Dense(8)(x))))


def sequences():
  model, x = Sequences(), jnp.ones((2, 5, 4))
  variables = model.init(jax.random.key(0), x)
  variables = {**variables, "masks": random_masks(variables["masks"], 0)}
  return model.apply, variables, fp.compact(model.apply, variables, x)


@pytest.mark.parametrize("symbols", ["b, t", "t"])
def test_a_sequence_length_may_be_a_symbol_of_the_callers_own(symbols):
  apply, variables, small = sequences()
  sizes = export.symbolic_shape(symbols)
  shape = (*sizes, 4) if len(sizes) == 2 else (2, *sizes, 4)
  exported = small.export(jax.ShapeDtypeStruct(shape, jnp.float32))
  assert str(exported.in_avals[0].shape) == str(
    (sizes[0], sizes[1], 4) if len(sizes) == 2 else "(batch, t, 4)"
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 4)), jnp.float32)
  np.testing.assert_allclose(exported.call(x), apply(variables, x), rtol=1e-4, atol=1e-5)
  assert exported.serialize(vjp_order=1)


def in_pairs(variables, x):
  y = nn.relu(x @ variables["params"]["w"]) * variables["masks"]["m"]
  return y.reshape(x.shape[0] // 2, 2, -1)


def test_a_network_that_computes_with_its_batch_size_is_exported_for_one():
  variables = {"params": {"w": jnp.ones((3, 4))}, "masks": {"m": jnp.array([1.0, 0.0, 1.0, 1.0])}}
  x = jnp.arange(12.0).reshape(4, 3)
  small = fp.compact(in_pairs, variables, x)
  with pytest.raises(ValueError, match=r"batch=None"):
    small.export(x)
  exported = small.export(x, batch=None)
  assert exported.in_avals[0].shape == (4, 3)
  np.testing.assert_allclose(exported.call(x), in_pairs(variables, x), rtol=1e-6)
  (pairs,) = export.symbolic_shape("n")
  twice = small.export(jax.ShapeDtypeStruct((2 * pairs, 3), jnp.float32))
  np.testing.assert_allclose(twice.call(x), in_pairs(variables, x), rtol=1e-6)


def test_the_symbol_of_the_batch_has_a_name():
  *_, x, small = pruned("mlp")
  assert str(small.export(x, batch="examples").in_avals[0].shape[0]) == "examples"


def test_a_compact_network_says_what_to_do_instead_of_pickling_it():
  *_, small = pruned("mlp")
  with pytest.raises(TypeError, match=r"cannot be pickled.*small\.variables"):
    pickle.dumps(small)


twice = core.Primitive("put_in_by_another_tool")
twice.def_abstract_eval(lambda x: x)


def test_functions_that_another_tool_has_replaced_are_named(monkeypatch):
  def apply(variables, x):
    return jnp.tanh(x @ variables["params"]["w"]) * variables["masks"]["m"]

  variables = {"params": {"w": jnp.ones((3, 4))}, "masks": {"m": jnp.array([1.0, 0.0, 1.0, 1.0])}}
  small = fp.compact(apply, variables, jnp.ones((2, 3)))
  monkeypatch.setattr(jnp, "tanh", twice.bind)
  small(small.variables, jnp.ones((2, 3)))  # at this size it was traced before
  with pytest.raises(ValueError, match=r"put_in_by_another_tool.*Trace it before"):
    small(small.variables, jnp.ones((5, 3)))


def test_what_was_traced_before_another_tool_replaces_functions_can_be_converted(monkeypatch):
  apply, variables, x, small = pruned("cnn_with_flatten")
  (batch,) = export.symbolic_shape("batch")
  spec = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
  jax.eval_shape(small, small.variables, spec)
  monkeypatch.setattr(nn, "relu", twice.bind)
  exported = export.export(jax.jit(lambda x: small(small.variables, x)))(spec)
  monkeypatch.undo()
  other = jnp.concatenate([x, 2 * x])
  np.testing.assert_allclose(exported.call(other), apply(variables, other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in UNMASKED if name != "kernels_of_each_example"])
def test_a_network_with_automatic_masks_is_exported_for_any_batch_size(name):
  model = UNMASKED[name]
  variables, args = model.variables(), model.inputs()
  auto = fp.auto_mask(model.apply, variables, *args)
  variables = {**auto.variables, "masks": random_masks(auto.masks, 0)}
  exported = fp.compact(auto.apply, variables, *args).export(*args)
  other = model.inputs(1, examples=2)
  found, expected = (
    jax.tree.leaves(function(*other))
    for function in (exported.call, jax.jit(lambda *xs: auto.apply(variables, *xs)))
  )
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


FOUR = jnp.ones((4, 3))
INSIDE = {
  "reshape": lambda x: x.reshape(4, 3),
  "a reshape that divides it": lambda x: x.reshape(2, 2, 3).reshape(-1, 3),
  "a constant": lambda x: x + FOUR,
  "broadcast": lambda x: x + jnp.broadcast_to(jnp.arange(3.0), (4, 3)),
  "range": lambda x: jnp.stack([x[i] for i in range(x.shape[0])]),
  "iteration": lambda x: jnp.stack(list(x)),
  "unpacking": lambda x: jnp.stack((lambda a, b, c, d: (a, b, c, d))(*x)),
  "len": lambda x: x.reshape(len(x), -1),
  "int": lambda x: x.reshape(int(x.shape[0]), -1),
  "float": lambda x: x / float(x.shape[0]),
  "if": lambda x: x if x.shape[0] > 2 else 2 * x,
  "NumPy": lambda x: x + np.ones(x.shape, np.float32),
  "arange": lambda x: jnp.arange(4.0)[:, None] * x,
  "vmap": lambda x: jax.vmap(lambda row, i: row * i)(x, jnp.arange(4.0)),
  "scan": lambda x: jax.lax.scan(lambda c, row: (c, row * c), 2.0, x)[1],
  "micro-batches": lambda x: jax.lax.map(jnp.tanh, x.reshape(2, -1, 3)).reshape(-1, 3),
  "a dictionary": lambda x: x * {4: 1.0, 2: 2.0}[x.shape[0]],
  "an assertion": lambda x: jnp.asarray(x, x.dtype) if x.shape == (4, 3) else [][0],
  "top-k": lambda x: jax.lax.top_k(x.T, 3)[0],
}  # fmt: skip
FREE = {
  "arange": lambda x: x + jnp.arange(x.shape[0])[:, None],
  "vmap": lambda x: jax.vmap(lambda row, i: row * i)(x, jnp.arange(x.shape[0])),
  "fori": lambda x: jax.lax.fori_loop(0, x.shape[0], lambda i, y: y.at[i].mul(2.0), x),
}


def layer_after(function):
  def apply(variables, x):
    return jnp.tanh(function(x) @ variables["w"]) * variables["masks"]

  variables = {"w": jnp.ones((3, 4)), "masks": jnp.array([1.0, 0.0, 1.0, 1.0])}
  x = jnp.arange(12.0).reshape(4, 3) / 12
  return apply, variables, x, fp.compact(apply, variables, x)


@pytest.mark.parametrize("way", INSIDE)
def test_a_batch_size_inside_of_a_network_is_an_error_with_the_remedy(way, tmp_path):
  apply, variables, x, small = layer_after(INSIDE[way])
  for call in (lambda: small.export(x), lambda: small.save(tmp_path / "file")):
    with pytest.raises(ValueError, match=r"any size.*batch=None"):
      call()
  np.testing.assert_allclose(small.export(x, batch=None).call(x), apply(variables, x), rtol=1e-5)


@pytest.mark.parametrize("way", FREE)
def test_a_batch_size_that_a_network_asks_for_is_free(way):
  apply, variables, x, small = layer_after(FREE[way])
  np.testing.assert_allclose(small.export(x).call(x[:3]), apply(variables, x[:3]), rtol=1e-5)


def test_an_error_that_has_nothing_to_do_with_the_batch_size_stays_as_it_is():
  *_, small = layer_after(jnp.tanh)
  with pytest.raises(TypeError, match="contracting dimensions") as caught:
    small.export(jnp.ones((4, 5)))
  assert "batch=None" not in str(caught.value)
