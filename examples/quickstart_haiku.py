"""Prune a Haiku network on handwritten digits to a tenth of its FLOPs: ``python examples/quickstart_haiku.py``."""

from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisherprune_jax as fp

# 1,797 images of 8 by 8 pixels: Alpaydin and Kaynak, https://doi.org/10.24432/C50P49 (CC BY 4.0).
rows = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",", dtype=np.float32)
rows = np.random.default_rng(0).permutation(rows)
images, labels = rows[:, :-1].reshape(-1, 8, 8, 1) / 16, rows[:, -1].astype(int)
unseen = slice(1350, None)


def net(x):
  x = jax.nn.relu(hk.Conv2D(32, 3)(x))
  x = jax.nn.relu(hk.Conv2D(32, 3, stride=2)(x))
  x = jax.nn.relu(hk.Linear(64)(hk.Flatten()(x)))
  return hk.Linear(10)(x)


model = hk.without_apply_rng(hk.transform(net))
params, apply = model.init(jax.random.key(0), images[:1]), model.apply


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
