"""Small networks, one for each kind of product that ``fp.reconstruct`` refits; all of their groups are read by products."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng([seed, *shape]).normal(size=shape)


def weights(shapes: Any, seed: int = 0) -> Any:
  """Random parameters of these shapes; none of them are equal."""
  rng = np.random.default_rng(seed)
  draw = lambda shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1))
  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


KINDS: dict[str, Any] = {}


def kind(*shape: int) -> Any:
  """Adds ``f(x, *, w=(3, 4), ..)`` to the table, whose keyword arguments say what its parameters are."""

  def add(fn: Any) -> Any:
    given = inspect.signature(fn).parameters.values()
    shapes = {p.name: p.default for p in given if p.kind is inspect.Parameter.KEYWORD_ONLY}
    KINDS[fn.__name__] = (
      lambda params, x: fn(x, **params.get("params", params)),
      lambda x: weights(shapes),
      shape,
    )
    return fn

  return add


def conv(x: Any, w: Any, stride: int = 1, **options: Any) -> Any:
  spatial = "DHW"[5 - x.ndim :]
  numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
  strides = (stride,) * len(spatial)
  return lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=numbers, **options)


@kind(6, 6, 2)
def strided_and_dilated(x, *, a=(3, 3, 2, 6), b=(3, 3, 6, 4), c=(3, 3, 4, 4), d=(4,), w=(4, 2)):
  x = jnp.tanh(conv(jnp.tanh(conv(x, a)), b, stride=2) + d)
  return jnp.tanh(conv(x, c, rhs_dilation=(2, 2))).mean((1, 2)) @ w


@kind(5, 5, 4)
def grouped(x, *, a=(3, 3, 4, 8), b=(3, 3, 4, 6), w=(6, 2)):
  x = jnp.tanh(conv(jnp.tanh(conv(x, a)), b, feature_group_count=2))
  return x.mean((1, 2)) @ w


@kind(5, 5, 2)
def depthwise_separable(x, *, a=(1, 1, 2, 6), b=(3, 3, 1, 6), c=(1, 1, 6, 4), w=(4, 2)):
  x = jnp.tanh(conv(jnp.tanh(conv(x, a)), b, feature_group_count=6))
  return jnp.tanh(conv(x, c)).mean((1, 2)) @ w


@kind(4, 4, 2)
def transposed(x, *, a=(3, 3, 2, 6), b=(3, 3, 6, 3)):
  return lax.conv_transpose(jnp.tanh(conv(x, a)), b, (2, 2), "SAME")


@kind(8, 2)
def convolution_1d(x, *, a=(3, 2, 6), b=(3, 6, 3)):
  return conv(jnp.tanh(conv(x, a)), b)


@kind(3, 4, 3, 2)
def convolution_3d(x, *, a=(2, 2, 2, 2, 4), b=(2, 2, 2, 4, 3)):
  return conv(jnp.tanh(conv(x, a)), b, stride=2)


@kind(4, 3)
def heads_times_depth(x, *, k=(3, 2), v=(3, 2, 4), o=(2, 4, 3)):
  scores = jax.nn.softmax(x @ k, 1)
  return jnp.einsum("bth,bthe,hed->btd", scores, jnp.einsum("btd,dhe->bthe", x, v), o)


@kind(3)
def concatenated(x, *, a=(3, 6), b=(3, 4), c=(10, 2), d=(2,)):
  return jnp.concatenate([jnp.tanh(x @ a), jnp.sin(x @ b)], -1) @ c + d


@kind(3, 3, 2)
def flattened(x, *, a=(2, 2, 2, 4), b=(36, 3)):
  return jnp.tanh(conv(x, a)).reshape(x.shape[0], -1) @ b


@kind(3)
def used_twice(x, *, a=(3, 6), b=(6, 4), c=(4,), w=(4, 2)):
  h = x @ a
  return (jnp.tanh(jnp.tanh(h) @ b + c) * jnp.sin(jnp.cos(h) @ b + c)) @ w


@kind(3)
def stack_of_arrays(x, *, a=(3, 4), b=(3, 4, 6), c=(3, 6, 4), d=(3, 4), w=(4, 2)):
  step = lambda x, p: (x + jnp.tanh(x @ p[0]) @ p[1] + p[2], None)
  return jnp.tanh(lax.scan(step, x @ a, (b, c, d))[0]) @ w


@kind(3)
def experts(x, *, g=(3, 3), a=(3, 3, 6), b=(3, 6, 2)):
  h = jnp.tanh(jnp.einsum("bd,edf->bef", x, a))
  return jnp.einsum("be,bef,efo->bo", jax.nn.softmax(x @ g), h, b)


@kind(3)
def checkpointed(x, *, a=(3, 6), b=(6, 4), w=(4, 2)):
  return jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ a) @ b))(x) @ w


@kind(3)
def branches(x, *, a=(3, 6), b=(6, 2), c=(6, 2)):
  h = jnp.tanh(x @ a)
  return lax.cond(x.sum() > 1e6, lambda h: jnp.sin(h @ c), lambda h: h @ b, h)


@kind(5, 5, 2)
def normed(x, *, a=(3, 3, 2, 6), b=(3, 3, 6, 4), m=(4,), s=(4,), t=(4,), e=(1, 1, 2, 4), w=(4, 2)):
  """Statistics, scale and shift behind a convolution, and a residual behind them."""
  y = (conv(jnp.tanh(conv(x, a)), b) - m) * (lax.rsqrt(m * m + 1e-3) * s) + t
  return jax.nn.relu(y + conv(x, e)).mean((1, 2)) @ w


@jax.custom_jvp
def softsign(x):
  return x / (1 + jnp.abs(x))


softsign.defjvp(lambda p, t: (softsign(*p), t[0] / (1 + jnp.abs(p[0])) ** 2))
cube = jax.custom_vjp(lambda x: x**3)
cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


@kind(3)
def derivative_rules(x, *, a=(3, 6), b=(6, 4), w=(4, 2)):
  return cube(softsign(x @ a) @ b) @ w


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(4, name="outer")(nn.relu(nn.Dense(6, name="inner")(x))), None


class Tower(nn.Module):
  @nn.compact
  def __call__(self, x):
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return nn.Dense(2)(nn.tanh(stack()(nn.Dense(4)(x), None)[0]))


KINDS["scanned_layers"] = (Tower().apply, lambda x: Tower().init(jax.random.key(0), x), (3,))
