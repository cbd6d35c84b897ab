"""Unmasked networks that rank: tables, features side by side or multiplied, factors, crosses, towers."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from tests.auto_models import Ids, dense, function, group, network


def table(rows: int, features: int, name: str) -> nn.Embed:
  return nn.Embed(rows, features, name=name)


@network(
  Ids(4, ()),
  Ids(6, ()),
  (3,),
  groups={
    "user": group(7, "user/embedding 1, top/kernel 0"),
    "item": group(8, "item/embedding 1, top/kernel 0"),
    "numbers": group(5, "bottom/kernel 1, bottom/bias 0, top/kernel 0"),
    "top": group(9, "top/kernel 1, top/bias 0, head/kernel 0"),
  },
  skipped="user/embedding 0, item/embedding 0",
)
def features_concatenated(user, item, numbers):
  features = [table(4, 7, "user")(user), table(6, 8, "item")(item), nn.relu(dense(5, "bottom")(numbers))]
  return dense(1, "head")(nn.relu(dense(9, "top")(jnp.concatenate(features, axis=-1))))[:, 0]


@network(
  Ids(4, ()),
  Ids(6, (2,)),
  (3,),
  groups={
    "embedded": group(5, "user/embedding 1, items/embedding 1, bottom/kernel 1, bottom/bias 0, top/kernel 0"),
    "top": group(8, "top/kernel 1, top/bias 0, head/kernel 0"),
  },
  skipped="user/embedding 0, items/embedding 0",
)
def features_multiplied(user, items, numbers):
  """Products of all pairs of features, beside the numbers themselves (DLRM)."""
  numbers = nn.relu(dense(5, "bottom")(numbers))
  user = table(4, 5, "user")(user)
  features = jnp.concatenate([jnp.stack([numbers, user], axis=1), table(6, 5, "items")(items)], axis=1)
  products = jnp.einsum("bid,bjd->bij", features, features)
  rows, columns = jnp.tril_indices(4, -1)
  y = jnp.concatenate([numbers, products[:, rows, columns]], axis=-1)
  return dense(1, "head")(nn.relu(dense(8, "top")(y)))[:, 0]


@function(
  Ids(7, (3,)),
  groups={"factors": group(5, "v 1")},
  skipped="v 0, w 0",
)
def factorisation_machine(fields, *, v=(7, 5), w=(7, 1), bias=()):
  x = v[fields]
  pairs = jnp.square(jnp.sum(x, axis=1)) - jnp.sum(jnp.square(x), axis=1)
  return bias + jnp.sum(w[fields], axis=(1, 2)) + 0.5 * jnp.sum(pairs, axis=-1)


_CROSSED = (
  "cross_0/kernel 0, cross_0/kernel 1, cross_0/bias 0, cross_1/kernel 0, cross_1/kernel 1, cross_1/bias 0"
)


@network(
  Ids(4, ()),
  (3,),
  groups={
    "user": group(5, "user/embedding 1, head/kernel 0", _CROSSED),
    "numbers": group(6, "bottom/kernel 1, bottom/bias 0, head/kernel 0", _CROSSED),
  },
)
def cross_layers(user, numbers):
  x = start = jnp.concatenate([table(4, 5, "user")(user), dense(6, "bottom")(numbers)], axis=-1)
  for at in range(2):
    x = start * dense(11, f"cross_{at}")(x) + x
  return dense(1, "head")(x)[:, 0]


@network(
  Ids(4, ()),
  Ids(6, (3,)),
  groups={
    "user": group(7, "user/embedding 1, left/kernel 0"),
    "item": group(8, "items/embedding 1, right/kernel 0"),
    "common": group(5, "left/kernel 1, left/bias 0, right/kernel 1, right/bias 0"),
  },
)
def two_towers(user, items):
  """Of unit length both; a bag of items."""
  unit = lambda x: x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-3)
  left = unit(dense(5, "left")(table(4, 7, "user")(user)))
  right = unit(dense(5, "right")(jnp.mean(table(6, 8, "items")(items), axis=1)))
  return jnp.sum(left * right, axis=-1)
