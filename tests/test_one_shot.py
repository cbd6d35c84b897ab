"""Pruning without training: what features cost once the rest is refitted, the choice among them, and the whole job."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisherprune_jax as fp
from fisherprune_jax._graph.variables import VariableTree
from fisherprune_jax._reconstruction.fitting import Fit
from fisherprune_jax._reconstruction.importance import projected_gradients, refitted_importance, stride
from fisherprune_jax._reconstruction.surgeon import Reader, descend, rising

KEY = jax.random.key(0)


class Net(nn.Module):
  """A residual network with batch norm, for images ``(B, 8, 8, 1)``."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(12, (3, 3))(x)
    for _ in range(2):
      h = nn.BatchNorm(use_running_average=True)(nn.Conv(16, (3, 3), use_bias=False)(nn.relu(x)))
      x = x + nn.Conv(12, (3, 3))(nn.relu(h))
    return nn.Dense(5)(nn.relu(x).mean((1, 2)))


def network(seed=0):
  x = jax.random.normal(KEY, (64, 8, 8, 1))
  return Net().apply, Net().init(jax.random.key(seed), x), x


def error(a, b):
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b - b.mean(0)))


# What features cost.


def reader(rng, groups=2, rows=40, terms=6, columns=3, taps=1):
  x = rng.normal(size=(groups, rows, terms * taps)) @ rng.normal(size=(terms * taps, terms * taps))
  w = rng.normal(size=(groups, terms * taps, columns))
  gram = x.swapaxes(1, 2) @ x
  return x, Reader(gram, gram, w, np.arange(terms), np.arange(terms * taps).reshape(terms, taps))


def refitted(x, w, left, ridge):
  """The least squared error of some columns towards the whole product, with the same ridge towards the parameters."""
  total = 0.0
  for x_g, w_g in zip(x, w, strict=True):
    level = ridge * np.mean(np.sum(x_g**2, 0))
    matrix = np.concatenate([x_g[:, left], np.sqrt(level) * np.eye(len(left))])
    wanted = np.concatenate([x_g @ w_g, np.sqrt(level) * w_g[left]])
    found = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    total += np.sum((matrix @ found - wanted) ** 2)
  return total


@pytest.mark.parametrize("taps", [1, 3])
def test_what_a_descent_costs_equals_least_squares(taps):
  x, one = reader(np.random.default_rng(0), taps=taps)
  costs = descend([one], len(one.features), ridge=0.01)
  order = np.argsort(costs.step)
  for count in range(1, len(order)):
    left = np.sort(one.columns[order[count:]].ravel())
    expected = refitted(x, one.parameters, left, 0.01)
    np.testing.assert_allclose(costs.removed[order[:count]].sum(), expected, rtol=1e-6)


def test_the_cheapest_feature_goes_first():
  x, one = reader(np.random.default_rng(1))
  costs = descend([one], len(one.features), ridge=0.01)
  every = range(len(one.columns))
  each = [refitted(x, one.parameters, [at for at in every if at != gone], 0.01) for gone in every]
  assert np.argmin(each) == np.argmin(costs.step)
  alone = [np.sum((x[:, :, [at]] @ one.parameters[:, [at]]) ** 2) for at in every]
  np.testing.assert_allclose(costs.alone, alone, rtol=1e-9)


def test_products_that_read_one_group_share_its_features():
  rng = np.random.default_rng(2)
  pairs = [reader(rng), reader(rng, columns=5)]
  costs = descend([one for _, one in pairs], 6, ridge=0.01)
  last = np.argsort(costs.step)[-2:]
  expected = sum(refitted(x, one.parameters, np.sort(last), 0.01) for x, one in pairs)
  np.testing.assert_allclose(np.sort(costs.removed)[:4].sum(), expected, rtol=1e-6)


def test_several_features_at_a_time_cost_what_they_cost_together():
  x, one = reader(np.random.default_rng(3), groups=1, rows=300, terms=150)
  costs = descend([one], len(one.features), ridge=0.01)
  assert np.bincount(costs.step).max() == 3
  gone = costs.step < 60
  expected = refitted(x, one.parameters, np.flatnonzero(~gone), 0.01)
  np.testing.assert_allclose(costs.removed[gone].sum(), expected, rtol=1e-6)


def test_dead_columns_cost_nothing():
  x, one = reader(np.random.default_rng(5), groups=1)
  dead = np.arange(0, x.shape[-1], 2)
  x[:, :, dead] = 0
  gram = x.swapaxes(1, 2) @ x
  costs = descend([one._replace(gram=gram, plain=gram, parameters=10 * one.parameters)], 6, ridge=0.01)
  assert set(np.argsort(costs.step)[: len(dead)]) == set(dead)
  np.testing.assert_allclose(costs.removed[dead], 0, atol=1e-9 * costs.removed.max())


