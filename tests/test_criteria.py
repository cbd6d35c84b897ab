"""The criteria that have names: what they say of each feature, and that they prune."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from fisherprune_jax._cost.owned import keys_of
from fisherprune_jax._masks import flatten, unflatten
from fisherprune_jax._training.criteria import CRITERIA, criterion_of, fisher_importance, taylor_importance
from tests.models import CASES, random_masks

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
WEIGHED = """
  mlp cnn_with_flatten conv_grouped residual_branches_masked_apart dense_net lstm_scanned scanned_layers tied_embeddings
  attention_grouped mixture_of_experts
""".split()
"""Whose weights are compared with those that compacting leaves out: it takes a second for each feature."""


def setting(name, alive=0.7):
  case = CASES[name]
  variables, x = case.variables(), case.inputs()
  masks = random_masks(variables["masks"], 0, alive)
  return case.module().apply, variables, x, masks


def weights_of(variables):
  return {key: part for key, part in variables.items() if key != "masks"}


@pytest.mark.parametrize("name", CASES)
def test_as_many_entries_go_with_a_feature_as_parameters_are_saved(name):
  apply, variables, x, masks = setting(name)
  params = fp.cost_model(apply, variables, x, measure="params")
  leaves = jax.tree_util.tree_leaves_with_path(weights_of(variables))
  ones = {keys_of(path): jnp.ones(leaf.shape) for path, leaf in leaves}
  found = unflatten(jax.jit(params.ownership.add_up)(ones, flatten(masks) != 0), masks)
  for got, expected in zip(*map(jax.tree.leaves, (found, params.per_feature(masks))), strict=True):
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", WEIGHED)
def test_magnitude_is_the_norm_of_what_goes(name):
  apply, variables, x, masks = setting(name)
  cost = fp.cost_model(apply, variables, x)
  found = fp.estimate_importance(None, weights_of(variables), masks, (), method="magnitude", cost=cost)
  squares = jax.tree.map(np.square, weights_of(variables))

  def left(masks):
    small = fp.compact(apply, {**variables, "masks": masks}, x)
    return sum(float(np.sum(leaf)) for leaf in jax.tree.leaves(small.shrink(squares)))

  path, mask = max(jax.tree_util.tree_leaves_with_path(masks), key=lambda pair: pair[1].size)
  row = np.unravel_index(np.argmax(mask.sum(-1)), mask.shape[:-1])
  without = lambda k: jax.tree_util.tree_map_with_path(
    lambda p, m: m.at[(*row, k)].set(0) if p == path else m, masks
  )
  alive = np.flatnonzero(mask[row])
  norms = np.sqrt([max(left(masks) - left(without(k)), 0.0) for k in alive])
  signal = dict(jax.tree_util.tree_leaves_with_path(found))[path][row][alive]
  np.testing.assert_allclose(signal, norms / norms.mean(), rtol=1e-3)


def share(grads, weights):
  """Of examples, ``(B, C)``, those that have gradients: sizes of samples by the variances of their means."""

  def size(weights):  # of independent numbers of variance one, the weighted mean has the variance sum p^2
    return 1 / np.square(weights / weights.sum()).sum()

  return (size(weights * np.square(grads).sum(1)) - 1) / (size(weights) - 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["mlp", "dense_net", "scanned_layers"])
def test_fishers_signals_are_handed_out_in_the_order_of_both_ranks(name, weighted):
  apply, variables, x, masks = setting(name)
  cost = fp.cost_model(apply, variables, x)
  rng = np.random.default_rng(1)
  grads = jax.tree.map(lambda m: jnp.asarray(rng.normal(size=(*m.shape[:-1], 6, m.shape[-1]))), masks)
  weights = jnp.asarray(rng.uniform(size=6), jnp.float32) if weighted else None
  found = {}
  for method in ("fisher", "magnitude", "fisher_magnitude"):
    scores = scores_of(method, cost, weights_of(variables), masks, grads, example_weights=weights)
    found[method] = map(np.atleast_2d, jax.tree.leaves(scores))
  leaves = zip(*map(jax.tree.leaves, (masks, grads)), *found.values(), strict=True)
  for mask, gradients, losses, norms, got in leaves:
    rows = np.asarray(gradients).reshape(-1, 6, mask.shape[-1])
    for row, alive in enumerate(np.atleast_2d(mask) != 0):
      expected, features = losses[row].copy(), np.flatnonzero(alive)
      rank = {k: (losses[row][features] < losses[row][k]).sum() for k in features}
      trust = (1 - share(rows[row][:, alive], np.ones(6) if weights is None else np.asarray(weights))) ** 2
      both = {k: rank[k] + trust * (norms[row][features] < norms[row][k]).sum() for k in features}
      order = sorted(features, key=lambda k: (both[k], rank[k]))
      for loss, k in zip(sorted(losses[row][alive]), order, strict=True):
        expected[k] = loss
      np.testing.assert_allclose(got[row], expected, rtol=1e-6)


def scores_of(method, cost, params, masks, mask_grads, **given):
  """What features are pruned by after one update."""
  criterion = criterion_of(method, cost=cost)

  @jax.jit
  def score(params, masks, mask_grads, given):
    given = {"axis_name": None, "name": None, **given}
    given |= {"params": params, "masks": masks, "mask_grads": mask_grads}
    return criterion.ranked(criterion.importance_of(given), given)

  return score(params, masks, mask_grads, given)


def signals_of(method, params, grads=None, **given):
  """Of one update; of a network whose norms are ``params["b"]``'s rows, mostly."""
  grads = None if grads is None else {"m": jnp.asarray(grads, jnp.float32)}
  return np.asarray(scores_of(method, COST, params, V["masks"], grads, **given)["m"])


