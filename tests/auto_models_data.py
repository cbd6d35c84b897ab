"""Unmasked networks that read data in many places: positions, angles, head masks, windows. Data ties nothing together."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.auto_models import function, group


def attend(x, q, k, v, o, change=lambda q, k: (q, k), weigh=lambda w: w):
  """Heads that are added to a stream, ``(b, t, f)``; kernels ``(f, h, d)`` and ``(h, d, f)``."""
  q, k, v = (jnp.einsum("btf,fhd->bthd", x, kernel) for kernel in (q, k, v))
  q, k = change(q, k)
  weights = weigh(jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)))
  return x + jnp.einsum("bhts,bshd,hdf->btf", weights, v, o)


def two_layers(depth: int, halves: bool = False, heads: int = 3):
  """The groups of two layers of attention between ``stem`` and ``head``."""
  found = {"stream": group(7, "stem 1, q 0, k 0, v 0, o 2, q1 0, k1 0, v1 0, o1 2, head 0")}
  for at in ("", "1"):
    found[f"heads{at}"] = group(heads, f"q{at} 1, k{at} 1, v{at} 1, o{at} 0")
    found[f"depth{at}"] = group(depth // 2 if halves else depth, f"q{at} 2, k{at} 2")
    found[f"values{at}"] = group(5, f"v{at} 2, o{at} 1")
  return found


def rotated(x, cos, sin):
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _rotary(x, positions, stem, head, *layers):
  angles = positions[:, :, None, None] / 100.0 ** (jnp.arange(4) / 4)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  x = x @ stem
  for own in layers:
    x = attend(x, *own, change=lambda q, k: (rotated(q, cos, sin), rotated(k, cos, sin)))
  return x @ head


@function((4, 6), (4,), groups=two_layers(8, halves=True), skipped="stem 0, head 1")
def rotary_by_positions(
  x,
  positions,
  *,
  stem=(6, 7),
  q=(7, 3, 8),
  k=(7, 3, 8),
  v=(7, 3, 5),
  o=(3, 5, 7),
  q1=(7, 3, 8),
  k1=(7, 3, 8),
  v1=(7, 3, 5),
  o1=(3, 5, 7),
  head=(7, 2),
):
  return _rotary(x, positions, stem, head, (q, k, v, o), (q1, k1, v1, o1))


@function((4, 6), groups=two_layers(4), skipped="stem 0, head 1")
def biases_and_head_masks(
  x,
  *,
  stem=(6, 7),
  q=(7, 3, 4),
  k=(7, 3, 4),
  v=(7, 3, 5),
  o=(3, 5, 7),
  q1=(7, 3, 4),
  k1=(7, 3, 4),
  v1=(7, 3, 5),
  o1=(3, 5, 7),
  head=(7, 2),
):
  """Slopes that all layers share, and ones for the heads of each layer."""
  distance = jnp.abs(jnp.arange(4)[:, None] - jnp.arange(4))
  slopes = jnp.exp(-distance * 2.0 ** -jnp.arange(1.0, 4.0)[:, None, None])
  keep = jnp.ones((2, 3))
  x = x @ stem
  for at, own in enumerate(((q, k, v, o), (q1, k1, v1, o1))):
    x = attend(x, *own, weigh=lambda w, at=at: w * slopes * keep[at][:, None, None])
  return x @ head


@function(
  (4, 6),
  groups={
    "stream": group(7, "stem 1, q 1, k 1, v 1, o 3, head 0"),
    "heads": group(3, "q 2, k 2, v 2, o 1", layers=2),
    "half of the depth": group(4, "q 3, k 3", layers=2),
    "values": group(5, "v 3, o 2", layers=2),
  },
  skipped="stem 0, q 0",
)
def rotary_in_a_scan(
  x, *, stem=(6, 7), q=(2, 7, 3, 8), k=(2, 7, 3, 8), v=(2, 7, 3, 5), o=(2, 3, 5, 7), head=(7, 2)
):
  """One table is read in every turn, another one is carried, and a head mask has a row for each."""
  angles = jnp.arange(4.0)[:, None, None] / 100.0 ** (jnp.arange(4) / 4)

  def layer(carried, own):
    x, sin = carried
    *kernels, keep = own
    turn = lambda q, k: (rotated(q, jnp.cos(angles), sin), rotated(k, jnp.cos(angles), sin))
    x = jax.checkpoint(attend, static_argnums=(5, 6))(x, *kernels, turn, lambda w: w * keep[:, None, None])
    return (x, sin), None

  (x, _), _ = lax.scan(layer, (x @ stem, jnp.sin(angles)), (q, k, v, o, jnp.ones((2, 3))))
  return x @ head


@function(
  (4, 6), groups={"stream": group(16, "stem 1, up 0"), "inner": group(12, "up 1, down 0")}, skipped="stem 0"
)
def sines_and_windows(x, *, stem=(6, 16), up=(16, 12), down=(12, 2)):
  """Positions end to end, interleaved, and rolled; a window on the features, which is symmetric."""
  time = jnp.arange(4)[:, None] / 100.0 ** (jnp.arange(8) / 8)
  pair = jnp.sin(time), jnp.cos(time)
  x = x @ stem + jnp.concatenate(pair, axis=-1)
  x = x + jnp.stack(pair, axis=-1).reshape(4, 16) + jnp.roll(jnp.concatenate(pair, axis=-1), 3, axis=-1)
  half = jnp.hanning(12)[:6] + 0.1
  return (jax.nn.relu(x @ up) * jnp.concatenate([half, half[::-1]])) @ down


@function(
  (6, 5),
  groups={
    "stem": group(7, "stem 1, up 0"),
    "inner": group(8, "up 1, read 0, bias 0"),
  },
  skipped="stem 0, read 1",
)
def slices_of_one_example(x, *, stem=(5, 7), up=(7, 8), bias=(8,), read=(8, 2)):
  """A model of one example under vmap, with slices and updates at places known or computed."""

  def one(x):
    h = jnp.tanh(x @ stem)
    first = jnp.argmax(x[:, 0]) % 3
    window = lax.dynamic_slice_in_dim(h, 1, 3, axis=0) + lax.dynamic_slice_in_dim(h, first, 3, axis=0)
    inner = jax.nn.relu(window @ up + bias)
    wide = lax.dynamic_update_slice_in_dim(jnp.zeros((6, 8)), inner, first, axis=0)
    return lax.dynamic_update_slice_in_dim(wide, inner[:2], 4, axis=0) @ read

  return jax.vmap(one)(x)


@function(
  (4, 6),
  groups={
    "stream": group(7, "stem 1, qkv 0, o 2, head 0"),
    "heads": group(3, "qkv 1, bias 0, o 0"),
    "depth": group(4, "qkv 1, bias 0"),
    "values": group(4, "qkv 1, bias 0, o 1"),
  },
  skipped="stem 0, head 1",
)
def fused_by_reshape(x, *, stem=(6, 7), qkv=(7, 36), bias=(36,), o=(3, 4, 7), head=(7, 2)):
  x = x @ stem
  q, k, v = jnp.moveaxis((x @ qkv + bias).reshape(*x.shape[:2], 3, 3, 4), 2, 0)
  weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
  return (x + jnp.einsum("bhts,bshd,hdf->btf", weights, v, o)) @ head
