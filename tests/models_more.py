"""More of the table in ``tests/models.py``: attention, norms, layouts, and what is known to break pruning tools."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import fisherprune_jax as fp
from tests.models import batch_norm, case, conv, dense, mask, param_dtype, wide


class Weight(nn.Module):
  """A raw parameter, used by whatever function likes to."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param("w", nn.initializers.normal(), self.shape, param_dtype())


def weight(*shape: int) -> jax.Array:
  return Weight(shape)()


def heads(x: jax.Array, number: int, features: int = 3) -> jax.Array:
  """Without biases: attention does not see those of keys, so their gradients would be rounding errors."""
  return nn.DenseGeneral((number, features), use_bias=False, param_dtype=param_dtype())(x)


def joined(x: jax.Array, features: int) -> jax.Array:
  return nn.DenseGeneral(features, axis=(-2, -1), param_dtype=param_dtype())(x)


def masked_heads(*qkv: jax.Array, **options: Any) -> jax.Array:
  """``attention_fn`` of which each head can be switched off."""
  return mask(nn.dot_product_attention(*qkv, **options), axis=-2)


def tokens(x: jax.Array) -> jax.Array:
  return jnp.clip(jnp.abs(x * 3).astype(jnp.int32), 0, 4)


@case((2, 4, 4, 3), removable=False)
def group_norm_over_the_mask(x):
  y = nn.GroupNorm(num_groups=3)(mask(nn.relu(conv(6)(x))))
  return dense(3)(jnp.mean(y, axis=(1, 2)))


@case((3, 5), removable=False)
def bias_behind_the_mask(x):
  y = mask(dense(6, use_bias=False)(x)) + weight(6)
  return dense(3)(nn.relu(y))


@case((2, 4, 4, 3), removable=False)
def convolution_bias_behind_a_dead_group(x):
  y = mask(nn.relu(conv(4, (1, 1))(x)))
  return dense(3)(jnp.mean(nn.relu(conv(4, (2, 2), feature_group_count=4)(y)), axis=(1, 2)))


@case((2, 3))
def tied_embeddings(x):
  table, both = nn.Embed(5, 6, param_dtype=param_dtype()), fp.Mask()
  y = both(table(tokens(x)))
  return table.attend(both(y + dense(6)(mask(nn.gelu(dense(4)(y))))))


@case((2, 3))
def tied_embeddings_masked_apart(x):
  table = nn.Embed(5, 6, param_dtype=param_dtype())
  y = mask(table(tokens(x)))
  return table.attend(mask(nn.tanh(dense(6)(y))))


def attention(number: int, features: int, **options: Any) -> nn.Module:
  """As ``heads``, without biases."""
  return nn.MultiHeadDotProductAttention(
    number, qkv_features=features, use_bias=False, param_dtype=param_dtype(), **options
  )


@case((2, 3, 5))
def attention_with_masked_heads(x):
  return x + attention(4, 8, attention_fn=masked_heads)(x)


@case((2, 3, 5))
def attention_plain(x):
  y = attention(2, 4)(x, mask=nn.make_causal_mask(x[..., 0]))
  return dense(2)(mask(nn.relu(dense(5)(y))))


@case((2, 3, 5))
def attention_by_jax(x):
  y = jax.nn.dot_product_attention(heads(x, 4), heads(x, 4), heads(x, 4), is_causal=True)
  return joined(mask(y, axis=-2), 3)


@case((2, 3, 5))
def attention_grouped(x):
  query, key, value = heads(x, 4), heads(x, 2), heads(x, 2)
  key, value = (jnp.repeat(y, 2, axis=-2) for y in (key, value))
  return joined(mask(nn.dot_product_attention(query, key, value), axis=-2), 3)


@case((2, 3, 5))
def attention_grouped_by_jax(x):
  y = jax.nn.dot_product_attention(heads(x, 4), heads(x, 2), heads(x, 2))
  return joined(mask(y, axis=-2), 3)


@case((2, 3, 5))
def attention_with_masked_head_features(x):
  both = fp.Mask()
  query, key, value = both(heads(x, 2, 4)), both(heads(x, 2, 4)), mask(heads(x, 2, 4))
  return joined(jax.nn.dot_product_attention(query, key, value), 3)


@case((2, 3, 4))
def transformer_block(x):
  norm = lambda: nn.LayerNorm(param_dtype=param_dtype())
  attend = attention(2, 6, attention_fn=masked_heads)
  x = x + attend(norm()(x), mask=nn.make_causal_mask(x[..., 0]))
  y = mask(nn.gelu(dense(6)(norm()(x))))
  return dense(2)(norm()(x + dense(4)(y)))


