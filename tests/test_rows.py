"""Rows of tables: masked rows read as zeros, are removed, and the index is renumbered."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fisherprune_jax as fp
from tests.counting import count

WORDS, USERS, BATCH = 20, 9, 6


class Ranking(nn.Module):
  @nn.compact
  def __call__(self, words, users):
    h = jnp.concatenate(
      [nn.Embed(WORDS, 6, name="words")(words).mean(1), nn.Embed(USERS, 4, name="users")(users)], -1
    )
    h = nn.relu(nn.Dense(8, name="hidden")(h))
    return nn.Dense(2, name="out")(h)


def data(seed=0, batch=BATCH):
  words, users = jax.random.split(jax.random.key(seed))
  return jax.random.randint(words, (batch, 7), 0, WORDS), jax.random.randint(users, (batch,), 0, USERS)


@pytest.fixture(scope="module")
def ranking():
  model = Ranking()
  variables = model.init(jax.random.key(1), *data())
  return model, variables, fp.auto_mask(model.apply, variables, *data(), rows=True)


def random_masks(auto, keep=0.5, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda m: jnp.asarray(rng.random(m.shape) < keep, jnp.float32), auto.masks)


def close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_tables_are_groups_of_their_own_kind(ranking):
  _, _, auto = ranking
  rows = {group.name: group for group in auto.groups if group.kind == "rows"}
  assert {name: (group.size, group.members) for name, group in rows.items()} == {
    "words.rows": (WORDS, (("params/words/embedding", 0),)),
    "users.rows": (USERS, (("params/users/embedding", 0),)),
  }
  model, variables, _ = ranking
  without = fp.auto_mask(model.apply, variables, *data())
  assert {group.name for group in without.groups} == {group.name for group in auto.groups} - rows.keys()
  reasons = {skip.path: skip.why for skip in without.skipped}
  assert "gather along the masked axis" in reasons["params/words/embedding"]


def test_masked_rows_read_as_zeros_and_are_removed(ranking):
  model, variables, auto = ranking
  masks = random_masks(auto)
  masked = {**auto.variables, "masks": masks}
  zeroed = jax.tree.map(jnp.array, variables)
  for name in ("words", "users"):
    zeroed["params"][name]["embedding"] *= masks[f"{name}.rows"][:, None]
  rest = fp.auto_mask(model.apply, variables, *data())
  expected = rest.apply({**zeroed, "masks": {name: masks[name] for name in rest.masks}}, *data())
  close(auto.apply(masked, *data()), expected)
  small = auto.compact(masked)
  for batch in (BATCH, 11):
    close(small(small.variables, *data(3, batch)), auto.apply(masked, *data(3, batch)))
  shape = small.variables["params"]["words"]["embedding"].shape
  assert shape == (int(masks["words.rows"].sum()), int(masks["words"].sum()))
  assert not small.blockers
  depends = [False] * len(jax.tree.leaves(small.variables)) + [True] * 2
  # Renumbering is looking up, which costs nothing.
  assert count(jax.make_jaxpr(small)(small.variables, *data()), depends) == small.cost * BATCH
  np.testing.assert_array_equal(
    small.kept["params"]["words"]["embedding"][0], np.flatnonzero(masks["words.rows"])
  )


def test_gradients_of_rows_for_each_example(ranking):
  _, variables, auto = ranking

  def loss(params, masks, batch):
    return jnp.mean(jnp.sum(auto.apply({"params": params, "masks": masks}, *batch) ** 2, -1))

  _, (_, grads) = fp.value_and_mask_grads(loss)(variables["params"], auto.masks, data())
  words, users = data()
  for at in range(BATCH):
    one = words[at : at + 1], users[at : at + 1]
    expected = jax.grad(lambda masks, one=one: loss(variables["params"], masks, one))(auto.masks)
    close(jax.tree.map(lambda g, at=at: g[at], grads), expected)


def test_gradients_and_optimizer_states_of_the_smaller_tables(ranking):
  _, _, auto = ranking
  masks = random_masks(auto)
  masked = {**auto.variables, "masks": masks}
  small = auto.compact(masked)

  def masked_loss(params):
    return jnp.sum(jnp.sin(auto.apply({"params": params, "masks": masks}, *data())))

  def small_loss(params):
    return jnp.sum(jnp.sin(small({"params": params}, *data())))

  tx = optax.adam(1e-2)
  params, state = masked["params"], tx.init(masked["params"])
  for _ in range(3):
    grads = jax.grad(masked_loss)(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  thin, thin_state = small.shrink(params), small.shrink_opt_state(tx, state)
  close(jax.grad(small_loss)(thin), small.shrink(jax.grad(masked_loss)(params)))
  assert thin_state[0].mu["words"]["embedding"].shape == thin["words"]["embedding"].shape


@pytest.mark.parametrize("measure", ["params", "memory"])
def test_the_cost_of_rows_is_exact(ranking, measure):
  _, _, auto = ranking
  cost = auto.cost(measure)
  masks = random_masks(auto, 0.8)
  drops = cost.per_feature(masks)
  for name, mask in masks.items():
    for feature in np.flatnonzero(mask):
      without = {**masks, name: mask.at[feature].set(0)}
      assert cost.exact(masks) - cost.exact(without) == drops[name][feature]
  size = sum(
    x.nbytes if measure == "memory" else x.size
    for x in jax.tree.leaves(auto.compact({**auto.variables, "masks": masks}).variables)
  )
  assert cost.exact(masks) == size


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap", "promise_in_bounds"])
def test_any_index_reads_what_it_read(mode):
  def apply(v, ids):
    rows = (
      jnp.take(v["table"], ids, axis=0, mode=mode)
      if mode != "promise_in_bounds"
      else v["table"].at[ids].get(mode=mode)
    )
    return jnp.tanh(rows) @ v["out"]

  variables = {"table": jax.random.normal(jax.random.key(0), (5, 3)), "out": jnp.ones((3, 2))}
  ids = jnp.array([0, 1, 2, 3, 4, *([] if mode == "promise_in_bounds" else [-1, -2, -7, 5, 9])])
  auto = fp.auto_mask(apply, variables, ids, rows=True)
  for masks in ([1, 0, 1, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 0], [1] * 5):
    masked = {**auto.variables, "masks": {**auto.masks, "table.rows": jnp.array(masks, jnp.float32)}}
    small = auto.compact(masked)
    assert small.variables["table"].shape[0] == sum(masks)
    close(small(small.variables, ids), auto.apply(masked, ids))


def test_a_table_without_rows_reads_as_zeros(ranking):
  _, _, auto = ranking
  masked = {**auto.variables, "masks": {**auto.masks, "users.rows": jnp.zeros(USERS)}}
  small = auto.compact(masked)
  assert small.variables["params"]["users"]["embedding"].size == 0
  close(small(small.variables, *data()), auto.apply(masked, *data()))


def test_pruner_prunes_tables_to_a_budget_in_bytes(ranking, tmp_path):
  model, variables, _ = ranking
  pruner = fp.Pruner(
    model.apply,
    variables,
    *data(),
    keep=0.5,
    measure="memory",
    rows=True,
    select=["words.rows", "users.rows"],
    stop=6,
  )
  tx = pruner.wrap(optax.adam(1e-2))

  def loss_fn(params, batch):
    return jnp.mean(jnp.sum(model.apply({"params": params}, *batch) ** 2, -1))

  @jax.jit
  def step(params, state, batch):
    _, grads = pruner.value_and_grad(loss_fn)(params, state, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, state = variables["params"], tx.init(variables["params"])
  for at in range(8):
    params, state = step(params, state, data(at))
  small = pruner.compact(params, state)
  size = sum(x.nbytes for x in jax.tree.leaves(small.variables))
  assert 0.4 * pruner.cost.dense < size <= 0.5 * pruner.cost.dense
  close(small(small.variables, *data(9)), pruner.apply(params, state, *data(9)))
  exported = small.export(*data())
  close(exported.call(*data(9, 13)), small(small.variables, *data(9, 13)))
  small.save(tmp_path / "small.safetensors")
  loaded = fp.load(tmp_path / "small.safetensors")
  close(loaded(loaded.variables, *data(9, 13)), small(small.variables, *data(9, 13)))


def test_rare_rows_go_first_in_one_shot(ranking):
  model, variables, _ = ranking
  words, users = data(0, 64)
  words = words % 10  # the others never come
  pruner = fp.Pruner(
    model.apply, variables, words, users, keep=0.6, measure="params", rows=True, select=["words.rows"]
  )
  params, masks = pruner.one_shot(variables["params"], [(words, users)])
  assert masks["words.rows"][:10].sum() == masks["words.rows"].sum()
  small = pruner.compact(params, masks)
  close(small(small.variables, words, users), pruner.apply(params, masks, words, users))


def test_rows_that_reach_an_output_are_refused():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
      embed = nn.Embed(WORDS, 6, name="words")
      return embed.attend(nn.Dense(6, name="dense")(embed(ids)))

  ids = data()[0]
  variables = Tied().init(jax.random.key(0), ids)
  auto = fp.auto_mask(Tied().apply, variables, ids, rows=True)
  assert all(group.kind == "features" for group in auto.groups)
  (why,) = [skip.why for skip in auto.skipped if (skip.path, skip.axis) == ("params/words/embedding", 0)]
  assert why == "it reaches an output"
  with pytest.raises(ValueError, match=r"select must hold names of groups .*words\.rows"):
    fp.auto_mask(Tied().apply, variables, ids, rows=True, select=["words.rows"])


def test_a_table_that_is_read_in_several_ways():
  """By number twice, as a whole by attention, and under vmap."""

  def one(v, ids):
    h = v["table"][ids] + v["table"][ids[::-1]]
    soft = jax.nn.softmax(h @ v["query"]) @ v["table"]
    return (jnp.tanh(h).mean(0) + soft.mean(0)) @ v["out"]

  apply = jax.vmap(one, in_axes=(None, 0))
  keys = jax.random.split(jax.random.key(0), 3)
  variables = {
    "table": jax.random.normal(keys[0], (8, 5)),
    "query": jax.random.normal(keys[1], (5, 8)),
    "out": jax.random.normal(keys[2], (5, 2)),
  }
  ids = jax.random.randint(jax.random.key(3), (4, 6), 0, 8)
  auto = fp.auto_mask(apply, variables, ids, rows=True)
  for seed in range(3):
    masked = {**auto.variables, "masks": random_masks(auto, 0.6, seed)}
    small = auto.compact(masked)
    close(small(small.variables, ids), auto.apply(masked, ids))
  grads = jax.jacobian(lambda masks: auto.apply({**variables, "masks": masks}, ids).sum(1))(auto.masks)
  each = jax.grad(lambda masks: auto.apply({**variables, "masks": masks}, ids).sum())(
    fp.per_example(auto.masks, 4)
  )
  close(each, grads)


def test_activations_picked_by_number_shrink_behind_masks():
  """A mask on an axis of activations from which an index of the data picks."""

  def apply(v, x):
    h = jnp.tanh(x @ v["w"]) * v["masks"]
    return h[:, jnp.argsort(x[0])[:3] % 6].sum(1)

  variables = {"w": jax.random.normal(jax.random.key(0), (3, 6)), "masks": jnp.array([1.0, 0, 1, 0, 0, 1])}
  x = jax.random.normal(jax.random.key(1), (4, 3))
  small = fp.compact(apply, variables, x)
  assert small.variables["w"].shape == (3, 3)
  close(small(small.variables, x), apply(variables, x))
  swapped = lax.rev(x, (0,))
  close(small(small.variables, swapped), apply(variables, swapped))


def test_tables_of_stacked_layers_have_rows_for_each_layer():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, ids):
      return jnp.tanh(nn.Dense(6)(x) + nn.Embed(10, 6, name="table")(ids).mean(1)), None

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x, ids):
      options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
      return nn.Dense(2)(nn.scan(Layer, length=3, **options)(name="layers")(x, ids)[0])

  x, ids = jax.random.normal(jax.random.key(0), (4, 6)), jax.random.randint(jax.random.key(1), (4, 5), 0, 10)
  variables = Network().init(jax.random.key(2), x, ids)
  auto = fp.auto_mask(Network().apply, variables, x, ids, rows=True)
  assert auto.masks["layers/table.rows"].shape == (3, 10)
  masked = {**auto.variables, "masks": random_masks(auto, 0.6)}
  small = auto.compact(masked)
  close(small(small.variables, x, ids), auto.apply(masked, x, ids))
  each = fp.per_example(masked["masks"], 4)
  grads = jax.grad(lambda m: jnp.sum(auto.apply({**variables, "masks": m}, x, ids) ** 2))(each)
  for at in range(4):
    one = x[at : at + 1], ids[at : at + 1]
    expected = jax.grad(lambda m, one=one: jnp.sum(auto.apply({**variables, "masks": m}, *one) ** 2))(
      masked["masks"]
    )
    close(jax.tree.map(lambda g, at=at: g[:, at], grads), expected)
