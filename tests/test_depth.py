"""A number of residual blocks to keep, alone and with widths, in one shot and while training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from fisherprune_jax._pruner import blocks

LAYERS = 6


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    h = nn.LayerNorm()(x)
    return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(h))), None


class Net(nn.Module):
  stacked: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="first")(x)
    if self.stacked:
      stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
      x, _ = stack(name="layers")(x, None)
    else:
      for at in range(LAYERS):
        x, _ = Block(name=f"layer{at}")(x, None)
    return nn.Dense(3, name="last")(x)


X = jax.random.normal(jax.random.key(0), (64, 5))


def network(stacked=False, **options):
  model = Net(stacked)
  variables = model.init(jax.random.key(1), X)
  return model, variables, fp.Pruner(model.apply, variables, X, **{"blocks": True, **options})


def live_blocks(masks):
  return sum(int(mask.sum()) for name, mask in masks.items() if name.endswith(".block"))


@pytest.mark.parametrize("stacked", [False, True])
def test_the_blocks_that_stay_are_those_of_the_highest_importance(stacked):
  _, _, pruner = network(stacked, keep=1.0)
  rng = np.random.default_rng(0)
  importance = jax.tree.map(lambda m: jnp.asarray(rng.uniform(1, 2, m.shape)), pruner.cost.masks)
  names = [name for name in importance if name.endswith(".block")]
  every = np.concatenate([np.ravel(importance[name]) for name in names])
  assert every.size == LAYERS
  for depth in range(LAYERS + 1):
    masks = fp.select_masks(pruner.cost, importance, depth=depth)
    kept = np.concatenate([np.ravel(masks[name]) for name in names])
    np.testing.assert_array_equal(kept, np.argsort(np.argsort(every)) >= LAYERS - depth)
    assert all(masks[name].all() for name in masks if name not in names)
    fast = fp.select_masks(pruner.cost, importance, depth=depth, recost_every=16)
    jax.tree.map(np.testing.assert_array_equal, masks, fast)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_number_of_blocks_is_exact_beside_a_target_and_widths(stacked):
  _, _, pruner = network(stacked, keep=0.5)
  rng = np.random.default_rng(1)
  importance = jax.tree.map(lambda m: jnp.asarray(rng.uniform(1, 2, m.shape)), pruner.cost.masks)
  width = next(name for name in importance if "up" in name)
  masks = fp.select_masks(pruner.cost, importance, 0.5 * pruner.cost.dense, {width: 7}, depth=5)
  assert live_blocks(masks) == 5
  assert np.all(np.sum(masks[width], -1) == 7)
  assert float(pruner.cost(masks)) <= 0.5 * pruner.cost.dense
  free = fp.select_masks(pruner.cost, importance, 0.5 * pruner.cost.dense)
  assert live_blocks(free) < 5  # without it, the budget takes blocks too


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_one_shot_leaves_out_blocks_one_after_the_other(stacked, labels):
  """Each time the one that harms the outputs (or the loss) least, by brute force."""
  _, variables, pruner = network(stacked, keep=1.0, depth=2)
  y = jnp.sin(X[:, :3])
  _, masks = pruner.one_shot(
    variables["params"],
    [(X, y)],
    loss_fn=(lambda p, batch: jnp.mean((Net(stacked).apply({"params": p}, batch[0]) - batch[1]) ** 2))
    if labels
    else None,
    reconstruct=False,
  )
  names = [name for name in masks if name.endswith(".block")]
  places = [(name, at) for name in names for at in np.ndindex(masks[name].shape)]

  def harm(gone):
    tried = {name: np.ones(mask.shape, np.float32) for name, mask in masks.items()}
    for name, at in gone:
      tried[name][at] = 0
    found = pruner.apply(variables["params"], tried, X)
    dense = pruner.apply(variables["params"], pruner.cost.masks, X)
    return float(jnp.mean((found - y) ** 2) if labels else jnp.mean(jnp.sum((found - dense) ** 2, -1)))

  gone = []
  while len(gone) < LAYERS - 2:
    gone.append(min((place for place in places if place not in gone), key=lambda place: harm([*gone, place])))
  assert {place for place in places if not masks[place[0]][place[1]]} == {*gone}


def test_tied_blocks_are_left_out_together_and_many_in_fewer_rounds(monkeypatch):
  calls = []

  def harm(masks):
    gone = [int(name[1:].split(".")[0]) for name, mask in masks.items() if not mask[0]]
    calls.append(gone)
    return float(sum(1 + at for at in gone))

  masks = {f"b{at}.block": jnp.ones(1) for at in range(6)} | {"width": jnp.ones(3)}
  ones = jax.tree.map(jnp.ones_like, masks)
  found = blocks.with_blocks(masks, ["b[01].block"], lambda: harm)(ones)
  assert float(found["b0.block"][0]) == float(found["b1.block"][0]) == pytest.approx(1.5)
  order = sorted((name for name in found if name != "width"), key=lambda name: float(found[name][0]))
  assert order[-1] == "b5.block"
  np.testing.assert_array_equal(found["width"], ones["width"])
  assert all((0 in gone) == (1 in gone) for gone in calls)
  count = len(calls)
  calls.clear()
  monkeypatch.setattr(blocks, "MOST_RUNS", 8)
  few = blocks.with_blocks(masks, ["b[01].block"], lambda: harm)(ones)
  assert len(calls) < count
  assert float(few["b5.block"][0]) == max(float(few[name][0]) for name in order)
  calls.clear()
  same = blocks.with_blocks({"width": jnp.ones(3)}, (), lambda: harm)({"width": ones["width"]})
  assert same["width"].tolist() == [1, 1, 1]
  assert not calls


def test_blocks_without_which_nothing_is_finite_stay():
  masks = {"a.block": jnp.ones(1), "b.block": jnp.ones(1)}
  found = blocks.with_blocks(masks, (), lambda: lambda m: float("nan") if not m["a.block"][0] else 1.0)(masks)
  assert float(found["b.block"][0]) == 1.0 < float(found["a.block"][0]) < float("inf")


def test_one_shot_keeps_the_blocks_and_widths_stay_at_keep_one():
  _, variables, pruner = network(keep=1.0, depth=4)
  # A block that does nothing goes first.
  variables["params"]["layer2"]["down"] = jax.tree.map(jnp.zeros_like, variables["params"]["layer2"]["down"])
  params, masks = pruner.one_shot(variables["params"], [X])
  assert live_blocks(masks) == 4
  assert not masks["layer2.block"].any()
  config = pruner.config(masks)
  assert all(config[f"layer{at}/up"] == 16 for at in range(LAYERS))
  small = pruner.compact(params, masks)
  masked = pruner.apply(params, masks, X)
  np.testing.assert_allclose(small(small.variables, X), masked, atol=1e-5)
  removed = [at for at in range(LAYERS) if not config[f"layer{at}.block"]]
  assert all(not x.size for at in removed for x in jax.tree.leaves(small.variables["params"][f"layer{at}"]))


def test_while_training_the_number_falls_like_the_budget_and_nothing_is_compiled_again():
  model, variables, pruner = network(keep=0.6, depth=3, start=2, stop=10)
  tx = pruner.wrap(optax.adam(1e-3))

  def loss_fn(params, batch):
    return jnp.mean(jnp.square(model.apply({"params": params}, batch)))

  @jax.jit
  def step(params, state):
    _, grads = pruner.value_and_grad(loss_fn)(params, state, X)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, state, depths = variables["params"], tx.init(variables["params"]), []
  for _ in range(14):
    params, state = step(params, state)
    depths.append(live_blocks(pruner.masks(state)))
  line = [LAYERS - 3 * np.clip((n - 2) / 8, 0, 1) for n in range(1, 15)]
  assert depths == [int(np.ceil(x - 1e-6)) for x in line]
  assert step._cache_size() == 1
  assert float(pruner.cost(pruner.masks(state))) <= pruner.target


def test_tied_blocks_go_together_and_never_below_the_depth():
  pairs = ["layer[01].block", "layer[23].block", "layer[45].block"]
  _, _, pruner = network(keep=1.0)
  importance = {
    name: jnp.full(mask.shape, 1.0 + number) for number, (name, mask) in enumerate(pruner.cost.masks.items())
  }
  for depth, left in ((4, 4), (3, 4), (2, 2), (0, 0)):
    masks = fp.select_masks(pruner.cost, importance, depth=depth, tie=pairs)
    assert live_blocks(masks) == left
    for a, b in ((0, 1), (2, 3), (4, 5)):
      assert masks[f"layer{a}.block"] == masks[f"layer{b}.block"]


def test_config_tells_widths_by_name():
  _, _, pruner = network(True, keep=1.0)
  masks = {name: mask.copy() for name, mask in pruner.cost.masks.items()}
  name = next(name for name in masks if "up" in name)
  assert pruner.config(masks)[name] == 16
  masks[name] = masks[name].at[:, :3].set(0)
  assert pruner.config(masks)[name] == 13
  masks[name] = masks[name].at[2, :5].set(0)
  assert pruner.config(masks)[name] == (13, 13, 11, 13, 13, 13)


@pytest.mark.parametrize(
  ("options", "kind", "message"),
  [
    ({"depth": LAYERS + 1}, ValueError, "depth must be at most 6, the number of residual blocks, got 7"),
    (
      {"widths": {"layer0/up": None}},
      ValueError,
      "widths must be whole numbers, for the pattern 'layer0/up', got None",
    ),
    ({"widths": {"layer0/up": float("nan")}}, ValueError, "widths must be whole numbers, for the pattern"),
    ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
    ({"depth": 1.5}, TypeError, "depth must be a Python int, got float"),
    ({"depth": True}, TypeError, "depth must be a Python int"),
    ({"depth": 2, "blocks": False}, ValueError, r"depth=2 needs masks of residual blocks.*blocks=True"),
    (
      {"depth": 2, "widths": {"layer[0-4].block": 0}},
      ValueError,
      "depth must be at most 1, the blocks that widths leaves, got 2",
    ),
    ({"depth": 2, "exclude": ["*.block"]}, ValueError, "depth must be at least 6, the blocks that"),
    ({"depth": 2, "min_features": {"layer[0-3].block": 1, "*": 1}}, ValueError, "depth must be at least"),
  ],
)
def test_bad_input_is_refused(options, kind, message):
  with pytest.raises(kind, match=message):
    network(keep=0.5, **options)