RISING = {"b": jnp.array([[1.0], [2.0], [3.0], [4.0]]) * jnp.ones((4, 2))}
FALLING = [4.0, 3.0, 2.0, 1.0]


def test_as_far_as_few_examples_have_gradients_norms_decide():
  both = lambda grads, **given: signals_of("fisher_magnitude", RISING, grads, **given)
  for alike in ([FALLING], [FALLING] * 3):  # of one example alone, too
    np.testing.assert_allclose(both(alike), [8, 4.5, 2, 0.5], rtol=1e-6)
  one = [FALLING, [0.0] * 4, [0.0] * 4, [0.0] * 4]  # ranks 3 2 1 0 and 0 1 2 3: Fisher's decide among equals
  np.testing.assert_allclose(both(one), np.array([8, 4.5, 2, 0.5]) / 4, rtol=1e-6)
  swapped = [[3.0, 4.0, 2.0, 1.0], *one[1:]]  # ranks 2 3 1 0 and 0 1 2 3
  np.testing.assert_allclose(both(swapped), np.array([0.5, 8, 4.5, 2]) / 4, rtol=1e-6)


def test_examples_of_weight_count_as_often():
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(3, 4)) * np.array([[1.0], [0.1], [3.0]])
  both = lambda grads, **given: signals_of("fisher_magnitude", RISING, grads, **given)
  padded = np.vstack([grads, np.full((2, 4), np.nan)])
  np.testing.assert_allclose(
    both(padded, example_weights=jnp.array([1.0, 1, 1, 0, 0])), both(grads), rtol=1e-6
  )
  np.testing.assert_allclose(
    both([FALLING, FALLING], example_weights=jnp.array([1.0, 99.0])), [8, 4.5, 2, 0.5], rtol=1e-6
  )
  little = jnp.array([1.0, 1.0, 1e-9])
  np.testing.assert_allclose(
    both([FALLING, FALLING, [0.0] * 4], example_weights=little), [8, 4.5, 2, 0.5], rtol=1e-5
  )


def test_equals_have_one_rank_wherever_they_stand():
  flat = {"b": jnp.ones((4, 2))}
  grads = [[3.0, 1.0, 2.0, 0.5], [0.0] * 4]
  by_fisher = signals_of("fisher", flat, grads)
  np.testing.assert_array_equal(signals_of("fisher_magnitude", flat, grads), by_fisher)
  idle = [[0.0, 0.0, 0.0, 2.0], [0.0] * 4]  # one feature alone has a gradient, and keeps it
  for order in itertools.permutations(range(3)):
    norms = {"b": jnp.array([[2.0 + k] for k in order] + [[1.0]]) * jnp.ones((4, 2))}
    np.testing.assert_array_equal(signals_of("fisher_magnitude", norms, idle), [0, 0, 0, 1])


