"""Measures beside FLOPs: against the compact network, feature by feature, and against what XLA counts; sums of costs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from fisherprune_jax._cost.counters import SHAPES_ALONE
from tests.counting import count
from tests.models import CASES, random_masks

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
ALL = pytest.mark.parametrize("name", CASES)
OTHERS = ("macs", "params", "bytes", "memory")
MACHINE = fp.Roofline(flops_per_second=1.0, bytes_per_second=4.0)
"""Some nodes of small networks are bound by one of both here, some by the other."""
CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")
SELECTS = """
  conv_1d_causal_dilated conv_grouped mobile_net_block depthwise_multiplier batch_norm_after_the_mask
  layer_norm_over_the_mask layer_norm_before_the_mask residual_branches_masked_apart sigmoid_after_the_mask
  maximum_over_the_mask sort_over_the_mask channel_shuffle channels_picked_by_index stacked_tiled_and_scattered embedding
  pad_and_slice mask_after_flatten softmax_over_the_mask fft_over_the_mask mask_value_used_in_other_ways remat_and_jit
  lstm_scanned gru_scanned recurrent_state_masked conditional while_loop switch fori_loop scanned_layers
  group_norm_over_the_mask bias_behind_the_mask tied_embeddings tied_embeddings_masked_apart
  convolution_with_batch_groups along_other_axes windows_of_any_function linear_algebra
  matrices_in_a_batch_that_is_masked factorisation_over_the_mask
""".split()
"""Their compact programs bring entries to other places on the way, or loop; a node's own bytes are what is counted."""


def setting(name, seed=0, alive=0.6):
  case = CASES[name]
  variables, x = case.variables(), case.inputs()
  return case.module().apply, variables, x, random_masks(variables["masks"], seed, alive)


def without(masks, path, k):
  return jax.tree_util.tree_map_with_path(lambda p, m: m.at[k].set(0) if p == path else m, masks)


@ALL
def test_every_feature_costs_what_brute_force_says(name):
  apply, variables, x, masks = setting(name, alive=0.8)
  each = [fp.cost_model(apply, variables, x, measure=measure) for measure in (*OTHERS, MACHINE)]
  # One number that has all of them in it.
  cost = each[0] + 3 * each[1] + 0.5 * each[2] + 2 * each[3] + 7 * each[4]
  before = [c.exact(masks) for c in each]
  n = x.shape[0]
  worth = np.array([1 / n, 3, 0.5 / n, 2, 7 / n])
  assert float(cost(masks)) == pytest.approx(worth @ before, rel=1e-6)
  found = jax.tree.leaves(cost.per_feature(masks))
  for drops, (path, mask) in zip(found, jax.tree_util.tree_leaves_with_path(masks), strict=True):
    for k in np.ndindex(mask.shape):
      left = [c.exact(without(masks, path, k)) for c in each]
      assert drops[k] == pytest.approx(worth @ np.subtract(before, left), rel=1e-5), (path, k)


@ALL
def test_parameters_are_those_of_the_compact_network(name):
  apply, variables, x, masks = setting(name)
  cost = fp.cost_model(apply, variables, x, measure="params")
  small = fp.compact(apply, {**variables, "masks": masks}, x)
  held = sum(leaf.size for leaf in jax.tree.leaves(small.variables))
  if name == "scanned_layers":  # one array for layers of different widths: the narrower ones are filled up
    assert cost.exact(masks) < held
  else:
    assert cost.exact(masks) == held
    memory = fp.cost_model(apply, variables, x, measure="memory")
    assert memory.exact(masks) == sum(leaf.nbytes for leaf in jax.tree.leaves(small.variables))
  whole = {key: part for key, part in variables.items() if key != "masks"}
  assert cost.dense <= sum(leaf.size for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("name", [name for name in CASES if name not in SELECTS])
def test_bytes_are_those_of_the_compact_program(name):
  apply, variables, x, masks = setting(name)
  cost = fp.cost_model(apply, variables, x, measure="bytes")
  small = fp.compact(apply, {**variables, "masks": masks}, x)
  jaxpr = jax.make_jaxpr(small)(small.variables, x).jaxpr
  depends = [False] * len(jax.tree.leaves(small.variables)) + [True]
  assert cost.exact(masks) == bytes_of(jaxpr, depends)


def bytes_of(jaxpr, depends):
  """Operands and results of all that depends on the arguments."""
  marked, total = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}, 0
  for eqn in jaxpr.eqns:
    flags = [not hasattr(v, "val") and v in marked for v in eqn.invars]
    if not any(flags):
      continue
    marked |= {*eqn.outvars}
    inner = next((part for part in eqn.params.values() if hasattr(part, "eqns")), None)
    if inner is not None:
      assert eqn.primitive.name in CALLS
      total += bytes_of(getattr(inner, "jaxpr", inner), flags)
    elif eqn.primitive.name not in SHAPES_ALONE:
      arrays = [v.aval for v in (*eqn.invars, *eqn.outvars) if not hasattr(v, "val")]
      total += sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
  return total


