"""The transformation against a plain loop over NumPy arrays, and its manners inside jit, Optax and Flax."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, Mesh, PartitionSpec

import fisherprune_jax as fp

WIDTHS = (4, 5, 5, 3)
"""Two plain masks, and between them the two rows of a stack; in this order ties are broken."""
ROW_OF = np.repeat(np.arange(4), WIDTHS)
K, B, T = sum(WIDTHS), 4, 30


def flops(n: Any) -> Any:
  """A cost in which what a feature saves depends on what is left of its neighbours."""
  return 3 * n[0] + n[0] * n[1] + n[1] * n[2] + 2 * n[2] * n[3] + n[3]


def counts(mask: np.ndarray) -> np.ndarray:
  return np.bincount(ROW_OF, weights=mask, minlength=4)


def as_tree(flat: Any, examples: bool = False) -> Any:
  """Entries ``(..., K)``, or with an example axis ``(..., B, K)``, as a tree of masks."""
  stack = flat[..., 4:14].reshape(*flat.shape[:-1], 2, 5)
  stack = stack.swapaxes(-3, -2) if examples else stack
  return {"Mask_10": flat[..., :4], "Mask_2": {"stack": stack}, "b": flat[..., 14:]}


@functools.cache
def cost() -> fp.CostModel:
  def rows(masks: Any) -> jax.Array:
    stack = jnp.sum(masks["Mask_2"]["stack"], axis=-1)
    return jnp.array([jnp.sum(masks["Mask_10"]), *stack, jnp.sum(masks["b"])])

  def per_feature(masks: Any) -> Any:
    n = rows(masks)
    drops = jnp.stack([flops(n) - flops(n.at[i].add(-1)) for i in range(4)])
    return jax.tree.map(jnp.multiply, masks, as_tree(drops[ROW_OF]))

  return fp.CostModel.from_functions(as_tree(np.ones(K)), lambda m: flops(rows(m)), per_feature)


def draw(seed: int) -> np.ndarray:
  """Gradients ``(T, B, K)`` of features that matter by very different amounts."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(T, B, K)) * rng.lognormal(size=K)).astype(np.float32)


def reference(
  g: np.ndarray,
  weights: np.ndarray | None,
  prune_every: int = 100,
  burn_in: int = 0,
  decay: Any = 0.96,
  cost_weight: Any = "auto",
  target: Any = 0.0,
  debias: bool = True,
  features_per_prune: int = 1,
  min_features: int = 1,
) -> list[fp.FisherPruneState]:
  """The states after each step, from the definitions, in float64."""
  mask, scores, pruned_at = np.ones(K), np.zeros(K), np.full(K, -1)
  product, counted, skipped, exhausted, states = 1.0, 0, 0, False, []
  for n in range(1, T + 1):
    signal = mean_of_squares(g[n - 1], np.ones(B) if weights is None else weights[n - 1]) / 2
    finite = bool(np.isfinite(signal).all())
    if finite:
      d = at(decay, n)
      scores, product, counted = d * scores + (1 - d) * signal, d * product, counted + 1
    else:
      skipped += 1
    due = finite and n > burn_in and n % prune_every == 0
    for _ in range(features_per_prune if due else 0):
      if 0 < at(target, n) >= flops(counts(mask)):
        break
      current = scores / (1 - product) if debias else scores
      k = cheapest(mask, current, at(cost_weight, n), min_features)
      exhausted = k is None
      if exhausted:
        break
      mask, pruned_at = np.where(np.arange(K) == k, 0, mask), np.where(np.arange(K) == k, n, pruned_at)
    trees = as_tree(scores), as_tree(mask), as_tree(pruned_at)
    total = flops(counts(mask))
    states.append(fp.FisherPruneState(n, *trees, total, shares(mask), product, counted, skipped, exhausted))
  return states


def shares(mask: np.ndarray) -> Any:
  """Of every mask vector: its live features times what one of them costs, over the cost."""
  n = counts(mask)
  total = flops(n) or np.inf
  found = np.array([n[i] * (flops(n) - flops(n - np.eye(4)[i])) / total for i in range(4)])
  return {"Mask_10": found[0], "Mask_2": {"stack": found[1:3]}, "b": found[3]}


