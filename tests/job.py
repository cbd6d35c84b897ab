"""A small training job that tests repeat on several devices, in several processes, and after being killed."""

import functools
import re
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisherprune_jax as fp

BATCH = 16
STEPS = 16


class Network(nn.Module):
  """A convolution, two dense layers and a dropout that is switched off; every width divides by eight."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = fp.Mask(name="conv")(nn.relu(nn.Conv(8, (3, 3))(x)))
    x = x.reshape(x.shape[0], -1)
    x = fp.Mask(name="dense")(nn.relu(nn.Dense(16)(x)))
    return nn.Dense(8)(x)


MODEL = Network()


@functools.cache
def variables() -> Any:
  return MODEL.init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))


@functools.cache
def cost() -> fp.CostModel:
  return fp.cost_model(MODEL.apply, variables(), jnp.ones((1, 4, 4, 1)))


def transformation(**options: Any) -> optax.GradientTransformationExtraArgs:
  pruning = fp.fisher_prune(cost(), **{"prune_every": 2, "decay": 0.8, "burn_in": 3, **options})
  return optax.chain(optax.adam(1e-2), pruning)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels, a function of the step alone."""
  rng = np.random.default_rng(step)
  return rng.normal(size=(BATCH, 4, 4, 1)).astype(np.float32), rng.integers(8, size=BATCH)


def loss_fn(params: Any, masks: Any, batch: Any) -> jax.Array:
  logits = MODEL.apply({"params": params, "masks": masks}, batch[0])
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train_step(
  tx: Any, params: Any, opt_state: Any, batch: Any, loss_fn: Any = loss_fn
) -> tuple[Any, Any, jax.Array]:
  loss, (grads, mask_grads) = fp.value_and_mask_grads(loss_fn)(params, fp.get_masks(opt_state), batch)
  updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
  return optax.apply_updates(params, updates), opt_state, loss


def plain_step(
  params: Any, opt_state: Any, masks: Any, batch: Any, loss_fn: Any = loss_fn
) -> tuple[Any, Any, jax.Array]:
  """The same network, trained without pruning."""
  loss, grads = jax.value_and_grad(loss_fn)(params, masks, batch)
  updates, opt_state = optax.adam(1e-2).update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def start(tx: Any) -> tuple[Any, Any]:
  params = jax.tree.map(np.asarray, variables()["params"])  # host arrays: no step can donate them
  return params, jax.tree.map(jnp.array, tx.init(params))


def flat_masks(opt_state: Any) -> np.ndarray:
  return np.concatenate([np.asarray(m) for m in jax.tree.leaves(fp.get_masks(opt_state))])


@functools.cache
def masks_on_one_device(steps: int = STEPS) -> np.ndarray:
  """The masks after every step, ``(steps, features)``, without any mesh."""
  tx = transformation()
  (params, opt_state), seen = start(tx), []
  step = jax.jit(functools.partial(train_step, tx))
  for n in range(steps):
    params, opt_state, _ = step(params, opt_state, batch(n))
    seen.append(flat_masks(opt_state))
  return np.stack(seen)


def collectives(function: Any, *args: Any) -> Counter[str]:
  """How many elements cross devices, by kind, in the compiled program; what runs per pruning step included."""
  text = jax.jit(function).lower(*args).compile().as_text()
  found = Counter[str]()
  for result, kind in re.findall(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\(",
    text,
  ):
    for shape in re.findall(r"\w+\[([\d,]*)\]", result):
      found[kind] += int(np.prod([int(n) for n in shape.split(",") if n]))
  return found
