"""Training goes on after compaction: the same trajectory, and the same features pruned at the same steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from tests.models import CASES, random_masks
from tests.test_compaction import Trained, close, pruned

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
OPTIMIZERS = {
  "sgd": optax.sgd(0.1),
  "momentum": optax.sgd(0.05, momentum=0.9),
  "nesterov": optax.sgd(0.05, momentum=0.9, nesterov=True),
  "adam": optax.adam(0.01),
  "adamw": optax.adamw(0.01, weight_decay=0.1),
  "lion": optax.lion(0.003),
  "schedule": optax.adam(optax.cosine_decay_schedule(0.01, 30)),
  "chain": optax.chain(optax.clip(0.5), optax.scale_by_adam(), optax.trace(0.5), optax.scale(-0.01)),
  "ema_of_updates": optax.chain(optax.sgd(0.1), optax.ema(0.9)),
  "injected": optax.inject_hyperparams(optax.adam)(0.01),
  "multi_steps": optax.MultiSteps(optax.adam(0.01), 3).gradient_transformation(),
}


def steps(apply, masks, tx):
  """A jitted step of the masked network, or of a compact one if ``masks`` is None."""

  def loss(params, masks, x):
    variables = {"params": params} if masks is None else {"params": params, "masks": masks}
    return jnp.mean((apply(variables, x) - 1.0) ** 2)

  @jax.jit
  def step(params, state, x):
    if masks is None:
      grads, extra = jax.grad(loss)(params, None, x), None
    else:
      _, (grads, extra) = fp.value_and_mask_grads(loss)(params, masks, x)
    updates, state = tx.update(grads, state, params, mask_grads=extra)
    return optax.apply_updates(params, updates), state

  return step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", ["cnn_with_flatten", "lstm_scanned"])
def test_twenty_steps_follow_the_masked_network(name, case, x64):
  apply, variables, x = pruned(CASES[case], 1, jnp.float64)
  masks = variables["masks"]
  tx = optax.chain(fp.fisher_prune(fp.cost_model(apply, variables, x), prune_every=1000), OPTIMIZERS[name])
  params, state = variables["params"], tx.init(variables["params"])
  average = params
  masked = steps(apply, masks, tx)
  for _ in range(4):
    params, state = masked(params, state, x)
    average = optax.incremental_update(params, average, 0.1)
  small = fp.compact(apply, {"params": params, "masks": masks}, x)
  thin, thin_state, thin_average = (
    small.variables["params"],
    small.shrink_opt_state(tx, state),
    small.shrink(average),
  )
  compact = steps(small, None, tx)
  for _ in range(20):
    params, state = masked(params, state, x)
    thin, thin_state = compact(thin, thin_state, x)
    average = optax.incremental_update(params, average, 0.1)
    thin_average = optax.incremental_update(thin, thin_average, 0.1)
  close(small.shrink(params), thin, 1e-9)
  close(small.shrink(average), thin_average, 1e-9)
  moved = [
    np.abs(a - b).max()
    for a, b in zip(jax.tree.leaves(thin), jax.tree.leaves(small.variables["params"]), strict=True)
  ]
  assert max(moved) > 1e-3


def test_batch_norm_goes_on_with_its_statistics(x64):
  model = Trained()
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 2)))
  variables = model.init(jax.random.key(0), x)
  masks = random_masks(variables["masks"], 0, 0.5)
  train = functools.partial(model.apply, mutable=["batch_stats"])
  small = fp.compact(train, variables | {"masks": masks}, x, state_from=lambda out: out[1])
  tx = optax.adam(0.01)

  def run(apply, variables, extra):
    def loss(params, stats):
      y, new = apply({"params": params, "batch_stats": stats, **extra}, x)
      return jnp.mean((y - 1.0) ** 2), new["batch_stats"]

    @jax.jit
    def step(params, stats, state):
      grads, stats = jax.grad(loss, has_aux=True)(params, stats)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), stats, state

    params, stats = variables["params"], variables["batch_stats"]
    state = tx.init(params)
    for _ in range(20):
      params, stats, state = step(params, stats, state)
    return params, stats

  masked = run(train, variables, {"masks": masks})
  compact = run(small, small.variables, {})
  for expected, found in zip(masked, compact, strict=True):
    close(small.shrink(expected), found, 1e-9)


INDEPENDENT = [
  case
  for case in CASES.values()
  if case.differentiable and case.independent and set(case.variables()) == {"params", "masks"}
]


class Wide(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="out")(fp.Mask(name="mask")(nn.relu(nn.Dense(24, name="inner")(x))))


def test_factored_statistics_start_anew_where_their_parameter_shrank():
  x = jax.random.normal(jax.random.key(0), (6, 16))
  variables = Wide().init(jax.random.key(1), x)
  masks = {"mask": {"mask": jnp.asarray(np.arange(24) % 3 == 0, jnp.float32)}}
  tx = optax.adafactor(0.01, min_dim_size_to_factor=4)
  params, state = variables["params"], tx.init(variables["params"])

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: jnp.mean(Wide().apply({"params": p, "masks": masks}, x) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, state = step(params, state)
  small = fp.compact(Wide().apply, {"params": params, "masks": masks}, x)
  with pytest.warns(UserWarning, match="restart from zero") as said:
    thin = small.shrink_opt_state(tx, state)
  assert "v_row/inner/kernel" in str(said[0].message)
  assert "bias" not in str(said[0].message)
  fresh = tx.init(small.variables["params"])
  assert jax.tree.map(jnp.shape, thin) == jax.tree.map(jnp.shape, fresh)
  before, after, new = (optax.tree.get(s, "v") for s in (state, thin, fresh))
  np.testing.assert_array_equal(after["out"]["bias"], before["out"]["bias"])
  np.testing.assert_array_equal(after["inner"]["bias"], before["inner"]["bias"][::3])
  np.testing.assert_array_equal(after["inner"]["kernel"], new["inner"]["kernel"])
  gradients = jax.tree.map(jnp.ones_like, small.variables["params"])
  tx.update(gradients, thin, small.variables["params"])


class Deep(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = fp.Mask(name="first")(nn.relu(nn.Conv(7, (3, 3))(x)))
    x = fp.Mask(name="second")(nn.relu(nn.Conv(6, (3, 3), strides=2)(x)))
    x = fp.Mask(name="third")(nn.relu(nn.Dense(9)(x.reshape(x.shape[0], -1))))
    return nn.Dense(3)(x)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_pruning_goes_on_with_the_same_features_at_the_same_steps(optimizer, x64):
  x = jax.random.normal(jax.random.key(0), (8, 6, 6, 2), jnp.float64)
  labels = jnp.arange(8) % 3
  variables = jax.tree.map(lambda v: v.astype(jnp.float64), Deep().init(jax.random.key(1), x))
  variables = {**variables, "masks": jax.tree.map(lambda m: m.astype(jnp.float32), variables["masks"])}
  target = 0.2 * fp.cost_model(Deep().apply, variables, x).dense

  def transformation(cost):
    return optax.chain(OPTIMIZERS[optimizer], fp.fisher_prune(cost, prune_every=3, decay=0.9, target=target))

  def run(apply, tx, params, state, count):
    def loss(params, masks, batch):
      logits = apply({"params": params, "masks": masks}, batch[0])
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    @jax.jit
    def step(params, state):
      masks = fp.get_masks(state)
      _, (grads, mask_grads) = fp.value_and_mask_grads(loss)(params, masks, (x, labels))
      updates, state = tx.update(grads, state, params, mask_grads=mask_grads)
      return optax.apply_updates(params, updates), state

    for _ in range(count):
      params, state = step(params, state)
    return params, state

  tx = transformation(fp.cost_model(Deep().apply, variables, x))
  start = (variables["params"], tx.init(variables["params"]))
  params, state = run(Deep().apply, tx, *start, 13)
  small = fp.compact(Deep().apply, {"params": params, "masks": fp.get_masks(state)}, x, keep_masks=True)
  thin_tx = transformation(fp.cost_model(small, small.variables, x))
  thin_state = small.shrink_opt_state(tx, state)
  thin, thin_state = run(small, thin_tx, small.variables["params"], thin_state, 24)
  params, state = run(Deep().apply, tx, params, state, 24)

  history, thin_history = fp.get_state(state).pruned_at, fp.get_state(thin_state).pruned_at
  masked_away = jax.tree.map(lambda m: np.flatnonzero(m == 0), small.masks)
  for full, cut, gone in zip(*map(jax.tree.leaves, (history, thin_history, masked_away)), strict=True):
    np.testing.assert_array_equal(np.delete(full, gone), cut)
  later = np.concatenate([leaf[leaf > 13] for leaf in jax.tree.leaves(history)])
  assert later.size >= 4
  close(small.shrink(params), thin, 1e-9)


@pytest.mark.parametrize("case", INDEPENDENT, ids=lambda case: case.name)
def test_kept_masks_give_the_same_gradients_per_example(case, x64):
  apply, variables, x = pruned(case, 2, jnp.float64)
  small = fp.compact(apply, variables, x, keep_masks=True)

  def mask_grads(function, variables):
    def loss(params, masks, x):
      return jnp.sum(jnp.sin(function({"params": params, "masks": masks}, x) + 1.0))

    return jax.jit(fp.value_and_mask_grads(loss, reduction="sum"))(variables["params"], variables["masks"], x)

  value, (_, full) = mask_grads(apply, variables)
  compact_value, (_, cut) = mask_grads(small, small.variables)
  np.testing.assert_allclose(compact_value, value, rtol=1e-10)
  for a, b, mask, kept in zip(
    *map(jax.tree.leaves, (full, cut, variables["masks"], small.variables["masks"])), strict=True
  ):
    alive = np.flatnonzero(mask)
    if mask.ndim == 1 and kept.shape == alive.shape:
      np.testing.assert_allclose(b, a[:, alive], rtol=1e-9, atol=1e-12)


def test_a_state_of_another_network_is_refused():
  apply, variables, x = pruned(CASES["mlp"], 1)
  small = fp.compact(apply, variables, x)
  tx = optax.adam(0.1)
  other = jax.tree.map(lambda p: jnp.zeros([n + 1 for n in p.shape]), variables["params"])
  with pytest.raises(ValueError, match="shape"):
    small.shrink_opt_state(tx, tx.init(other))


def test_parameters_that_bear_the_name_of_a_part_of_the_state():
  rng = np.random.default_rng(0)
  params = {name: {"w": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)} for name in ("mu", "other")}
  params["w"] = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
  mask = jnp.array([1.0, 0.0, 1.0, 0.0])
  variables = {"params": params, "masks": {"mask": mask}}

  def apply(variables, x):
    p = variables["params"]
    return (x @ p["mu"]["w"]) * variables["masks"]["mask"] @ p["w"] @ p["other"]["w"]

  small = fp.compact(apply, variables, jnp.ones((2, 4)))
  state = optax.adam(0.1).init(params)
  marked = jax.tree.map(lambda p: p + 1, params)
  state = (state[0]._replace(mu=marked, nu=marked), *state[1:])
  thin = small.shrink_opt_state(optax.adam(0.1), state)
  close(thin[0].mu, small.shrink(marked), 0)
  close(thin[0].nu, small.shrink(marked), 0)


def test_a_memory_of_several_gradients_is_sliced():
  apply, variables, x = pruned(CASES["mlp"], 0)
  params, tx = variables["params"], optax.scale_by_lbfgs(memory_size=3)
  small = fp.compact(apply, variables, x)
  state = tx.init(params)._replace(
    diff_params_memory=jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), params)
  )
  thin = small.shrink_opt_state(tx, state)
  fresh = tx.init(small.variables["params"])
  assert jax.tree.map(jnp.shape, thin) == jax.tree.map(jnp.shape, fresh)
  close(jax.tree.map(lambda m: m[1] / 2, thin.diff_params_memory), small.variables["params"], 1e-6)


def test_donating_what_is_compact_leaves_what_was_full():
  """Also where nothing was removed: history and scores of the full state are still wanted afterwards."""
  apply, variables, x = pruned(CASES["cnn_with_flatten"], 1, jnp.float32)
  tx = optax.chain(optax.adam(0.1), fp.fisher_prune(fp.cost_model(apply, variables, x)))
  params, state = jax.tree.map(jnp.array, (variables["params"], tx.init(variables["params"])))
  small = fp.compact(apply, {"params": params, "masks": variables["masks"]}, x)
  donated = small.variables["params"], small.shrink_opt_state(tx, state)
  jax.block_until_ready(
    jax.jit(
      lambda tree: jax.tree.map(lambda a: a ^ True if a.dtype == bool else a + 1, tree), donate_argnums=0
    )(donated)
  )
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))