def test_features_of_fewer_columns():
  x, one = reader(np.random.default_rng(4), terms=5)
  columns = np.array([[0, 1], [2, -1], [3, 4]])
  costs = descend([one._replace(features=np.arange(3), columns=columns)], 3, ridge=0.01)
  gone = columns[np.argmin(costs.step)]
  left = [at for at in range(5) if at not in gone]
  np.testing.assert_allclose(costs.removed.min(), refitted(x, one.parameters, left, 0.01), rtol=1e-6)


def test_what_rises():
  np.testing.assert_allclose(rising(np.array([1.0, 3.0, 2.0, 5.0, 0.0])), [1, 2.5, 2.5, 2.5, 2.5])
  assert (rising(np.arange(5.0)) == np.arange(5.0)).all()


# Importance without labels.


def test_importance_of_outputs_is_that_of_every_projection():
  apply_fn, variables, x = network()
  auto = fp.auto_mask(apply_fn, variables, x[:1])

  def outputs(params, masks, batch):
    return auto.apply({**params, "masks": masks}, batch)

  found = fp.estimate_importance(outputs, variables, auto.masks, [x[:8], x[8:12]], method="outputs", key=KEY)
  total = jax.tree.map(jnp.zeros_like, auto.masks)
  for number, batch in ((1, x[:8]), (2, x[8:12])):
    (k,) = jax.random.split(jax.random.fold_in(KEY, number), 1)
    signs = jax.random.rademacher(k, (len(batch), 5), jnp.float32)
    for row, sign in zip(batch, signs, strict=True):
      grads = jax.grad(lambda m, row=row, sign=sign: outputs(variables, m, row[None])[0] @ sign)(auto.masks)
      total = jax.tree.map(lambda t, g: t + 0.5 * g**2 / 12, total, grads)
  for name, expected in total.items():
    np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)


def test_importance_of_outputs_refuses_integers():
  with pytest.raises(ValueError, match="floating-point"):
    fp.estimate_importance(
      lambda p, m, b: (b * m["m"]).astype(int), {}, {"m": jnp.ones(2)}, [jnp.ones((3, 2))], method="outputs"
    )


def test_gradients_of_products_are_those_of_added_noise():
  apply_fn, variables, x = network()
  auto = fp.auto_mask(apply_fn, variables, x[:1])
  (traced,) = Fit(auto.apply, VariableTree(auto.variables, "masks"), [(x[:4],)]).traced
  env = traced.flat.env(auto.variables, (x[:4],))
  use = traced.consumers[-1].uses[0]
  assert traced.flat.nodes[use.at].name == "dot_general"
  (found,) = projected_gradients(traced.flat, [traced.flat.nodes[use.at].outs[0]], env, KEY)
  (k,) = jax.random.split(KEY, 1)
  np.testing.assert_array_equal(found, jax.random.rademacher(k, (4, 5), jnp.float32))


def test_readings_name_the_columns_of_each_feature():
  def two(params, x):
    h = jnp.concatenate([jnp.tanh(x @ params["a"]), jnp.tanh(x @ params["b"])], -1)
    return h @ params["c"]

  params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 4)), "c": jnp.ones((6, 2))}
  auto = fp.auto_mask(two, params, jnp.ones((1, 3)))
  found = first_readings(auto.apply, auto.variables, jnp.ones((2, 3)))
  assert {reading.mask: reading.columns.ravel().tolist() for reading in found} == {0: [0, 1], 1: [2, 3, 4, 5]}


def first_readings(apply_fn, variables, x):
  """What the first product behind a mask reads."""
  (traced,) = Fit(apply_fn, VariableTree(variables, "masks"), [(x,)]).traced
  return traced.readings[0][0]