@case((3, 5))
def einsum_on_a_parameter(x):
  y = mask(nn.relu(jnp.einsum("bc,cd->bd", x, weight(5, 6))))
  y = mask(jnp.einsum("bd,dhk->bhk", y, weight(6, 2, 3)), axis=-2)
  return jnp.einsum("bhk,hko->bo", y, weight(2, 3, 3))


@case((3, 5))
def gate_masked_alone(x):
  return dense(3)(mask(nn.silu(dense(6, use_bias=False)(x))) * dense(6)(x))


@case((3, 5))
def gated_linear_unit(x):
  return dense(3)(mask(nn.glu(dense(10)(x))))


@case((3, 5), removable=False)  # the softmax sees every expert's gate
def experts(x):
  """A soft mixture; an expert goes with its weights."""
  gates = mask(nn.softmax(dense(4)(x)))
  hidden = mask(nn.relu(jnp.einsum("bc,ecd->bed", x, weight(4, 5, 3))))
  return jnp.einsum("bed,edo,be->bo", hidden, weight(4, 3, 2), gates)


@case((2, 6, 6, 2))
def convolution_dilated(x):
  x = mask(nn.relu(conv(4, kernel_dilation=(2, 1))(x)))
  return conv(2, padding="VALID", kernel_dilation=2)(x)


@case((2, 4, 4, 2))
def convolution_channels_first(x):
  layout = ("NCHW", "OIHW", "NCHW")
  y = jnp.moveaxis(x, -1, 1)
  for before, after in ((2, 5), (5, 4)):
    kernel = weight(after, before, 3, 3).astype(x.dtype)
    y = lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=layout)
    y = mask(nn.relu(y), axis=-3)
  return dense(2)(jnp.mean(y, axis=(2, 3)))


@case((2, 4, 3))
def convolution_with_batch_groups(x):
  """Channels stand where examples would, in two groups; positions are channels, examples are places."""
  y = mask(nn.relu(dense(6)(x)))
  layout = ("WCN", "WIO", "WNC")
  y = lax.conv_general_dilated(
    y, weight(1, 4, 4), (1,), "VALID", dimension_numbers=layout, batch_group_count=2
  )
  return joined(y, 2)


def upsampled(method: str) -> Any:
  def network(x):
    down = mask(nn.relu(conv(4)(x)))
    y = mask(nn.relu(conv(5)(nn.max_pool(down, (2, 2), (2, 2)))))
    y = jax.image.resize(y, (*down.shape[:-1], 5), method)
    return conv(2, (1, 1))(mask(nn.relu(conv(4, (1, 1))(jnp.concatenate([down, y], axis=-1)))))

  network.__name__ = f"u_net_resized_{method}"
  return network


for kind in ("nearest", "bilinear"):
  case((2, 4, 4, 2))(upsampled(kind))


@case((2, 4, 3))
def along_other_axes(x):
  y = mask(nn.relu(dense(5)(x)))
  y = jnp.cumsum(y, axis=1) + lax.cummax(y, axis=1) + jnp.sort(y, axis=1)
  where = jnp.argmax(y, axis=1).astype(y.dtype)
  return dense(3)(y[:, 1] + where + jnp.prod(y, axis=1) + jnp.min(y, axis=1))


def normalised(x: jax.Array) -> jax.Array:
  """Batch norm in training form."""
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axes)
  scale = weight(x.shape[-1]) * lax.rsqrt(jnp.mean(jnp.square(x - mean), axes) + 1e-3)
  return (x - mean) * scale + weight(x.shape[-1])


@case((3, 4, 4, 2), independent=False)
def batch_norm_in_training(x):
  x = mask(nn.relu(normalised(conv(5, use_bias=False)(x))))
  x = mask(nn.relu(normalised(conv(4, use_bias=False)(x))))
  return dense(2)(jnp.mean(x, axis=(1, 2)))


@case((2, 4, 4, 3))
def bottleneck(x):
  y = mask(nn.relu(batch_norm(conv(4, (1, 1), use_bias=False)(x))))
  y = mask(nn.relu(batch_norm(conv(4, strides=2, use_bias=False)(y))))
  y = batch_norm(conv(6, (1, 1), use_bias=False)(y))
  x = nn.relu(y + batch_norm(conv(6, (1, 1), strides=2, use_bias=False)(x)))
  return dense(2)(jnp.mean(x, axis=(1, 2)))


@case((4, 3), independent=False)  # examples are dealt out by their position
def mixture_of_experts(x):
  sizes = jnp.array([1, 0, 2], jnp.int32)
  y = mask(nn.relu(lax.ragged_dot(mask(nn.relu(dense(4)(x))), weight(3, 4, 5), sizes)))
  return lax.ragged_dot(y, weight(3, 5, 2), sizes)


