"""Masks that somebody else puts in: at the start, by set_masks, by hand. Everything follows, and pruning goes on."""

import functools
import operator
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisherprune_jax as fp
from tests.test_transform import (
  GRADS,
  PARAMS,
  WRAPPERS,
  K,
  as_tree,
  avals,
  cost,
  counts,
  drive,
  flops,
  gradients,
  shares,
  simple_cost,
  simple_gradients,
)

OPTIONS = {"prune_every": 2, "features_per_prune": 2, "target": 60.0}


def flat(tree):
  """The inverse of ``as_tree``."""
  return np.concatenate([np.ravel(tree["Mask_10"]), np.ravel(tree["Mask_2"]["stack"]), np.ravel(tree["b"])])


def some_masks(seed):
  mask = (np.random.default_rng(seed).random(K) < 0.6).astype(np.float32)
  mask[[0, 4, 9, 14]] = 1
  return mask


def assert_consistent(state, when_known=True):
  """The cost and the shares are those of the masks, the history says what is alive."""
  mask = flat(state.masks)
  np.testing.assert_array_equal(flat(state.pruned_at) < 0, mask > 0)
  if when_known:
    assert float(state.cost) == flops(counts(mask))
    chex.assert_trees_all_close(state.shares, shares(mask), rtol=1e-5)


def run(tx, state, steps):
  update = jax.jit(lambda state, g: tx.update({}, state, mask_grads=g)[1])
  for step in steps:
    state = update(state, gradients(step))
  return state


def test_it_starts_from_given_masks():
  mask = np.ones(K, np.float32)
  mask[[1, 7, 15]] = 0
  tx = fp.fisher_prune(cost(), masks=as_tree(mask), **{**OPTIONS, "target": 40.0})
  state = tx.init(PARAMS)
  assert_consistent(state)
  np.testing.assert_array_equal(flat(state.masks), mask)
  np.testing.assert_array_equal(flat(state.pruned_at), np.where(mask > 0, -1, 0))
  assert avals(state) == avals(fp.fisher_prune(cost()).init(PARAMS))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, PARAMS)) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  chex.assert_trees_all_equal(fp.masks_at(state, 0), state.masks)
  assert len(fp.history(state)) == int((mask == 0).sum())
  after = run(tx, state, range(8))
  assert_consistent(after)
  assert after.cost <= 40 < state.cost
  assert (flat(after.masks) <= mask).all()


def test_all_ones_given_are_none_given():
  given = fp.fisher_prune(cost(), masks=cost().masks, **OPTIONS)
  chex.assert_trees_all_close(
    run(given, given.init({}), range(6)),
    run(fp.fisher_prune(cost(), **OPTIONS), fp.fisher_prune(cost()).init({}), range(6)),
  )


def test_masks_under_the_floors_are_left_as_they_are():
  mask = np.zeros(K, np.float32)
  mask[:4] = 1
  tx = fp.fisher_prune(cost(), masks=as_tree(mask), prune_every=1, min_features=2)
  state = run(tx, tx.init({}), range(4))
  assert counts(flat(state.masks)).tolist() == [2, 0, 0, 0]
  assert state.exhausted


@functools.cache
def pruned(**options):
  tx = fp.fisher_prune(cost(), **{**OPTIONS, **options})
  return tx, run(tx, tx.init({}), range(10))


WITH = {"cost given": True, "cost unknown until the next update": False}
HOW = {"at once": lambda f: f, "under jit": jax.jit}


@pytest.mark.parametrize("given", WITH.values(), ids=WITH)
@pytest.mark.parametrize("how", HOW)
def test_set_masks_makes_everything_consistent(given, how):
  tx, before = pruned()
  old, new = flat(before.masks), some_masks(3)
  assert (new > old).any()
  assert (new < old).any()
  put = HOW[how](lambda state, m: fp.set_masks(state, m, cost=cost() if given else None))
  state = put(before, as_tree(new))
  assert avals(state) == avals(before)
  assert_consistent(state, when_known=given)
  assert np.isnan(state.cost) == (not given)
  at = flat(before.pruned_at)
  np.testing.assert_array_equal(flat(state.pruned_at), np.where(new > 0, -1, np.where(old > 0, 10, at)))
  chex.assert_trees_all_equal(state.scores, before.scores)
  for field in ("step", "counted", "skipped", "decay_product"):
    assert getattr(state, field) == getattr(before, field)
  # The next update knows the cost, though it is no step to prune at.
  state = run(tx, state, [10])
  assert_consistent(state)
  np.testing.assert_array_equal(flat(state.masks), new)
  assert run(tx, state, range(8)).cost <= 60


def test_what_is_said_after_set_masks():
  _, before = pruned()
  state = fp.set_masks(before, cost().masks)
  assert fp.summary(state).endswith("step 10, cost unknown until the next update")
  assert fp.history(state) == []
  assert "cost 90" in fp.summary(fp.set_masks(before, cost().masks, cost=cost()))