def grouped(groups):
  """A convolution in groups behind a mask of 12 features."""

  def apply(variables, x):
    (mask,) = variables["masks"].values()
    h = fp.apply_mask(jnp.tanh(x @ variables["params"]["w"]), mask)
    layout = ("NWC", "WIO", "NWC")
    h = jax.lax.conv_general_dilated(
      h, variables["params"]["k"], (1,), "VALID", dimension_numbers=layout, feature_group_count=groups
    )
    return h.sum(1) @ variables["params"]["v"]

  shapes = {"w": (5, 12), "k": (3, 12 // groups, 12), "v": (12, 40)}
  return apply, shapes, {"m": jnp.ones(12)}


def experts():
  """Products of three experts behind masks of their own."""

  def apply(variables, x):
    (mask,) = variables["masks"].values()
    h = jnp.tanh(jnp.einsum("btd,edf->ebtf", x, variables["params"]["w"]))
    h = jax.vmap(fp.apply_mask)(h, mask)
    return jnp.einsum("ebtf,efo->ebto", h, variables["params"]["k"]).sum(0)

  return apply, {"w": (3, 5, 4), "k": (3, 4, 7)}, {"m": jnp.ones((3, 4))}


def halves():
  """A mask of whose features only one half is read by a product at once."""

  def apply(variables, x):
    (mask,) = variables["masks"].values()
    a, b = jnp.split(fp.apply_mask(jnp.tanh(x @ variables["params"]["w"]), mask), 2, -1)
    return a @ variables["params"]["k"] + jnp.square(b) @ variables["params"]["v"]

  return apply, {"w": (5, 12), "k": (6, 7), "v": (6, 7)}, {"m": jnp.ones(12)}


GROUPED = {
  "depthwise": lambda: grouped(12),
  "grouped": lambda: grouped(3),
  "one group": lambda: grouped(1),
  "experts": experts,
  "halves": halves,
}


def made(kind):
  apply_fn, shapes, masks = GROUPED[kind]()
  keys = jax.random.split(KEY, len(shapes))
  params = {
    name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }
  return apply_fn, params, masks, jax.random.normal(jax.random.key(2), (96, 6, 5))


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("depthwise", [([at], [at], [[0, 1, 2]]) for at in range(12)]),
    ("one group", [(list(range(12)), [0], np.arange(36).reshape(12, 3).tolist())]),
    (
      "grouped",
      [(list(range(at, at + 4)), [at // 4], np.arange(12).reshape(4, 3).tolist()) for at in (0, 4, 8)],
    ),
    ("experts", [(list(range(4)), [at], [[0], [1], [2], [3]]) for at in range(3)]),
  ],
)
def test_readings_of_products_in_groups(kind, expected):
  apply_fn, params, masks, x = made(kind)
  found = first_readings(apply_fn, {"params": params, "masks": masks}, x)
  found = [(r.row, r.features.tolist(), r.groups.tolist(), r.columns.tolist()) for r in found]
  rows = range(3) if kind == "experts" else [0] * len(expected)
  assert sorted(found) == sorted((row, *each) for row, each in zip(rows, expected, strict=True))


def test_readings_of_a_mask_that_is_multiplied():
  def apply(variables, x):
    return x * (variables["masks"]["m"] * jnp.array([2.0, 3, 4])) @ variables["params"]["w"]

  variables = {"params": {"w": jnp.ones((3, 2))}, "masks": {"m": jnp.ones(3)}}
  (found,) = first_readings(apply, variables, jnp.ones((4, 3)))
  assert (found.row, found.features.tolist(), found.columns.tolist()) == (0, [0, 1, 2], [[0], [1], [2]])


@pytest.mark.parametrize("size", [200, 300])
def test_readings_of_masks_in_half_precision(size):
  def apply(variables, x):
    return x * variables["masks"]["m"].astype(jnp.bfloat16) @ variables["params"]["w"]

  variables = {"params": {"w": jnp.ones((size, 2), jnp.bfloat16)}, "masks": {"m": jnp.ones(size)}}
  found = first_readings(apply, variables, jnp.ones((4, size), jnp.bfloat16))
  (reading,) = found
  np.testing.assert_array_equal(reading.features, np.arange(size))
  np.testing.assert_array_equal(reading.columns[:, 0], np.arange(size))


@pytest.mark.parametrize("kind", GROUPED)
def test_features_that_nothing_depends_on_go_first(kind):
  """Half the features get parameters of zero behind them; at half the cost none of them is left, wherever they are."""
  apply_fn, params, masks, x = made(kind)
  ones = masks["m"]
  rng = np.random.default_rng(0)
  live = np.stack([rng.permutation(np.arange(row.size) % 2) for row in ones.reshape(-1, ones.shape[-1])])
  live = live.reshape(ones.shape).astype(bool)
  if kind == "experts":
    params["k"] = params["k"] * live[:, :, None]
  elif kind == "halves":
    params["k"], params["v"] = params["k"] * live[:6, None], params["v"] * live[6:, None]
  else:
    groups = {"depthwise": 12, "grouped": 3, "one group": 1}[kind]
    by_group = live.reshape(groups, -1).repeat(12 // groups, 0)
    params["k"] = params["k"] * by_group.T
  pruner = fp.Pruner(apply_fn, {"params": params, "masks": masks}, x, keep=0.5)
  _, found = pruner.one_shot(params, [x[:48], x[48:]])
  assert 0 < np.asarray(found["m"]).sum() <= live.sum()
  assert not np.asarray(found["m"])[~live].any()


def test_features_that_others_make_up_for_are_cheap():
  """Of three equal features two are free once the rest is refitted, and one of them is as dear as all."""

  def mlp(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]

  w = jax.random.normal(KEY, (4, 6))
  v = jnp.array([[2.0, 0, 0]] * 3 + [[0, 1.5, 0], [0, 0, 1.5], [0, 1.0, 1.0]])
  params = {"w": w.at[:, 1].set(w[:, 0]).at[:, 2].set(w[:, 0]), "v": v}
  x = jax.random.normal(jax.random.key(1), (128, 4))
  pruner = fp.Pruner(mlp, params, x, keep=4.2 / 6)
  _, plain = pruner.one_shot(params, [x], reconstruct=False)
  fitted, masks = pruner.one_shot(params, [x])
  assert plain["w"][:3].sum() == 3
  assert masks["w"][:3].sum() == 1
  assert error(pruner.apply(fitted, masks, x), mlp(params, x)) < 0.02


# The whole job.


@pytest.fixture(scope="module")
def job():
  apply_fn, variables, x = network()
  pruner = fp.Pruner(apply_fn, variables, x[:1], keep=[0.7, 0.4])
  batches = [x[at : at + 16] for at in range(0, 64, 16)]
  return pruner, variables, x, batches, pruner.one_shot(variables, batches)


def test_a_family_meets_its_targets_and_stays_close(job):
  pruner, variables, x, _, family = job
  unseen = jax.random.normal(jax.random.key(9), x.shape)
  dense = Net().apply(variables, unseen)
  for keep, most, (params, masks) in zip((0.7, 0.4), (0.35, 0.75), family, strict=True):
    small = pruner.compact(params, masks)
    assert small.cost <= keep * pruner.cost.dense
    masked = pruner.apply(params, masks, unseen)
    np.testing.assert_allclose(small(small.variables, unseen), masked, atol=1e-4)
    assert error(masked, dense) < most
    assert error(masked, dense) < 0.5 * error(pruner.apply(variables, masks, unseen), dense)
    assert jax.tree.structure(params) == jax.tree.structure(variables)


def test_one_target_gives_what_the_family_has(job):
  _, variables, x, batches, family = job
  pruner = fp.Pruner(Net().apply, variables, x[:1], keep=0.7)
  params, masks = pruner.one_shot(variables, iter(batches))
  for a, b in zip(jax.tree.leaves((params, masks)), jax.tree.leaves(family[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_candidates_keep_the_best(job):
  pruner, variables, x, batches, _ = job
  seen = []

  def score(params, masks):
    seen.append(masks)
    return -error(pruner.apply(params, masks, x), Net().apply(variables, x))

  found = pruner.one_shot(variables, batches, candidates=2, score_fn=score, reconstruct=False)
  assert len(seen) == 4
  for at, (_, masks) in enumerate(found):
    mine = seen[at::2]
    scores = [-error(pruner.apply(variables, m, x), Net().apply(variables, x)) for m in mine]
    best = mine[int(np.argmax(scores))]
    assert all(
      bool((a == b).all()) for a, b in zip(jax.tree.leaves(best), jax.tree.leaves(masks), strict=True)
    )
  assert pruner.one_shot(variables, batches, candidates=2, reconstruct=False)
  with pytest.raises(ValueError, match="candidates"):
    pruner.one_shot(variables, batches, candidates=7)


@pytest.mark.parametrize("options", [{}, {"cost_weight": 1e-7}], ids=["over costs", "less costs"])
def test_a_loss_replaces_the_outputs(options):
  apply_fn, variables, x = network()
  params = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
  pruner = fp.Pruner(apply_fn, variables, x[:1], keep=0.6, method="fisher", **options)
  labels = jnp.arange(64) % 5

  def loss_fn(variables, batch):
    logits = Net().apply(variables, batch[0])
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch[1]])

  _, masks = pruner.one_shot(params, [(x, labels)], loss_fn=loss_fn, reconstruct=False)
  importance = fp.estimate_importance(
    lambda p, m, b: loss_fn_masked(pruner, p, m, b), params, pruner.cost.masks, [(x, labels)], method="fisher"
  )
  expected = fp.select_masks(pruner.cost, importance, 0.6 * pruner.cost.dense, **options)
  assert all(
    bool((a == b).all()) for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(expected), strict=True)
  )
  _, without = pruner.one_shot(params, [(x, labels)], reconstruct=False)
  assert sum(map(jnp.sum, jax.tree.leaves(without))) > 0


def loss_fn_masked(pruner, params, masks, batch):
  logits = pruner.auto.apply({**params, "masks": masks}, batch[0])
  return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch[1]])


def test_masks_of_the_model_itself():
  class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = fp.Mask()(nn.relu(nn.Dense(24)(x)))
      return nn.Dense(3)(x)

  x = jax.random.normal(KEY, (64, 6))
  variables = Masked().init(jax.random.key(1), x)
  pruner = fp.Pruner(Masked().apply, variables, x[:1], keep=0.5, min_features=8)
  params, masks = pruner.one_shot(variables["params"], [x])
  assert jax.tree.leaves(masks)[0].sum() <= 12
  dense = Masked().apply({"params": variables["params"]}, x)
  assert error(pruner.apply(params, masks, x), dense) < 0.5


def test_nnx():
  model = nnx.Sequential(nnx.Linear(6, 24, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(24, 3, rngs=nnx.Rngs(1)))
  x = jax.random.normal(KEY, (64, 6))
  dense = model(x)
  pruner = fp.nnx.Pruner(model, x[:1], keep=0.5)
  pruned, masks = pruner.one_shot(model, [x])
  np.testing.assert_array_equal(model(x), dense)
  assert isinstance(pruned, nnx.Sequential)
  small = pruner.compact(pruned, masks)
  assert small.cost <= 0.5 * pruner.cost.dense
  assert error(small(small.variables, x), dense) < 0.5


def test_wrap_takes_one_target():
  apply_fn, variables, x = network()
  pruner = fp.Pruner(apply_fn, variables, x[:1], keep=[0.7, 0.4], stop=5)
  with pytest.raises(ValueError, match="one keep"):
    pruner.wrap(None)
  for keep in ([], [0.5, 1.5]):
    with pytest.raises(ValueError, match="keep must"):
      fp.Pruner(apply_fn, variables, x[:1], keep=keep)


def test_batches_that_are_none():
  apply_fn, variables, x = network()
  pruner = fp.Pruner(apply_fn, variables, x[:1], keep=0.5)
  with pytest.raises(TypeError, match="batches must be a list"):
    pruner.one_shot(variables, x)
  with pytest.raises(ValueError, match="at least one batch"):
    pruner.one_shot(variables, [])
  with pytest.raises(ValueError, match="arguments of apply_fn"):
    pruner.one_shot(variables, [()])


def test_moments_in_parts_are_those_at_once(monkeypatch):
  apply_fn, variables, x = network()
  auto = fp.auto_mask(apply_fn, variables, x[:1])
  (traced,) = Fit(auto.apply, VariableTree(auto.variables, "masks"), [(x,)]).traced
  alone = jax.tree.map(jnp.ones_like, auto.masks)
  whole = refitted_importance(traced, auto.variables, alone, KEY)
  monkeypatch.setattr("fisherprune_jax._reconstruction.importance.MOST_BYTES", 1)
  parts = refitted_importance(traced, auto.variables, alone, KEY)
  for name in auto.masks:
    np.testing.assert_allclose(whole[name], parts[name], rtol=1e-3)


def test_importance_needs_no_more_than_some_of_many_batches(monkeypatch):
  apply_fn, variables, x = network()
  auto = fp.auto_mask(apply_fn, variables, x[:1])
  tree, alone = VariableTree(auto.variables, "masks"), jax.tree.map(jnp.ones_like, auto.masks)
  batches = [(x[at : at + 8],) for at in range(0, 64, 8)]
  every, some = (Fit(auto.apply, tree, given).traced[0] for given in (batches, batches[::3]))
  assert stride(every) == 1
  monkeypatch.setattr("fisherprune_jax._reconstruction.importance.ENOUGH_EXAMPLES", 20)
  monkeypatch.setattr("fisherprune_jax._reconstruction.importance.ENOUGH_ROWS", 1)
  assert (stride(every), stride(some)) == (3, 1)
  for name, found in refitted_importance(every, auto.variables, alone, KEY).items():
    np.testing.assert_array_equal(found, refitted_importance(some, auto.variables, alone, KEY)[name])
  monkeypatch.setattr("fisherprune_jax._reconstruction.importance.ENOUGH_ROWS", 1000)
  assert stride(every) == 1  # 64 rows of the last layer are few for its 12 columns