def at(value: Any, n: int) -> Any:
  return float(value(n)) if callable(value) else value


def mean_of_squares(g: np.ndarray, w: np.ndarray) -> np.ndarray:
  rows = [w[i] * np.square(g[i].astype(np.float64)) for i in range(len(w)) if w[i] > 0]
  return np.sum(rows, axis=0) / np.sum(w)


def cheapest(mask: np.ndarray, scores: np.ndarray, cost_weight: Any, min_features: int) -> int | None:
  """The live feature with the smallest score among those that their mask can spare, the first one of equals."""
  best, found, n = np.inf, None, counts(mask)
  for k in range(K):
    drop = flops(n) - flops(n - np.eye(4)[ROW_OF[k]])
    score = scores[k] / (drop + 1e-6) if cost_weight == "auto" else scores[k] - cost_weight * drop
    if mask[k] and n[ROW_OF[k]] > min_features and score < best:
      best, found = score, k
  return found


def every_state(tx: Any, g: Any, weights: Any = None) -> fp.FisherPruneState:
  """The states after each step, stacked, from a scan."""

  def body(state: Any, inputs: Any) -> Any:
    _, state = tx.update({}, state, mask_grads=inputs[0], example_weights=inputs[1])
    return state, state

  return jax.lax.scan(body, tx.init({}), (g, weights))[1]


def last(states: Any) -> Any:
  return jax.tree.map(lambda x: x[-1], states)


