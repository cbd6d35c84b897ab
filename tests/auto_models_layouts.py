"""Unmasked networks in which channels are laid out in groups, merged, split, doubled and moved."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from tests.auto_models import conv, dense, function, group, network, norm, weight


@network(
  (5, 5, 4),
  groups={
    "groups": group(2, "before/kernel 3, before/bias 0, grouped/kernel 3, grouped/bias 0, after/kernel 2"),
    "inputs of each": group(3, "before/kernel 3, before/bias 0, grouped/kernel 2"),
    "outputs of each": group(5, "grouped/kernel 3, grouped/bias 0, after/kernel 2"),
  },
)
def grouped_convolution(x):
  x = nn.relu(conv(6, "before", (1, 1))(x))
  x = nn.relu(conv(10, "grouped", feature_group_count=2)(x))
  return conv(2, "after", (1, 1))(x)


@network(
  (5, 5, 2),
  groups={
    "channels": group(
      4, "before/kernel 3, before/bias 0, depthwise/kernel 3, depthwise/bias 0, after/kernel 2"
    ),
    "filters of each": group(3, "depthwise/kernel 3, depthwise/bias 0, after/kernel 2"),
  },
)
def depthwise_multiplier(x):
  x = nn.relu(conv(4, "before", (1, 1))(x))
  x = nn.silu(conv(12, "depthwise", feature_group_count=4)(x))
  return conv(2, "after", (1, 1))(x)


_SHUFFLED = "grouped_0/kernel 3, grouped_0/bias 0, depthwise/kernel 3, depthwise/bias 0"


@network(
  (4, 4, 6),
  groups={
    "inputs of each of the first groups": group(4, "before/kernel 3, before/bias 0, grouped_0/kernel 2"),
    # 2 groups of 15, shuffled to 15 times 2, which are 3 groups of 5 times 2.
    "first groups": group(2, "before/kernel 3, before/bias 0, grouped_1/kernel 2", _SHUFFLED),
    "second groups": group(3, "grouped_1/kernel 3, grouped_1/bias 0, after/kernel 2", _SHUFFLED),
    "what both share": group(5, "grouped_1/kernel 2", _SHUFFLED),
    "outputs of each of the second groups": group(7, "grouped_1/kernel 3, grouped_1/bias 0, after/kernel 2"),
  },
)
def channel_shuffle(x):
  x = nn.relu(conv(8, "before", (1, 1))(x))
  x = nn.relu(conv(30, "grouped_0", (1, 1), feature_group_count=2)(x))
  x = x.reshape(*x.shape[:-1], 2, 15).swapaxes(-1, -2).reshape(x.shape)
  x = nn.relu(conv(30, "depthwise", feature_group_count=30)(x))
  x = nn.relu(conv(21, "grouped_1", (1, 1), feature_group_count=3)(x))
  return conv(2, "after", (1, 1))(x)


@network(
  (3, 4, 3),
  groups={
    "before": group(4, "before/kernel 3, before/bias 0, up/kernel 2"),
    "channels": group(5, "up/kernel 3, up/bias 0, out/kernel 2"),  # beside 2 by 3 places
  },
  skipped="up/kernel 3, up/bias 0",
)
def pixel_shuffle(x):
  y = conv(30, "up")(nn.relu(conv(4, "before")(x)))
  examples, h, w, _ = y.shape
  y = y.reshape(examples, h, w, 2, 3, 5).transpose(0, 1, 3, 2, 4, 5).reshape(examples, 2 * h, 3 * w, 5)
  return conv(2, "out")(nn.relu(y))


_NORMED = "before/kernel 3, before/bias 0, norm/scale 0, norm/bias 0, after/kernel 2"


@network(
  (4, 4, 4),
  groups={"groups": group(2, _NORMED), "channels of each": group(5, _NORMED)},
)
def group_norm(x):
  x = nn.GroupNorm(num_groups=2, name="norm")(conv(10, "before")(x))
  return conv(3, "after")(nn.silu(x))


@network(
  (4, 4, 4),
  groups={"groups": group(2, _NORMED), "channels of each": group(5, _NORMED)},
)
def group_norm_in_two_passes(x):
  x = nn.GroupNorm(num_groups=2, use_fast_variance=False, name="norm")(conv(10, "before")(x))
  return conv(3, "after")(nn.silu(x))


@function(
  (2, 6, 7),
  groups={
    "first": group(5, "k 0, b 0, kk 1"),
    "second": group(4, "kk 0, w 0"),
  },
)
def channels_first(x, *, k=(5, 2, 3, 3), b=(5,), kk=(4, 5, 3, 3), w=(4, 3)):
  layer = lambda x, k: lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
  )
  x = nn.relu(layer(x, k) + b[:, None, None])
  return jnp.mean(nn.relu(layer(x, kk)), axis=(2, 3)) @ w


@network(
  (4, 6, 2),
  groups={
    "channels": group(5, "conv/kernel 3, conv/bias 0, merge/kernel 0", norm("norm")),  # four times over
    "merged": group(7, "merge/kernel 1, head/kernel 0"),
  },
)
def patches_merged(x):
  """Four neighbours side by side, as between the stages of a Swin network."""
  x = nn.relu(conv(5, "conv")(x))
  x = jnp.concatenate([x[:, i::2, j::2] for j in range(2) for i in range(2)], axis=-1)
  x = dense(7, "merge", use_bias=False)(nn.LayerNorm(name="norm")(x))
  return dense(2, "head")(jnp.mean(nn.gelu(x), axis=(1, 2)))


@network(
  (3,),
  groups={
    "both signs": group(5, "first/kernel 1, first/bias 0, second/kernel 0"),
    "units": group(4, "second/kernel 1, second/bias 0, left/kernel 0, right/kernel 0"),
    "left": group(6, "left/kernel 1, left/bias 0, head/kernel 0"),
    "right": group(7, "right/kernel 1, right/bias 0, head/kernel 0"),
  },
  skipped="second/kernel 1, second/bias 0",
)
def doubled_and_merged(x):
  """Of both signs side by side; the largest of three pieces for each unit; all products of two layers."""
  x = dense(5, "first")(x)
  x = nn.relu(jnp.concatenate([x, -x], axis=-1))
  x = jnp.max(dense(12, "second")(x).reshape(x.shape[0], 4, 3), axis=-1)
  left, right = (jnp.tanh(dense(n, name)(x)) for n, name in ((6, "left"), (7, "right")))
  return dense(2, "head")((left[:, :, None] * right[:, None]).reshape(x.shape[0], -1))


@network(
  (6, 6, 2),
  groups={
    "inputs": group(3, "before/kernel 3, before/bias 0, local/kernel 2"),  # beside six taps
    "rows": group(4, "local/kernel 0, local/bias 0, head/kernel 0"),
    "columns": group(5, "local/kernel 1, local/bias 1, head/kernel 0"),
    "outputs": group(7, "local/kernel 3, local/bias 2, head/kernel 0"),
  },
)
def weights_of_each_place(x):
  """A convolution without shared weights, which makes its places, so rows and columns may go."""
  x = nn.relu(conv(3, "before", (1, 1))(x))
  x = nn.relu(nn.ConvLocal(7, (3, 2), padding="VALID", name="local")(x))
  return dense(2, "head")(x.reshape(x.shape[0], -1))


@network(
  (4, 4, 2),
  (3,),
  groups={
    "channels": group(
      5, "first/kernel 3, first/bias 0, norm/scale 0, norm/bias 0, bend/kernel 1, bend/bias 0, last/kernel 2"
    ),
    "time": group(6, "time/kernel 1, time/bias 0, bend/kernel 0"),
  },
)
def scaled_and_shifted(x, time):
  """By a second argument, as in networks that take noise away."""
  scale, shift = jnp.split(dense(10, "bend")(nn.silu(dense(6, "time")(time))), 2, axis=-1)
  x = nn.LayerNorm(name="norm")(conv(5, "first")(x))
  return conv(2, "last")(nn.silu(x * (1 + scale[:, None, None]) + shift[:, None, None]))


@function(
  (4, 4, 3),
  (3,),
  groups={"inputs": group(5, "first 3, style 1, k 2"), "outputs": group(6, "k 3, last 2")},
)
def kernels_of_each_example(
  x, style_of, *, first=(1, 1, 3, 5), style=(3, 5), k=(3, 3, 5, 6), last=(1, 1, 6, 2)
):
  """Of unit length, and scaled by a second argument; examples are groups of one convolution's channels."""
  layer = lambda x, k, groups=1: lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
  )
  examples = x.shape[0]
  x = jnp.moveaxis(nn.relu(layer(x, first)), 0, 2).reshape(1, 4, 4, examples * 5)
  kernels = k * (style_of @ style)[:, None, None, :, None]
  kernels *= lax.rsqrt(jnp.sum(jnp.square(kernels), axis=(1, 2, 3), keepdims=True) + 1e-3)
  x = layer(x, jnp.moveaxis(kernels, 0, 3).reshape(3, 3, 5, examples * 6), examples)
  return layer(nn.relu(jnp.moveaxis(x.reshape(4, 4, examples, 6), 2, 0)), last)


@network(
  (4, 3),
  groups={
    "first": group(5, "first/kernel 1, first/bias 0, second/kernel 0"),
    "second": group(6, "second/kernel 1, second/bias 0, head/w 0"),
  },
)
def examples_behind(x):
  """Merged behind tokens where one layer sums, behind the features where the next one does."""
  examples, tokens, _ = x.shape
  x = nn.relu(dense(5, "first")(jnp.swapaxes(x, 0, 1).reshape(tokens * examples, 3)))
  x = jnp.swapaxes(nn.relu(dense(6, "second")(x)).reshape(tokens, examples, 6), 1, 2)
  return jnp.einsum("tfb,fo->bto", x, weight("head", 6, 2))
