"""Unmasked networks of images: sums, concatenations, gates, norms."""

import flax.linen as nn
import jax.numpy as jnp

from tests.auto_models import batch_norm, conv, dense, group, network, norm, normed, weight


def pooled(x):
  return jnp.mean(x, axis=(1, 2))


@network(
  (6, 6, 4),
  groups={
    "first": group(5, "conv_0/kernel 3, conv_0/bias 0, conv_1/kernel 2"),
    "second": group(7, "conv_1/kernel 3, conv_1/bias 0, dense/kernel 0"),  # beside four places
    "third": group(8, "dense/kernel 1, dense/bias 0, head/kernel 0"),
  },
  skipped="conv_0/kernel 0, conv_0/kernel 2, head/kernel 1, head/bias 0",
)
def plain(x):
  x = nn.max_pool(nn.relu(conv(5, "conv_0")(x)), (2, 2), (2, 2))
  x = nn.relu(conv(7, "conv_1", strides=2)(x))
  x = nn.relu(dense(8, "dense")(x.reshape(x.shape[0], -1)))
  return dense(2, "head")(x)


@network(
  (6, 6, 4),
  groups={
    "trunk": group(
      5,
      "stem/kernel 3, inner_0/kernel 2, outer_0/kernel 3, inner_1/kernel 2, shortcut/kernel 2",
      batch_norm("stem_norm"),
      batch_norm("outer_0_norm"),
    ),
    "inner of the first block": group(6, "inner_0/kernel 3, outer_0/kernel 2", batch_norm("inner_0_norm")),
    "inner of the second block": group(7, "inner_1/kernel 3, outer_1/kernel 2", batch_norm("inner_1_norm")),
    "second trunk": group(
      8,
      "outer_1/kernel 3, shortcut/kernel 3, head/kernel 0",
      batch_norm("outer_1_norm"),
      batch_norm("shortcut_norm"),
    ),
  },
)
def residual(x):
  layer = lambda x, features, name, *args, **options: normed(
    conv(features, name, *args, use_bias=False, **options)(x), f"{name}_norm"
  )
  x = nn.relu(layer(x, 5, "stem"))
  y = nn.relu(layer(x, 6, "inner_0"))
  x = nn.relu(x + layer(y, 5, "outer_0"))
  y = nn.relu(layer(x, 7, "inner_1", strides=2))
  x = nn.relu(layer(y, 8, "outer_1") + layer(x, 8, "shortcut", (1, 1), strides=2))
  return dense(2, "head")(pooled(x))


@network(
  (5, 5, 2),
  groups={
    "stem": group(
      4,
      "stem/kernel 3, stem/bias 0, layer_0/kernel 2, layer_1/kernel 2, head/kernel 0",
      *map(batch_norm, ("norm_0", "norm_1", "norm_2")),
    ),
    "first layer": group(
      3,
      "layer_0/kernel 3, layer_0/bias 0, layer_1/kernel 2, head/kernel 0",
      *map(batch_norm, ("norm_1", "norm_2")),
    ),
    "second layer": group(5, "layer_1/kernel 3, layer_1/bias 0, head/kernel 0", batch_norm("norm_2")),
  },
)
def dense_net(x):
  features = [conv(4, "stem")(x)]
  for at, growth in enumerate((3, 5)):
    y = nn.relu(normed(jnp.concatenate(features, axis=-1), f"norm_{at}"))
    features.append(conv(growth, f"layer_{at}")(y))
  return dense(2, "head")(pooled(nn.relu(normed(jnp.concatenate(features, axis=-1), "norm_2"))))


U_NET = {
  "down": group(4, "down/kernel 3, down/bias 0, bottom/kernel 2, join/kernel 2"),
  "bottom": group(5, "bottom/kernel 3, bottom/bias 0, up/kernel 2"),
  "up": group(3, "up/kernel 3, up/bias 0, join/kernel 2"),
  "join": group(6, "join/kernel 3, join/bias 0, out/kernel 2"),
}


@network((8, 8, 2), groups=U_NET)
def u_net(x):
  down = nn.relu(conv(4, "down")(x))
  y = nn.relu(conv(5, "bottom")(nn.max_pool(down, (2, 2), (2, 2))))
  up = nn.ConvTranspose(3, (2, 2), strides=(2, 2), name="up")(y)
  y = nn.relu(conv(6, "join")(jnp.concatenate([down, up], axis=-1)))
  return conv(2, "out", (1, 1))(y)


