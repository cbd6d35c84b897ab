"""Networks with masks, to time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fisherprune_jax as fp

Width = Callable[[int], int]
"""What is left of a masked width."""


def whole(width: int) -> int:
  """All of it."""
  return width


class ResNet50(nn.Module):
  """224x224 images; both inner widths of every bottleneck are masked, and can be built smaller at once."""

  width: Width = whole

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = partial(nn.Conv, use_bias=False)
    norm = partial(nn.BatchNorm, use_running_average=True)
    x = nn.max_pool(nn.relu(norm()(conv(64, (7, 7), 2)(x))), (3, 3), (2, 2), "SAME")
    for stage, blocks in enumerate((3, 4, 6, 3)):
      for block in range(blocks):
        stride = 2 if stage and not block else 1
        width = 64 * 2**stage
        inner = self.width(width)
        y = fp.Mask()(nn.relu(norm()(conv(inner, (1, 1))(x))))
        y = fp.Mask()(nn.relu(norm()(conv(inner, (3, 3), stride)(y))))
        y = norm()(conv(4 * width, (1, 1))(y))
        x = nn.relu(y + (x if block else norm()(conv(4 * width, (1, 1), stride)(x))))
    return nn.Dense(1000)(jnp.mean(x, axis=(1, 2)))


class Block(nn.Module):
  """A pre-norm transformer block of which heads and the hidden width are masked."""

  heads: int
  width: Width = whole

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    y = nn.LayerNorm()(x)
    shape = (self.width(self.heads), width // self.heads)
    query, key, value = (nn.DenseGeneral(shape)(y) for _ in range(3))
    y = fp.Mask(axis=-2)(nn.dot_product_attention(query, key, value))
    x = x + nn.DenseGeneral(width, axis=(-2, -1))(y)
    y = fp.Mask()(nn.gelu(nn.Dense(self.width(4 * width))(nn.LayerNorm()(x))))
    return x + nn.Dense(width)(y)


class ViT(nn.Module):
  """ViT-B/16 on 224x224 images with its 12 layers; any other number of them for the tool's own speed."""

  layers: int = 12
  width: Width = whole

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(768, (16, 16), (16, 16))(x)
    x = x.reshape(x.shape[0], -1, 768)
    x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], 768))
    for _ in range(self.layers):
      x = Block(12, self.width)(x)
    return nn.Dense(1000)(jnp.mean(nn.LayerNorm()(x), axis=1))


class VGG(nn.Module):
  """A VGG-like network on 64x64 images; every width is masked."""

  width: Width = whole

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3)):
      for _ in range(count):
        x = fp.Mask()(nn.relu(nn.Conv(self.width(width), (3, 3))(x)))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = fp.Mask()(nn.relu(nn.Dense(self.width(512))(x.reshape(x.shape[0], -1))))
    return nn.Dense(100)(x)


class Digits(nn.Module):
  """The network of ``examples/showcase/digits_cnn``."""

  width: Width = whole

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for width, stride in ((64, 1), (128, 2), (128, 1)):
      x = fp.Mask()(nn.relu(nn.Conv(self.width(width), (3, 3), stride)(x)))
    x = fp.Mask()(nn.relu(nn.Dense(self.width(128))(x.reshape(x.shape[0], -1))))
    return nn.Dense(10)(x)


def variables_of(model: nn.Module, x: Any) -> Any:
  """Random variables of a model, at the scale of its own initializers."""
  return jax.jit(model.init)(jax.random.key(0), x)


def keep(masks: Any, width: Width, seed: int = 0) -> Any:
  """Masks that keep random features, as many as ``width`` says."""
  rng = np.random.default_rng(seed)

  def draw(mask: Any) -> jax.Array:
    return jnp.zeros(mask.size).at[rng.permutation(mask.size)[: width(mask.size)]].set(1.0)

  return jax.tree.map(draw, masks)


def share(fraction: float) -> Width:
  """Cuts every width to a fraction."""
  return lambda width: max(1, round(fraction * width))


def rounded(width: Width, multiple: int) -> Width:
  """Widths rounded up to a multiple, or whole."""
  return lambda full: min(full, -(-width(full) // multiple) * multiple)


Cut = Callable[[fp.CostModel], Width]


def fraction(of_widths: float) -> Cut:
  """Cuts every width to a fraction."""
  return lambda cost: share(of_widths)


def budget(of_flops: float) -> Cut:
  """Cuts every width to the largest fraction that fits into a share of the FLOPs."""

  def cut(cost: fp.CostModel) -> Width:
    low, high = 0.0, 1.0
    for _ in range(12):
      middle = (low + high) / 2
      fits = float(cost(keep(cost.masks, share(middle)))) <= of_flops * cost.dense
      low, high = (middle, high) if fits else (low, middle)
    return share(low)

  return cut