EDITS = {
  "set_masks": lambda s, m: fp.set_masks(s, m),
  "masks alone": lambda s, m: s._replace(masks=m),
  "of another type": lambda s, m: s._replace(masks=jax.tree.map(lambda x: np.asarray(x, bool), m)),
  "with the history": lambda s, m: s._replace(
    masks=m, pruned_at=jax.tree.map(lambda x: jnp.where(x > 0, -1, 0), m)
  ),
  "while exhausted": lambda s, m: s._replace(masks=m, exhausted=jnp.array(True)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("several", [1, 3])
def test_pruning_goes_on_after_an_edit(edit, several):
  """Dense, sparse, dense, and sparse again; the masks that come out cost what the state says."""
  tx, sparse = pruned(features_per_prune=several)
  while sparse.cost > 60:
    sparse = run(tx, sparse, range(10))
  dense = EDITS[edit](sparse, as_tree(np.ones(K)))
  again = run(tx, dense, range(2))
  assert_consistent(again)
  assert counts(flat(again.masks)).sum() == K - several
  assert not again.exhausted
  for _ in range(8):
    again = run(tx, again, range(4))
  assert_consistent(again)
  assert again.cost <= 60


def test_an_edit_in_the_middle_is_dated_by_its_step():
  tx, before = pruned(burn_in=1000)
  mask = some_masks(1)
  for state in (before._replace(masks=as_tree(mask)), fp.set_masks(before, as_tree(mask))):
    after = run(tx, state, [0])
    np.testing.assert_array_equal(flat(after.pruned_at), np.where(mask > 0, -1, 10))
    assert_consistent(after)
    chex.assert_trees_all_equal(fp.masks_at(after, 9), as_tree(np.ones(K)))


def test_a_step_with_a_bad_batch_follows_an_edit_too():
  tx, before = pruned()
  broken = jax.tree.map(lambda g: g * jnp.nan, gradients(0))
  _, after = jax.jit(tx.update)({}, before._replace(masks=as_tree(np.ones(K))), mask_grads=broken)
  assert_consistent(after)
  assert after.cost == cost().dense


def test_following_edits_compiles_once_and_syncs_nothing():
  tx, state = pruned()
  traces = []

  @jax.jit
  def update(state, g):
    traces.append(None)
    return tx.update({}, state, mask_grads=g)[1]

  put = jax.jit(fp.set_masks)
  g, masks = gradients(0), jax.tree.map(jnp.array, cost().masks)
  state = put(update(state, g), masks)
  with jax.transfer_guard("disallow"):
    for _ in range(3):
      state = put(update(state, g), masks)
  assert len(traces) == 1


def test_an_ensemble_is_edited_by_vmap():
  tx, before = pruned()
  states = jax.tree.map(lambda x: jnp.stack([x, x]), before)
  masks = jax.tree.map(lambda *m: jnp.stack(m), as_tree(np.ones(K)), as_tree(some_masks(2)))
  g = jax.tree.map(lambda x: jnp.stack([x, x]), gradients(0))
  after = jax.jit(jax.vmap(lambda s, m, g: tx.update({}, fp.set_masks(s, m), mask_grads=g)[1]))(
    states, masks, g
  )
  for member in range(2):
    assert_consistent(jax.tree.map(operator.itemgetter(member), after))


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "MultiSteps around" not in name])
def test_masks_are_set_inside_other_transformations(name):
  tx = WRAPPERS[name][0](fp.fisher_prune(simple_cost(), prune_every=2))
  _, state = drive(tx, range(6))
  masks = {"m": jnp.array([0.0, 1, 1, 0, 1, 1])}
  new = jax.jit(lambda s: fp.set_masks(s, masks))(state)
  assert avals(new) == avals(state)
  np.testing.assert_array_equal(fp.get_masks(new)["m"], masks["m"])
  _, after = tx.update(GRADS, new, PARAMS, mask_grads=simple_gradients(0))
  assert float(fp.get_state(after).cost) == 40
  others = lambda s: [x for x in jax.tree.leaves(s, is_leaf=is_state) if not is_state(x)]
  chex.assert_trees_all_equal(others(new), others(state))


def is_state(x):
  return isinstance(x, fp.FisherPruneState)


def test_an_edited_state_survives_serialization():
  tx, before = pruned()
  state = fp.set_masks(before, as_tree(some_masks(3)))
  for copy in (
    flax.serialization.from_bytes(tx.init({}), flax.serialization.to_bytes(state)),
    pickle.loads(pickle.dumps(state)),
  ):
    chex.assert_trees_all_equal(run(tx, copy, range(4)), run(tx, state, range(4)))


