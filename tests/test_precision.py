"""Half precision: float32 statistics, and the choices of float32 wherever scores differ by more than rounding.

Beside each training in half precision, the float32 network computes the importance of the same weights, masks and
batches. At every prune the feature that goes must be the one with the smallest float32 score, or one whose score is
within ``CLOSE`` of it: half precision cannot tell these apart.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import fisherprune_jax as fp
from tests import job

STEPS, EVERY = 60, 4
CLOSE = {  # tens of roundings of the mantissa
  "bfloat16": 0.1,
  "float16": 0.02,
}


class Network(nn.Module):
  """A convolution and two dense layers that compute in a given precision."""

  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = fp.Mask(name="conv")(nn.relu(nn.Conv(12, (3, 3), **kinds)(x)))
    x = x.reshape(x.shape[0], -1)
    x = fp.Mask(name="dense")(nn.relu(nn.Dense(24, **kinds)(x)))
    return nn.Dense(8, **kinds)(x).astype(jnp.float32)


BF16, F16 = jnp.bfloat16, jnp.float16
RUNS = {
  "bfloat16 activations": (Network(BF16), 1.0),
  "bfloat16 parameters": (Network(BF16, BF16), 1.0),
  "float16 activations, loss times 1024": (Network(F16), 1024.0),
  "float16 parameters, loss times 1024": (Network(F16, F16), 1024.0),
}


def loss_of(model, scale=1.0):
  def loss_fn(params, masks, batch):
    logits = model.apply({"params": params, "masks": masks}, batch[0].astype(model.dtype))
    return scale * optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

  return loss_fn


def run(model, scale):
  """Cost, parameters and, for every step, the state and the float32 importance of the same weights and masks."""
  variables = Network().init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))
  cost = fp.cost_model(Network().apply, variables, jnp.ones((1, 4, 4, 1)))
  options = {"decay": 0.9, "method": "fisher"}
  tx = optax.chain(optax.sgd(0.1, momentum=0.9), fp.fisher_prune(cost, prune_every=EVERY, **options))
  only_scores = fp.fisher_prune(cost, **options)
  params = jax.tree.map(lambda p: p.astype(model.param_dtype), variables["params"])

  @jax.jit
  def step(params, opt_state, shadow, batch, scale):
    masks = fp.get_masks(opt_state)
    grads_of = fp.value_and_mask_grads(loss_of(model, scale), reduction=lambda batch: len(batch[1]) / scale)
    _, (grads, mask_grads) = grads_of(params, masks, batch)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    _, (_, exact) = fp.value_and_mask_grads(loss_of(Network()))(wide, masks, batch)
    _, shadow = only_scores.update({}, shadow, mask_grads=exact)
    grads = jax.tree.map(lambda g: (g.astype(jnp.float32) / scale).astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, shadow

  opt_state, shadow, states = tx.init(params), only_scores.init({}), []
  for n in range(STEPS):
    params, opt_state, shadow = step(params, opt_state, shadow, job.batch(n), jnp.float32(scale))
    states.append((opt_state, fp.get_importance(shadow)))
  return cost, params, states


@pytest.fixture(scope="module", params=RUNS)
def half(request):
  model, scale = RUNS[request.param]
  return model, CLOSE[jnp.dtype(model.dtype).name], *run(model, scale)


def flat(tree):
  return np.concatenate(jax.tree.leaves(tree))


def test_statistics_are_float32_and_parameters_keep_their_type(half):
  model, _, _, params, states = half
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(model.param_dtype)}
  state = fp.get_state(states[-1][0])
  for leaf in jax.tree.leaves((state.scores, state.masks, state.cost, state.shares, state.decay_product)):
    assert leaf.dtype == jnp.float32
  assert int(state.skipped) == 0


def test_signals_are_those_of_float32_up_to_rounding(half):
  """In nats, the loss scale undone: of what is alive, to a part of the typical signal."""
  _, close, _, _, states = half
  for state, exact in (states[0], states[-1]):
    alive = flat(fp.get_masks(state)) > 0
    ours, exact = flat(fp.get_importance(state))[alive], flat(exact)[alive]
    np.testing.assert_allclose(ours, exact, rtol=close, atol=close * np.median(exact))


def test_masks_are_those_of_float32_unless_scores_are_within_rounding(half):
  _, close, cost, _, states = half
  told_apart = 0
  for n in range(EVERY - 1, STEPS, EVERY):
    (before, _), (after, exact) = states[n - 1 : n + 1]
    masks = fp.get_masks(before)
    scores = flat(exact) / (flat(cost.per_feature(masks)) + 1e-6)
    alive = flat(masks) > 0
    [chosen] = np.flatnonzero(flat(masks) != flat(fp.get_masks(after)))
    smallest, second = np.sort(scores[alive])[:2]
    assert scores[chosen] <= (1 + close) * smallest, f"step {n + 1}"
    told_apart += second > (1 + close) * smallest
  assert told_apart >= 5, "too few choices that rounding leaves open"


def test_an_overflow_of_float16_changes_no_score():
  _, _, states = run(Network(F16), 2.0**40)
  state = fp.get_state(states[-1][0])
  assert int(state.skipped) == STEPS
  assert all(float(jnp.sum(s)) == 0 for s in jax.tree.leaves(state.scores))
  assert fp.history(state) == []


def test_a_dynamic_loss_scale_recovers():
  """Flax's ``DynamicScale`` halves the scale until gradients are finite; the batches before are not counted."""
  model = Network(F16)
  variables = model.init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))
  cost = fp.cost_model(Network().apply, variables, jnp.ones((1, 4, 4, 1)))
  tx = fp.fisher_prune(cost, prune_every=2)
  params, opt_state, dynamic = variables["params"], tx.init({}), DynamicScale(scale=2.0**30, fin_steps=1000)

  @jax.jit
  def step(opt_state, dynamic, batch):
    masks = fp.per_example(fp.get_masks(opt_state), job.BATCH)
    differentiate = dynamic.value_and_grad(loss_of(model), argnums=(0, 1))
    dynamic, finite, _, (_, mask_grads) = differentiate(params, masks, batch)
    mask_grads = jax.tree.map(lambda g: g * job.BATCH, mask_grads)  # of the summed loss
    return tx.update({}, opt_state, mask_grads=mask_grads)[1], dynamic, finite

  counted = 0
  for n in range(30):
    opt_state, dynamic, finite = step(opt_state, dynamic, job.batch(n))
    counted += int(finite)
  assert 0 < counted < 30
  assert int(opt_state.counted) >= counted
  assert int(opt_state.skipped) > 0
