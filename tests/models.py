"""One table of small networks that every property runs over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fisherprune_jax as fp


@dataclass(frozen=True)
class Case:
  """A network, the shape of one batch of its input, and what is known of it.

  ``removable``: nothing has to be kept whole. ``valid``: loop-free and VALID-padded, so that XLA's own count
  can be compared. ``differentiable``: by reverse mode. ``independent``: an example's output
  does not hang on the others.
  """

  name: str
  module: Callable[[], nn.Module]
  shape: tuple[int, ...]
  removable: bool = True
  valid: bool = False
  differentiable: bool = True
  independent: bool = True

  def variables(self, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Random variables: biases and statistics too, so that nothing is zero by accident."""
    module = self.module()
    init = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(self.shape, dtype))
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
      if path[0].key == "masks":
        return jnp.ones(leaf.shape, jnp.float32)
      values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1)
      return jnp.asarray(np.abs(values) + 0.5 if path[-1].key == "var" else values, dtype)

    return jax.tree_util.tree_map_with_path(draw, init)

  def inputs(self, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """A random batch."""
    return jnp.asarray(np.random.default_rng(seed + 1).normal(size=self.shape), dtype)


def random_masks(masks: Any, seed: int, alive: float = 0.6) -> Any:
  """Random 0/1 masks of which every row keeps a feature."""
  rng = np.random.default_rng(seed)

  def draw(mask: Any) -> jax.Array:
    values = rng.random(mask.shape) < alive
    values[..., rng.integers(mask.shape[-1])] = True
    return jnp.asarray(values, jnp.float32)

  return jax.tree.map(draw, masks)


CASES: dict[str, Case] = {}


def case(shape: tuple[int, ...], **known: bool) -> Any:
  """Adds a function ``x -> y`` with Linen layers in it to the table."""

  def add(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    class Network(nn.Module):
      @nn.compact
      def __call__(self, x: jax.Array) -> jax.Array:
        return function(x)

    CASES[function.__name__] = Case(function.__name__, Network, shape, **known)
    return function

  return add


def dense(features: int, name: str | None = None, use_bias: bool = True) -> nn.Dense:
  return nn.Dense(features, use_bias=use_bias, name=name, param_dtype=param_dtype())


def conv(features: int, kernel: Any = (3, 3), **options: Any) -> nn.Conv:
  return nn.Conv(features, kernel, param_dtype=param_dtype(), **options)


def param_dtype() -> Any:
  return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def mask(x: jax.Array, **options: Any) -> jax.Array:
  return fp.Mask(**options)(x)


def wide(x: jax.Array) -> jax.Array:
  """In float32 or wider, for what knows no half precision."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def batch_norm(x: jax.Array) -> jax.Array:
  return nn.BatchNorm(use_running_average=True)(x)


def flatten(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], -1)


@case((3, 5), valid=True)
def mlp(x):
  x = mask(nn.relu(dense(7)(x)))
  x = mask(jnp.tanh(dense(6)(x)))
  return dense(4)(x)


@case((3, 5), valid=True)
def mlp_without_biases(x):
  x = mask(nn.relu(dense(7, use_bias=False)(x)))
  x = mask(nn.relu(dense(6, use_bias=False)(x)))
  return dense(4, use_bias=False)(x)


@case((2, 6, 6, 3))
def cnn_with_flatten(x):
  x = mask(nn.relu(conv(5)(x)))
  x = nn.max_pool(x, (2, 2), (2, 2))
  x = mask(nn.relu(conv(6, strides=2)(x)))
  x = mask(nn.gelu(dense(7)(flatten(x))))
  return dense(4)(x)


@case((2, 9, 9, 2), valid=True)
def cnn_valid(x):
  x = mask(nn.relu(conv(5, padding="VALID")(x)))
  x = nn.avg_pool(x, (2, 2), (1, 1))
  x = mask(nn.relu(conv(4, padding="VALID", strides=(2, 1))(x)))
  return dense(3)(jnp.mean(x, axis=(1, 2)))


@case((2, 8, 3))
def conv_1d_causal_dilated(x):
  x = mask(nn.relu(conv(5, (3,), padding="CAUSAL")(x)))
  x = mask(nn.relu(conv(6, (3,), kernel_dilation=2)(x)))
  return conv(2, (1,))(x)


@case((2, 5, 5, 2))
def conv_transposed(x):
  x = mask(nn.relu(conv(4)(x)))
  x = mask(nn.relu(nn.ConvTranspose(5, (2, 2), strides=(2, 2), param_dtype=param_dtype())(x)))
  return conv(2, (1, 1))(x)


@case((2, 5, 5, 4))
def conv_grouped(x):
  x = mask(nn.relu(conv(8)(x)))
  x = mask(nn.relu(conv(12, feature_group_count=4)(x)))
  return conv(3, (1, 1))(x)


@case((2, 5, 5, 3))
def mobile_net_block_with_one_mask(x):
  both = fp.Mask()
  y = both(nn.relu6(batch_norm(conv(8, (1, 1))(x))))
  y = both(nn.relu6(batch_norm(conv(8, (3, 3), feature_group_count=8, use_bias=False)(y))))
  return x + batch_norm(conv(3, (1, 1))(y))


@case((2, 5, 5, 3))  # the second batch norm shifts what the first mask switched off; the second mask decides
def mobile_net_block(x):
  y = mask(nn.relu6(batch_norm(conv(8, (1, 1))(x))))
  y = mask(nn.relu6(batch_norm(conv(8, (3, 3), feature_group_count=8, use_bias=False)(y))))
  return x + batch_norm(conv(3, (1, 1))(y))


@case((2, 5, 5, 3))
def depthwise_multiplier(x):
  y = mask(nn.relu(conv(4, (1, 1))(x)))
  y = conv(8, (3, 3), feature_group_count=4, use_bias=False)(y)
  return conv(3, (1, 1))(mask(nn.silu(y)))


@case((2, 6, 6, 3))
def batch_norm_before_the_mask(x):
  x = mask(nn.relu(batch_norm(conv(6, use_bias=False)(x))))
  x = mask(nn.relu(batch_norm(conv(5, use_bias=False)(x))))
  return dense(3)(jnp.mean(x, axis=(1, 2)))


@case((2, 6, 6, 3), removable=False)
def batch_norm_after_the_mask(x):
  x = nn.relu(batch_norm(mask(conv(6)(x))))
  return dense(3)(jnp.max(x, axis=(1, 2)))


@case((3, 6), removable=False)
def layer_norm_over_the_mask(x):
  x = mask(nn.relu(dense(7)(x)))
  x = nn.LayerNorm()(x)
  return dense(4)(x)


@case((3, 6))
def rms_norm_over_the_mask(x):
  x = mask(nn.relu(dense(7)(x)))
  return dense(4)(nn.RMSNorm()(x))


@case((3, 6), removable=False)  # its statistics are those of all features
def layer_norm_before_the_mask(x):
  x = mask(nn.LayerNorm()(dense(7)(x)))
  return dense(4)(nn.gelu(x))


@case((2, 6, 6, 3))
def residual_network(x):
  x = conv(6)(x)
  for _ in range(2):
    y = mask(nn.relu(conv(5)(nn.relu(x))))
    x = x + conv(6)(y)
  return dense(3)(jnp.mean(nn.relu(x), axis=(1, 2)))


@case((2, 6, 6, 3))
def residual_branches_masked_apart(x):
  x = mask(conv(6)(x))
  x = x + mask(conv(6)(nn.relu(x)))
  return dense(3)(jnp.mean(nn.relu(x), axis=(1, 2)))


class _SharedTrunk(nn.Module):
  @nn.compact
  def __call__(self, x):
    trunk = fp.Mask()
    x = trunk(nn.relu(conv(6)(x)))
    for _ in range(2):
      x = trunk(x + conv(6)(mask(nn.relu(conv(4)(x)))))
    return dense(3)(jnp.mean(x, axis=(1, 2)))


CASES["residual_trunk_with_one_mask"] = Case("residual_trunk_with_one_mask", _SharedTrunk, (2, 5, 5, 2))


@case((2, 5, 5, 3))
def dense_net(x):
  features = [mask(conv(4)(x))]
  for _ in range(2):
    y = jnp.concatenate(features, axis=-1)
    features.append(mask(nn.relu(conv(3)(nn.relu(y)))))
  return dense(3)(jnp.mean(jnp.concatenate(features, axis=-1), axis=(1, 2)))


@case((2, 8, 8, 2))
def u_net(x):
  down = mask(nn.relu(conv(4)(x)))
  y = mask(nn.relu(conv(5)(nn.max_pool(down, (2, 2), (2, 2)))))
  up = nn.ConvTranspose(3, (2, 2), strides=(2, 2), param_dtype=param_dtype())(y)
  return conv(2, (1, 1))(mask(nn.relu(conv(4)(jnp.concatenate([down, up], axis=-1)))))


@case((3, 6))
def gated_unit(x):
  gate, value = jnp.split(dense(10)(x), 2, axis=-1)
  return dense(4)(mask(nn.silu(gate) * value))


@case((3, 6))
def unequal_split(x):
  y = mask(nn.relu(dense(10)(x)))
  a, b = jnp.split(y, [3], axis=-1)
  return dense(2)(a) + dense(2)(b)


@case((2, 6, 6, 3), removable=False)
def sigmoid_after_the_mask(x):
  y = nn.sigmoid(mask(conv(5)(x)))
  return dense(3)(jnp.mean(y, axis=(1, 2)))


@case((2, 6, 6, 3), removable=False)
def maximum_over_the_mask(x):
  y = mask(conv(5)(x))
  return dense(3)(flatten(jnp.max(y, axis=-1)))


@case((3, 6), removable=False)
def sort_over_the_mask(x):
  return dense(3)(jnp.sort(mask(dense(5)(x)), axis=-1))


@case((2, 4, 4, 3))
def channel_shuffle(x):
  y = mask(nn.relu(conv(6, (1, 1))(x)))
  y = y.reshape(2, 4, 4, 2, 3).swapaxes(-1, -2).reshape(2, 4, 4, 6)
  return conv(3, (1, 1))(y)


@case((3, 6))
def channels_picked_by_index(x):
  y = mask(nn.relu(dense(6)(x)))
  return dense(3)(y[:, jnp.array([4, 2, 0, 1, 1])])


@case((3, 6))
def stacked_tiled_and_scattered(x):
  y = mask(nn.relu(dense(6)(x)))
  y = jnp.stack([y, 2 * y, jnp.zeros_like(y)], axis=1)
  y = y.at[:, 2].set(y[:, 0] * y[:, 1]).at[:, 0].add(y[:, 2])
  y = lax.dynamic_update_slice(y, y[:, :1], (0, 1, 0))
  a, b, _ = jnp.unstack(jnp.tile(y, (1, 1, 2)), axis=1)
  return dense(3)(a + b)


@case((3, 6), removable=False)
def top_k_over_the_mask(x):
  values, places = lax.top_k(mask(nn.relu(dense(6)(x))), 3)
  return dense(3)(values) + places


@case((3, 6))
def embedding(x):
  table = nn.Embed(5, 6, param_dtype=param_dtype())
  y = table(jnp.clip(jnp.abs(x * 3).astype(jnp.int32), 0, 4))
  return dense(3)(mask(nn.relu(dense(5)(mask(y)))))


@case((3, 6))
def pad_and_slice(x):
  y = mask(nn.relu(dense(6)(x)))
  y = jnp.pad(y, ((0, 0), (1, 2)))[:, 1:-1][:, ::-1]
  return dense(3)(y)


@case((3, 6))
def mask_after_flatten(x):
  y = dense(6)(x.reshape(3, 3, 2)).reshape(3, -1)
  return dense(3)(mask(nn.relu(y)))


@case((2, 5, 4, 3))
def mask_on_heads(x):
  y = nn.DenseGeneral((4, 3), axis=-1, param_dtype=param_dtype())(x)
  y = mask(nn.relu(y), axis=-2)
  return nn.DenseGeneral(3, axis=(-2, -1), param_dtype=param_dtype())(y)


@case((3, 6), removable=False)
def softmax_over_the_mask(x):
  return dense(3)(nn.softmax(mask(dense(5)(x))))


@case((2, 6, 6, 3))
def fft_along_another_axis(x):
  y = wide(mask(nn.relu(conv(5)(x))))
  y = jnp.real(jnp.fft.fft(y, axis=1)) + jnp.fft.irfft2(jnp.fft.rfft2(y, axes=(1, 2)) * (1 + 2j), axes=(1, 2))
  return dense(3)(jnp.max(y, axis=(1, 2)))


@case((3, 6))  # the transform is as long as it was; of the variables nothing stays
def fft_over_the_mask(x):
  return dense(3)(jnp.imag(jnp.fft.rfft(wide(mask(dense(6)(x))))))


@case((3, 6))
def weights_shared(x):
  layer, gate = dense(6), fp.Mask()
  return dense(2)(gate(nn.relu(layer(gate(nn.relu(layer(x)))))))


@case((3, 6), removable=False, independent=False)  # it divides by the number of examples
def mask_value_used_in_other_ways(x):
  y = nn.relu(dense(5)(x))
  kept = fp.Mask()(jnp.ones_like(y))
  return dense(3)(y * kept + (1.0 - kept) * 0.5) / jnp.sum(kept)


@case((3, 4, 6))
def remat_and_jit(x):
  def block(y: jax.Array) -> jax.Array:
    return mask(nn.silu(dense(5)(y)))

  y = jax.jit(nn.gelu)(mask(dense(6)(x)))
  y = y + jax.checkpoint(jnp.sin)(y)
  return dense(2)(lax.rev(block(y), (1,)))


def lstm(features: int) -> nn.OptimizedLSTMCell:
  return nn.OptimizedLSTMCell(features, param_dtype=param_dtype())


class _Recurrent(nn.Module):
  """A masked recurrent state, shared over time: by ``nn.RNN`` (a scan)."""

  cell: Any

  @nn.compact
  def __call__(self, x):
    y = nn.RNN(self.cell(6))(mask(dense(5)(x)))
    return dense(2)(mask(y))


CASES["lstm_scanned"] = Case("lstm_scanned", lambda: _Recurrent(lstm), (2, 4, 3))
CASES["gru_scanned"] = Case(
  "gru_scanned", lambda: _Recurrent(lambda n: nn.GRUCell(n, param_dtype=param_dtype())), (2, 4, 3)
)


class _MaskedState(nn.Module):
  """A hidden state that is masked at every turn, with the mask closed over."""

  @nn.compact
  def __call__(self, x):
    inner, outer, gate = dense(6), dense(6, use_bias=False), fp.Mask()
    w = self.param("w", nn.initializers.normal(), (6, 6), param_dtype())
    inputs = gate(nn.relu(inner(x)))
    keep = gate(jnp.ones((x.shape[0], 6), x.dtype))
    outer(inputs)

    def turn(state, each):
      state = jnp.tanh(state @ w + each) * keep
      return state, state

    last, states = lax.scan(turn, jnp.zeros_like(inputs[:, 0]), jnp.moveaxis(inputs, 1, 0))
    return dense(2)(last + states.sum(0))


CASES["recurrent_state_masked"] = Case("recurrent_state_masked", _MaskedState, (2, 4, 3))


@case((2, 5), independent=False)
def conditional(x):
  y = mask(nn.relu(dense(6)(x)))
  z = lax.cond(jnp.sum(x) > 0, lambda y: jnp.tanh(y) * 2 + jnp.sin(y), lambda y: y, y)
  return dense(2)(z)


@case((2, 5), differentiable=False)
def while_loop(x):
  y = mask(nn.relu(dense(6)(x)))
  z = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, y))[1]
  return dense(2)(z)


@case((2, 5), independent=False)
def switch(x):
  y = mask(nn.relu(dense(6)(x)))
  branches = [jnp.tanh, lambda y: y * y + y, lambda y: y]
  return dense(2)(lax.switch(jnp.argmax(x[0]), branches, y))


@case((2, 5))
def fori_loop(x):
  y = mask(nn.relu(dense(6)(x)))
  return dense(2)(lax.fori_loop(0, 3, lambda i, y: y * 0.5 + jnp.sin(y), y))


class _Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = mask(nn.relu(dense(5)(nn.LayerNorm(param_dtype=param_dtype())(x))))
    return x + dense(4)(y).astype(x.dtype), jnp.sum(y, axis=-1)


class _ScannedLayers(nn.Module):
  """A stack of layers by ``nn.scan``: masks ``(L, C)``, each layer with a width of its own."""

  @nn.compact
  def __call__(self, x):
    axes = {"params": 0, "masks": 0}
    layers = nn.scan(_Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
    x, sums = layers()(x, None)
    return dense(2)(x) + jnp.mean(sums, axis=0)[:, None]


CASES["scanned_layers"] = Case("scanned_layers", _ScannedLayers, (2, 4))


from tests import models_more as models_more  # noqa: E402  it adds to the table
