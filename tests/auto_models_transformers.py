"""Unmasked transformers: a decoder, rotary positions, windows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.auto_models import Ids, conv, dense, group, network, norm, weight
from tests.auto_models_attention import heads, joined


def turned(x: jax.Array, form: str) -> jax.Array:
  """Rotary positions of (examples, T, heads, depth), in the three forms in which they are written."""
  *_, length, _, depth = x.shape
  angles = jnp.arange(length)[:, None] * 100.0 ** (-jnp.arange(depth // 2) / depth)
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  if form == "halves":
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  if form == "pairs":
    a, b = jnp.moveaxis(x.reshape(*x.shape[:-1], depth // 2, 2), -1, 0)
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
  assert form == "every two"
  cos, sin = (jnp.repeat(y, 2, axis=-1) for y in (cos, sin))
  crossed = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
  return x * cos + crossed * sin


@network(
  Ids(11, (4,)),
  groups={
    "stream": group(
      9,
      "embed/embedding 1, query/kernel 0, key/kernel 0, value/kernel 0, out/kernel 2, out/bias 0",
      "gate/kernel 0, up/kernel 0, down/kernel 1, norm_0/scale 0, norm_1/scale 0, norm_2/scale 0",
    ),
    "heads of keys and values": group(2, "query/kernel 1, key/kernel 1, value/kernel 1, out/kernel 0"),
    "queries of each": group(3, "query/kernel 1, out/kernel 0"),
    "half of the depth": group(5, "query/kernel 2, key/kernel 2"),
    "values": group(7, "value/kernel 2, out/kernel 1"),
    "inner": group(8, "gate/kernel 1, up/kernel 1, down/kernel 0"),
  },
  skipped="embed/embedding 0",
)
def decoder(tokens):
  """Queries in groups, rotary positions, a gated layer, tied embeddings."""
  root_mean_square = lambda x, name: nn.RMSNorm(name=name)(x)
  plain = lambda number, depth, name: heads(number, depth, name, use_bias=False)
  embed = nn.Embed(11, 9, name="embed")
  x = embed(tokens)
  y = root_mean_square(x, "norm_0")
  query, key = (turned(plain(n, 10, name)(y), "halves") for n, name in ((6, "query"), (2, "key")))
  query = query.reshape(*query.shape[:2], 2, 3, 10)
  scores = jnp.einsum("btkgd,bskd->bkgts", query, key) / np.sqrt(10)
  scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), scores, -1e9)
  y = jnp.einsum("bkgts,bskd->btkgd", nn.softmax(scores), plain(2, 7, "value")(y))
  x = x + joined(9)(y.reshape(*y.shape[:2], 6, 7))
  y = root_mean_square(x, "norm_1")
  y = nn.silu(dense(8, "gate", use_bias=False)(y)) * dense(8, "up", use_bias=False)(y)
  x = x + dense(9, "down", use_bias=False)(y)
  return embed.attend(root_mean_square(x, "norm_2"))


@network(
  (4, 3),
  groups={
    "heads of keys and values": group(2, "query/kernel 1, key/kernel 1, value/kernel 1, out/kernel 0"),
    "queries of each": group(3, "query/kernel 1, out/kernel 0"),
    "depth": group(5, "query/kernel 2, key/kernel 2"),
    "values": group(5, "value/kernel 2, out/kernel 1"),
  },
)
def grouped_queries_by_jax(x):
  query, key, value = (heads(n, 5, name, use_bias=False)(x) for n, name in ((6, "query"), (2, "key"), (2, "value")))  # fmt: skip
  return joined(4)(jax.nn.dot_product_attention(query, key, value, is_causal=True))


for form in ("pairs", "every two"):

  @network(
    (4, 3),
    name=f"rotary_by_{form}".replace(" ", "_"),
    groups={
      "heads": group(2, "query/kernel 1, key/kernel 1, value/kernel 1, out/kernel 0"),
      "half of the depth": group(5, "query/kernel 2, key/kernel 2"),
      "values": group(7, "value/kernel 2, out/kernel 1"),
    },
  )
  def rotary(x, form=form):
    query, key, value = (heads(2, n, name, use_bias=False)(x) for n, name in ((10, "query"), (10, "key"), (7, "value")))  # fmt: skip
    return joined(4)(nn.dot_product_attention(turned(query, form), turned(key, form), value))


def cut(x: jax.Array) -> jax.Array:
  """Windows of 3 by 2, folded into the examples."""
  examples, h, w, features = x.shape
  x = x.reshape(examples, h // 3, 3, w // 2, 2, features)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 6, features)


def laid(x: jax.Array, h: int, w: int) -> jax.Array:
  """The inverse of ``cut``."""
  x = x.reshape(-1, h // 3, w // 2, 3, 2, x.shape[-1])
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


@network(
  (6, 4, 2),
  groups={
    "stream": group(
      7,
      "stem/kernel 3, stem/bias 0, qkv/kernel 0, out/kernel 1, out/bias 0, up/kernel 0, down/kernel 1, down/bias 0",
      "head/kernel 0",
      norm("norm_0"),
      norm("norm_1"),
    ),
    "heads": group(3, "qkv/kernel 1, qkv/bias 0, table/w 1, out/kernel 0"),
    "depth": group(5, "qkv/kernel 1, qkv/bias 0"),
    "values": group(5, "qkv/kernel 1, qkv/bias 0, out/kernel 0"),
    "inner": group(8, "up/kernel 1, up/bias 0, down/kernel 0"),
  },
  skipped="table/w 0",
)
def swin(x):
  x = conv(7, "stem", (1, 1))(x)
  y = cut(jnp.roll(nn.LayerNorm(name="norm_0")(x), (-1, -1), axis=(1, 2)))
  query, key, value = jnp.moveaxis(dense(45, "qkv")(y).reshape(-1, 6, 3, 3, 5), 2, 0)
  rows, columns = (np.arange(6) // 2, np.arange(6) % 2)
  places = (rows[:, None] - rows + 2) * 3 + columns[:, None] - columns + 1
  bias = jnp.moveaxis(weight("table", 15, 3)[places.reshape(-1)].reshape(6, 6, 3), -1, 0)
  scores = jnp.einsum("nthd,nshd->nhts", query, key) / np.sqrt(5) + bias
  y = jnp.einsum("nhts,nshd->nthd", nn.softmax(scores), value).reshape(-1, 6, 15)
  x = x + jnp.roll(laid(dense(7, "out")(y), 6, 4), (1, 1), axis=(1, 2))
  x = x + dense(7, "down")(nn.gelu(dense(8, "up")(nn.LayerNorm(name="norm_1")(x))))
  return dense(2, "head")(jnp.mean(x, axis=(1, 2)))