def two_layers(v, x):
  return jnp.tanh(x @ v["a"] * v["masks"]) @ v["b"]


V = {
  "a": jnp.ones((3, 6)),
  "b": jnp.ones((6, 2)),
  "masks": jnp.array([1.0, 0, 1, 1, 0, 1]),
}
X = jnp.ones((4, 3))


def test_bytes_and_multiply_accumulates_against_xla():
  small = fp.compact(two_layers, V, X)
  counted = jax.jit(small).lower(small.variables, X).cost_analysis()
  found = {
    m: fp.cost_model(two_layers, V, X, measure=m).exact(V["masks"]) for m in ("flops", "macs", "bytes")
  }
  assert found["bytes"] == counted["bytes accessed"]
  assert found["macs"] == 4 * (4 * 3 + 2 * 4)
  jaxpr = jax.make_jaxpr(small)(small.variables, X)
  assert found["flops"] == count(jaxpr, [False, False, True])


def test_the_larger_of_both_times_counts_node_by_node():
  machine = fp.Roofline(flops_per_second=3.0, bytes_per_second=2.0)
  cost = fp.cost_model(two_layers, V, X, measure=machine)
  small = fp.compact(two_layers, V, X)
  flops, moved = (
    {row.primitive: row.now for row in fp.cost_model(two_layers, V, X, measure=m).breakdown(V["masks"])}
    for m in ("flops", "bytes")
  )
  # Both products stand in one line; taken apart by hand.
  first = max(4 * 4 * 5 / 3, 4 * (12 + 12 + 16) / 2)
  second = max(4 * 2 * 7 / 3, 4 * (16 + 8 + 8) / 2)
  tanh = max(flops["tanh"] * 4 / 3, moved["tanh"] * 4 / 2)
  assert cost.unit == "seconds"
  assert float(cost(V["masks"])) == pytest.approx((first + second + tanh) / 4, rel=1e-6)
  assert cost.exact(V["masks"]) == pytest.approx(first + second + tanh)
  now = float(cost(V["masks"]))
  assert [bool(cost.exceeds(V["masks"], t)) for t in (now * 0.999, now * 1.001)] == [True, False]
  assert [bool(cost.exceeds(V["masks"], jnp.float32(t))) for t in (now * 0.999, now * 1.001)] == [True, False]
  assert small.cost == flops["dot_general"] + flops["tanh"]


def test_one_example_is_bound_by_bytes_and_many_by_flops():
  few, many = (
    fp.cost_model(two_layers, V, jnp.ones((n, 3)), measure=fp.Roofline(1e3, 1e3)).dense for n in (1, 4096)
  )
  bytes_, flops = (
    fp.cost_model(two_layers, V, jnp.ones((n, 3)), measure=m).dense
    for n, m in ((1, "bytes"), (4096, "flops"))
  )
  assert few == pytest.approx(bytes_ / 1e3)
  assert many >= flops / 1e3
  assert many < few


def test_bytes_follow_the_types():
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), V)
  full, less = (
    fp.cost_model(two_layers, v, x, measure="bytes").dense
    for v, x in ((V, X), (half, X.astype(jnp.bfloat16)))
  )
  assert less == full / 2


def test_parameters_are_counted_in_all_and_bytes_for_each_example():
  one, four = (fp.cost_model(two_layers, V, X[:n], measure="params").dense for n in (1, 4))
  assert one == four == 30
  one, four = (fp.cost_model(two_layers, V, X[:n], measure="bytes").dense for n in (1, 4))
  weights = 4 * 30
  assert one - weights == four - weights / 4


def test_memory_is_that_of_all_variables_in_their_dtypes():
  """A cache and a key beside parameters of half precision."""

  def step(variables, x):
    p, mask = variables["params"], variables["masks"]["m"]
    h = fp.apply_mask(x @ p["a"], mask) + variables["cache"] * mask
    return h @ p["b"] + jax.random.normal(variables["key"], (2,))

  masks = {"m": jnp.array([1.0, 1, 0, 0, 1])}
  params = {"a": jnp.ones((3, 5), jnp.bfloat16), "b": jnp.ones((5, 2), jnp.float32)}
  held = {"params": params, "cache": jnp.zeros((7, 5)), "key": jax.random.key(0)}
  cost = fp.cost_model(step, {**held, "masks": masks}, jnp.ones((7, 3)), measure="memory")
  key = jax.random.key(0).nbytes
  assert cost.dense == 2 * 15 + 4 * 10 + 4 * 35 + key
  small = fp.compact(step, {**held, "masks": masks}, jnp.ones((7, 3)))
  assert cost.exact(masks) == sum(leaf.nbytes for leaf in jax.tree.leaves(small.variables))
  assert cost.exact(masks) == 2 * 9 + 4 * 6 + 4 * 21 + key
  joined = cost + 2.0 * fp.cost_model(step, {**held, "masks": masks}, jnp.ones((7, 3)), measure="params")
  assert joined.dense == cost.dense + 2 * (15 + 10 + 35 + 1)


