"""Unmasked networks with attention: heads, the depth that scores sum over, that of values, and all layouts of them."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.auto_models import Ids, conv, dense, group, network, norm, weight


def heads(number: int, depth: int, name: str, **options: Any) -> nn.DenseGeneral:
  return nn.DenseGeneral((number, depth), name=name, **options)


def joined(features: int, name: str = "out") -> nn.DenseGeneral:
  return nn.DenseGeneral(features, axis=(-2, -1), name=name)


def attention(x: Any, memory: Any, number: int, depth: int, values: int) -> jax.Array:
  """With biases, but for keys: attention does not see those, so their gradients would be rounding errors."""
  query = heads(number, depth, "query")(x)
  key = heads(number, depth, "key", use_bias=False)(memory)
  value = heads(number, values, "value")(memory)
  return joined(x.shape[-1])(nn.dot_product_attention(query, key, value))


HEADS = group(3, "query/kernel 1, query/bias 0, key/kernel 1, value/kernel 1, value/bias 0, out/kernel 0")
DEPTH = group(4, "query/kernel 2, query/bias 1, key/kernel 2")
VALUES = group(5, "value/kernel 2, value/bias 1, out/kernel 1")
VIT = {
  "stream": group(
    9,
    "patches/kernel 3, patches/bias 0, class/w 2, positions/w 2, query/kernel 0, key/kernel 0, value/kernel 0",
    "out/kernel 2, out/bias 0, up/kernel 0, down/kernel 1, down/bias 0, head/kernel 0",
    *map(norm, ("norm_0", "norm_1", "norm_2")),
  ),
  "heads": HEADS,
  "depth": DEPTH,
  "values": VALUES,
  "inner": group(7, "up/kernel 1, up/bias 0, down/kernel 0"),
}


@network((6, 6, 3), groups=VIT, skipped="positions/w 1")
def vit(x, one_pass=True):
  layer_norm = lambda x, name: nn.LayerNorm(use_fast_variance=one_pass, name=name)(x)
  x = conv(9, "patches", strides=3, padding="VALID")(x)
  x = x.reshape(x.shape[0], -1, 9)
  first = jnp.broadcast_to(weight("class", 1, 1, 9), (x.shape[0], 1, 9))
  x = jnp.concatenate([first, x], axis=1) + weight("positions", 1, 5, 9)
  y = layer_norm(x, "norm_0")
  x = x + attention(y, y, 3, 4, 5)
  x = x + dense(9, "down")(nn.gelu(dense(7, "up")(layer_norm(x, "norm_1"))))
  return dense(2, "head")(layer_norm(x, "norm_2")[:, 0])


@network((6, 6, 3), groups=VIT, skipped="positions/w 1")
def vit_in_two_passes(x):
  return vit(x, one_pass=False)


@network(
  (4, 2),
  groups={
    "stream": group(
      7, "stem/kernel 1, stem/bias 0, attention/out/kernel 2, attention/out/bias 0, head/kernel 0",
      "attention/query/kernel 0, attention/key/kernel 0, attention/value/kernel 0",
    ),
    "heads": group(
      3, "attention/query/kernel 1, attention/query/bias 0, attention/key/kernel 1, attention/key/bias 0",
      "attention/value/kernel 1, attention/value/bias 0, attention/out/kernel 0",
    ),
    "depth": group(
      5, "attention/query/kernel 2, attention/query/bias 1, attention/key/kernel 2, attention/key/bias 1",
    ),
    "values": group(5, "attention/value/kernel 2, attention/value/bias 1, attention/out/kernel 1"),
  },
)  # fmt: skip
def attention_by_flax(x):
  x = dense(7, "stem")(x)
  layer = nn.MultiHeadDotProductAttention(3, qkv_features=15, name="attention")
  return dense(2, "head")(x + layer(x, mask=nn.make_causal_mask(x[..., 0])))


_FUSED = {
  "stem": group(7, "stem/kernel 1, stem/bias 0, qkv/kernel 0"),
  "heads": group(2, "qkv/kernel 1, qkv/bias 0, out/kernel 0"),
}
_DEPTHS = {
  **_FUSED,
  "depth": group(5, "qkv/kernel 1, qkv/bias 0"),
  "values": group(5, "qkv/kernel 1, qkv/bias 0, out/kernel 0"),
}


def _moved(y: jax.Array, axis: int) -> Sequence[jax.Array]:
  return tuple(jnp.moveaxis(y, axis, 0))


def _ranges(y: jax.Array, axis: int) -> Sequence[jax.Array]:
  y = jnp.moveaxis(y, axis, 0)
  return y[0], *y[1:]


def _taken(y: jax.Array, axis: int) -> Sequence[jax.Array]:
  return tuple(jnp.take(y, at, axis=axis) for at in range(3))


def _at_index(y: jax.Array, axis: int) -> Sequence[jax.Array]:
  return tuple(lax.dynamic_index_in_dim(y, at, axis, keepdims=False) for at in range(3))


def fused(x: jax.Array, axes: str, *shape: int, read: Callable[..., Any] = _moved) -> jax.Array:
  """One layer for q, k and v, its features laid out as ``axes`` says."""
  y = dense(30, "qkv")(x).reshape(*x.shape[:2], *shape)
  query, key, value = read(y, 2 + axes.index("3"))
  return nn.dot_product_attention(query, key, value)


for _name, _read in {"ranges": _ranges, "take": _taken, "dynamic_index": _at_index}.items():

  @network((4, 3), name=f"fused_read_by_{_name}", groups=_DEPTHS)
  def _fused(x, read=_read):
    y = fused(dense(7, "stem")(x), "3hd", 3, 2, 5, read=read)
    return dense(4, "out")(y.reshape(*y.shape[:2], -1))


@network((4, 3), groups=_DEPTHS)
def fused_3_heads_depth(x):
  y = fused(dense(7, "stem")(x), "3hd", 3, 2, 5)
  return dense(4, "out")(y.reshape(*y.shape[:2], -1))


@network((4, 3), groups=_DEPTHS)
def fused_heads_3_depth(x):
  y = fused(dense(7, "stem")(x), "h3d", 2, 3, 5)
  return dense(4, "out")(y.reshape(*y.shape[:2], -1))


@network(
  (4, 2),
  groups={
    **_FUSED,
    "depth": group(5, "qkv/kernel 1, qkv/bias 0"),
    "values": group(3, "qkv/kernel 1, qkv/bias 0, out/kernel 0"),
  },
)
def fused_end_to_end(x):
  parts = jnp.split(dense(26, "qkv")(dense(7, "stem")(x)), [10, 20], axis=-1)
  query, key, value = (y.reshape(*y.shape[:2], 2, -1) for y in parts)
  y = nn.dot_product_attention(query, key, value)
  return dense(4, "out")(y.reshape(*y.shape[:2], -1))


@network(
  (4, 6),
  (5, 4),
  groups={
    "stream": group(7, "stem/kernel 1, stem/bias 0, query/kernel 0, out/kernel 1, out/bias 0, head/kernel 0"),
    "memory": group(8, "memory/kernel 1, memory/bias 0, key/kernel 0, value/kernel 0"),
    "heads": group(
      2, "query/kernel 1, query/bias 0, key/kernel 1, value/kernel 1, value/bias 0, out/kernel 0"
    ),
    "depth": group(5, "query/kernel 1, query/bias 0, key/kernel 1"),
    "values": group(3, "value/kernel 1, value/bias 0, out/kernel 0"),
  },
)
def cross_attention(x, memory):
  """Of two arguments, by kernels that have heads and depth merged."""
  x, memory = dense(7, "stem")(x), nn.relu(dense(8, "memory")(memory))
  query, key = dense(10, "query")(x), dense(10, "key", use_bias=False)(memory)
  parts = query, key, dense(6, "value")(memory)
  y = nn.dot_product_attention(*(y.reshape(*y.shape[:2], 2, -1) for y in parts))
  return dense(4, "head")(x + dense(7, "out")(y.reshape(*y.shape[:2], -1)))


@network(
  (4, 3),
  groups={
    "heads": group(2, "query/kernel 1, value/kernel 1, out/kernel 0, near/w 1"),
    "depth": group(5, "query/kernel 2, key/kernel 1, query_norm/scale 0, key_norm/scale 0"),
    "values": group(6, "value/kernel 2, out/kernel 1"),
  },
  skipped="near/w 0",
)
def relative_positions(x):
  """One key for all heads, norms of queries and keys, biases by distance: those of variables, and constant ones."""
  query, value = (heads(2, n, name, use_bias=False)(x) for n, name in ((5, "query"), (6, "value")))
  key = dense(5, "key", use_bias=False)(x)
  query, key = nn.RMSNorm(name="query_norm")(query), nn.RMSNorm(name="key_norm")(key)
  distance = np.arange(4)[:, None] - np.arange(4)
  learned = jnp.moveaxis(weight("near", 7, 2)[distance + 3], -1, 0)
  fixed = -np.array([0.5, 0.25])[:, None, None] * np.abs(distance)
  scores = jnp.einsum("bthd,bsd->bhts", query, key) + learned + fixed
  return joined(4)(jnp.einsum("bhts,bshd->bthd", nn.softmax(scores), value))


@network(
  (4, 2),
  groups={
    "queries": group(6, "queries/w 0, head/kernel 0"),
    "tokens": group(7, "stem/kernel 1, stem/bias 0, key/kernel 0, value/kernel 0"),
    "heads": group(2, "query/kernel 1, key/kernel 1, value/kernel 1, out/kernel 0"),
    "depth": group(5, "query/kernel 2, key/kernel 2"),
    "values": group(4, "value/kernel 2, out/kernel 1"),
    "features": group(8, "out/kernel 2, out/bias 0, head/kernel 0"),
  },
)
def learned_queries(x):
  """Queries that are variables, and do not attend to each other; the sum over their own features is of variables alone."""
  x = nn.relu(dense(7, "stem")(x))
  query = heads(2, 5, "query", use_bias=False)(weight("queries", 6, 9))
  key, value = (heads(2, n, name, use_bias=False)(x) for n, name in ((5, "key"), (4, "value")))
  scores = jnp.einsum("qhd,bshd->bhqs", query, key)
  y = jnp.tanh(joined(8)(jnp.einsum("bhqs,bshd->bqhd", nn.softmax(scores), value)))
  return dense(2, "head")(y.reshape(y.shape[0], -1))


@network(
  (8, 3),
  groups={
    "heads": group(2, "query/kernel 1, key/kernel 1, value/kernel 1, out/kernel 0"),
    "depth": group(5, "query/kernel 2, key/kernel 2"),
    "values": group(6, "value/kernel 2, out/kernel 1"),
  },
)
def in_chunks(x):
  """Keys and values four at a time, with a running maximum and running sums."""
  query, key, value = (
    heads(2, n, name, use_bias=False)(x) for n, name in ((5, "query"), (5, "key"), (6, "value"))
  )

  def chunk(state, each):
    most, total, summed = state
    key, value = each
    scores = jnp.einsum("bthd,bshd->bhts", query, key)
    higher = jnp.maximum(most, jnp.max(scores, axis=-1))
    weights, old = jnp.exp(scores - higher[..., None]), jnp.exp(most - higher)
    summed = summed * old[..., None] + jnp.einsum("bhts,bshv->bhtv", weights, value)
    return (higher, total * old + jnp.sum(weights, axis=-1), summed), None

  chunks = tuple(jnp.moveaxis(y.reshape(y.shape[0], 2, 4, *y.shape[2:]), 1, 0) for y in (key, value))
  nothing = jnp.zeros((x.shape[0], 2, 8), x.dtype)
  start = nothing - 1e9, nothing, jnp.zeros((*nothing.shape, 6), x.dtype)
  (_, total, summed), _ = lax.scan(chunk, start, chunks)
  return joined(4)(jnp.moveaxis(summed / total[..., None], 1, 2))


def folded(x: jax.Array, number: int, depth: int) -> jax.Array:
  """Attention with its heads folded into the batch."""
  examples, tokens, _ = x.shape

  def heads(y: jax.Array) -> jax.Array:
    return jnp.swapaxes(y.reshape(examples, tokens, number, -1), 1, 2).reshape(
      -1, tokens, y.shape[-1] // number
    )

  query, key = (heads(dense(number * depth, name, use_bias=False)(x)) for name in ("query", "key"))
  value = heads(dense(number * 5, "value")(x))
  y = jax.nn.softmax(query @ key.mT) @ value
  return jnp.swapaxes(y.reshape(examples, number, tokens, -1), 1, 2).reshape(examples, tokens, -1)


_FOLDED = {
  "heads": group(3, "query/kernel 1, key/kernel 1, value/kernel 1, value/bias 0, out/kernel 0"),
  "depth": group(4, "query/kernel 1, key/kernel 1"),
  "values": group(5, "value/kernel 1, value/bias 0, out/kernel 0"),
}


@network((4, 2), groups=_FOLDED)
def heads_in_the_batch(x):
  return dense(6, "out")(folded(x, 3, 4))


@network(
  (4, 4, 2),
  groups={
    **_FOLDED,
    "stem": group(7, "stem/kernel 1, stem/bias 0, query/kernel 0, key/kernel 0, value/kernel 0"),
  },
)
def windows_in_the_batch(x):
  """Windows of an image folded into the batch, and heads of each window too."""
  y = dense(7, "stem")(x).reshape(-1, 2, 2, 2, 2, 7)
  y = folded(jnp.swapaxes(y, 2, 3).reshape(-1, 4, 7), 3, 4)
  y = dense(6, "out")(y).reshape(-1, 2, 2, 2, 2, 6)
  return jnp.swapaxes(y, 2, 3).reshape(*x.shape[:3], 6)


@network(
  Ids(11, (3,)),
  groups={
    "row": group(4, "table/w 1, up/kernel 0"),
    "inner": group(7, "up/kernel 1, up/bias 0, out/kernel 0"),
  },
)
def rows_of_a_table(ids):
  """All categories of all examples are looked up in one go."""
  rows = weight("table", 11, 4)[ids.reshape(-1)]
  return dense(2, "out")(nn.relu(dense(7, "up")(rows.reshape(ids.shape[0], 12))))