SETTINGS: dict[str, dict[str, Any]] = {
  "every step until nothing is left": {"prune_every": 1},
  "every third step after a burn-in": {"prune_every": 3, "burn_in": 6},
  "burn-in between multiples": {"prune_every": 4, "burn_in": 5, "decay": 0.0},
  "numeric weight": {"prune_every": 2, "cost_weight": 0.2},
  "negative weight": {"prune_every": 2, "cost_weight": -0.2},
  "numeric weight, not debiased": {"prune_every": 2, "cost_weight": 0.2, "debias": False},
  "target": {"prune_every": 2, "target": 60.0},
  "several at once down to a target": {"prune_every": 5, "target": 50, "features_per_prune": 4},
  "several at once down to the floors": {"prune_every": 4, "min_features": 2, "features_per_prune": 3},
  "more at once than there are": {"prune_every": 7, "features_per_prune": 100},
  "no floors": {"prune_every": 1, "min_features": 0},
  "no floors, several at once": {"prune_every": 3, "min_features": 0, "features_per_prune": 5},
  "schedules": {
    "prune_every": 1,
    "features_per_prune": 2,
    "decay": lambda n: 0.9 * n / (n + 3),
    "cost_weight": lambda n: 0.02 * n,
    "target": lambda n: 80.5 - 2.0 * n,
  },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_states_are_those_of_the_reference(name):
  tx = fp.fisher_prune(cost(), **SETTINGS[name])
  run = jax.jit(lambda g: every_state(tx, g))
  for seed in range(3):
    g = draw(seed)
    g[[2, 11], 1, 5], g[7, 0, 0] = np.nan, np.inf
    assert_equal_states(run(as_tree(g, examples=True)), reference(g, None, **SETTINGS[name]))


def assert_equal_states(found: fp.FisherPruneState, expected: list[fp.FisherPruneState]) -> None:
  """Decisions exactly, means to rounding."""
  stacked = jax.tree.map(lambda *x: np.stack(x), *expected)
  for field in ("step", "masks", "pruned_at", "cost", "counted", "skipped", "exhausted"):
    chex.assert_trees_all_equal(*(jax.tree.map(np.float64, getattr(s, field)) for s in (found, stacked)))
  for field in ("scores", "decay_product"):
    chex.assert_trees_all_close(getattr(found, field), getattr(stacked, field), rtol=2e-5)
  assert stacked.cost[-1] < 80, "too little was pruned to tell"


def test_the_settings_tell_options_apart():
  histories = {name: reference(draw(0), None, **o)[-1].pruned_at for name, o in SETTINGS.items()}
  assert len({str(jax.tree.leaves(h)) for h in histories.values()}) == len(SETTINGS)


def test_example_weights_and_padding_that_holds_nan():
  g, weights = draw(5), np.random.default_rng(1).random((T, B)).astype(np.float32)
  weights[:, 3] = 0
  g[:, 3] = np.nan
  weights[4:8, 0], g[4:8, 0] = 0, np.inf
  weights[12] = 0  # a batch of nothing but padding is skipped
  options = {"prune_every": 3, "cost_weight": 0.1}
  with np.errstate(invalid="ignore"):
    expected = reference(g, weights, **options)
  run = jax.jit(lambda *args: every_state(fp.fisher_prune(cost(), **options), *args))
  assert_equal_states(run(as_tree(g, examples=True), weights), expected)
  assert expected[-1].skipped == 1


def uniform_cost(masks: Any) -> fp.CostModel:
  """One per feature."""
  return fp.CostModel.from_functions(masks, lambda m: sum(map(jnp.sum, jax.tree.leaves(m))), lambda m: m)


def test_ties_go_to_the_first_mask_in_tree_order_then_to_the_lowest_index():
  masks = {"Mask_2": jnp.ones(2), "Mask_10": jnp.ones((2, 3)), "z": jnp.ones(3)}
  tx = fp.fisher_prune(uniform_cost(masks), prune_every=1)
  g = {"Mask_2": jnp.ones((9, 1, 2)), "Mask_10": jnp.ones((9, 2, 1, 3)), "z": jnp.ones((9, 1, 3))}
  state = last(jax.jit(lambda g: every_state(tx, g))(g))
  expected = {"Mask_10": [[1, 2, -1], [3, 4, -1]], "Mask_2": [5, -1], "z": [6, 7, -1]}
  assert jax.tree.map(lambda x: x.tolist(), state.pruned_at) == expected


def one_mask(scores: list[float], **options: Any) -> fp.FisherPruneState:
  """The state after one step with these squared gradients and a uniform cost."""
  tx = fp.fisher_prune(uniform_cost({"m": jnp.ones(len(scores))}), prune_every=1, **options)
  g = {"m": jnp.sqrt(jnp.array([scores]))}
  return jax.jit(lambda g: tx.update({}, tx.init({}), mask_grads=g)[1])(g)


@pytest.mark.parametrize(("target", "left"), [(3.0, 3), (2.999, 2), (2.0, 2), (0.5, 1), (0.0, 1)])
def test_pruning_stops_at_the_target_not_above_it(target, left):
  assert one_mask([3.0, 1.0, 2.0], target=target, features_per_prune=5).cost == left


def test_signals_are_half_the_mean_square_and_bias_corrected():
  state = one_mask([8.0, 2.0], decay=0.75)
  np.testing.assert_allclose(fp.get_importance(state)["m"], [4.0, 1.0], rtol=1e-6)
  np.testing.assert_allclose(state.scores["m"], [1.0, 0.25], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25], ids=str)
def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters(bad):
  """The square of 1e25 is not finite in float32 either."""
  tx = fp.fisher_prune(cost(), prune_every=1)
  update = jax.jit(lambda state, g: tx.update({}, state, mask_grads=g)[1])
  good, broken = draw(0)[0], draw(0)[1]
  broken[0, -1] = bad
  state = tx.init({})
  for n in range(1, 4):
    state = update(state, as_tree(broken, examples=True))
    assert (state.step, state.counted, state.skipped) == (n, 0, n)
    chex.assert_trees_all_equal(state.masks, tx.init({}).masks)
    chex.assert_trees_all_equal(fp.get_importance(state), as_tree(np.zeros(K)))
  before = update(state, as_tree(good, examples=True))
  assert before.cost < cost().dense
  after = update(before, as_tree(broken, examples=True))
  chex.assert_trees_all_equal(after._replace(step=before.step, skipped=before.skipped), before)
  assert (after.step, after.counted, after.skipped) == (5, 1, 4)


