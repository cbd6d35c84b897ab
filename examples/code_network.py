"""The network and the text of code_transformer.py: bytes of Python's standard library, causal attention."""

import math
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisherprune_jax as fp

LENGTH, BATCH = 128, 16  # bytes of context, examples in a batch
LAYERS, WIDTH, HEADS, DEPTH, MLP = 3, 128, 8, 16, 512
HELD_OUT = 256  # windows of the held-out files that are evaluated


class Block(nn.Module):
  """Causal attention and an MLP, each added to a stream that keeps its width."""

  heads: int
  mlp: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = partial(nn.DenseGeneral, dtype=self.dtype)
    y = nn.LayerNorm(dtype=self.dtype)(x)
    q, k, v = (dense((self.heads, DEPTH), name=name)(y) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DEPTH)
    past = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = nn.softmax(jnp.where(past, scores, -1e9).astype(jnp.float32)).astype(self.dtype)
    y = fp.Mask(axis=-2, name="heads")(jnp.einsum("bhqk,bkhd->bqhd", weights, v))
    x = x + dense(WIDTH, axis=(-2, -1), name="out")(y)
    y = nn.gelu(dense(self.mlp, name="up")(nn.LayerNorm(dtype=self.dtype)(x)))
    return x + dense(WIDTH, name="down")(fp.Mask(name="mlp")(y))


class Transformer(nn.Module):
  """Bytes in, logits of the next byte out."""

  heads: int = HEADS
  mlp: int = MLP
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = nn.Embed(256, WIDTH, dtype=self.dtype)(tokens)
    x = x + self.param("position", nn.initializers.normal(0.02), (LENGTH, WIDTH)).astype(self.dtype)
    for layer in range(LAYERS):
      x = Block(self.heads, self.mlp, self.dtype, name=f"layer{layer}")(x)
    return nn.Dense(256, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)).astype(jnp.float32)


class Text(NamedTuple):
  """The bytes to learn from, and windows ``(n, LENGTH + 1)`` of other files to be judged by."""

  train: np.ndarray
  held_out: np.ndarray


def load() -> Text:
  """The modules of the standard library in alphabetical order, every tenth held out."""
  folder = Path(sysconfig.get_paths()["stdlib"])
  files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
  if len(files) < 20:
    sys.exit(f"The source of Python's standard library was looked for in {folder}: {len(files)} files.")
  train = b"".join(text for n, text in enumerate(files) if n % 10)
  held_out = np.frombuffer(b"".join(files[::10]), np.uint8)
  starts = np.linspace(0, len(held_out) - LENGTH - 1, HELD_OUT).astype(int)
  windows = np.lib.stride_tricks.sliding_window_view(held_out, LENGTH + 1)[starts]
  return Text(np.frombuffer(train, np.uint8), np.int32(windows))


def batch_at(text: Text, seed: int, step: int) -> np.ndarray:
  """Random windows of the training text, a function of the seed and the step."""
  starts = np.random.default_rng((seed, step)).integers(len(text.train) - LENGTH, size=BATCH)
  return np.int32(text.train[starts[:, None] + np.arange(LENGTH + 1)])


def nats(logits: jax.Array, windows: jax.Array) -> jax.Array:
  """The negative log-likelihood of every window, summed over its bytes: what pruning scores are made of."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).sum(axis=1)


class Lesson(NamedTuple):
  """A batch: windows ``(BATCH, LENGTH + 1)``, and a teacher's probabilities of each next byte, if there is a teacher."""

  windows: Any
  taught: jax.Array | None = None


def loss_of(logits: jax.Array, lesson: Lesson, weight: float) -> jax.Array:
  """Nats of every window; with a teacher, that weight of them is of what it thinks likely, the rest of what is written."""
  written = nats(logits, lesson.windows)
  if lesson.taught is None:
    return written
  return (1 - weight) * written + weight * optax.softmax_cross_entropy(logits, lesson.taught).sum(axis=1)


def cost_of(model: Transformer) -> fp.CostModel:
  """FLOPs of a window of LENGTH bytes."""
  tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
  return fp.cost_model(model.apply, jax.eval_shape(model.init, jax.random.key(0), tokens), tokens)


def narrower(budget: float, dtype: Any) -> Transformer:
  """The widest network of one shape for all layers, heads and MLP scaled alike, that costs no more than a budget."""

  def model(mlp: int) -> Transformer:
    return Transformer(max(1, round(HEADS * mlp / MLP)), mlp, dtype)

  fits, too_wide = 1, MLP + 1
  while too_wide - fits > 1:
    mlp = (fits + too_wide) // 2
    fits, too_wide = (mlp, too_wide) if cost_of(model(mlp)).dense <= budget else (fits, mlp)
  return model(fits)
