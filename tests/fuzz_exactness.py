"""More of what the networks of the fuzzer are made of: rules that are no derivatives, signs of zero, nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz_ops import along, need, op


@jax.custom_vjp
def reverse(y: Any, factor: Any) -> Any:
  return y


reverse.defvjp(lambda y, factor: (y, factor), lambda factor, g: (-factor * g, jnp.zeros_like(factor)))


@jax.custom_vjp
def straight_through(hard: Any, soft: Any) -> Any:
  return hard


straight_through.defvjp(lambda hard, soft: (hard, None), lambda _, g: (jnp.zeros_like(g), g))


@jax.custom_vjp
def scaled_back(x: Any) -> Any:
  return jnp.tanh(x)


scaled_back.defvjp(
  lambda x: (jnp.tanh(x), x), lambda x, g: (g * jnp.cos(x) / jnp.sqrt(1 + jnp.sum(g * g, -1, keepdims=True)),)
)


@jax.custom_jvp
def mixed(x: Any, y: Any) -> Any:
  return jnp.sin(x)


mixed.defjvp(
  lambda p, t: (jnp.sin(p[0]), t[0] * p[1] + 0.5 * jnp.flip(t[1], -1) + jnp.mean(t[0], -1, keepdims=True))
)


def in_a_scan(f: Any) -> Any:
  return lambda *xs: lax.scan(lambda c, _: (0.5 * f(c, *xs[1:]) + c, jnp.sum(c)), xs[0], None, length=2)[0]


@op(2)
def custom_rule(b: Any) -> None:
  """A rule that reads, feeds or mixes what the function does not."""
  v = b.pick(lambda s: len(s) >= 2)
  need(b.axis(v) is not None)
  w = b.pick(lambda s: s == b.shape(v), other=v)
  axis = b.axis(v)
  name = b.param((b.shape(v)[axis],))
  kind = b.choice(["reverse", "number", "straight", "rounded", "scaled", "mixed"])
  place = b.choice(["alone", "alone", "remat", "scan", "jit"])

  def run(p: Any, m: Any, x: Any, y: Any) -> Any:
    f = {
      "reverse": lambda x, y: reverse(x, along(p[name], axis, x.ndim) * jnp.ones_like(x)),
      "number": lambda x, y: reverse(x, 0.4),
      "straight": straight_through,
      "rounded": lambda x, y: straight_through(jnp.round(4 * x) / 4, x),
      "scaled": lambda x, y: scaled_back(x),
      "mixed": mixed,
    }[kind]
    wrap = {"alone": lambda f: f, "remat": jax.checkpoint, "scan": in_a_scan, "jit": jax.jit}[place]
    return wrap(f)(x, y)

  b.add(f"{kind} {place} {axis}", run, v, w)


@op(1.2)
def sign_of_zero(b: Any) -> None:
  v = b.pick()
  w = b.pick(lambda s: s == b.shape(v), other=v)
  kind = b.choice(["atan2", "copysign", "signbit", "bits", "inverse", "angle", "top_k", "loop"])
  axis = b.axis(v)

  def run(p: Any, m: Any, x: Any, y: Any) -> Any:
    return {
      "atan2": lambda: jnp.arctan2(x, -1 - y * y),
      "copysign": lambda: jnp.copysign(1 + jnp.abs(y), x),
      "signbit": lambda: jnp.where(jnp.signbit(x), y, 0.5 * y),
      "bits": lambda: (lax.bitcast_convert_type(x, jnp.uint64) >> 63).astype(x.dtype) + y,
      "inverse": lambda: jnp.where(1 / lax.stop_gradient(x) > 0, y, 2 * y),
      "angle": lambda: jnp.angle(lax.complex(-1 - jnp.abs(lax.stop_gradient(y)), lax.stop_gradient(x))),
      "top_k": lambda: jnp.moveaxis(lax.top_k(jnp.moveaxis(x, axis, -1), 1)[1].astype(x.dtype), -1, axis) + y,
      "loop": lambda: lax.fori_loop(0, 2, lambda _, c: jnp.where(jnp.signbit(c), -0.5 * c, jnp.sin(c)), x),
    }[kind]()

  b.add(f"sign {kind} {axis}", run, v, w)


@op(0.8)
def of_nothing(b: Any) -> None:
  """A reduction over no entries, laid beside what was there."""
  v = b.pick(lambda s: len(s) >= 2)
  axis = b.axis(v)
  kind = b.choice(["prod", "all", "max", "min", "sum", "any"])

  def run(p: Any, m: Any, x: Any) -> Any:
    none = lax.slice_in_dim(x, 0, 0, axis=axis)
    found = {
      "prod": lambda: jnp.prod(none, axis, keepdims=True),
      "all": lambda: jnp.all(none > 0, axis, keepdims=True).astype(x.dtype),
      "any": lambda: jnp.any(none > 0, axis, keepdims=True).astype(x.dtype),
      "sum": lambda: jnp.sum(none, axis, keepdims=True),
      "max": lambda: jnp.max(none, axis, keepdims=True, initial=-0.3),
      "min": lambda: jnp.min(none, axis, keepdims=True, initial=0.4),
    }[kind]()
    return jnp.concatenate([x, found], axis)

  b.add(f"{kind} of nothing {axis}", run, v)


@op(1)
def dilated_window(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  n, rank = b.shape(v)[axis], len(b.shape(v))
  need(n <= 6)
  window, stride, base, dilation = (int(b.rng.integers(1, 4)) for _ in range(4))
  pad = (int(b.rng.integers(0, 3)), int(b.rng.integers(0, 3)))
  need(base * (n - 1) + 1 + sum(pad) >= dilation * (window - 1) + 1)
  kind = b.choice(["max", "min", "sum", "other"])
  init, combine = {"max": (-np.inf, lax.max), "min": (np.inf, lax.min), "sum": (0.0, lax.add)}.get(
    kind, (0.5, lambda a, b: a * b)
  )
  lay = lambda n, other: tuple(n if at == axis else other for at in range(rank))

  def run(p: Any, m: Any, x: Any) -> Any:
    x = (
      lax.stop_gradient(x) if kind == "other" or max(base, dilation) > 1 else x
    )  # JAX has no such derivative
    y = lax.reduce_window(
      x, init, combine, lay(window, 1), lay(stride, 1), lay(pad, (0, 0)), lay(base, 1), lay(dilation, 1)
    )
    return jnp.clip(y, -3, 3)

  b.add(f"window {kind} {axis} {window} {stride} {base} {dilation} {pad}", run, v)


@op(0.5)
def prints(b: Any) -> None:
  v = b.pick()
  looped = b.chance(0.4)

  def run(p: Any, m: Any, x: Any) -> Any:
    if looped:
      return lax.fori_loop(0, 2, lambda _, c: (jax.debug.callback(lambda z: None, c), jnp.sin(c))[1], x)
    jax.debug.callback(lambda z: None, jnp.sum(x))
    return jnp.sin(x)

  b.add(f"prints {looped}", run, v)


@op(1.5)
def norm_before_mask(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v, least=2)
  n, rank = b.shape(v)[axis], len(b.shape(v))
  scale, name = b.param((n,)), b.mask(n)
  kind = b.choice(["layer", "one pass", "rms", "softmax", "center"])

  def run(p: Any, m: Any, x: Any) -> Any:
    mean = jnp.mean(x, axis, keepdims=True)
    y = {
      "layer": lambda: (x - mean) * lax.rsqrt(jnp.mean((x - mean) ** 2, axis, keepdims=True) + 0.2),
      "one pass": lambda: (
        (x - mean) * lax.rsqrt(jnp.abs(jnp.mean(x * x, axis, keepdims=True) - mean**2) + 0.2)
      ),
      "rms": lambda: x * lax.rsqrt(jnp.mean(x * x, axis, keepdims=True) + 0.2),
      "softmax": lambda: jax.nn.softmax(x, axis),
      "center": lambda: x - mean,
    }[kind]()
    return jax.nn.relu(y * along(p[scale], axis, rank)) * along(m[name], axis, rank)

  b.add(f"{kind} before mask {axis} {name}", run, v)


@op(0.8)
def examples_elsewhere(b: Any) -> None:
  """A layer and its mask where the examples are not in front: time-major, last, or merged with another axis."""
  v = b.pick(lambda s: len(s) == 3)
  need(b.free(v) == [1, 2])
  n, t, hidden = b.shape(v)[2], b.shape(v)[1], b.size()
  w, name = b.param((n, hidden)), b.mask(hidden)
  kind = b.choice(["time major", "last", "merged behind", "one by one"])

  def run(p: Any, m: Any, x: Any) -> Any:
    def layer(x: Any) -> Any:
      return jnp.tanh(x @ p[w]) * m[name]

    if kind == "time major":
      return jnp.swapaxes(layer(jnp.swapaxes(x, 0, 1)), 0, 1)
    if kind == "last":
      return jnp.transpose(jnp.tanh(jnp.einsum("btc,ch->htb", x, p[w])) * m[name][:, None, None], (2, 1, 0))
    if kind == "merged behind":
      merged = layer(jnp.swapaxes(x, 0, 1).reshape(-1, n))
      return jnp.swapaxes(merged.reshape(t, -1, hidden), 0, 1)
    return jax.vmap(layer)(x)

  b.add(f"examples {kind} {name}", run, v)


def power_iterated(w: Any) -> Any:
  u = jnp.ones(w.shape[0], w.dtype)
  for _ in range(2):
    v = u @ w
    u = w @ v / (1 + jnp.linalg.norm(w @ v))
  return w / (1 + jnp.sum(u * u))


BY_VARIABLES = {
  "power iteration": power_iterated,
  "loop": lambda w: (
    w / (1 + jnp.sum(lax.scan(lambda u, _: (jnp.tanh(w @ (u @ w)), None), w[:, 0], None, length=2)[0] ** 2))
  ),
  "standardised": lambda w: (w - jnp.mean(w, 0)) / jnp.sqrt(jnp.var(w, 0) + 0.2),
  "cosine": lambda w: w / jnp.sqrt(jnp.sum(w * w, 0) + 0.2),
  "rows": lambda w: w / jnp.sqrt(jnp.sum(w * w, 1, keepdims=True) + 0.2),
  "whole": lambda w: w / (1 + jnp.linalg.norm(w)),
}


@op(0.8)
def weights_of_variables(b: Any) -> None:
  """A layer with a kernel that is computed from variables alone, or a query that is projected alone as well."""
  v = b.pick(lambda s: len(s) >= 2)
  need(b.free(v) and b.free(v)[-1] == len(b.shape(v)) - 1)
  n, hidden, outs = b.shape(v)[-1], b.size(), b.size()
  first, w, name = b.param((n, hidden)), b.param((hidden, outs)), b.mask(hidden)
  query, mix = b.param((hidden,)), b.param((hidden, outs))
  kind = b.choice([*BY_VARIABLES, "query"])
  floor = jnp.asarray(-0.4) if b.chance(0.3) else None

  def run(p: Any, m: Any, x: Any) -> Any:
    h = x @ p[first] + (p[query] if kind == "query" else 0)
    h = jnp.tanh(h if floor is None else jnp.where(h > floor, h, floor)) * m[name]
    return h @ p[w] + p[query] @ p[mix] if kind == "query" else h @ BY_VARIABLES[kind](p[w])

  b.add(f"by variables {kind} {name}", run, v)


OF_STACKS = {
  "plain": lambda w, p: w,
  "cast": lambda w, p: w.astype(jnp.float32).astype(w.dtype),
  "scaled": lambda w, p: w * (1 + p["scale"]),
  "shared row": lambda w, p: w * (1 + p["row"]),
  "low rank": lambda w, p: w + p["left"] @ p["right"],
  "standardised": lambda w, p: (
    (w - jnp.mean(w, 1, keepdims=True)) / jnp.sqrt(jnp.var(w, 1, keepdims=True) + 0.2)
  ),
  "cut": lambda w, p: jnp.concatenate([w[:, :, :1], jnp.sin(w[:, :, 1:])], 2),
  "reshaped": lambda w, p: jnp.tanh(w.reshape(len(w), -1)).reshape(w.shape),
  "backwards": lambda w, p: w[::-1],
  "summed too": lambda w, p: w * (1 + jnp.sum(w, 0)),
}
"""What is done to a stack of kernels before the loop over its layers."""


@op(1)
def stacked_layers(b: Any) -> None:
  """Residual layers in a loop, with a mask for each, of kernels that are computed with before the loop."""
  v = b.pick(lambda s: len(s) >= 2)
  need(b.free(v) and b.free(v)[-1] == len(b.shape(v)) - 1)
  n, hidden, count = b.shape(v)[-1], b.size() + 1, int(b.rng.integers(2, 4))
  first, last = b.param((count, n, hidden), "s"), b.param((count, hidden, n), "s")
  more = {"scale": (count, 1, hidden), "row": (hidden,), "left": (count, n, 2), "right": (count, 2, hidden)}
  kind, back, writes, again = b.choice([*OF_STACKS]), b.chance(0.3), b.chance(0.3), b.chance(0.2)
  used = {"scaled": ["scale"], "shared row": ["row"], "low rank": ["left", "right"]}.get(kind, [])
  own = {key: b.param(more[key], "s" if key != "row" else "p") for key in used}
  name = b.mask_of_layers(count, hidden)

  def run(p: Any, m: Any, x: Any) -> Any:
    kernels = OF_STACKS[kind](p[first], {key: p[at] for key, at in own.items()})

    def layer(h: Any, each: Any) -> Any:
      ours, theirs, mask = each
      inner = jnp.tanh(h @ ours) * mask
      return h + inner @ theirs, jnp.sum(inner, -1)

    h, sums = lax.scan(layer, x, (kernels, p[last], m[name]), reverse=back)
    if again:
      h, _ = lax.scan(layer, h, (kernels, p[last] * 0.5, m[name]))
    return h + jnp.sum(sums, 0)[..., None] if writes else h

  b.add(f"stack {kind} {back} {writes} {again} {name}", run, v)
