"""Unmasked networks of weights laid out in unusual ways, and what JAX wraps around layers: calls, rules, branches, loops."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tests.auto_models import UNMASKED, Group, Unmasked, dense, function, group, network


@function(
  (3,),
  groups={
    "first": group(5, "v 1, g 0, vv 0"),
    "second": group(4, "vv 1, gg 0, w 0"),
  },
  stay="vv 0",
)
def weight_norm(x, *, v=(3, 5), g=(5,), vv=(5, 4), gg=(4,), w=(4, 2)):
  """The norms are of all rows, those of dead features too: they read the variable alone, and no mask stands there."""
  unit = lambda v, g: v * g * lax.rsqrt(jnp.sum(jnp.square(v), axis=0) + 1e-3)
  return nn.relu(nn.relu(x @ unit(v, g)) @ unit(vv, gg)) @ w


@function(
  (3,),
  groups={"first": group(5, "a 1, b 0, u 0"), "second": group(4, "b 1, w 0")},
  stay="b 0, b 1, u 0",
)
def spectral_norm(x, *, a=(3, 5), b=(5, 4), u=(5,), w=(4, 2)):
  """A power iteration by hand, that starts from what is stored of the last one."""
  v = u @ b
  v = v * lax.rsqrt(v @ v + 1e-3)
  new = b @ v
  return nn.relu(nn.relu(x @ a) @ (b / (jnp.tanh(new @ new) + 1))) @ w


@function(
  (4, 4, 2),
  groups={"first": group(5, "a 3, b 2"), "second": group(4, "b 3, w 0")},
  stay="b 2",
)
def weight_standardisation(x, *, a=(3, 3, 2, 5), b=(3, 3, 5, 4), w=(4, 2)):
  """Kernels less their means, over their deviations: a stem that keeps its arguments, and a layer behind it."""

  def layer(x, kernel):
    centred = kernel - jnp.mean(kernel, (0, 1, 2))
    kernel = centred * lax.rsqrt(jnp.mean(centred**2, (0, 1, 2)) + 1e-3)
    return nn.relu(
      lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )

  return jnp.mean(layer(layer(x, a), b), (1, 2)) @ w


@function((3,), groups={"hidden": group(5, "a 1, w 0")}, stay="w 0")
def cosine_classifier(x, *, a=(3, 5), w=(5, 4)):
  h = nn.relu(x @ a)
  return (h @ (w * lax.rsqrt(jnp.sum(w * w, 0) + 1e-3))) * lax.rsqrt(jnp.sum(h * h, -1, keepdims=True) + 1e-3)


@function(
  (4, 3),
  groups={"stream": group(5, "a 1, q 1, mix 0, b 0"), "hidden": group(6, "b 1, w 0")},
  stay="q 1, mix 0",
)
def queries_projected_alone(x, *, a=(3, 5), q=(4, 5), mix=(5, 2), b=(5, 6), w=(6, 2)):
  """Queries that are added to a stream, and projected alone as well."""
  return nn.relu((x @ a + q) @ b) @ w + q @ mix


@function(
  (3,),
  groups={"first": group(5, "a 1, b 0"), "second": group(4, "b 1, w 0")},
  stay="b 0, b 1",
)
def power_iteration_in_a_loop(x, *, a=(3, 5), b=(5, 4), w=(4, 2)):
  def turn(u, _):
    v = u @ b
    u = b @ (v * lax.rsqrt(v @ v + 1e-3))
    return u * lax.rsqrt(u @ u + 1e-3), None

  u, _ = lax.scan(turn, jnp.ones(5, b.dtype), None, length=2)
  return nn.relu(nn.relu(x @ a) @ (b * lax.rsqrt(u @ u + 1e-3))) @ w


@function(
  (3,),
  groups={
    "hidden": group(5, "w 1, b 1, out 0"),
    "rank": group(2, "a 1, b 0"),
  },
)
def low_rank_adapter(x, *, w=(3, 5), a=(3, 2), b=(2, 5), out=(5, 4)):
  return nn.relu(x @ w + (x @ a) @ b) @ out


@function((3,), groups={"hidden": group(5, "w 1, b 1, out 0")})
def low_rank_adapter_merged(x, *, w=(3, 5), a=(3, 2), b=(2, 5), out=(5, 4)):
  """Only variables are summed over the rank, and nothing that depends on the argument: no group."""
  return nn.relu(x @ (w + a @ b)) @ out


@function(
  (3,),
  groups={"shared": group(5, "stem 1, w 0, w 1, b 0, head 0")},
)
def weights_shared(x, *, stem=(3, 5), w=(5, 5), b=(5,), head=(5, 2)):
  """One layer three times over."""
  x = jnp.tanh(x @ stem)
  for _ in range(3):
    x = jnp.tanh(x @ w + b)
  return x @ head


@function(
  (3,),
  groups={
    "before": group(2, "w 1, b 0, every 0"),
    "middle": group(4, "w 1, b 0, every 0, some 0"),
    "behind": group(5, "w 1, b 0, every 0"),
  },
)
def slice_read_alone(x, *, w=(3, 11), b=(11,), every=(11, 2), some=(4, 2)):
  """A part of the features has a reader of its own, so the others need not go as it does."""
  x = jnp.tanh(x @ w + b)
  return x @ every + x[:, 2:6] @ some


WHOLE = {
  "softmax": nn.softmax,
  "sort": lambda x: jnp.sort(x, axis=-1),
  "cumsum": lambda x: jnp.cumsum(x, axis=-1),
  "product": lambda x: x * jnp.prod(x, axis=-1, keepdims=True),
  "maximum": lambda x: x - jnp.max(x, axis=-1, keepdims=True),
  "top": lambda x: lax.top_k(x, 2)[0],
  "argmax": lambda x: x + jnp.argmax(x, axis=-1, keepdims=True),
  "window": lambda x: nn.max_pool(x[..., None], (3,), padding="SAME")[..., 0],
  "gather": lambda x: jnp.take_along_axis(x, (jnp.abs(x) > 0.5).astype(jnp.int32), axis=-1),
}


@network(
  (3,),
  groups={"inner": group(7, "inner/kernel 1, inner/bias 0", *(f"{name}/kernel 0" for name in WHOLE))},
  skipped=", ".join(f"{name}/kernel 1, {name}/bias 0" for name in WHOLE),
)
def needed_whole(x):
  """Features that a primitive needs all of."""
  x = nn.relu(dense(7, "inner")(x))
  return sum(dense(2, f"after_{name}")(op(dense(5, name)(x))) for name, op in WHOLE.items())


@function(
  (4, 3),
  groups={
    "stream": group(5, "stem 1, up 0, down 1, head 0"),
    "inner": group(6, "up 1, b 0, down 0"),
  },
)
def remat_and_jit(x, *, stem=(3, 5), up=(5, 6), b=(6,), down=(6, 5), head=(5, 2)):
  branch = jax.checkpoint(lambda x, up, down: jax.jit(nn.silu)(x @ up + b) @ down)
  x = jax.jit(nn.gelu)(x @ stem)
  return jnp.mean(jax.checkpoint(jnp.sin)(x + branch(x, up, down)), axis=1) @ head


@jax.custom_vjp
def _clipped(x: Any) -> Any:
  return jnp.sin(x)


_clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.clip(g, -0.1, 0.1) * jnp.cos(x),))


@jax.custom_jvp
def _bent(x: Any, slope: Any) -> Any:
  return jnp.where(x > 0, x, slope * x)


_bent.defjvp(lambda xs, ts: (_bent(*xs), jnp.where(xs[0] > 0, 1.0, xs[1]) * ts[0]))


@function(
  (3,),
  groups={
    "first": group(5, "w 1, b 0, v 0"),
    "second": group(6, "v 1, slope 0, u 0"),
    "third": group(7, "u 1, out 0"),
  },
)
def derivative_rules(x, *, w=(3, 5), b=(5,), v=(5, 6), slope=(6,), u=(6, 7), out=(7, 2)):
  """Functions with rules of their own, by users and by JAX."""
  x = _clipped(x @ w + b)
  x = _bent(x @ v, jnp.broadcast_to(slope, (x.shape[0], 6)))
  return jax.nn.softplus(jax.nn.relu(x @ u)) @ out


@jax.custom_vjp
def _linear(x: Any, w: Any) -> Any:
  return x @ w


_linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@function(
  (3,),
  groups={"first": group(5, "w 1, v 0"), "second": group(6, "v 1, out 0")},
)
def layers_with_a_rule(x, *, w=(3, 5), v=(5, 6), out=(6, 2)):
  """Products whose derivative somebody wrote."""
  return _linear(jnp.tanh(_linear(jnp.tanh(_linear(x, w)), v)), out)


@function(
  (3,),
  groups={
    "models": group(4, "w 0, b 0, v 0"),
    "hidden": group(5, "w 2, b 1, v 1"),
  },
)
def ensemble(x, *, w=(4, 3, 5), b=(4, 5), v=(4, 5, 2)):
  """The mean of four models under ``vmap``: whole models may go, or a feature of all of them."""
  return jnp.mean(jax.vmap(lambda w, b, v: nn.relu(x @ w + b) @ v)(w, b, v), axis=0)


@function(
  (3,),
  groups={
    "before": group(5, "w 1, left 0, right 0"),
    "inside": group(6, "right 1, back 0"),
    "behind": group(7, "left 1, back 1, out 0"),
  },
)
def conditional(x, *, w=(3, 5), left=(5, 7), right=(5, 6), back=(6, 7), out=(7, 2), which=()):
  """One branch has a layer of its own; a variable decides."""
  x = jnp.tanh(x @ w)
  x = lax.cond(which > 0, lambda x: jnp.sin(x @ left), lambda x: nn.relu(x @ right) @ back, x)
  return x @ out


@function((3,), groups={"carried": group(5, "w 1, r 0, r 1, b 0, out 0")})
def for_loop(x, *, w=(3, 5), r=(5, 5), b=(5,), out=(5, 2)):
  return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ r + b), x @ w) @ out


@function((3,), groups={"carried": group(5, "w 1, r 0, r 1, b 0, out 0")}, differentiable=False)
def while_loop(x, *, w=(3, 5), r=(5, 5), b=(5,), out=(5, 2)):
  """Whose condition sums over the features, too."""
  turn = lambda state: (state[0] + 1, jnp.tanh(state[1] @ r + b))
  goes_on = lambda state: (state[0] < 3) & (jnp.sum(jnp.square(state[1])) < 1e3)
  return lax.while_loop(goes_on, turn, (0, x @ w))[1] @ out


@function(
  (4, 3),
  groups={
    "features": group(7, "w 1, b 0, q 0, k 0, v 0"),
    "heads": group(2, "q 1, k 1, v 1, out 0"),
    "depth": group(5, "q 2, k 2"),
    "values": group(6, "v 2, out 1"),
  },
)
def one_example_at_a_time(x, *, w=(3, 7), b=(7,), q=(7, 2, 5), k=(7, 2, 5), v=(7, 2, 6), out=(2, 6, 4)):
  """Written for one example, laid over the batch by ``vmap``."""

  def model(x):
    x = nn.relu(x @ w + b)
    query, key, value = (jnp.einsum("td,dhk->thk", x, each) for each in (q, k, v))
    weights = nn.softmax(jnp.einsum("thk,shk->hts", query, key))
    return jnp.einsum("hts,shv,hvo->to", weights, value, out)

  return jax.vmap(model)(x)


def _list_of_arrays(variables, x):
  (w, b), v = variables
  return nn.relu(x @ w + b) @ v


UNMASKED["list_of_arrays"] = Unmasked(
  "list_of_arrays",
  _list_of_arrays,
  lambda x: [(jnp.zeros((3, 5)), jnp.zeros(5)), jnp.zeros((5, 2))],
  ((3,),),
  {"hidden": Group(5, frozenset({("0/0", 1), ("0/1", 0), ("1", 0)}))},
)
