"""Unmasked networks of tokens: mixers, experts, stacks of layers, recurrent states."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from tests.auto_models import conv, dense, function, group, network, norm, weight

_MIXER = {
  "stream": group(
    9,
    "patches/kernel 2, patches/bias 0, wide/kernel 0, narrow/kernel 1, narrow/bias 0, head/kernel 0",
    *map(norm, ("norm_0", "norm_1", "norm_2")),
  ),
  "between tokens": group(5, "mix/kernel 1, mix/bias 0, back/kernel 0"),
  "inner": group(7, "wide/kernel 1, wide/bias 0, narrow/kernel 0"),
}
_PLACES = "mix/kernel 0, back/kernel 1, back/bias 0"


def mixed(x):
  """Layers over tokens, then over features, and a classifier of their mean."""
  tokens = x.shape[1]
  y = jnp.swapaxes(nn.LayerNorm(name="norm_0")(x), 1, 2)
  y = dense(tokens, "back")(nn.gelu(dense(5, "mix")(y)))
  x = x + jnp.swapaxes(y, 1, 2)
  x = x + dense(9, "narrow")(nn.gelu(dense(7, "wide")(nn.LayerNorm(name="norm_1")(x))))
  return dense(2, "head")(jnp.mean(nn.LayerNorm(name="norm_2")(x), axis=1))


@network((12, 2), groups={**_MIXER, "tokens": group(4, _PLACES)})
def mixer(x):
  """Tokens are the places of a convolution, whole in its result alone; the layer over them produces and reads them."""
  return mixed(conv(9, "patches", (3,), strides=3, padding="VALID")(x))


@network(
  (6, 6, 2),
  groups={
    **_MIXER,
    "stream": group(
      9,
      "patches/kernel 3, patches/bias 0, wide/kernel 0, narrow/kernel 1, narrow/bias 0, head/kernel 0",
      *map(norm, ("norm_0", "norm_1", "norm_2")),
    ),
    "rows": group(2, _PLACES),
    "columns": group(3, _PLACES),
  },
)
def mixer_of_an_image(x):
  """Tokens are rows times columns, so either goes as a whole."""
  x = conv(9, "patches", (3, 2), strides=(3, 2), padding="VALID")(x)
  return mixed(x.reshape(x.shape[0], 6, 9))


@network(
  (12, 2),
  groups={
    **_MIXER,
    "stream": group(
      9,
      "patches/kernel 1, patches/bias 0, wide/kernel 0, narrow/kernel 1, narrow/bias 0, head/kernel 0",
      *map(norm, ("norm_0", "norm_1", "norm_2")),
    ),
  },
  skipped=_PLACES,
)
def mixer_of_cut_patches(x):
  """Tokens are a part of the argument's axis."""
  return mixed(dense(9, "patches")(x.reshape(x.shape[0], 4, 6)))


_EXPERTS = {
  "stem": group(6, "stem/kernel 1, stem/bias 0, router/kernel 0, up/w 1"),
  "inner": group(5, "up/w 2, bias/w 1, down/w 1"),
  "outputs": group(4, "down/w 2, head/kernel 0"),
}


def experts(x, route):
  x = nn.relu(dense(6, "stem")(x))
  gates = route(dense(3, "router")(x))
  y = nn.relu(jnp.einsum("bd,edf->bef", x, weight("up", 3, 6, 5)) + weight("bias", 3, 5))
  y = jnp.einsum("bef,efo->beo", y, weight("down", 3, 5, 4))
  return dense(2, "head")(jnp.einsum("beo,be->bo", y, gates))


@network((7,), groups=_EXPERTS, skipped="router/kernel 1, router/bias 0, up/w 0, bias/w 0, down/w 0")
def experts_by_softmax(x):
  return experts(x, nn.softmax)


@network(
  (7,),
  groups={**_EXPERTS, "experts": group(3, "router/kernel 1, router/bias 0, up/w 0, bias/w 0, down/w 0")},
)
def experts_by_sigmoid(x):
  return experts(x, nn.sigmoid)


class _Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm(name="norm_0")(x)
    query, value = (nn.DenseGeneral((3, n), name=name)(y) for n, name in ((4, "query"), (5, "value")))
    key = nn.DenseGeneral((3, 4), use_bias=False, name="key")(y)
    y = nn.dot_product_attention(query, key, value)
    x = x + nn.DenseGeneral(7, axis=(-2, -1), name="out")(y)
    y = nn.gelu(nn.Dense(6, name="up")(nn.LayerNorm(name="norm_1")(x)))
    return x + nn.Dense(7, name="down")(y), None


def stacked(*texts: str) -> str:
  return ", ".join(f"layers/{part}" for text in texts for part in text.split(", "))


@network(
  (4, 2),
  groups={
    "stream": group(
      7,
      "stem/kernel 1, stem/bias 0, head/kernel 0",
      stacked("norm_0/scale 1, norm_0/bias 1, norm_1/scale 1, norm_1/bias 1, query/kernel 1, key/kernel 1"),
      stacked("value/kernel 1, out/kernel 3, out/bias 1, up/kernel 1, down/kernel 2, down/bias 1"),
    ),
    "heads": group(
      3,
      stacked("query/kernel 2, query/bias 1, key/kernel 2, value/kernel 2, value/bias 1, out/kernel 1"),
      layers=2,
    ),
    "depth": group(4, stacked("query/kernel 3, query/bias 2, key/kernel 3"), layers=2),
    "values": group(5, stacked("value/kernel 3, value/bias 2, out/kernel 2"), layers=2),
    "inner": group(6, stacked("up/kernel 2, up/bias 1, down/kernel 1"), layers=2),
  },
  skipped="layers/up/kernel 0, layers/down/bias 0, layers/query/kernel 0",
)
def scanned_layers(x):
  layers = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
  x, _ = layers(name="layers")(dense(7, "stem")(x), None)
  return dense(2, "head")(x)


@function(
  (8,),
  groups={
    "carried": group(5, "stem 1, w 1, v 2, u 1, head 0"),
    "inner": group(6, "w 2, b 1, v 1", layers=4),
    "written": group(7, "u 2, read 0"),
  },
  skipped="w 0, b 0, v 0, u 0",
)
def scanned_arrays(
  x, *, stem=(8, 5), w=(4, 5, 6), b=(4, 6), v=(4, 6, 5), u=(4, 5, 7), head=(5, 2), read=(7, 2)
):
  """Layers that also write something down, which is summed over their turns and then over features."""

  def layer(x, each):
    w, b, v, u = each
    return x + nn.relu(x @ w + b) @ v, x @ u

  x, written = lax.scan(layer, x @ stem, (w, b, v, u))
  return x @ head + nn.relu(jnp.sum(written, axis=0)) @ read
