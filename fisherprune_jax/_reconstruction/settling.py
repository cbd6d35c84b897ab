"""From a product's result to its settling point, and back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import Value
from fisherprune_jax._reconstruction.consumers import Consumer, Use
from fisherprune_jax._reconstruction.flat import Compiled, Flat
from fisherprune_jax._reconstruction.products import result_matrix


def settling(flat: Flat, use: Use) -> Value:
  """The value at which a use settles."""
  return flat.nodes[use.end].outs[0]


def multipliers(flat: Flat, use: Use) -> list[Value]:
  """The values that a product's result is multiplied or divided by on its path; they depend on variables alone."""
  read = [v for at in use.path if flat.nodes[at].name in ("mul", "div") for v in flat.nodes[at].ins]
  return [value for value in read if value not in flat.varies and value.literal is None]


def along(flat: Flat, use: Use, stop: int | None, env: Mapping[Value, Any], y: jax.Array) -> jax.Array:
  """The linear part of the way from a product's result to its settling point, or to the addition at ``stop``.

  All of it has the precision of ``y``, whatever that of the network is.
  """
  value = flat.nodes[use.at].outs[0]
  for at in use.path:
    node = flat.nodes[at]
    if node.name in ("add", "add_any", "sub"):
      y = y if node.name != "sub" or node.ins[0] is value else -y
      y = jnp.broadcast_to(y, node.outs[0].shape)
    elif node.name not in ("convert_element_type", "reduce_precision"):
      others = [env[x] if x.literal is None else x.literal for x in node.ins if x is not value]
      others = [jnp.asarray(x, y.dtype) for x in others]
      (y,) = compat.bind(node.eqn, [y if x is value else others.pop(0) for x in node.ins])
    (value,) = node.outs
    if at == stop:
      break
  return y


class Columns(NamedTuple):
  """Which entry of a leaf is the bias of each column ``(G, c)``, -1 for none, and how much of a change it takes."""

  entries: np.ndarray
  scale: np.ndarray


def bias_columns(
  flat: Flat, consumer: Consumer, env: Mapping[Value, Any], compiled: Compiled
) -> Columns | None:
  """How a consumer's bias meets the columns of its product; None if it has none, or not one entry for each column."""
  bias = consumer.bias
  if bias is None or len(consumer.uses) > 1:
    return None
  (use,) = consumer.uses
  scales = multipliers(flat, use)

  def meet(
    one: jax.Array, places: jax.Array, arrays: list[jax.Array]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    node, known = flat.nodes[use.at], dict(zip(scales, arrays, strict=True))
    places = jnp.broadcast_to(places, flat.nodes[bias.at].outs[0].shape)
    like = jnp.broadcast_to(one, node.outs[0].shape)  # no constant, which XLA would evaluate
    settled, pull = jax.vjp(lambda y: along(flat, use, bias.at, known, y), like)
    parts = (pull(x)[0] for x in (settled, settled * places, jnp.broadcast_to(one, settled.shape)))
    square, weighted, scale = (result_matrix(node, use.side, x) for x in parts)
    found = jnp.round(weighted / jnp.where(square > 0, square, 1))
    first, last = (
      reduce(jnp.where(square > 0, found, other), 1)
      for reduce, other in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    )
    return first, last, jnp.max(scale, 1, where=square > 0, initial=-jnp.inf)

  given = (jnp.float32(1), jnp.asarray(bias.entries, jnp.float32), flat.get(scales, env))
  first, last, scale = map(np.asarray, compiled(meet, *given)(*given))
  entries = np.where(np.isfinite(first), first, -1).astype(np.int64)
  used = entries[entries >= 0]
  if len(np.unique(used)) != used.size or not used.size or (np.isfinite(first) & (first != last)).any():
    return None
  return Columns(entries, np.where(entries >= 0, scale, 0))
