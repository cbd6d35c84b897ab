"""Prune a Keras model on handwritten digits to a tenth of its FLOPs: ``python examples/quickstart_keras.py``."""

import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

import fisherprune_jax as fp

# 1,797 images of 8 by 8 pixels: Alpaydin and Kaynak, https://doi.org/10.24432/C50P49 (CC BY 4.0).
rows = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",", dtype=np.float32)
rows = np.random.default_rng(0).permutation(rows)
images, labels = rows[:, :-1].reshape(-1, 8, 8, 1) / 16, rows[:, -1].astype(int)
unseen = slice(1350, None)


keras.utils.set_random_seed(0)
layer = keras.layers
convs = [layer.Conv2D(32, 3, stride, padding="same", activation="relu") for stride in (1, 2)]
model = keras.Sequential(
  [keras.Input((8, 8, 1)), *convs, layer.Flatten(), layer.Dense(64, "relu"), layer.Dense(10)]
)
params, state = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))


def apply(params, images):
  return model.stateless_call(params, state, images)[0]


def loss_fn(params, images, labels):
  return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()


@jax.jit
def train_step(params, opt_state, images, labels):
  loss, grads = pruner.value_and_grad(loss_fn)(params, opt_state, images, labels)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def accuracy(logits):
  return f"{np.mean(jnp.argmax(logits, axis=-1) == labels[unseen]):.1%} of unseen digits are read correctly"


pruner = fp.Pruner(apply, params, images[:1], keep=0.1, start=300, stop=900)
tx = pruner.wrap(optax.adam(2e-3))
opt_state = tx.init(params)
for step in range(1201):
  batch = np.random.default_rng(step).integers(0, 1350, 64)
  params, opt_state, loss = train_step(params, opt_state, images[batch], labels[batch])
  if step % 300 == 0:
    print(f"step {step}: loss {loss:.3f},", accuracy(pruner.apply(params, opt_state, images[unseen])))
small = pruner.compact(params, opt_state)
print(small.report(), f"\nThe small network: {accuracy(small(small.variables, images[unseen]))}.", sep="\n")
