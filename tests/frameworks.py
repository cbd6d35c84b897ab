"""Real models of Equinox, Haiku and Keras 3 as functions of their variables; random weights, drawn by NumPy."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

CLASSES = 10
SIZE = 48
"""Of an image: what is left of it after the last stride is 2 x 2, which batch norm can still tell apart."""
LABELS = np.array([1, 7])


class Network(NamedTuple):
  """A network in both of its forms.

  Attributes:
    apply: ``apply(variables, x)``, as it is served.
    train: ``train(variables, x, labels) -> (loss, state)``.
    variables: ``"params"`` and ``"state"``.
    x: two examples.
  """

  apply: Callable[..., Any]
  train: Callable[..., Any]
  variables: dict[str, Any]
  x: np.ndarray


def loss_of(logits, labels):
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def drawn(tree):
  """Weights like ``tree``: what is a variance or a scale is positive, and nothing is zero that need not be."""
  random = np.random.default_rng(0)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.shape:
      return (
        jnp.ones(leaf.shape, leaf.dtype) if leaf.dtype == jnp.float32 else jnp.zeros(leaf.shape, leaf.dtype)
      )
    if any(word in name for word in ("var", "scale", "gamma", "norm")):
      return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    fan_in = max(np.prod(leaf.shape[:-1]), 1) if len(leaf.shape) > 1 else 10
    return jnp.asarray(random.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, tree)


def images(size, *, channels_first=False):
  shape = (2, 3, size, size) if channels_first else (2, size, size, 3)
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def haiku_resnet18() -> Network:
  net = hk.transform_with_state(lambda x, training: hk.nets.ResNet18(CLASSES)(x, training))
  x = images(SIZE)
  params, state = drawn(jax.eval_shape(lambda key: net.init(key, x, True), jax.random.key(0)))

  def apply(variables, x):
    return net.apply(variables["params"], variables["state"], None, x, False)[0]

  def train(variables, x, labels):
    logits, state = net.apply(variables["params"], variables["state"], None, x, True)
    return loss_of(logits, labels), state

  return Network(apply, train, {"params": params, "state": state}, x)


def as_tree(weights, values):
  """Values of Keras' variables as a tree, by the paths of these."""
  return unflatten_dict({w.path: value for w, value in zip(weights, values, strict=True)}, sep="/")


def as_list(weights, tree):
  """A tree as Keras takes it."""
  flat = flatten_dict(tree, sep="/")
  return [flat[w.path] for w in weights]


def keras_application(name: str) -> Network:
  make = getattr(keras.applications, name)
  model = make(weights=None, input_shape=(SIZE, SIZE, 3), classes=CLASSES, classifier_activation=None)
  trained, others = model.trainable_variables, model.non_trainable_variables

  def call(variables, x, training):
    params, state = as_list(trained, variables["params"]), as_list(others, variables["state"])
    logits, state = model.stateless_call(params, state, x, training=training)
    return logits, as_tree(others, state)

  def train(variables, x, labels):
    logits, state = call(variables, x, training=True)
    return loss_of(logits, labels), state

  variables = {
    "params": as_tree(trained, [w.value for w in trained]),
    "state": as_tree(others, [w.value for w in others]),
  }
  return Network(lambda v, x: call(v, x, training=False)[0], train, drawn(variables), images(SIZE))


class CNN(eqx.Module):
  """Convolutions with batch norm, a residual branch, and dropout before the head; for one example."""

  stem: eqx.nn.Conv2d
  norm: eqx.nn.BatchNorm
  inner: eqx.nn.Conv2d
  outer: eqx.nn.Conv2d
  drop: eqx.nn.Dropout
  head: eqx.nn.MLP

  def __init__(self, key):
    keys = jax.random.split(key, 4)
    self.stem = eqx.nn.Conv2d(3, 16, 3, stride=2, key=keys[0])
    self.norm = eqx.nn.BatchNorm(16, "batch", mode="batch")
    self.inner = eqx.nn.Conv2d(16, 24, 3, padding=1, key=keys[1])
    self.outer = eqx.nn.Conv2d(24, 16, 1, key=keys[2])
    self.drop = eqx.nn.Dropout(0.1)
    self.head = eqx.nn.MLP(16, CLASSES, 32, 1, key=keys[3])

  def __call__(self, x, state, key=None):
    x, state = self.norm(self.stem(x), state)
    x = jax.nn.relu(x)
    x = x + self.outer(jax.nn.relu(self.inner(x)))
    return self.head(self.drop(x.mean(axis=(1, 2)), key=key)), state


def equinox_cnn() -> Network:
  model, state = eqx.nn.make_with_state(CNN)(jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  serving = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)[1]

  def apply(variables, x):
    model = eqx.combine(variables["params"], serving)
    return jax.vmap(lambda x: model(x, variables["state"])[0])(x)

  def train(variables, x, labels):
    model = eqx.combine(variables["params"], static)
    keys = jax.random.split(jax.random.key(0), len(x))
    mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    logits, state = mapped(x, variables["state"], keys)
    return loss_of(logits, labels), state

  return Network(apply, train, {"params": params, "state": state}, images(32, channels_first=True))


NETWORKS = {
  "EquinoxCNN": equinox_cnn,
  "ResNet18": haiku_resnet18,
  "MobileNetV2": functools.partial(keras_application, "MobileNetV2"),
  "EfficientNetB0": functools.partial(keras_application, "EfficientNetB0"),
}