def test_exhaustion_is_said_once_an_attempt_fails():
  tx = fp.fisher_prune(uniform_cost({"m": jnp.ones(3)}), prune_every=2)
  states = every_state(tx, {"m": jnp.ones((8, 1, 3))})
  assert states.exhausted.tolist() == [False] * 5 + [True] * 3
  assert states.cost.tolist() == [3, 2, 2, 1, 1, 1, 1, 1]
  # Both stop short of a failed attempt: the first by its target, the second for want of another turn.
  assert not one_mask([1.0, 2.0], features_per_prune=2, target=1.0).exhausted
  assert not one_mask([1.0, 2.0], features_per_prune=1).exhausted
  assert one_mask([1.0, 2.0], features_per_prune=2).exhausted


def test_half_precision_gradients_are_squared_in_float32():
  tx = fp.fisher_prune(uniform_cost({"m": jnp.ones(2)}))
  g = {"m": jnp.full((2, 2), 1e-5, jnp.float16)}
  state = tx.update({}, tx.init({}), mask_grads=g)[1]
  np.testing.assert_allclose(fp.get_importance(state)["m"], 0.5 * float(g["m"][0, 0]) ** 2, rtol=1e-5)


PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "half": jnp.ones(2, jnp.bfloat16)}
GRADS = {"w": jnp.array([0.5, 1.0, -1.0]), "half": jnp.ones(2, jnp.bfloat16)}


def gradients(step: int = 0) -> Any:
  return jax.tree.map(jnp.asarray, as_tree(draw(0)[step], examples=True))


def avals(tree: Any) -> Any:
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def abstract(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_one_compilation_serves_all_steps_and_types_are_stable():
  tx = fp.fisher_prune(cost(), prune_every=2, burn_in=3, features_per_prune=2, target=40.0)
  state = tx.init(PARAMS)
  traces = []

  @jax.jit
  def update(state: Any, g: Any) -> Any:
    traces.append(None)
    return tx.update(GRADS, state, PARAMS, mask_grads=g)[1]

  before = avals(state)
  for step in range(20):
    g = gradients(step)
    state = update(state, jax.tree.map(lambda x: x * jnp.nan, g) if step == 9 else g)
  assert avals(state) == before
  assert len(traces) == 1
  assert state.cost <= 40
  assert state.skipped == 1


def test_it_works_in_a_cond():
  tx = fp.fisher_prune(cost(), prune_every=1)

  @jax.jit
  def maybe(flag: jax.Array, state: Any, g: Any) -> Any:
    return jax.lax.cond(flag, lambda s: tx.update({}, s, mask_grads=g)[1], lambda s: s, state)

  state = tx.init(PARAMS)
  chex.assert_trees_all_equal(maybe(False, state, gradients()), state)
  after = maybe(True, state, gradients())
  assert after.step == 1
  assert after.cost < state.cost


def test_init_looks_at_no_parameter():
  tx = fp.fisher_prune(cost())
  state = tx.init(PARAMS)
  assert jax.eval_shape(tx.init, PARAMS) == abstract(state)
  for params in (None, {}, jax.eval_shape(lambda: PARAMS)):
    chex.assert_trees_all_equal(tx.init(params), state)


def test_optax_maps_over_parameters_only():
  tx = optax.chain(optax.sgd(0.1, momentum=0.9), fp.fisher_prune(cost()))
  state = optax.tree.map_params(tx, lambda x: x + 7, tx.init(PARAMS))
  chex.assert_trees_all_equal(state[0][0].trace, jax.tree.map(lambda p: jnp.full_like(p, 7), PARAMS))
  chex.assert_trees_all_equal(fp.get_state(state), fp.fisher_prune(cost()).init(PARAMS))


def test_updates_pass_through_unchanged():
  tx = fp.fisher_prune(cost(), prune_every=1)
  updates = {"w": jnp.ones(3, jnp.bfloat16), "n": (jnp.arange(2), None), "s": 1.5}
  found, _ = tx.update(updates, tx.init(None), mask_grads=gradients())
  assert jax.tree.structure(found) == jax.tree.structure(updates)
  assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(updates), strict=True))


