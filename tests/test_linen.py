"""The mask layer of ``flax.linen``."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import fisherprune_jax as fp

SHAPE = (2, 3, 4, 5)


def values(shape: tuple[int, ...] = SHAPE, dtype: Any = jnp.float32) -> jax.Array:
  """Integers from one on, so that every entry is told apart and products are exact."""
  return jnp.arange(1, 1 + np.prod(shape)).reshape(shape).astype(dtype)


def binary(*shape: int) -> jax.Array:
  """A mask that no other one of its shape, transposed or shifted, equals by accident."""
  return jnp.asarray(np.random.default_rng(len(shape)).random(shape) < 0.5, jnp.float32)


def apply(mask: jax.Array, x: jax.Array, **options: int) -> jax.Array:
  """The layer under a given mask."""
  return fp.Mask(**options).apply({"masks": {"mask": mask}}, x)


def test_init_gives_ones_in_float32():
  variables = fp.Mask().init(jax.random.key(0), values(dtype=jnp.bfloat16))
  assert list(variables) == ["masks"]
  mask = variables["masks"]["mask"]
  assert (mask.shape, mask.dtype) == ((5,), jnp.float32)
  np.testing.assert_array_equal(mask, 1)


def test_init_needs_no_values():
  shapes = jax.eval_shape(fp.Mask(axis=1).init, jax.random.key(0), values())
  assert shapes["masks"]["mask"].shape == (3,)


AXES = [(-1, 0), (3, 0), (-2, 0), (1, 0), (0, 1), (2, 1), (-1, 2), (0, -1), (-3, -1)]


@pytest.mark.parametrize(("axis", "batch_axis"), AXES)
def test_a_mask_lies_along_its_axis(axis, batch_axis):
  x, mask = values(), binary(SHAPE[axis])
  expected = np.moveaxis(np.moveaxis(np.asarray(x), axis, -1) * np.asarray(mask), -1, axis)
  np.testing.assert_array_equal(apply(mask, x, axis=axis, batch_axis=batch_axis), expected)


@pytest.mark.parametrize(("axis", "batch_axis"), AXES)
def test_per_example_masks_lie_along_both_axes(axis, batch_axis):
  x, mask = values(), binary(SHAPE[batch_axis], SHAPE[axis])
  places = (batch_axis, axis)
  expected = np.moveaxis(np.array(x), places, (0, 1))
  expected = np.moveaxis(expected * np.asarray(mask)[:, :, None, None], (0, 1), places)
  np.testing.assert_array_equal(apply(mask, x, axis=axis, batch_axis=batch_axis), expected)


def test_square_masks_are_not_transposed():
  x, mask = jnp.ones((3, 3)), jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
  np.testing.assert_array_equal(apply(mask, x), mask)
  np.testing.assert_array_equal(apply(mask, x, axis=0, batch_axis=1), mask.T)


def test_without_the_collection_it_is_the_identity():
  x = values()
  np.testing.assert_array_equal(fp.Mask().apply({}, x), x)
  np.testing.assert_array_equal(fp.Mask().apply({"params": {"w": jnp.ones(3)}}, x), x)


class Block(nn.Module):
  """A masked layer to lift."""

  @nn.compact
  def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
    return fp.Mask()(nn.Dense(4)(x)), None


def scanned(x: jax.Array) -> jax.Array:
  axes = {"params": 0, "masks": 0}
  return nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)()(x, None)[0]


def mapped(x: jax.Array) -> jax.Array:
  axes = {"params": 0, "masks": 0}
  return nn.vmap(Block, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=3)()(x)[0]


def rematerialised(x: jax.Array) -> jax.Array:
  return nn.remat(Block)()(x)[0]


def jitted(x: jax.Array) -> jax.Array:
  return nn.jit(Block)()(x)[0]


class Network(nn.Module):
  """A function with Linen layers in it."""

  function: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return self.function(x)


@pytest.mark.parametrize("function", [scanned, mapped, rematerialised, jitted])
def test_lifted_modules_take_both_kinds_of_masks_or_none(function):
  model, x = Network(function), jnp.linspace(-1, 1, 8).reshape(2, 4)
  variables = model.init(jax.random.key(0), x)
  params, ones = variables["params"], variables["masks"]
  zeros = jax.tree.map(jnp.zeros_like, ones)
  expected = model.apply({"params": params}, x)
  for masks in (ones, fp.per_example(ones, 2)):
    np.testing.assert_array_equal(model.apply({"params": params, "masks": masks}, x), expected)
  for masks in (zeros, fp.per_example(zeros, 2)):
    np.testing.assert_array_equal(model.apply({"params": params, "masks": masks}, x), 0)
  assert np.any(expected)


class Two(nn.Module):
  """Two masks, one of them nested."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return fp.Mask(name="last")(Block(name="block")(x)[0])


