"""Nothing leaves the device: no transfers, no compilation after the first step, a small state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from tests import job
from tests.compiling import nothing_compiled


def step_with_metrics(tx, params, opt_state, batch):
  params, opt_state, loss = job.train_step(tx, params, opt_state, batch)
  return params, opt_state, {"loss": loss, **fp.metrics(opt_state)}


def test_a_step_moves_nothing_between_host_and_device():
  tx = job.transformation(prune_every=1, burn_in=0, features_per_prune=2, target=1.0)
  params, opt_state, batch = jax.device_put((*job.start(tx), job.batch(0)))
  step = jax.jit(functools.partial(step_with_metrics, tx))
  with jax.transfer_guard("disallow"):
    for _ in range(3):
      params, opt_state, metrics = step(params, opt_state, batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):  # the guard is awake
      step(params, opt_state, job.batch(0))
  assert float(metrics["pruning/alive"]) == 8 + 16 - 6


def test_the_program_calls_nothing_on_the_host():
  tx = job.transformation()
  program = str(jax.make_jaxpr(functools.partial(step_with_metrics, tx))(*job.start(tx), job.batch(0)))
  assert "cond[" in program
  assert "callback" not in program


def test_a_thousand_steps_compile_once():
  tx = job.transformation(
    prune_every=7,
    burn_in=20,
    features_per_prune=2,
    target=optax.linear_schedule(job.cost().dense, 0.1 * job.cost().dense, 500),
  )
  step = jax.jit(functools.partial(step_with_metrics, tx), donate_argnums=(0, 1))
  params, opt_state = jax.device_put(job.start(tx))
  batches = [jax.device_put(job.batch(n)) for n in range(8)]
  params, opt_state, _ = step(params, opt_state, batches[0])
  with nothing_compiled():
    for n in range(1, 1000):
      params, opt_state, metrics = step(params, opt_state, batches[n % 8])
    jax.block_until_ready(params)
  assert int(metrics["pruning/step"]) == 1000
  assert float(metrics["pruning/cost"]) <= 0.1 * job.cost().dense


def test_the_state_is_under_sixteen_bytes_a_feature_beyond_the_masks():
  tx = fp.fisher_prune(job.cost())
  state = tx.init({})
  features = sum(mask.size for mask in jax.tree.leaves(state.masks))
  beyond = sum(x.nbytes for x in jax.tree.leaves(state._replace(masks=())))
  assert beyond < 16 * features


def test_the_state_of_many_features_is_eight_bytes_each():
  masks = {"m": jnp.ones(10_000)}
  cost = fp.CostModel.from_functions(masks, total=lambda m: jnp.sum(m["m"]), per_feature=lambda m: m)
  state = fp.fisher_prune(cost).init({})
  beyond = sum(x.nbytes for x in jax.tree.leaves(state._replace(masks=())))
  np.testing.assert_allclose(beyond / 10_000, 8, atol=0.01)