def test_the_unit_is_named():
  costs = {m: fp.cost_model(two_layers, V, X, measure=m) for m in ("flops", *OTHERS)}
  assert [c.unit for c in costs.values()] == ["FLOPs", "MACs", "parameters", "bytes", "bytes"]
  assert {row.unit for row in costs["bytes"].breakdown(V["masks"])} == {"bytes"}
  rows = costs["params"].breakdown(V["masks"])
  assert [(row.where, row.dense, row.now) for row in rows] == [("a", 18, 12), ("b", 12, 8)]
  both = costs["flops"] + costs["params"]
  assert both.unit == "FLOPs + parameters"
  assert {row.unit for row in both.breakdown(V["masks"])} == {"FLOPs", "parameters"}
  assert sum(row.now for row in both.breakdown(V["masks"])) == pytest.approx(float(both(V["masks"])))


def test_sums_are_exact():
  flops = fp.cost_model(two_layers, V, X)
  params = fp.cost_model(two_layers, V, X, measure="params")
  masks = V["masks"]
  total = flops + 0.1 * params  # a tenth as it is written, not the float nearest to it
  assert total.dense == flops.dense + 3.0
  assert (flops + flops).exact(masks) == 2 * flops.exact(masks)
  now = flops.exact(masks) / 4 + 2.0
  assert float(total(masks)) == pytest.approx(now, rel=1e-6)
  for target, above in (
    (now, False),
    (now - 0.05, True),
    (jnp.float32(now), False),
    (jnp.float32(now - 0.05), True),
  ):
    assert bool(total.exceeds(masks, target)) is above
    assert bool(jax.jit(total.exceeds)(masks, target)) is above


@pytest.mark.parametrize("rate", [1.0, 1e6, 1e12, 3e14])
def test_a_time_is_above_a_target_by_a_millionth(rate):
  """Also where the target is an array, as an injected hyperparameter and a schedule are."""
  cost = fp.cost_model(two_layers, V, X, measure=fp.Roofline(rate, rate / 7))
  for masks in (cost.masks, V["masks"]):
    now = cost.exact(masks) / 4
    for target, above in ((now * (1 - 1e-6), True), (now * (1 + 1e-6), False)):
      assert bool(cost.exceeds(masks, target)) is above
      assert bool(jax.jit(cost.exceeds)(masks, jnp.float32(target))) is above


def test_functions_of_your_own_add_up_too():
  own = fp.CostModel.from_functions(
    V["masks"], lambda m: 5.0 * m.sum(), lambda m: 5.0 * jnp.ones_like(m), unit="joules"
  )
  flops = fp.cost_model(two_layers, V, X)
  total = 2 * own + flops
  assert total.unit == "2 joules + FLOPs"
  assert total.dense == 60 + flops.dense
  np.testing.assert_allclose(total.per_feature(V["masks"]), 10 + flops.per_feature(V["masks"]))
  assert bool(total.exceeds(V["masks"], total.dense - 1)) is False


def test_a_network_is_pruned_to_a_number_of_parameters():
  params = fp.cost_model(two_layers, V, X, measure="params")
  tx = fp.fisher_prune(params, target=16, prune_every=1, features_per_prune=9)
  state = tx.init({})
  grads = jnp.broadcast_to(jnp.arange(1.0, 7), (4, 6))
  _, state = tx.update({}, state, mask_grads=grads)
  np.testing.assert_array_equal(fp.get_masks(state), [0, 0, 0, 1, 1, 1])  # 3 (3 + 2)
  assert float(fp.get_state(state).cost) == 15


def test_bad_input_is_refused():
  flops = fp.cost_model(two_layers, V, X)
  with pytest.raises(
    ValueError,
    match=r"measure must be one of flops, macs, params, bytes, memory, or an fp.Roofline, got 'watts'",
  ):
    fp.cost_model(two_layers, V, X, measure="watts")
  with pytest.raises(ValueError, match="primitives must be None"):
    fp.cost_model(two_layers, V, X, measure="params", primitives=("dot_general",))
  other = fp.CostModel.from_functions(jnp.ones(3), lambda m: m.sum(), lambda m: m)
  with pytest.raises(ValueError, match=r"masks of one shape, \(6,\), got \(3,\)"):
    flops + other
  for rates in ((0.0, 1.0), (1.0, -1.0), (float("inf"), 1.0), ("fast", 1.0)):
    with pytest.raises(ValueError, match="of a Roofline must be a positive number"):
      fp.Roofline(*rates)
  for factor in (0, -1.0, float("nan"), float("inf")):
    with pytest.raises(ValueError, match="multiplied by a positive number"):
      factor * flops
  with pytest.raises(TypeError):
    flops + 1
  with pytest.raises(TypeError):
    flops * flops