@pytest.mark.parametrize("method", ["magnitude", "fisher_magnitude"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_norms_that_are_not_finite_prune_nothing(method, bad):
  tx = fp.fisher_prune(COST, method=method, prune_every=1, cost_weight=0.0)
  params = {"b": RISING["b"].at[2, 0].set(bad)}
  _, state = tx.update({}, tx.init(params), params, mask_grads=GRADS)
  assert int(fp.get_state(state).skipped) == (
    method == "magnitude"
  )  # Fisher's importance is finite, the ranking is not
  np.testing.assert_array_equal(fp.get_masks(state)["m"], 1)
  assert not fp.get_state(state).exhausted


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-14, 1.0, 2.0**10])
def test_norms_of_half_precision_are_float32(dtype, scale):
  params = {"b": (scale * RISING["b"]).astype(dtype)}
  np.testing.assert_allclose(signals_of("magnitude", params), np.arange(1, 5) / 2.5, rtol=1e-6)


def test_a_parameter_may_be_called_value():
  apply = lambda v, x: x @ v["params"]["attn"]["value"] * v["masks"] @ v["params"]["out"]
  rng = np.random.default_rng(0)
  params = {"attn": {"value": jnp.asarray(rng.normal(size=(2, 3)))}, "out": jnp.ones((3, 1))}
  variables = {"params": params, "masks": jnp.ones(3)}
  cost = fp.cost_model(apply, variables, jnp.ones((5, 2)))
  norms = np.sqrt(np.square(params["attn"]["value"]).sum(0) + 1)
  found = fp.estimate_importance(None, params, variables["masks"], (), method="magnitude", cost=cost)
  np.testing.assert_allclose(found, norms / norms.mean(), rtol=1e-5)


def test_a_part_of_a_parameter_is_no_parameter():
  """As under ``shard_map``: the norm would be that of what is left."""
  params = {"a": V["params"]["a"][:, :2], "b": V["params"]["b"]}
  message = r"got params/a of the shape \(3, 2\), which is \(3, 4\) there.*gather it before tx.update"
  with pytest.raises(ValueError, match=message):
    signals_of("magnitude", params)


@pytest.mark.parametrize("method", CRITERIA)
def test_signals_are_float32_under_64_bits(method):
  with jax.enable_x64(True):
    given = {"method": method, "cost": COST}
    loss = lambda params, masks, x: jnp.mean(net({"params": params, "masks": masks}, x) ** 2)
    found = fp.estimate_importance(loss, V["params"], V["masks"], [X], **given)
    if method in ("fisher", "taylor"):
      signal = {"fisher": fisher_importance, "taylor": taylor_importance}[method]
      assert signal(GRADS)["m"].dtype == jnp.float32
  assert found["m"].dtype == jnp.float32


def test_a_batch_that_is_not_finite_hands_out_nothing():
  tx = fp.fisher_prune(COST, method="fisher_magnitude", prune_every=1)
  _, before = tx.update({}, tx.init({}), V["params"], mask_grads=GRADS)
  _, after = tx.update({}, before, V["params"], mask_grads={"m": GRADS["m"].at[0, 1].set(jnp.nan)})
  np.testing.assert_array_equal(fp.get_importance(after)["m"], fp.get_importance(before)["m"])


def recurrent(v, x):
  turn = lambda h, _: (jnp.tanh((h @ v["w"] + x) * v["masks"]["m"]), None)
  return jax.lax.scan(turn, x * v["masks"]["m"], None, length=3)[0] @ v["out"]


def test_entries_that_go_along_both_axes_count_once():
  rng = np.random.default_rng(0)
  v = {"w": rng.normal(size=(5, 5)), "out": rng.normal(size=(5, 2)), "masks": {"m": jnp.ones(5)}}
  v = jax.tree.map(jnp.float32, v)
  x = jnp.ones((2, 5))
  masks = {"m": jnp.array([1.0, 1, 0, 1, 1])}
  cost = fp.cost_model(recurrent, v, x)
  found = fp.estimate_importance(None, weights_of(v), masks, (), method="magnitude", cost=cost)["m"]
  alive = np.array([0, 1, 3, 4])
  w, out = np.square(v["w"])[np.ix_(alive, alive)], np.square(v["out"])[alive]
  norms = np.sqrt(w.sum(0) + w.sum(1) - np.diag(w) + out.sum(1))
  np.testing.assert_allclose(found[alive], norms / norms.mean(), rtol=1e-5)


