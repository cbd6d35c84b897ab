"""Image networks without masks, in the forms in which they were published."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = partial(nn.BatchNorm, use_running_average=True, momentum=0.9)


class ResNet50(nn.Module):
  """He et al. 2016: convolutions without biases, each before a batch norm."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = partial(nn.Conv, use_bias=False)
    x = nn.max_pool(nn.relu(Norm()(conv(64, (7, 7), 2)(x))), (3, 3), (2, 2), "SAME")
    for stage, blocks in enumerate((3, 4, 6, 3)):
      for block in range(blocks):
        stride, width = 2 if stage and not block else 1, 64 * 2**stage
        y = nn.relu(Norm()(conv(width, (1, 1))(x)))
        y = nn.relu(Norm()(conv(width, (3, 3), stride)(y)))
        y = Norm()(conv(4 * width, (1, 1))(y))
        x = nn.relu(y + (x if block else Norm()(conv(4 * width, (1, 1), stride)(x))))
    return nn.Dense(1000)(jnp.mean(x, axis=(1, 2)))


class EfficientNetB0(nn.Module):
  """Tan and Le 2019: inverted bottlenecks with depthwise convolutions, squeeze and excitation."""

  stages = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
  )

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = partial(nn.Conv, use_bias=False)
    x = nn.swish(Norm()(conv(32, (3, 3), 2)(x)))
    for expansion, width, repeats, size, first_stride in self.stages:
      for block in range(repeats):
        stride, inside = first_stride if not block else 1, expansion * x.shape[-1]
        y = nn.swish(Norm()(conv(inside, (1, 1))(x))) if expansion > 1 else x
        y = nn.swish(Norm()(conv(inside, (size, size), stride, feature_group_count=inside)(y)))
        gate = nn.swish(nn.Conv(max(1, x.shape[-1] // 4), (1, 1))(y.mean((1, 2), keepdims=True)))
        y = Norm()(conv(width, (1, 1))(y * nn.sigmoid(nn.Conv(inside, (1, 1))(gate))))
        x = x + y if x.shape == y.shape else y
    x = nn.swish(Norm()(conv(1280, (1, 1))(x)))
    return nn.Dense(1000)(jnp.mean(x, axis=(1, 2)))


class ConvNeXtTiny(nn.Module):
  """Liu et al. 2022: depthwise convolutions, layer norms, layer scale."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.LayerNorm()(nn.Conv(96, (4, 4), 4)(x))
    for stage, blocks in enumerate((3, 3, 9, 3)):
      width = 96 * 2**stage
      if stage:
        x = nn.Conv(width, (2, 2), 2)(nn.LayerNorm()(x))
      for block in range(blocks):
        y = nn.LayerNorm()(nn.Conv(width, (7, 7), feature_group_count=width)(x))
        y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
        x = x + y * self.param(f"scale{stage}_{block}", nn.initializers.constant(1e-6), (width,))
    return nn.Dense(1000)(nn.LayerNorm()(jnp.mean(x, axis=(1, 2))))


class StdConv(nn.Conv):
  """A convolution whose kernel is standardized over all axes but the last."""

  def param(self, name: str, *args, **options):  # type: ignore[no-untyped-def]
    value = super().param(name, *args, **options)
    if name != "kernel":
      return value
    axes = tuple(range(value.ndim - 1))
    return (value - value.mean(axes)) * jax.lax.rsqrt(value.var(axes) + 1e-10)


class BiT(nn.Module):
  """Kolesnikov et al. 2020, R50x1: group norms before standardized convolutions."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = partial(StdConv, use_bias=False)
    x = nn.max_pool(conv(64, (7, 7), 2)(x), (3, 3), (2, 2), "SAME")
    for stage, blocks in enumerate((3, 4, 6, 3)):
      for block in range(blocks):
        stride, width = 2 if stage and not block else 1, 64 * 2**stage
        y = nn.relu(nn.GroupNorm()(x))
        residual = x if block else conv(4 * width, (1, 1), stride)(y)
        y = nn.relu(nn.GroupNorm()(conv(width, (1, 1))(y)))
        y = nn.relu(nn.GroupNorm()(conv(width, (3, 3), stride)(y)))
        x = conv(4 * width, (1, 1))(y) + residual
    return nn.Dense(1000)(jnp.mean(nn.relu(nn.GroupNorm()(x)), axis=(1, 2)))


NETWORKS = {
  "ResNet-50": ResNet50,
  "EfficientNet-B0": EfficientNetB0,
  "ConvNeXt-T": ConvNeXtTiny,
  "BiT-R50x1": BiT,
}