def test_a_mask_missing_from_a_given_collection_is_an_error():
  model, x = Two(), jnp.ones((2, 4))
  variables = model.init(jax.random.key(0), x)
  params, masks = variables["params"], variables["masks"]
  assert set(masks) == {"block", "last"}
  with pytest.raises(ValueError, match=r"'masks' must hold a mask .* got none at block/Mask_0"):
    model.apply({"params": params, "masks": {"last": masks["last"]}}, x)
  with pytest.raises(ValueError, match="got none at last"):
    model.apply({"params": params, "masks": {"block": masks["block"]}}, x)
  with pytest.raises(ValueError, match="got none at the root"):
    fp.Mask().apply({"masks": {"other": jnp.ones(4)}}, x)


class Pair(nn.Module):
  """Two masks to lift."""

  @nn.compact
  def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
    return fp.Mask(name="second")(nn.Dense(4)(fp.Mask(name="first")(x))), None


STACK = {"variable_axes": {"params": 0, "masks": 0}, "split_rngs": {"params": True}}
LIFTS: dict[str, Callable[[], Any]] = {
  "not at all": lambda: Pair,
  "scan": lambda: nn.scan(Pair, length=3, **STACK),
  "vmap": lambda: nn.vmap(Pair, in_axes=None, axis_size=3, **STACK),
  "remat": lambda: nn.remat(Pair),
  "jit": lambda: nn.jit(Pair),
  "scan of remat": lambda: nn.scan(nn.remat(Pair), length=3, **STACK),
  "remat of scan": lambda: nn.remat(nn.scan(Pair, length=3, **STACK)),
}
CALLS: dict[str, Callable[[nn.Module, Any, jax.Array], Any]] = {
  "apply": lambda model, variables, x: model.apply(variables, x),
  "frozen": lambda model, variables, x: model.apply(freeze(variables), x),
  "mutable masks": lambda model, variables, x: model.apply(variables, x, mutable=["masks"]),
  "all mutable": lambda model, variables, x: model.apply(variables, x, mutable=True),
  "bind": lambda model, variables, x: model.bind(variables)(x),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lift", LIFTS)
def test_what_was_given_is_seen_from_inside_lifted_modules(lift, call):
  """All masks, none, no collection: however the module is lifted and the variables come."""
  model, x = Network(lambda x: LIFTS[lift]()(name="pair")(x)[0]), jnp.linspace(-1, 1, 8).reshape(2, 4)
  variables = model.init(jax.random.key(0), x)
  params, masks = variables["params"], variables["masks"]["pair"]
  assert set(masks) == {"first", "second"}
  run = lambda variables: jax.tree.leaves(CALLS[call](model, variables, x))[0]
  np.testing.assert_allclose(run({"params": params}), model.apply(variables, x), rtol=1e-6)
  zeros = {"pair": jax.tree.map(jnp.zeros_like, masks)}
  np.testing.assert_array_equal(run({"params": params, "masks": zeros}), 0)
  for name in masks:
    with pytest.raises(ValueError, match=f"got none at pair/{name}"):
      run({"params": params, "masks": {"pair": {other: masks[other] for other in masks if other != name}}})


def test_masks_are_left_as_they_are():
  mask = binary(5)
  _, new = fp.Mask().apply({"masks": {"mask": mask}}, values(), mutable=["masks"])
  np.testing.assert_array_equal(new["masks"]["mask"], mask)


@pytest.mark.parametrize(
  ("shape", "options", "message"),
  [
    ((2, 3), {"axis": 2}, r"axis must be an axis of its input, got 2 for shape \(2, 3\)"),
    ((2, 3), {"axis": -3}, r"axis must be an axis of its input, got -3 for shape \(2, 3\)"),
    ((2, 3), {"batch_axis": 5}, r"batch_axis must be an axis of its input, got 5 for shape \(2, 3\)"),
    ((2, 3), {"axis": 0}, "axis=0 and batch_axis=0"),
    ((2, 3), {"axis": -2}, "axis=-2 and batch_axis=0"),
    ((2, 3), {"batch_axis": -1}, "axis=-1 and batch_axis=-1"),
    ((3,), {}, "axis=-1 and batch_axis=0"),
    ((), {}, r"axis must be an axis of its input, got -1 for shape \(\)"),
  ],
)
def test_a_wrong_axis_is_refused(shape, options, message):
  with pytest.raises(ValueError, match=message):
    fp.Mask(**options).init(jax.random.key(0), jnp.ones(shape))
  with pytest.raises(ValueError, match=message):
    fp.Mask(**options).apply({}, jnp.ones(shape))


@pytest.mark.parametrize(
  ("mask_shape", "options", "expected"),
  [
    ((4,), {}, (5,)),
    ((1,), {}, (5,)),
    ((5,), {"axis": 1}, (3,)),
    ((3, 5), {}, (2, 5)),
    ((1, 5), {}, (2, 5)),
    ((5, 2), {}, (2, 5)),
    ((2, 5), {"batch_axis": 1}, (3, 5)),
    ((7, 2, 5), {}, (2, 5)),
    ((), {}, (2, 5)),
  ],
)
def test_a_mask_of_another_shape_is_refused(mask_shape, options, expected):
  with pytest.raises(ValueError, match="must have shape") as error:
    apply(jnp.ones(mask_shape), values(), **options)
  assert f"must have shape {expected}" in str(error.value)
  assert f"got {mask_shape}" in str(error.value)


@pytest.mark.parametrize(
  "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8, jnp.complex64]
)
@pytest.mark.parametrize("mask_dtype", [jnp.float32, jnp.bfloat16, jnp.int32, bool])
def test_the_dtype_of_the_input_is_kept(dtype, mask_dtype):
  x, mask = values(dtype=dtype), binary(5)
  y = apply(mask.astype(mask_dtype), x)
  assert y.dtype == dtype
  np.testing.assert_array_equal(y, np.asarray(x) * np.asarray(mask).astype(dtype))


def test_double_precision_is_not_lost(x64):
  x = jnp.asarray([[1 / 3, 2 / 3]], jnp.float64)
  y = apply(jnp.asarray([1, 0], jnp.float32), x)
  assert y.dtype == jnp.float64
  np.testing.assert_array_equal(y, x * jnp.array([1.0, 0.0]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_product_is_taken_in_float32(dtype):
  """Rounded to half precision the factor would be one; a mask's gradient is a sum that would be rounded too."""
  eps = float(jnp.finfo(dtype).eps)
  assert apply(jnp.float32([1 + eps / 2]), jnp.full((1, 1), 2 - eps, dtype))[0, 0] == 2
  long = jnp.asarray(np.random.default_rng(0).random((1, 3000, 2)), dtype)
  gradient = jax.grad(lambda m: jnp.sum(apply(m, long).astype(jnp.float32)))(jnp.ones((1, 2)))
  assert gradient.dtype == jnp.float32
  np.testing.assert_allclose(gradient, np.sum(np.asarray(long, np.float64), axis=1), rtol=1e-5)
