"""Prune an NNX module on handwritten digits to a tenth of its FLOPs: ``python examples/quickstart_nnx.py``."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fisherprune_jax as fp

# 1,797 images of 8 by 8 pixels: Alpaydin and Kaynak, https://doi.org/10.24432/C50P49 (CC BY 4.0).
rows = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",", dtype=np.float32)
rows = np.random.default_rng(0).permutation(rows)
images, labels = rows[:, :-1].reshape(-1, 8, 8, 1) / 16, rows[:, -1].astype(int)
unseen = slice(1350, None)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Conv(1, 32, (3, 3), rngs=rngs)
    self.second = nnx.Conv(32, 32, (3, 3), strides=2, rngs=rngs)
    self.hidden, self.out = nnx.Linear(512, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.second(nnx.relu(self.first(x))))
    return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def loss_fn(model, images, labels):
  return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
  loss, grads = pruner.value_and_grad(loss_fn)(model, optimizer, images, labels)
  optimizer.update(model, grads)
  return loss


def accuracy(logits):
  return f"{np.mean(jnp.argmax(logits, axis=-1) == labels[unseen]):.1%} of unseen digits are read correctly"


model = Net(nnx.Rngs(0))
pruner = fp.nnx.Pruner(model, images[:1], keep=0.1, start=300, stop=900)
optimizer = nnx.Optimizer(model, pruner.wrap(optax.adam(2e-3)), wrt=nnx.Param)
for step in range(1201):
  batch = np.random.default_rng(step).integers(0, 1350, 64)
  loss = train_step(model, optimizer, images[batch], labels[batch])
  if step % 300 == 0:
    print(f"step {step}: loss {loss:.3f},", accuracy(pruner.apply(model, optimizer, images[unseen])))
small = pruner.compact(model, optimizer)
print(small.report(), f"\nThe small network: {accuracy(small(small.variables, images[unseen]))}.", sep="\n")