def test_after_compaction_the_state_is_inert():
  tx = fp.fisher_prune(cost(), prune_every=1)
  state = tx.init(PARAMS)._replace(scores={}, masks={}, pruned_at={})
  updates, after = jax.jit(tx.update)(GRADS, state, PARAMS, mask_grads=None)
  chex.assert_trees_all_equal(updates, GRADS)
  chex.assert_trees_all_equal(after, state._replace(step=jnp.int32(1)))


AXIS_WEIGHTS = np.array([[1.0, 2.0], [0.0, 0.5], [0.0, 0.0], [3.0, 1.0]], np.float32)
"""Shards that count for different amounts, one of them padding only."""


@pytest.mark.parametrize("weights", [None, AXIS_WEIGHTS], ids=["unweighted", "weighted"])
def test_shards_over_a_mapped_axis_act_like_one_batch(weights):
  options = {"prune_every": 2, "features_per_prune": 2}
  shards = np.random.default_rng(3).normal(size=(T, 4, 2, K)).astype(np.float32)
  if weights is not None:
    shards[:, 2] = np.nan
  shards[4, 1, 1, 0] = np.inf  # one broken shard: all skip the batch
  whole = fp.fisher_prune(cost(), **options)
  split = fp.fisher_prune(cost(), **options, axis_name="shards")
  tiled = None if weights is None else jnp.tile(weights, (T, 1, 1))

  @jax.jit
  def both(g: jax.Array, w: Any) -> Any:
    flat = None if w is None else w.reshape(T, 8)
    one = every_state(whole, as_tree(g.reshape(T, 8, K), examples=True), flat)
    axes = (1, None if w is None else 1)
    many = jax.vmap(
      lambda g, w: every_state(split, as_tree(g, examples=True), w), in_axes=axes, axis_name="shards"
    )
    return one, many(g, w)

  one, many = both(shards, tiled)
  assert last(one).skipped == 1
  assert last(one).cost < cost().dense
  for shard in range(4):
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[shard], many), one, rtol=1e-5)  # noqa: B023


def test_the_state_stays_replicated_under_shard_map():
  """That outputs without the axis in their specification are replicated is checked while tracing."""
  tx = fp.fisher_prune(cost(), prune_every=1, features_per_prune=2, axis_name="i")
  mesh = Mesh(np.array(jax.devices()[:1]), ("i",), axis_types=(AxisType.Auto,))
  sharded, replicated = PartitionSpec("i"), PartitionSpec()
  in_specs = (replicated, {"Mask_10": sharded, "Mask_2": PartitionSpec(None, "i"), "b": sharded}, sharded)

  def update(state: Any, g: Any, weights: Any) -> Any:
    return tx.update({}, state, mask_grads=g, example_weights=weights)[1]

  mapped = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=in_specs, out_specs=replicated))
  single = fp.fisher_prune(cost(), prune_every=1, features_per_prune=2)
  expected = jax.jit(lambda g: single.update({}, single.init({}), mask_grads=g)[1])(gradients())
  chex.assert_trees_all_close(mapped(tx.init({}), gradients(), jnp.ones(B)), expected, rtol=1e-5)


# Inside other transformations: masks of one leaf, for these compile faster.


@functools.cache
def simple_cost() -> fp.CostModel:
  """Ten per feature, of six."""
  masks = {"m": jnp.ones(6)}
  return fp.CostModel.from_functions(
    masks, lambda m: 10 * jnp.sum(m["m"]), lambda m: jax.tree.map(lambda x: 10 * x, m)
  )


def simple_gradients(step: int) -> Any:
  return {"m": jnp.asarray(draw(0)[step, :, :6])}


def drive(tx: Any, steps: Any) -> tuple[Any, Any]:
  """Parameters and state after updates with the gradients of these steps."""

  @jax.jit
  def update(params: Any, state: Any, g: Any) -> Any:
    updates, state = tx.update(GRADS, state, params, mask_grads=g)
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, tx.init(PARAMS)
  for step in steps:
    params, state = update(params, state, simple_gradients(step))
  return params, state


def multi_steps(tx: Any) -> Any:
  return optax.MultiSteps(tx, every_k_schedule=2)