MOBILE = {
  "trunk": group(
    4,
    "stem/kernel 3, stem/bias 0, expand/kernel 2, project/kernel 3, head/kernel 0",
    batch_norm("project_norm"),
  ),
  "inner": group(
    7,
    "expand/kernel 3, depthwise/kernel 3, project/kernel 2",
    batch_norm("expand_norm"),
    batch_norm("depthwise_norm"),
  ),
}


@network((5, 5, 3), groups=MOBILE)
def mobile_net(x, gate=lambda y: y):
  layer = lambda x, features, name, *args, **options: normed(
    conv(features, name, *args, use_bias=False, **options)(x), f"{name}_norm"
  )
  x = conv(4, "stem")(x)
  y = nn.relu6(layer(x, 7, "expand", (1, 1)))
  y = nn.relu6(layer(y, 7, "depthwise", feature_group_count=7))
  x = x + layer(gate(y), 4, "project", (1, 1))
  return dense(2, "head")(pooled(x))


@network(
  (5, 5, 3),
  groups={
    "trunk": MOBILE["trunk"],
    "inner": group(
      7,
      "expand/kernel 3, depthwise/kernel 3, squeeze/kernel 2, excite/kernel 3, excite/bias 0, project/kernel 2",
      batch_norm("expand_norm"),
      batch_norm("depthwise_norm"),
    ),
    "gate": group(3, "squeeze/kernel 3, squeeze/bias 0, excite/kernel 2"),
  },
)
def efficient_net(x):
  def gate(y):
    s = nn.silu(conv(3, "squeeze", (1, 1))(jnp.mean(y, axis=(1, 2), keepdims=True)))
    return y * nn.sigmoid(conv(7, "excite", (1, 1))(s))

  return mobile_net(x, gate)


@network(
  (8, 8, 3),
  groups={
    "stream": group(
      4,
      "stem/kernel 3, stem/bias 0, depthwise/kernel 3, depthwise/bias 0, up/kernel 0, down/kernel 1, down/bias 0",
      "gamma/w 0, shrink/kernel 2",
      *map(norm, ("stem_norm", "block_norm", "shrink_norm")),
    ),
    "inner": group(6, "up/kernel 1, up/bias 0, down/kernel 0"),
    "second stream": group(5, "shrink/kernel 3, shrink/bias 0, head/kernel 0", norm("head_norm")),
  },
)
def conv_next(x):
  layer_norm = lambda x, name: nn.LayerNorm(name=name)(x)
  x = layer_norm(conv(4, "stem", (2, 2), strides=2)(x), "stem_norm")
  y = layer_norm(conv(4, "depthwise", feature_group_count=4)(x), "block_norm")
  x = x + weight("gamma", 4) * dense(4, "down")(nn.gelu(dense(6, "up")(y)))
  x = conv(5, "shrink", (2, 2), strides=2)(layer_norm(x, "shrink_norm"))
  return dense(2, "head")(layer_norm(pooled(x), "head_norm"))


@network(
  (5, 5, 3),
  groups={
    "first": group(4, "first/kernel 3, first/bias 0, second/kernel 2"),
    "second": group(5, "second/kernel 3, second/bias 0, head/kernel 0"),
  },
  skipped="second/kernel 2",  # for its part that is the argument's
)
def argument_concatenated(x):
  y = jnp.concatenate([x, nn.relu(conv(4, "first")(x))], axis=-1)
  return dense(2, "head")(pooled(nn.relu(conv(5, "second")(y))))


@network(
  (5, 5, 2),
  groups={"first": group(4, "first/kernel 3, first/bias 0, second/kernel 2")},
  skipped="second/kernel 3, second/bias 0, head/kernel 0",
)
def features_returned(x):
  y = pooled(conv(5, "second")(nn.relu(conv(4, "first")(x))))
  return dense(3, "head")(nn.relu(y)), y


@network(
  (6, 6, 2),
  groups={
    "trunk": group(
      4, "stem/kernel 3, stem/bias 0, inner/kernel 2, outer/kernel 3, outer/bias 0, head/kernel 0"
    ),
    "inner": group(5, "inner/kernel 3, inner/bias 0, outer/kernel 2"),
    "beside its front": group(2, "outer/kernel 3, outer/bias 0, head/kernel 0"),
    "beside its end": group(3, "outer/kernel 3, outer/bias 0, head/kernel 0"),
  },
)
def shortcut_padded(x):
  """Of few features to more, by zeros: those of the branch that meet zeros go by themselves."""
  x = nn.relu(conv(4, "stem")(x))
  y = conv(9, "outer")(nn.relu(conv(5, "inner", strides=2)(x)))
  x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 3)))
  return dense(2, "head")(pooled(nn.relu(x + y)))
