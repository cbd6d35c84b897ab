"""What prunes is a criterion: Fisher's by its name or as an object, and any of the user's own."""

import functools
import inspect
import re
from typing import get_type_hints

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from fisherprune_jax._training.criteria import FISHER
from fisherprune_jax._training.options import Options, is_static
from tests.test_transform import T, as_tree, cost, draw, every_state

MASKS = {"a": jnp.ones(3), "layers": jnp.ones((2, 2))}
COST = fp.CostModel.from_functions(
  MASKS, total=lambda m: sum(map(jnp.sum, jax.tree.leaves(m))), per_feature=lambda m: m
)
PARAMS = {"w": jnp.ones(2)}
RANKING = {"a": np.array([5, 0, 3]), "layers": np.array([[1, 4], [2, 6]])}
ORDER = [("a", 1), ("layers[0]", 0), ("layers[1]", 0), ("a", 2)]
"""How the ranking goes, down to the last feature of every mask."""
BY_HAND = fp.Criterion(lambda: RANKING, name="by hand", unit="places")


def run(tx, steps, **extra):
  update = jax.jit(lambda state, extra: tx.update(PARAMS, state, PARAMS, **extra)[1])
  state = tx.init(PARAMS)
  for _ in range(steps):
    state = update(state, extra)
  return state


def gone(state, name=None):
  return [(pruned.mask, pruned.feature) for pruned in fp.history(state, name)]


@pytest.mark.parametrize("averaged", [True, False])
def test_a_fixed_ranking_prunes_as_it_says(averaged):
  method = fp.Criterion(lambda: RANKING, name="by hand", averaged=averaged, unit="places")
  state = run(fp.fisher_prune(COST, prune_every=1, method=method), 6)
  assert gone(state) == ORDER
  assert [pruned.step for pruned in fp.history(state)] == [1, 2, 3, 4]
  assert state.exhausted
  chex.assert_trees_all_close(fp.get_importance(state), jax.tree.map(jnp.float32, RANKING), rtol=1e-6)
  assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(
    lambda x: x.dtype, fp.fisher_prune(COST).init(PARAMS)
  )
  assert "importance, places" in fp.summary(state, method=method)
  assert "importance, nats" in fp.summary(state)