# MultiSteps around everything keeps the signal of each second micro-batch only.
ALL, EACH_SECOND = (0, 1, 2, 3, 4, 5), (1, 3, 5)

WRAPPERS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
  "chain, first": (lambda tx: optax.chain(tx, optax.sgd(0.1)), ALL),
  "chain, last": (lambda tx: optax.chain(optax.sgd(0.1), optax.clip(1.0), tx), ALL),
  "nested chains": (lambda tx: optax.chain(optax.chain(optax.chain(tx)), optax.scale(-1.0)), ALL),
  "named_chain": (lambda tx: optax.named_chain(("opt", optax.sgd(0.1)), ("prune", tx)), ALL),
  "masked": (lambda tx: optax.masked(tx, {"w": True, "half": False}), ALL),
  "partition": (
    lambda tx: optax.partition(
      {"a": optax.chain(optax.sgd(0.1), tx), "b": optax.sgd(0.2)}, {"w": "a", "half": "b"}
    ),
    ALL,
  ),
  "apply_if_finite": (lambda tx: optax.apply_if_finite(optax.chain(optax.sgd(0.1), tx), 3), ALL),
  "MultiSteps around it": (lambda tx: multi_steps(optax.chain(optax.sgd(0.1), tx)), EACH_SECOND),
  "MultiSteps after it": (
    lambda tx: optax.chain(tx, multi_steps(optax.sgd(0.1)).gradient_transformation()),
    ALL,
  ),
  "flatten": (lambda tx: optax.flatten(optax.chain(optax.sgd(0.1), tx)), ALL),
  "inject_hyperparams": (
    lambda _: fp.inject_hyperparams(fp.fisher_prune)(simple_cost(), prune_every=2),
    ALL,
  ),
}


@functools.cache
def alone(steps: tuple[int, ...]) -> fp.FisherPruneState:
  """The state of the bare transformation."""
  return drive(fp.fisher_prune(simple_cost(), prune_every=2), steps)[1]


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_state_is_found_inside_other_transformations(name):
  wrap, steps = WRAPPERS[name]
  _, state = drive(wrap(fp.fisher_prune(simple_cost(), prune_every=2)), ALL)
  expected = alone(steps)
  chex.assert_trees_all_close(fp.get_state(state), expected, rtol=1e-5)
  chex.assert_trees_all_equal(fp.get_masks(state), expected.masks)
  chex.assert_trees_all_close(fp.get_importance(state), fp.get_importance(expected), rtol=1e-5)
  assert expected.cost < simple_cost().dense


def test_states_are_found_in_traced_and_abstract_trees():
  tx = optax.chain(optax.sgd(0.1), fp.fisher_prune(cost()))
  assert jax.eval_shape(lambda: fp.get_masks(tx.init(PARAMS))) == abstract(cost().masks)
  assert fp.get_masks(jax.eval_shape(tx.init, PARAMS)) == abstract(cost().masks)


@pytest.mark.parametrize("find", [fp.get_state, fp.get_masks, fp.get_importance])
def test_a_state_must_hold_one_pruning_state(find):
  tx = fp.fisher_prune(cost())
  for state in (optax.adam(0.1).init(PARAMS), (), None, {"opt": jnp.ones(3)}):
    with pytest.raises(ValueError, match="one FisherPruneState, got 0"):
      find(state)
  with pytest.raises(ValueError, match="one FisherPruneState, got 2"):
    find(optax.chain(tx, optax.sgd(0.1), tx).init(PARAMS))


OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
  "the classic": ({}, optax.sgd(0.1, momentum=0.9)),
  "nesterov": ({"momentum": 0.8, "nesterov": True}, optax.sgd(0.1, momentum=0.8, nesterov=True)),
  "no momentum": ({"momentum": None}, optax.sgd(0.1)),
  "other updates": ({"update_params": optax.adam(0.3)}, optax.adam(0.3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruning_sgd_is_a_chain(name):
  arguments, train = OPTIMIZERS[name]
  options = {"prune_every": 2, "method": "fisher"}
  found = drive(fp.pruning_sgd(0.1, simple_cost(), flops_target=50.0, **arguments, **options), ALL)
  expected = drive(optax.chain(train, fp.fisher_prune(simple_cost(), target=50.0, **options)), ALL)
  chex.assert_trees_all_equal(found, expected)
  assert fp.get_state(found).cost == 50


def test_the_learning_rate_may_be_a_schedule_and_options_are_checked():
  tx = fp.pruning_sgd(optax.linear_schedule(1.0, 0.0, 2), simple_cost(), momentum=None)
  update = jax.jit(lambda state, g: tx.update(GRADS, state, PARAMS, mask_grads=g))
  state = tx.init(PARAMS)
  for factor in (-1.0, -0.5, 0.0):
    updates, state = update(state, simple_gradients(0))
    np.testing.assert_allclose(updates["w"], factor * GRADS["w"])
  with pytest.raises(ValueError, match="prune_every must be at least 1, got 0"):
    fp.pruning_sgd(0.1, simple_cost(), prune_every=0)


# Injected hyperparameters.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("target", [250_123, 250_123.0, 3_000_000_000])
def test_injected_targets_are_exact(dtype, target):
  tx = fp.inject_hyperparams(fp.fisher_prune)(simple_cost(), target=target)
  params = {"w": jnp.ones(2, dtype)}
  state = tx.init(params)
  after = jax.eval_shape(lambda s: tx.update(params, s, params, mask_grads=simple_gradients(0))[1], state)
  assert float(state.hyperparams["target"]) == target
  for found in (state, after):
    assert {x.dtype for x in found.hyperparams.values()} == {jnp.dtype("float32")}


def test_hyperparameters_change_between_steps_without_recompiling():
  inject = fp.inject_hyperparams(fp.fisher_prune)
  tx = optax.chain(optax.sgd(0.1), inject(simple_cost(), prune_every=1, target=1e9))
  traces = []

  @jax.jit
  def update(state: Any, g: Any) -> Any:
    traces.append(None)
    return tx.update(GRADS, state, PARAMS, mask_grads=g)[1]

  state = update(tx.init(PARAMS), simple_gradients(0))
  assert fp.get_state(state).cost == 60
  for target in (45.0, 20.0):
    state[1].hyperparams["target"] = jnp.float32(target)
    for step in range(4):
      state = update(state, simple_gradients(step))
    assert target - 10 < fp.get_state(state).cost <= target
  assert len(traces) == 1


STATIC = ("cost", "prune_every", "burn_in", "features_per_prune", "min_features")


@pytest.mark.parametrize(
  ("static", "dtype"), [((), jnp.float32), (("cost",), jnp.float32), (STATIC, jnp.bfloat16)]
)
def test_injecting_by_optax_alone_fails_with_advice(static, dtype):
  tx = optax.inject_hyperparams(fp.fisher_prune, static_args=static)(simple_cost(), target=250_123.0)
  with pytest.raises(TypeError, match="static_args") as error:
    tx.init({"w": jnp.ones(2, dtype)})
  assert "hyperparam_dtype=jnp.float32" in str(error.value)
  assert "fp.inject_hyperparams" in str(error.value)


def test_injecting_by_optax_works_as_advised():
  make = optax.inject_hyperparams(fp.fisher_prune, static_args=STATIC, hyperparam_dtype=jnp.float32)
  _, state = drive(make(simple_cost(), prune_every=2), ALL)
  chex.assert_trees_all_close(fp.get_state(state), alone(ALL), rtol=1e-5)


# Inside Flax's train state.


class Network(nn.Module):
  """Two masks and batch statistics."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = fp.Mask()(nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))))
    x = fp.Mask()(nn.relu(nn.Dense(5)(x)))
    return nn.Dense(1)(x)


def loss_of(params: Any, masks: Any, batch: Any, state: fp.TrainState) -> Any:
  """Squared error, with the new statistics."""
  variables = {"params": params, "masks": masks, "batch_stats": state.batch_stats}
  y, new = state.apply_fn(variables, batch["x"], train=True, mutable=["batch_stats"])
  return jnp.mean(jnp.square(y[:, 0] - batch["y"])), new["batch_stats"]


@jax.jit
def train_step(state: fp.TrainState, batch: Any) -> tuple[fp.TrainState, jax.Array]:
  differentiate = fp.value_and_mask_grads(loss_of, has_aux=True)
  (loss, stats), (grads, mask_grads) = differentiate(state.params, state.masks, batch, state)
  return state.apply_gradients(grads=grads, mask_grads=mask_grads, batch_stats=stats), loss


@pytest.fixture(scope="module")
def task() -> tuple[fp.TrainState, fp.CostModel, Any]:
  """A fresh train state, its cost model and a batch."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
  batch = {"x": x, "y": jnp.sin(x[:, 0]) + x[:, 1]}
  model = Network()
  variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), x)
  cost_model = fp.cost_model(functools.partial(model.apply, train=False), variables, x)
  target = 0.5 * cost_model.dense
  tx = fp.pruning_sgd(0.05, cost_model, prune_every=5, burn_in=10, flops_target=target)
  state = fp.TrainState.create(
    apply_fn=model.apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"]
  )
  return state, cost_model, batch