def test_injected_hyperparameters_leave_the_masks_alone():
  masks = {"m": jnp.array([0.0, 1, 1, 0, 1, 1])}
  tx = fp.inject_hyperparams(fp.fisher_prune)(simple_cost(), masks=masks, prune_every=2, name="it")
  state = tx.init(PARAMS)
  assert set(state.hyperparams) == {"decay", "target"}
  np.testing.assert_array_equal(fp.get_masks(state)["m"], masks["m"])
  one = fp.CostModel.from_functions(jnp.ones(3), jnp.sum, lambda m: m)  # a tree that is an array
  tx = fp.inject_hyperparams(fp.fisher_prune)(one, masks=jnp.array([1.0, 0.0, 1.0]))
  np.testing.assert_array_equal(fp.get_masks(tx.init(PARAMS)), [1, 0, 1])


REFUSED = {
  "another tree": (
    {"Mask_10": np.ones(4)},
    "masks must have the structure of the masks of the optimizer state",
  ),
  "another width": (
    {**as_tree(np.ones(K)), "b": np.ones(4)},
    r"masks must have the shapes of the masks of the optimizer state, \(3,\) at b, got \(4,\)",
  ),
  "no switches": (as_tree(np.full(K, 0.5)), "Masks must be 0 or 1, got 0.5 at Mask_10"),
  "not a number": (as_tree(np.full(K, np.nan)), "Masks must be 0 or 1, got nan at Mask_10"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_do_not_fit_are_refused(name):
  masks, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    fp.set_masks(pruned()[1], masks)
  with pytest.raises(ValueError, match=message.replace("the optimizer state", "the cost model")):
    fp.fisher_prune(cost(), masks=masks)


def test_a_compact_network_has_no_masks_to_set():
  inert = pruned()[1]._replace(scores={}, masks={}, pruned_at={}, shares={})
  with pytest.raises(ValueError, match=r"needs a pruning state with masks.*keep_masks=True"):
    fp.set_masks(inert, {})


@pytest.mark.parametrize("field", ["scores", "pruned_at", "shares", "masks"])
def test_a_state_that_does_not_fit_itself_is_refused(field):
  tx, state = pruned()
  for wrong in ({"Mask_10": jnp.ones(4)}, {**getattr(state, field), "b": jnp.ones(7)}):
    with pytest.raises(
      ValueError, match=r"optimizer state must have (the )?(structure|shape).*(set_masks|tx.init)"
    ):
      run(tx, state._replace(**{field: wrong}), [0])


def test_a_train_state_refuses_masks_among_its_collections():
  with pytest.raises(ValueError, match=r"collections must be other collections than 'masks'.*masks=\.\.\."):
    fp.TrainState.create(
      apply_fn=print,
      params=PARAMS,
      tx=fp.pruning_sgd(0.1, simple_cost()),
      collections={"masks": {"m": jnp.ones(6)}},
    )


def network():
  return nnx.Sequential(
    nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3), nnx.Linear(3, 1, rngs=nnx.Rngs(1))
  )


def test_masks_of_a_module_are_set_with_those_of_its_optimizer():
  model, x = network(), jnp.ones((4, 2))
  price = fp.nnx.cost_model(model, x)
  optimizer = fp.nnx.Optimizer(model, fp.pruning_sgd(0.1, price, prune_every=1), wrt=nnx.Param)
  step = nnx.jit(
    lambda model, optimizer: optimizer.update(model, *gradients_of(model)[:1], **gradients_of(model)[1])
  )

  def gradients_of(model):
    _, (grads, mask_grads) = fp.nnx.value_and_mask_grads(lambda m, x: jnp.mean(m(x) ** 2))(model, x)
    return grads, {"mask_grads": mask_grads}

  for _ in range(2):
    step(model, optimizer)
  assert float(model.layers[1].mask[...].sum()) == 1
  ones = jax.tree.map(jnp.ones_like, fp.get_masks(optimizer.opt_state))
  optimizer.set_masks(model, ones)
  assert float(model.layers[1].mask[...].sum()) == 3
  assert fp.history(optimizer.opt_state) == []
  step(model, optimizer)
  assert float(model.layers[1].mask[...].sum()) == 2
  assert float(fp.get_state(optimizer.opt_state).cost) == float(price(fp.get_masks(optimizer.opt_state)))
  optimizer.opt_state = nnx.data(fp.set_masks(optimizer.opt_state, ones, cost=price))  # by hand
  assert float(fp.get_state(optimizer.opt_state).cost) == price.dense


def test_a_module_whose_masks_are_others_than_those_of_its_optimizer_is_refused():
  model = network()
  price = fp.nnx.cost_model(model, jnp.ones((4, 2)))
  model.layers[1].mask[...] = jnp.array([1.0, 0.0, 1.0])
  with pytest.raises(ValueError, match=r"got others at layers/1/mask: 2 alive in the model, 3 in the"):
    fp.nnx.Optimizer(model, fp.pruning_sgd(0.1, price), wrt=nnx.Param)
  _, variables = fp.nnx.functional(model)
  tx = fp.pruning_sgd(0.1, price, masks=variables["masks"])
  optimizer = fp.nnx.Optimizer(model, tx, wrt=nnx.Param)
  np.testing.assert_array_equal(fp.get_masks(optimizer.opt_state)["layers"][1]["mask"], [1, 0, 1])