def net(v, x):
  return jnp.tanh(x @ v["params"]["a"] * v["masks"]["m"]) @ v["params"]["b"]


V = {
  "params": {"a": jnp.arange(12.0).reshape(3, 4) + 1, "b": jnp.ones((4, 2))},
  "masks": {"m": jnp.ones(4)},
}
X = jnp.ones((5, 3))
COST = fp.cost_model(net, V, X)
GRADS = {"m": jnp.array([[1.0, -5, 2, 0.5], [-3.0, 5, 0, 0.5]])}


def gone(method, mask_grads=GRADS, **options):
  tx = optax.chain(optax.sgd(0.1), fp.fisher_prune(COST, prune_every=1, method=method, **options))
  step = jax.jit(lambda s: tx.update(V["params"], s, V["params"], mask_grads=mask_grads)[1])
  state = tx.init(V["params"])
  for _ in range(3):
    state = step(state)
  return [pruned.feature for pruned in fp.history(state)]


def primitives_of_a_step(method):
  """Of a step that prunes nothing: those outside of conditionals."""
  tx = fp.fisher_prune(COST, method=method)
  update = lambda state: tx.update({}, state, V["params"], mask_grads=GRADS, example_weights=jnp.ones(2))

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "cond":
        continue
      inner = [p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")]
      yield from itertools.chain(*map(walk, inner)) if inner else [eqn.primitive.name]

  closed = jax.make_jaxpr(update)(tx.init(V["params"]))
  return sorted(walk(closed.jaxpr))


def test_a_step_that_prunes_nothing_does_what_fishers_does():
  assert primitives_of_a_step("fisher_magnitude") == primitives_of_a_step("fisher")
  assert "sort" not in primitives_of_a_step("fisher_magnitude")


def test_fishers_signals_are_averaged_before_they_are_ranked():
  rng = np.random.default_rng(2)
  batches = [jnp.asarray(rng.normal(size=(3, 4)) * np.array([[3.0], [1.0], [0.1]])) for _ in range(4)]
  tx = fp.fisher_prune(COST, decay=0.5, prune_every=4, method="fisher_magnitude", cost_weight=0.0)
  state = tx.init(V["params"])
  for batch in batches:
    _, state = tx.update({}, state, V["params"], mask_grads={"m": batch})
  losses = [np.square(batch).mean(0) / 2 for batch in batches]
  mean = sum(2.0**n * loss for n, loss in enumerate(losses)) / 15
  np.testing.assert_allclose(fp.get_importance(state)["m"], mean, rtol=1e-5)
  trust = (1 - share(np.asarray(batches[-1]), np.ones(3))) ** 2
  both = np.argsort(np.argsort(mean)) + trust * np.arange(4)  # norms rise
  assert [pruned.feature for pruned in fp.history(state)] == [int(np.argmin(both))]


def test_each_prunes_what_it_ranks_lowest():
  assert gone("fisher") == [3, 2, 0]  # means of squares 5, 25, 2, 0.25
  assert gone("taylor") == [3, 2, 0]  # of absolute values 2, 5, 1, 0.5
  assert gone("magnitude") == [0, 1, 2]
  # Gradients of both examples: the second has 34.25 of 64.5 in squares, a share of 0.99, and norms decide nothing.
  assert gone("fisher_magnitude") == [3, 2, 0]
  # Of one example: ranks 2 + 0, 3 + 1, 1 + 2, 0 + 3; of equals what Fisher ranks lower.
  one = {"m": jnp.sqrt(2 * jnp.square(GRADS["m"]).mean(0)) * jnp.array([[1.0], [0.0]])}
  assert gone("fisher_magnitude", one) == [0, 3, 2]
  assert (
    gone("random")
    == np.argsort(fp.estimate_importance(None, {}, V["masks"], (), method="random")["m"])[:3].tolist()
  )


def test_what_one_says_the_other_does():
  """``fp.select_masks`` with estimated importance, and the transformation."""
  x = 0.05 * X  # small enough that no two features matter alike, all being saturated
  for method in CRITERIA:
    loss = lambda params, masks, batch: jnp.mean(
      jnp.sum(net({"params": params, "masks": masks}, batch) ** 2, 1)
    )
    importance = fp.estimate_importance(loss, V["params"], V["masks"], [x], method=method, cost=COST)
    once = fp.select_masks(COST, importance, 0.6 * COST.dense)
    tx = fp.fisher_prune(COST, target=0.6 * COST.dense, prune_every=1, features_per_prune=4, method=method)
    _, (grads, mask_grads) = fp.value_and_mask_grads(loss)(V["params"], V["masks"], x)
    _, state = tx.update(grads, tx.init(V["params"]), V["params"], mask_grads=mask_grads)
    np.testing.assert_array_equal(once["m"], fp.get_masks(state)["m"], err_msg=method)


def test_the_cost_counts_or_not():
  """Fewer FLOPs hang on the mask of few inputs: over cost, its features have to matter less."""

  def two(v, x):
    return (x @ v["a"] * v["masks"]["a"]).sum(1, keepdims=True) + (x[:, :1] @ v["b"] * v["masks"]["b"]).sum(
      1, keepdims=True
    )

  v = {"a": jnp.ones((50, 2)), "b": jnp.ones((1, 2)), "masks": {"a": jnp.ones(2), "b": jnp.ones(2)}}
  cost = fp.cost_model(two, v, jnp.ones((4, 50)))
  grads = {"a": jnp.full((4, 2), 2.0), "b": jnp.full((4, 2), 1.0)}
  for method in ("fisher", "taylor"):
    for weight, first in (("auto", "a"), (0.0, "b")):
      tx = fp.fisher_prune(cost, prune_every=1, method=method, cost_weight=weight)
      _, state = tx.update({}, tx.init({}), mask_grads=grads)
      assert fp.history(state)[0].mask == first


def test_taylor_is_the_mean_absolute_gradient():
  weights = jnp.array([1.0, 3.0])
  tx = fp.fisher_prune(COST, method="taylor")
  _, state = tx.update({}, tx.init({}), mask_grads=GRADS, example_weights=weights)
  np.testing.assert_allclose(fp.get_importance(state)["m"], [2.5, 5, 0.5, 0.5], rtol=1e-6)
  padded = {"m": GRADS["m"].at[1].set(jnp.nan)}
  _, state = tx.update({}, tx.init({}), mask_grads=padded, example_weights=jnp.array([1.0, 0.0]))
  np.testing.assert_allclose(fp.get_importance(state)["m"], [1, 5, 2, 0.5], rtol=1e-6)


def test_magnitude_takes_no_gradients_of_masks():
  tx = fp.fisher_prune(COST, prune_every=1, method="magnitude")
  _, state = tx.update(V["params"], tx.init(V["params"]), V["params"])
  norms = np.sqrt(np.square(V["params"]["a"]).sum(0) + 2)
  np.testing.assert_allclose(fp.get_importance(state)["m"], norms / norms.mean(), rtol=1e-5)
  assert "of the mean" in fp.summary(state, method="magnitude")


def test_magnitude_of_a_part_of_the_parameters():
  """What is not trained is not known to the optimizer: what is, counts."""
  tx = fp.fisher_prune(COST, method="magnitude")
  part = {"a": V["params"]["a"]}
  _, state = tx.update(part, tx.init(part), part)
  norms = np.sqrt(np.square(V["params"]["a"]).sum(0))
  np.testing.assert_allclose(fp.get_importance(state)["m"], norms / norms.mean(), rtol=1e-5)


def test_costs_that_add_up_know_what_they_are_of():
  params = fp.cost_model(net, V, X, measure="params")
  own = fp.CostModel.from_functions(V["masks"], lambda m: m["m"].sum(), lambda m: m)
  for cost in (COST + params, 2 * COST, own + COST, COST + own):
    found = fp.estimate_importance(None, V["params"], V["masks"], (), method="magnitude", cost=cost)
    assert float(found["m"].mean()) == pytest.approx(1)
  for cost in (own, 2 * own):
    with pytest.raises(ValueError, match="method='magnitude' needs a cost that knows which variables go"):
      fp.fisher_prune(cost, method="magnitude")


def test_where_parameters_are_not_known_the_order_is_fishers():
  own = fp.CostModel.from_functions(V["masks"], lambda m: m["m"].sum(), lambda m: m)
  loss = lambda params, masks, x: jnp.mean(net({"params": params, "masks": masks}, x) ** 2)
  given = (loss, V["params"], V["masks"], [X])
  fisher = fp.estimate_importance(*given, method="fisher")
  for cost in (None, own):
    chex.assert_trees_all_equal(fp.estimate_importance(*given, cost=cost), fisher)
  _, (_, grads) = fp.value_and_mask_grads(loss)(V["params"], V["masks"], X)
  states = []
  for method in ("fisher", "fisher_magnitude"):
    tx = fp.fisher_prune(COST, prune_every=1, method=method)
    states.append(tx.update({}, tx.init({}), mask_grads=grads)[1])  # without params
  chex.assert_trees_all_equal(*states)


def test_what_is_missing_is_said():
  tx = fp.fisher_prune(COST, method="magnitude")
  with pytest.raises(ValueError, match="'magnitude' needs params, got params=None"):
    tx.update({}, tx.init({}))
  with pytest.raises(
    ValueError, match="needs the parameters of the network that the cost was built for, got other: none of"
  ):
    tx.update({}, tx.init({}), {"other": jnp.ones(3)})
  with pytest.raises(ValueError, match="needs the cost model of the network, got cost=None"):
    fp.estimate_importance(None, V["params"], V["masks"], (), method="magnitude")
  tx = fp.fisher_prune(COST, method="taylor")
  with pytest.raises(ValueError, match="mask_grads=None"):
    tx.update({}, tx.init({}))
  with pytest.raises(
    ValueError,
    match=r"method must be one of \('fisher', 'taylor', 'magnitude', 'fisher_magnitude', 'random'\)",
  ):
    fp.fisher_prune(COST, method="movement")


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shards_say_what_the_whole_batch_says(method, dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), V["params"])
  sizes = np.array([0, 0, 5, 1, 1, 1])  # of the first shard one example alone has gradients
  grads = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)) * sizes[:, None], jnp.float32)

  def importance(grads, **options):
    tx = fp.fisher_prune(COST, method=method, **options)
    return fp.get_importance(tx.update({}, tx.init(params), params, mask_grads={"m": grads})[1])["m"]

  shards = jax.vmap(lambda part: importance(part, axis_name="shards"), axis_name="shards")(
    grads.reshape(2, 3, 4)
  )
  assert shards.dtype == jnp.float32
  np.testing.assert_allclose(shards, [importance(grads)] * 2, rtol=1e-5)


