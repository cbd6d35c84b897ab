"""Prune a trained network without training and without labels: ``python examples/quickstart_one_shot.py``."""

from pathlib import Path

import flax.linen as nn
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


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(32, (3, 3))(x))
    x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
    x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
    return nn.Dense(10)(x)


@jax.jit
def train_step(params, opt_state, images, labels):
  def loss_fn(params):
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def accuracy(logits):
  return f"{np.mean(jnp.argmax(logits, axis=-1) == labels[unseen]):.1%} of unseen digits are read correctly"


model, tx = Net(), optax.adam(2e-3)
params = model.init(jax.random.key(0), images[:1])["params"]
opt_state = tx.init(params)
for step in range(600):
  batch = np.random.default_rng(step).integers(0, 1350, 64)
  params, opt_state = train_step(params, opt_state, images[batch], labels[batch])
print("Trained:", accuracy(model.apply({"params": params}, images[unseen])))

# From here on no labels, and no training.
batches = np.split(images[:1350], 9)
pruner = fp.Pruner(model.apply, {"params": params}, images[:1], keep=[0.5, 0.25, 0.1])
for pruned, masks in pruner.one_shot(params, batches):
  small = pruner.compact(pruned, masks)
  print(
    f"{small.cost / pruner.cost.dense:.1%} of the FLOPs:", accuracy(small(small.variables, images[unseen]))
  )