@case((2, 4, 4, 3), removable=False, differentiable=False)
def windows_of_any_function(x):
  y = mask(nn.relu(conv(5)(x)))
  smallest = lax.reduce_window(
    y, jnp.inf, lambda a, b: jnp.minimum(a, b), (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
  )
  return dense(2)(jnp.mean(smallest, axis=(1, 2)))


def transposed(kernel: Any, strides: Any, padding: Any, dilation: Any = 1, groups: int = 1) -> Any:
  """A transposed convolution between masks, and what follows it."""

  def network(x):
    y = mask(nn.relu(conv(4, (1,) * len(kernel))(x)))
    if groups == 1:
      layer = nn.ConvTranspose(
        3, kernel, strides, padding, kernel_dilation=(dilation,) * len(kernel), param_dtype=param_dtype()
      )
      y = layer(y)
    else:
      space = "HW"[: len(kernel)]
      w = weight(*kernel, 4 // groups, 4).astype(y.dtype)
      numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
      y = lax.conv_general_dilated(
        y, w, (1,) * len(kernel), padding, strides, (dilation,) * len(kernel), numbers, groups
      )
    return dense(2)(mask(jnp.tanh(y)))

  network.__name__ = "conv_transposed_" + "_".join(
    str(part).replace(" ", "") for part in (*kernel, "by", *strides, padding, dilation, groups)
  )
  return network


for options in (
  ((3, 3), (2, 2), "SAME"),
  ((3, 2), (2, 3), "VALID"),
  ((2, 2), (3, 1), "SAME"),  # a kernel smaller than its stride: some places of the result are zero
  ((2,), (3,), "VALID"),
  ((5,), (2,), "SAME", 2),
  ((3,), (2,), "VALID", 3),
  ((3,), (1,), "SAME"),
  ((3,), (2,), [(2, 1)], 1, 2),
  ((3, 3), (2, 2), [(0, 2), (-1, 1)], 1, 4),
):
  case((*(2, 4, 3)[: len(options[0]) + 1], 2))(transposed(*options))


@case((2, 3, 5))
def linear_algebra(x):
  y = wide(mask(dense(4)(x)))
  grams = jnp.einsum("btc,bsc->bts", y, y) + jnp.eye(3)
  z = mask(jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(grams), y, lower=True))
  return dense(2)(z) + jnp.linalg.solve(grams, dense(2)(x))


@case((2, 4, 3))
def matrices_in_a_batch_that_is_masked(x):
  """For every channel a matrix; the channels go, and what is computed of them."""
  y = jnp.moveaxis(wide(dense(5)(x)), -1, 1)
  grams = jnp.einsum("bct,bcs->bcts", y, y) + jnp.eye(4)
  return dense(2)(mask(jnp.moveaxis(jnp.linalg.cholesky(grams)[..., 0], 1, -1)))


@case((2, 5))
def complex_numbers(x):
  x = wide(x)
  z = lax.complex(dense(4)(x), dense(4)(x))
  z = mask(z * jnp.exp(1j * dense(4)(x))) / (2 + 1j)
  return jnp.real(z @ (weight(4, 3) + 1j * weight(4, 3))) + jnp.sum(jnp.abs(z) ** 2, -1, keepdims=True)


@case((2, 6, 5), removable=False)
def factorisation_over_the_mask(x):
  q, r = jnp.linalg.qr(wide(mask(dense(4)(x))) + 0.1 * jnp.eye(6, 4))
  return (
    dense(2)(q) + jnp.sum(jnp.linalg.solve(3 * jnp.eye(4) + mask(jnp.tanh(r)), r), axis=(1, 2))[:, None, None]
  )


@case((2, 3, 5))
def heads_in_the_batch(x):
  """Attention as in diffusion models: heads are folded into the batch, and masked before."""
  examples, tokens, _ = x.shape

  def heads(y):
    return jnp.swapaxes(y, 1, 2).reshape(-1, tokens, 2)

  head, depth = fp.Mask(axis=-2), fp.Mask()
  biases = (True, False, True)  # attention does not see that of the keys
  q, k, v = (head(nn.DenseGeneral((4, 2), use_bias=b, param_dtype=param_dtype())(x)) for b in biases)
  q, k, v = heads(depth(q)), heads(depth(k)), heads(mask(v))
  y = (nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v).reshape(examples, 4, tokens, 2)
  return nn.DenseGeneral(3, axis=(1, 3), param_dtype=param_dtype())(y)


@case((2, 6, 3))
def rows_regrouped_over_the_batch(x):
  """``(6 b, 4) -> (3 b, 8) -> (b, 24)``."""
  y = mask(jnp.tanh(dense(4)(x))).reshape(-1, 4)
  y = jnp.sin(y.reshape(-1, 8))
  return dense(2)(y.reshape(-1, 24))