WRAPPED = {
  "chain": lambda **o: optax.chain(optax.sgd(0.1), fp.fisher_prune(COST, method=BY_HAND, **o)),
  "injected": lambda **o: fp.inject_hyperparams(fp.fisher_prune)(COST, method=BY_HAND, **o),
  "sgd": lambda **o: fp.pruning_sgd(0.1, COST, method=BY_HAND, **o),
  "named": lambda **o: fp.fisher_prune(COST, method=BY_HAND, name="it", **o),
  "swallowed": lambda **o: optax.lookahead(fp.fisher_prune(COST, method=BY_HAND, **o), 2, 0.5),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_it_needs_nothing_wherever_it_stands(how):
  """Also in what drops extra arguments, and beside gradients that are not for it."""
  tx = optax.with_extra_args_support(WRAPPED[how](prune_every=1))
  params = optax.LookaheadParams.init_synced(PARAMS) if how == "swallowed" else PARAMS
  state = tx.init(params)
  for _ in range(2):
    _, state = tx.update(PARAMS, state, params, mask_grads={"another": 1}, example_weights=jnp.ones(9))
  assert gone(state) == ORDER[:2]


def test_two_criteria_in_one_optimizer():
  tx = optax.chain(
    fp.fisher_prune(COST, prune_every=1, method=BY_HAND, name="mine"),
    fp.fisher_prune(COST, prune_every=1, name="theirs"),
  )
  g = {"a": jnp.array([[3.0, 2.0, 1.0]]), "layers": jnp.full((2, 1, 2), 4.0)}
  state = run(tx, 2, mask_grads={"theirs": g})
  assert gone(state, "mine") == ORDER[:2]
  assert gone(state, "theirs") == [("a", 2), ("a", 1)]


def test_fisher_by_name_and_as_an_object_are_one():
  g = as_tree(draw(0), examples=True)
  runs = [
    jax.jit(lambda g, method=method: every_state(fp.fisher_prune(cost(), prune_every=2, method=method), g))(g)
    for method in ("fisher", FISHER)
  ]
  chex.assert_trees_all_equal(*runs)
  assert runs[0].cost[-1] < cost().dense


def opposite(scores):
  return jax.tree.map(jnp.negative, scores)


def test_a_rank_decides_where_features_are_pruned_and_changes_no_score():
  method = fp.Criterion(lambda: RANKING, rank=opposite)
  tx = fp.fisher_prune(COST, prune_every=2, method=method, cost_weight=0.0)
  state = run(tx, 6)
  assert gone(state) == [("layers[1]", 1), ("a", 0), ("layers[0]", 1)]
  assert [pruned.step for pruned in fp.history(state)] == [2, 4, 6]
  chex.assert_trees_all_close(fp.get_importance(state), jax.tree.map(jnp.float32, RANKING), rtol=1e-6)
  once = fp.estimate_importance(None, {}, MASKS, (), method=method)
  chex.assert_trees_all_close(once, jax.tree.map(lambda x: -jnp.float32(x), RANKING))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_rank_that_is_not_finite_prunes_nothing(bad):
  rank = lambda scores, step: {**scores, "a": jnp.where(step < 3, bad, scores["a"])}
  method = fp.Criterion(lambda: RANKING, rank=rank)
  tx = fp.fisher_prune(COST, prune_every=1, method=method)
  assert not gone(run(tx, 2))
  assert not run(tx, 2).exhausted
  assert gone(run(tx, 3)) == ORDER[:1]


def mean_absolute(mask_grads):
  return jax.tree.map(lambda g: jnp.mean(jnp.abs(g), axis=-2), mask_grads)


@pytest.mark.parametrize("averaged", [True, False])
def test_signals_of_another_kind_are_averaged_or_the_last_one(averaged):
  """Against a loop over NumPy arrays, one bad batch among them."""
  decay, draws = 0.8, draw(4)
  draws[5, 2, 3] = np.nan
  method = fp.Criterion(mean_absolute, averaged=averaged)
  tx = fp.fisher_prune(cost(), decay=decay, method=method)
  states = jax.jit(lambda g: every_state(tx, g))(as_tree(draws, examples=True))
  score, weight = np.zeros(draws.shape[-1]), 0.0
  for n in range(T):
    signal = np.mean(np.abs(draws[n].astype(np.float64)), axis=0)
    if np.isfinite(signal).all():
      d = decay if averaged else 0
      score, weight = d * score + (1 - d) * signal, d * weight + (1 - d)
    found = fp.get_importance(jax.tree.map(lambda x: x[n], states))  # noqa: B023
    chex.assert_trees_all_close(found, as_tree(score / weight), rtol=1e-5)
  assert (states.counted[-1], states.skipped[-1]) == (T - 1, 1)


def test_all_batches_count_alike_under_the_schedule_that_the_docstring_names():
  draws = draw(1)
  method = fp.Criterion(mean_absolute)
  tx = fp.fisher_prune(cost(), decay=lambda n: (n - 1) / n, method=method)
  state = jax.jit(lambda g: every_state(tx, g))(as_tree(draws, examples=True))
  mean = np.mean(np.abs(draws.astype(np.float64)), axis=(0, 1))
  chex.assert_trees_all_close(
    fp.get_importance(jax.tree.map(lambda x: x[-1], state)), as_tree(mean), rtol=1e-5
  )


def test_what_partial_has_bound_is_no_longer_a_parameter():
  seen = []

  def importance(masks, step):
    seen.append(step)
    return RANKING

  method = fp.Criterion(functools.partial(importance, step="bound"))
  assert method.uses == {"masks"}
  run(fp.fisher_prune(COST, method=method), 1)
  assert seen == ["bound"]


def test_it_gets_what_it_names_and_nothing_else():
  seen = []

  def importance(updates, params, masks, *, step, hint, axis_name="none", absent=3):
    seen.append(locals())
    return RANKING

  method = fp.Criterion(importance)
  assert method.uses == {"updates", "params", "masks", "step", "hint", "axis_name", "absent"}
  tx = fp.fisher_prune(COST, method=method, prune_every=1)
  state = tx.init(PARAMS)
  for _ in range(2):
    _, state = tx.update({"u": 1}, state, PARAMS, hint=7, other=8)
  assert [int(arguments["step"]) for arguments in seen] == [1, 2]
  second = seen[1]
  assert (second["updates"], second["hint"], second["absent"], second["axis_name"]) == (
    {"u": 1},
    7,
    3,
    "none",
  )
  assert second["params"] is PARAMS
  np.testing.assert_array_equal(second["masks"]["a"], [1, 0, 1])


def test_what_it_takes_may_be_missing_whatever_it_is():
  def importance(mask_grads=None, example_weights=None):
    assert mask_grads is None
    assert example_weights is None
    return RANKING

  tx = fp.fisher_prune(COST, method=fp.Criterion(importance))
  tx.update({}, tx.init(PARAMS), PARAMS)


def test_an_axis_that_it_needs_is_an_option():
  tx = fp.fisher_prune(COST, method=fp.Criterion(lambda axis_name: RANKING))
  with pytest.raises(
    ValueError, match=r"needs axis_name, got None. Pass it: fp.fisher_prune\(..., axis_name"
  ):
    tx.update({}, tx.init(PARAMS), PARAMS)


def test_weights_decide_where_a_criterion_looks_at_them_alone():
  """The norm of the weights behind each feature, without any gradient."""
  params = {"w": jnp.array([[3.0, 0.5, 2.0], [0.0, 0.5, 1.0]]), "v": jnp.full((2, 4, 2), 9.0)}
  norms = fp.Criterion(
    lambda params: {"a": jnp.linalg.norm(params["w"], axis=0), "layers": params["v"][:, 0]},
    averaged=False,
  )
  tx = optax.chain(optax.sgd(0.1), fp.fisher_prune(COST, prune_every=1, method=norms))
  step = jax.jit(lambda state, params: tx.update(params, state, params)[1])
  state = step(tx.init(params), params)
  assert gone(state) == [("a", 1)]
  moved = {**params, "w": params["w"].at[:, 0].set(0.1)}
  assert gone(step(state, moved)) == [("a", 1), ("a", 0)]


def test_chance_decides_differently_at_every_step():
  def chance(step, masks):
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.tree.map(lambda m: jax.random.uniform(jax.random.fold_in(key, m.size), m.shape), masks)

  method = fp.Criterion(chance, averaged=False)
  state = run(fp.fisher_prune(COST, prune_every=1, method=method), 3)
  assert len(gone(state)) == 3
  importance = [run(fp.fisher_prune(COST, method=method), n).scores["a"] for n in (1, 2, 2)]
  assert not np.array_equal(importance[0], importance[1])
  np.testing.assert_array_equal(importance[1], importance[2])


def pruned_by(importance=lambda: RANKING, **fields):
  tx = optax.chain(
    optax.sgd(0.1), fp.fisher_prune(COST, method=fp.Criterion(importance, name="mine", **fields))
  )
  return lambda **extra: tx.update(PARAMS, tx.init(PARAMS), **extra)


REFUSED = {
  "parameters that are missing": (
    lambda: pruned_by(lambda params: RANKING)(),
    ValueError,
    ("The criterion 'mine' needs params, got params=None", "tx.update(grads, state, params)", "drops extra"),
  ),
  "a keyword that is missing": (
    lambda: pruned_by(lambda hint: RANKING)(other=1),
    ValueError,
    ("The criterion 'mine' needs hint, got hint=None", "tx.update(..., hint=...)", "optax.lookahead"),
  ),
  "gradients that are missing": (
    lambda: pruned_by(lambda mask_grads: RANKING)(),
    ValueError,
    ("got mask_grads=None", "fp.value_and_mask_grads"),
  ),
  "gradients that do not fit": (
    lambda: pruned_by(lambda mask_grads: RANKING)(mask_grads=MASKS),
    ValueError,
    ("mask_grads for a mask of shape (3,) must have shape ('B', 3)", "got (3,)"),
  ),
  "weights that are negative": (
    lambda: pruned_by(lambda example_weights=None: RANKING)(example_weights=jnp.array([-1.0])),
    ValueError,
    ("example_weights must be finite and at least 0", "got -1.0"),
  ),
  "importance of another tree": (
    lambda: pruned_by(lambda: {"a": RANKING["a"]})(),
    ValueError,
    ("The importance of the criterion 'mine' must have the structure of the masks", "got nothing at layers"),
  ),
  "importance of another shape": (
    lambda: pruned_by(lambda: {**RANKING, "layers": np.ones((2, 3))})(),
    ValueError,
    ("importance of the criterion 'mine' must have the shape (2, 2) of the mask at layers", "got (2, 3)"),
  ),
  "a rank of another shape": (
    lambda: pruned_by(rank=lambda scores: {**scores, "a": jnp.ones(2)})(),
    ValueError,
    ("rank of the criterion 'mine' must have the shape (3,) of the mask at a", "got (2,)"),
  ),
  "a rank that is no function": (
    lambda: fp.Criterion(lambda: RANKING, rank=RANKING),
    TypeError,
    ("rank of a Criterion must be a", "got dict"),
  ),
  "no function": (
    lambda: fp.Criterion(RANKING),
    TypeError,
    ("importance of a Criterion must be a", "got dict"),
  ),
  "parameters without names": (
    lambda: fp.Criterion(lambda *arguments: RANKING),
    TypeError,
    ("importance of a Criterion must name its parameters", "def importance(mask_grads, masks)"),
  ),
  "keywords without names": (
    lambda: fp.Criterion(lambda: RANKING, rank=lambda scores, **others: scores),
    TypeError,
    ("rank of a Criterion must name its parameters",),
  ),
  "a rank that needs what is missing": (
    lambda: pruned_by(rank=lambda scores, hint: scores)(),
    ValueError,
    ("The criterion 'mine' needs hint, got hint=None",),
  ),
  "the class itself": (
    lambda: fp.fisher_prune(COST, method=fp.Criterion),
    ValueError,
    (
      "method must be one of ('fisher', 'taylor', 'magnitude', 'fisher_magnitude', 'random'), or an fp.Criterion",
      "got <class",
    ),
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named_with_its_value(name):
  act, kind, parts = REFUSED[name]
  with pytest.raises(kind, match=".*".join(map(re.escape, parts))):
    act()


def test_the_options_of_the_table_are_those_of_the_signature():
  """Names, order, defaults and types."""
  signature = inspect.signature(fp.fisher_prune).parameters
  table = inspect.signature(Options).parameters
  assert [(p.name, p.default) for p in signature.values()] == [(p.name, p.default) for p in table.values()]
  types = get_type_hints(fp.fisher_prune)
  del types["return"]
  assert types == get_type_hints(Options)
  arguments = inspect.getdoc(fp.fisher_prune).split("Args:")[1].split("Returns:")[0]
  assert re.findall(r"^  (\w+): ", arguments, re.MULTILINE) == list(signature)


def test_what_is_no_number_is_static():
  numbers = {"decay", "target", "cost_weight"}
  for name, option in inspect.signature(fp.fisher_prune).parameters.items():
    assert is_static(name, 0.5) == (name not in numbers)
    assert is_static(name, option.default) == (name not in numbers - {"cost_weight"})
  assert not is_static("learning_rate", 0.5)