def test_a_train_state_trains_and_prunes_to_the_target(task):
  state, cost_model, batch = task
  first_stats, losses = state.batch_stats, []
  for _ in range(60):
    state, loss = train_step(state, batch)
    losses.append(float(loss))
  assert state.step == 60
  assert losses[-1] < 0.2 * losses[0]
  assert float(cost_model(state.masks)) <= 0.5 * cost_model.dense
  assert fp.get_state(state.opt_state).cost == cost_model(state.masks)
  steps = np.concatenate([np.ravel(p) for p in jax.tree.leaves(fp.get_state(state.opt_state).pruned_at)])
  pruned = np.sort(steps[steps >= 0])
  np.testing.assert_array_equal(pruned, 15 + 5 * np.arange(pruned.size))
  assert set(state.variables) == {"params", "masks", "batch_stats"}
  assert not np.allclose(first_stats["BatchNorm_0"]["mean"], state.batch_stats["BatchNorm_0"]["mean"])
  y = state.apply_fn(state.variables, batch["x"], train=False)
  assert float(jnp.mean(jnp.square(y[:, 0] - batch["y"]))) < losses[0]


def test_a_train_state_survives_serialization(task):
  fresh, _, batch = task
  state = fresh
  for _ in range(16):
    state, _ = train_step(state, batch)
  assert np.any(jax.tree.leaves(state.masks)[0] == 0) or np.any(jax.tree.leaves(state.masks)[1] == 0)
  restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
  assert isinstance(fp.get_state(restored.opt_state), fp.FisherPruneState)
  chex.assert_trees_all_equal(restored, state)
  chex.assert_trees_all_equal_dtypes(restored, state)
  for _ in range(4):
    (state, loss), (restored, again) = train_step(state, batch), train_step(restored, batch)
    assert loss == again
  chex.assert_trees_all_equal(restored, state)


def test_a_train_state_forwards_example_weights_and_holds_other_collections():
  cache = {"cache": {"n": jnp.ones(2)}}
  state = fp.TrainState.create(
    apply_fn=print, params=PARAMS, tx=fp.pruning_sgd(0.1, simple_cost()), collections=cache
  )
  assert set(state.variables) == {"params", "masks", "cache"}
  chex.assert_trees_all_equal(state.masks, simple_cost().masks)
  g, weights = draw(0)[0, :, :6], jnp.array([1.0, 1.0, 0.0, 0.0])
  g[2:] = np.nan
  step = jax.jit(
    lambda state, g: state.apply_gradients(
      grads=GRADS, mask_grads={"m": g}, example_weights=weights, collections={}
    )
  )
  after = step(state, g)
  np.testing.assert_allclose(
    fp.get_importance(after.opt_state)["m"], 0.5 * np.mean(np.square(g[:2]), axis=0), rtol=1e-5
  )
  np.testing.assert_allclose(after.params["w"], PARAMS["w"] - 0.1 * GRADS["w"], rtol=1e-6)
  assert set(after.variables) == {"params", "masks"}
