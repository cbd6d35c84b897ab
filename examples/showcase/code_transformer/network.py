"""A small causal transformer and its text: the bytes of Python's standard library."""

import math
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

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
    x = x + dense(WIDTH, axis=(-2, -1), name="out")(jnp.einsum("bhqk,bkhd->bqhd", weights, v))
    y = nn.gelu(dense(self.mlp, name="up")(nn.LayerNorm(dtype=self.dtype)(x)))
    return x + dense(WIDTH, name="down")(y)


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
  """The negative log-likelihood of every window, summed over its bytes."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).sum(axis=1)


class Lesson(NamedTuple):
  """A batch: windows ``(BATCH, LENGTH + 1)``, and a teacher's probabilities of each next byte, if there is a teacher."""

  windows: Any
  taught: jax.Array | None = None


def loss_of(logits: jax.Array, lesson: Lesson, weight: float) -> jax.Array:
  """Nats of every window. With a teacher, ``weight`` is the share of its predictions in the loss."""
  written = nats(logits, lesson.windows)
  if lesson.taught is None:
    return written
  return (1 - weight) * written + weight * optax.softmax_cross_entropy(logits, lesson.taught).sum(axis=1)


def loss_fn(apply: Callable[..., jax.Array], weight: float, params: Any, lesson: Lesson) -> jax.Array:
  """The mean loss of a network without masks."""
  return loss_of(apply({"params": params}, lesson.windows[:, :-1]), lesson, weight).mean()


def adamw(steps: int) -> optax.GradientTransformation:
  rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, steps // 20), steps, 1e-4)
  return optax.adamw(rate, b2=0.98, weight_decay=0.05)


def evaluator(apply: Callable[..., jax.Array], text: Text) -> Callable[..., float]:
  """Bits per byte of the held-out windows, as a function of what ``apply`` takes before the tokens."""
  score = jax.jit(lambda windows, *given: nats(apply(*given, windows[:, :-1]), windows).mean())

  def evaluate(*given: Any) -> float:
    parts = np.split(text.held_out, HELD_OUT // 64)
    return float(np.mean([score(part, *given) for part in parts])) / LENGTH / math.log(2)

  return evaluate


def sample(apply: Callable[..., jax.Array], variables: Any, prompt: bytes, count: int, seed: int) -> str:
  """Continues a prompt, byte by byte."""

  @jax.jit
  def pick(window: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.categorical(key, apply(variables, window)[0, last] / 0.6)

  text, key = list(prompt), jax.random.key(seed)
  for n in range(count):
    window = np.zeros((1, LENGTH), np.int32)
    window[0, : len(text)] = text[-LENGTH:]
    text.append(int(pick(window, min(len(text), LENGTH) - 1, jax.random.fold_in(key, n))))
  return bytes(text).decode("utf-8", "replace")