@pytest.mark.parametrize("method", CRITERIA)
def test_nothing_is_traced_anew_after_the_first_step(method):
  tx, traces = fp.fisher_prune(COST, prune_every=1, method=method), []

  @jax.jit
  def step(state):
    traces.append(1)
    return tx.update(V["params"], state, V["params"], mask_grads=GRADS)[1]

  state = tx.init(V["params"])
  for _ in range(3):
    after = step(state)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    state = after
  assert len(traces) == 1


def test_modules_of_nnx():
  from flax import nnx

  model = nnx.Sequential(
    nnx.Linear(3, 4, rngs=nnx.Rngs(0)), fp.nnx.Mask(4), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
  )
  cost = fp.nnx.cost_model(model, X)
  tx = fp.fisher_prune(cost, prune_every=1, method="magnitude")
  optimizer = fp.nnx.Optimizer(model, tx, wrt=nnx.Param)
  first, last = model.layers[0], model.layers[2]
  norms = jnp.sqrt(
    jnp.sum(first.kernel[...] ** 2, 0) + first.bias[...] ** 2 + jnp.sum(last.kernel[...] ** 2, 1)
  )
  _, (grads, _) = fp.nnx.value_and_mask_grads(lambda m, x: jnp.mean(m(x) ** 2))(model, X)
  optimizer.update(model, grads)
  assert int(jnp.argmin(model.layers[1].mask[...])) == int(jnp.argmin(norms))


def test_automatic_masks():
  apply = lambda v, x: jnp.tanh(x @ v[0]) @ v[1]
  auto = fp.auto_mask(apply, [V["params"]["a"], V["params"]["b"]], X)
  cost = fp.cost_model(auto.apply, auto.variables, X)
  tx = fp.fisher_prune(cost, prune_every=1, method="magnitude")
  params = auto.variables["params"]
  _, state = tx.update(params, tx.init(params), params)
  (mask,) = jax.tree.leaves(fp.get_masks(state))
  np.testing.assert_array_equal(mask, [0, 1, 1, 1])
