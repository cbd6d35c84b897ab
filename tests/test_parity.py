"""The classic optimizer's recorded traces, reproduced through the public API.

What differs by decision is undone here and nowhere else: importance is in nats and per example, so the classic
ones are ``2 / B**2`` times ours; the bias correction and the floor under each mask are switched off.
"""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp

ORACLE = Path(__file__).parent / "oracle"
CASES = sorted(path.stem for path in ORACLE.glob("*.npz"))
COUNTED = ("dot_general", "conv_general_dilated", "add")


class Mlp(nn.Module):
  """Dense layers with biases; relu and a mask after all but the last."""

  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate(self.widths):
      x = nn.Dense(width, name=f"dense{i}")(x)
      if i < len(self.widths) - 1:
        x = fp.Mask(name=f"mask{i}")(nn.relu(x))
    return x


class Cnn(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = fp.Mask(name="mask0")(nn.relu(nn.Conv(6, (3, 3), name="conv0")(x)))
    x = fp.Mask(name="mask1")(nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv1")(x)))
    x = x.reshape(x.shape[0], -1)
    x = fp.Mask(name="mask2")(nn.relu(nn.Dense(10, name="dense0")(x)))
    return nn.Dense(5, name="dense1")(x)


def model_of(trace):
  if "init/conv0/kernel" in trace:
    return Cnn()
  count = sum(name.startswith("init/dense") and name.endswith("/bias") for name in trace)
  return Mlp(tuple(trace[f"init/dense{i}/bias"].shape[0] for i in range(count)))


def tree(trace, prefix):
  out = {}
  for name, array in trace.items():
    if name.startswith(prefix + "/"):
      _, layer, leaf = name.split("/")
      out.setdefault(layer, {})[leaf] = jnp.asarray(array)
  return out


def classic_cnn_cost(masks):
  """What the classic optimizer reports: after the flatten it counts kept channels, not pixels times channels.

  A layer without inputs costs -1 per output; ``feature_cost`` is the derivative of this polynomial.
  """
  a, b, c = (jnp.sum(masks[f"mask{i}"]["mask"]) for i in range(3))
  conv = 64 * a * (2 * 27 - 1) + 64 * a + 16 * b * (2 * 9 * a - 1) + 16 * b
  return conv + c * (2 * b - 1) + c + 5 * (2 * c - 1) + 5


def cost_of(trace, model, variables, x):
  if isinstance(model, Cnn):
    return fp.CostModel.from_functions(variables["masks"], classic_cnn_cost, jax.grad(classic_cnn_cost))
  return fp.cost_model(model.apply, variables, x, primitives=COUNTED)


def options_of(trace):
  setting = lambda name: trace[f"settings/{name}"].item()
  per_nat = setting("batch_size") ** 2 / 2
  return {
    "prune_every": setting("prune_every"),
    "burn_in": setting("burn_in"),
    "decay": setting("decay"),
    "flops_weight": "auto" if setting("flops_weight_auto") else setting("flops_weight") * per_nat,
    "flops_target": setting("flops_target"),
    "min_features": 0,
    "debias": False,
    "momentum": setting("momentum"),
    "nesterov": setting("use_nesterov"),
    "update_params": optax.set_to_zero() if setting("frozen") else None,
  }


def replay(trace):
  """Runs the recorded batches through the public API; yields every step's loss and state."""
  model = model_of(trace)
  params = tree(trace, "init")
  variables = model.init(jax.random.key(0), trace["x"][0]) | {"params": params}
  cost = cost_of(trace, model, variables, trace["x"][0])
  tx = fp.pruning_sgd(trace["settings/learning_rate"].item(), cost, **options_of(trace))

  def loss_fn(params, masks, batch):
    x, y = batch
    logits = model.apply({"params": params, "masks": masks}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  @jax.jit
  def step(params, opt_state, batch):
    loss, (grads, mask_grads) = fp.value_and_mask_grads(loss_fn)(params, fp.get_masks(opt_state), batch)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return (
      optax.apply_updates(params, updates),
      opt_state,
      loss,
      loss_fn(params, fp.get_masks(opt_state), batch),
    )

  opt_state = tx.init(params)
  steps = []
  for x, y in zip(trace["x"], trace["y"], strict=True):
    params, opt_state, loss, _ = step(params, opt_state, (x, y))
    after = loss_fn(params, fp.get_masks(opt_state), (x, y))
    steps.append((loss, after, fp.get_state(opt_state), cost.per_feature(fp.get_masks(opt_state))))
  return params, opt_state, steps, (model, variables)


@pytest.fixture(scope="module", params=CASES)
def run(request):
  with np.load(ORACLE / f"{request.param}.npz") as arrays:
    trace = dict(arrays)
  return trace, *replay(trace)


def masks_of(state):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state.masks)]


def test_the_recorded_cases_are_all_here():
  assert len(CASES) == 3
  for name in CASES:
    assert json.loads((ORACLE / f"{name}.json").read_text())["case"] == name


def test_masks_are_exact_at_every_step(run):
  trace, _, _, steps, _ = run
  for t, (_, _, state, _) in enumerate(steps):
    for k, mask in enumerate(masks_of(state)):
      np.testing.assert_array_equal(mask, trace[f"mask/{k}"][t], err_msg=f"step {t}, mask {k}")


def test_what_was_pruned_when_is_in_the_history(run):
  trace, _, _, steps, _ = run
  pruned_at = [np.asarray(leaf) for leaf in jax.tree.leaves(steps[-1][2].pruned_at)]
  found = {(int(n) - 1, k, int(i)) for k, at in enumerate(pruned_at) for i, n in enumerate(at) if n >= 0}
  expected = {(t, int(k), int(i)) for t, (k, i) in enumerate(trace["pruned"]) if k >= 0}
  assert found == expected
  assert found


def test_losses_agree_to_1e_5(run):
  trace, _, _, steps, _ = run
  np.testing.assert_allclose([loss for loss, *_ in steps], trace["loss"], rtol=1e-5)
  np.testing.assert_allclose([after for _, after, *_ in steps], trace["loss_post"], rtol=1e-5)


def test_signals_agree_to_1e_4(run):
  trace, _, _, steps, _ = run
  per_nat = 2 / trace["settings/batch_size"].item() ** 2
  for t, (_, _, state, _) in enumerate(steps):
    for k, scores in enumerate(jax.tree.leaves(state.scores)):
      np.testing.assert_allclose(scores * per_nat, trace[f"signal/{k}"][t], rtol=1e-4, atol=1e-12)


def test_reported_costs_agree(run):
  trace, _, _, steps, _ = run
  for t, (_, _, state, per_feature) in enumerate(steps):
    np.testing.assert_allclose(state.cost, trace["cost"][t], rtol=1e-6)
    for k, (drops, mask) in enumerate(zip(jax.tree.leaves(per_feature), masks_of(state), strict=True)):
      alive = mask > 0
      np.testing.assert_allclose(drops[alive], trace[f"feature_cost/{k}"][t][alive], rtol=1e-6)


def test_our_own_count_is_the_exact_cost(run):
  trace, _, _, steps, (model, variables) = run
  x = trace["x"][0]
  exact = fp.cost_model(model.apply, variables, x, primitives=COUNTED)
  assert exact.dense == trace["cost_exact_initial"]
  for t, (_, _, state, _) in enumerate(steps):
    assert exact.exact(state.masks) / len(x) == trace["cost_exact"][t]


def test_final_weights_agree_to_1e_5(run):
  trace, params, _, _, _ = run
  for layer, leaves in tree(trace, "final").items():
    for name, expected in leaves.items():
      np.testing.assert_allclose(params[layer][name], expected, atol=1e-5)


def test_final_momentum_agrees(run):
  trace, _, opt_state, _, _ = run
  recorded = tree(trace, "final_momentum")
  if not recorded:
    assert trace["settings/frozen"]
    return
  momentum = optax.tree.get(opt_state, "trace")
  for layer, leaves in recorded.items():
    for name, expected in leaves.items():
      np.testing.assert_allclose(momentum[layer][name], expected, atol=1e-5)
