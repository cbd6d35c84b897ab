"""Prune an Equinox module on digits to a tenth of its FLOPs: ``python examples/quickstart_equinox.py``."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisherprune_jax as fp

# 1,797 images of 8 by 8 pixels: Alpaydin and Kaynak, https://doi.org/10.24432/C50P49 (CC BY 4.0).
rows = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",", dtype=np.float32)
rows = np.random.default_rng(0).permutation(rows)
images, labels = rows[:, :-1].reshape(-1, 1, 8, 8) / 16, rows[:, -1].astype(int)
unseen = slice(1350, None)


def net(key):
  keys = jax.random.split(key, 4)
  first = eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0])
  second = eqx.nn.Conv2d(32, 32, 3, stride=2, padding=1, key=keys[1])
  hidden, out = eqx.nn.Linear(512, 64, key=keys[2]), eqx.nn.Linear(64, 10, key=keys[3])
  relu = eqx.nn.Lambda(jax.nn.relu)
  return eqx.nn.Sequential([first, relu, second, relu, eqx.nn.Lambda(jnp.ravel), hidden, relu, out])


params, static = eqx.partition(net(jax.random.key(0)), eqx.is_array)


def apply(params, images):
  return jax.vmap(eqx.combine(params, static))(images)


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
