"""Unmasked networks with a state: cells, plain scans, selective and linear ones, loops in loops."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tests.auto_models import conv, dense, function, group, network, weight
from tests.models import param_dtype


def gates(names: str, *axes: int, bias: bool, cell: str = "cell") -> str:
  """The members of a cell's gates: their kernels' axes, and their biases."""
  kernels = [f"{cell}/{name}/kernel {axis}" for name in names.split() for axis in axes]
  return ", ".join(kernels + [f"{cell}/{name}/bias 0" for name in names.split() if bias])


@network(
  (4, 3),
  groups={
    "inputs": group(5, "before/kernel 1, before/bias 0", gates("ii if ig io", 0, bias=False)),
    "state": group(
      6, "head/kernel 0", gates("ii if ig io", 1, bias=False), gates("hi hf hg ho", 0, 1, bias=True)
    ),
  },
)
def lstm(x):
  y = nn.RNN(nn.OptimizedLSTMCell(6, param_dtype=param_dtype(), name="cell"))(nn.relu(dense(5, "before")(x)))
  return dense(2, "head")(y)


@network(
  (4, 3),
  groups={
    "inputs": group(5, "before/kernel 1, before/bias 0", gates("ir iz in", 0, bias=False)),
    "state": group(
      6,
      "head/kernel 0",
      gates("ir iz in", 1, bias=True),
      gates("hr hz", 0, 1, bias=False),
      gates("hn", 0, 1, bias=True),
    ),
  },
)
def gru(x):
  y = nn.RNN(nn.GRUCell(6, param_dtype=param_dtype(), name="cell"))(nn.relu(dense(5, "before")(x)))
  return dense(2, "head")(y[:, -1])


@function(
  (4, 3),
  groups={
    "first state": group(5, "w 1, r 0, r 1, b 0, v 0"),
    "second state": group(6, "v 1, s 0, s 1, c 0, out 0"),
  },
)
def recurrent(x, *, w=(3, 5), r=(5, 5), b=(5,), v=(5, 6), s=(6, 6), c=(6,), out=(6, 2)):
  """Two recurrent layers in one scan; the second starts at a variable."""

  def turn(states, x):
    first, second = states
    first = jnp.tanh(x @ w + first @ r + b)
    second = nn.sigmoid(first @ v + second @ s)
    return (first, second), second @ out

  start = jnp.zeros((x.shape[0], 5), x.dtype), jnp.broadcast_to(c, (x.shape[0], 6))
  return jnp.moveaxis(lax.scan(turn, start, jnp.moveaxis(x, 1, 0))[1], 0, 1)


@network(
  (4, 6),
  groups={
    "stream": group(
      7,
      "stem/kernel 1, stem/bias 0, norm/scale 0, inner/kernel 0, outer/kernel 1, outer/bias 0, head/kernel 0",
    ),
    "inner": group(
      5,
      "inner/kernel 1, inner/bias 0, conv/kernel 2, conv/bias 0, select/kernel 0, step/kernel 1, step/bias 0",
      "decay/w 0, skip/w 0, outer/kernel 0",
    ),
    "rank of the step": group(2, "select/kernel 1, step/kernel 0"),
    "state": group(3, "select/kernel 1, decay/w 1"),
  },
)
def mamba(x):
  """A selective scan: a state (channels, 3) whose decay, input and output hang on the token."""
  x = dense(7, "stem")(x)
  y, gate = jnp.split(dense(10, "inner")(nn.RMSNorm(name="norm")(x)), 2, axis=-1)
  y = nn.silu(conv(5, "conv", (4,), padding="CAUSAL", feature_group_count=5)(y))
  step, into, out = jnp.split(dense(8, "select", use_bias=False)(y), [2, 5], axis=-1)
  step = nn.softplus(dense(5, "step")(step))
  decay = -jnp.exp(weight("decay", 5, 3))

  def turn(state: Any, each: Any) -> Any:
    y, step, into, out = each
    state = jnp.exp(step[..., None] * decay) * state + (step * y)[..., None] * into[:, None]
    return state, jnp.einsum("bes,bs->be", state, out)

  each = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (y, step, into, out))
  _, read = lax.scan(turn, jnp.zeros((x.shape[0], 5, 3), jnp.result_type(x, decay)), each)
  y = (jnp.moveaxis(read, 0, 1) + y * weight("skip", 5)) * nn.silu(gate)
  return dense(2, "head")(x + dense(7, "outer")(y))


@network(
  (4, 3),
  groups={
    "forwards": group(
      5, "head/kernel 0", gates("ii if ig io", 1, bias=False), gates("hi hf hg ho", 0, 1, bias=True)
    ),
    "backwards": group(
      6,
      "head/kernel 0",
      gates("ii if ig io", 1, bias=False, cell="back"),
      gates("hi hf hg ho", 0, 1, bias=True, cell="back"),
    ),
  },
)
def lstm_both_ways(x):
  cells = (
    nn.OptimizedLSTMCell(n, param_dtype=param_dtype(), name=name) for n, name in ((5, "cell"), (6, "back"))
  )
  return dense(2, "head")(nn.Bidirectional(*map(nn.RNN, cells))(x))


@function(
  (4, 3),
  groups={
    "stream": group(7, "stem 1, b 2, c 1, skip 0, head 0"),
    "state": group(5, "angle 0, size 0, b 1, c 0"),
  },
)
def linear_recurrence(
  x, *, stem=(3, 7), angle=(5,), size=(5,), b=(2, 5, 7), c=(5, 7, 2), skip=(7,), head=(7, 2)
):
  """A complex diagonal state, computed for all tokens at once by an associative scan."""
  x = x @ stem
  decay = jnp.exp(lax.complex(-jnp.exp(size), angle))
  driven = x @ lax.complex(b[0], b[1]).T
  combine = lambda one, other: (one[0] * other[0], other[0] * one[1] + other[1])
  decays = jnp.broadcast_to(decay, driven.shape)
  _, state = lax.associative_scan(combine, (decays, driven), axis=1)
  return nn.gelu(jnp.real(state @ lax.complex(c[..., 0], c[..., 1])) + x * skip) @ head


@function(
  (4, 3),
  groups={
    "stream": group(5, "stem 1, w 1, v 2, head 0"),
    "states": group(6, "w 2, r 1, r 2, b 1, v 1", layers=2),
  },
  skipped="w 0, r 0, b 0, v 0",
)
def recurrent_layers_in_a_scan(
  x, *, stem=(3, 5), w=(2, 5, 6), r=(2, 6, 6), b=(2, 6), v=(2, 6, 5), head=(5, 2)
):
  """A scan over tokens in a scan over layers, of which each is computed anew for its derivative."""

  def layer(x, each):
    w, r, b, v = each

    def turn(state, x):
      state = jnp.tanh(x + state @ r + b)
      return state, state

    inputs = jnp.moveaxis(x @ w, 1, 0)
    _, states = lax.scan(turn, jnp.zeros_like(inputs[0]), inputs)
    return x + jnp.moveaxis(states, 0, 1) @ v, None

  x, _ = lax.scan(jax.checkpoint(layer), x @ stem, (w, r, b, v))
  return x @ head
