"""Lines that pruning adds to and changes in a training script, by framework: ``python benchmarks/added_lines.py``.

Each script below is the pruned one. A line that ends in ``# added`` is not in the plain script; one that ends in
``# was: ...`` is that there. Both scripts are run.
"""

import contextlib
import io

from rich.console import Console
from rich.table import Table

DATA = """
import jax, jax.numpy as jnp, optax
import fisherprune_jax as fp  # added
x = jax.random.normal(jax.random.key(0), (64, 8))
y = jnp.argmax(x[:, :3], axis=1)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
"""
LOOP = """tx = optax.adam(1e-2)
pruner = fp.Pruner(apply, params, x, keep=0.5, stop=20)  # added
tx = pruner.wrap(tx)  # added
opt_state = tx.init(params)
@jax.jit
def step(params, opt_state, x, y):
  loss, grads = pruner.value_and_grad(loss_fn)(params, opt_state, x, y)  # was: jax.value_and_grad(loss_fn)(params, x, y)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss
for _ in range(30):
  params, opt_state, loss = step(params, opt_state, x, y)
small = pruner.compact(params, opt_state)  # added
"""  # fmt: skip
SCRIPTS = {
  "Linen, TrainState": """
import flax.linen as nn
from flax.training import train_state
model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(3)])
variables = model.init(jax.random.key(1), x)
def loss_fn(params, x, y):
  return cross_entropy(model.apply({"params": params}, x), y).mean()
tx = optax.adam(1e-2)
pruner = fp.Pruner(model.apply, variables, x, keep=0.5, stop=20)  # added
tx = pruner.wrap(tx)  # added
state = train_state.TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
@jax.jit
def step(state, x, y):
  loss, grads = pruner.value_and_grad(loss_fn)(state.params, state.opt_state, x, y)  # was: jax.value_and_grad(loss_fn)(state.params, x, y)
  return state.apply_gradients(grads=grads), loss
for _ in range(30):
  state, loss = step(state, x, y)
small = pruner.compact(state.params, state.opt_state)  # added
""",
  "NNX": """
from flax import nnx
rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 3, rngs=rngs))
def loss_fn(model, x, y):
  return cross_entropy(model(x), y).mean()
tx = optax.adam(1e-2)
pruner = fp.nnx.Pruner(model, x, keep=0.5, stop=20)  # added
tx = pruner.wrap(tx)  # added
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
@nnx.jit
def step(model, optimizer, x, y):
  loss, grads = pruner.value_and_grad(loss_fn)(model, optimizer, x, y)  # was: nnx.value_and_grad(loss_fn)(model, x, y)
  optimizer.update(model, grads)
  return loss
for _ in range(30):
  loss = step(model, optimizer, x, y)
small = pruner.compact(model, optimizer)  # added
""",
  "Equinox": """
import equinox as eqx
model = eqx.nn.MLP(8, 3, 32, 2, key=jax.random.key(1))
params, static = eqx.partition(model, eqx.is_inexact_array)
def apply(params, x):
  return jax.vmap(eqx.combine(params, static))(x)
def loss_fn(params, x, y):
  return cross_entropy(apply(params, x), y).mean()
"""
  + LOOP,
  "Haiku": """
import haiku as hk
network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 3])(x)))
params, apply = network.init(jax.random.key(1), x), network.apply
def loss_fn(params, x, y):
  return cross_entropy(apply(params, x), y).mean()
"""
  + LOOP,
  "Keras": """
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(3)])
params, state = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))
def apply(params, x):
  return model.stateless_call(params, state, x)[0]
def loss_fn(params, x, y):
  return cross_entropy(apply(params, x), y).mean()
tx = optax.adam(1e-2)
pruner = fp.Pruner(apply, params, x, keep=0.5, stop=20)  # added
tx = pruner.wrap(tx)  # added
opt_state = tx.init(params)
@jax.jit
def step(params, opt_state, x, y):
  loss, grads = pruner.value_and_grad(loss_fn)(params, opt_state, x, y)  # was: jax.value_and_grad(loss_fn)(params, x, y)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss
for _ in range(30):
  params, opt_state, loss = step(params, opt_state, x, y)
small = pruner.compact(params, opt_state)  # added
""",
}  # fmt: skip


def plain(line: str) -> str | None:
  """A line of the plain script; None where that has none."""
  if line.endswith("# added"):
    return None
  code, _, original = line.partition("  # was: ")
  return f"{code.partition(' = ')[0]} = {original}" if original else line


def main() -> None:
  """Runs every script in both forms and prints the numbers of lines."""
  table = Table("framework", "plain script", "added", "changed", "pruned to")
  for name, body in SCRIPTS.items():
    lines = [line for line in (DATA + body).splitlines() if line]
    others = [other for line in lines if (other := plain(line)) is not None]
    found: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
      exec("\n".join(others), {})
      exec("\n".join(lines), found)
    changed = sum("  # was: " in line for line in lines)
    share = found["small"].cost / found["pruner"].cost.dense  # type: ignore[attr-defined]
    table.add_row(name, str(len(others)), str(len(lines) - len(others)), str(changed), f"{share:.0%}")
  Console().print(table)


if __name__ == "__main__":
  main()
