"""What goes together, what is left alone, at once or step by step: against a loop that says it slowly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp

SIZES = {"a": (20,), "b": (16,), "rows": (3, 8), "x.block": (1,)}


def masks_of(sizes=SIZES):
  return {name: jnp.ones(shape) for name, shape in sizes.items()}


PRICES = {"a": 3.0, "b": 1.0, "rows": 2.0, "x.block": 9.0}


def linear():
  """Every feature of a mask costs the same, whatever else is there."""
  total = lambda m: sum((PRICES[name] * leaf.sum() for name, leaf in m.items()), jnp.float32(0))
  return fp.CostModel.from_functions(
    masks_of(), total, lambda m: {name: PRICES[name] * jnp.ones_like(leaf) for name, leaf in m.items()}
  )


def network():
  """Widths that multiply each other, and a stack."""
  rng = np.random.default_rng(0)
  sizes = {"a": (5, 20), "b": (20, 16), "c": (16, 2)}
  variables = {"params": {name: rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}}

  def apply(v, x):
    p, m = v["params"], v["masks"]
    x = jnp.tanh(x @ p["a"]) * m["a"]
    x = jnp.tanh(x @ p["b"]) * m["b"]
    return x @ p["c"]

  variables["masks"] = {"a": jnp.ones(20), "b": jnp.ones(16)}
  return fp.cost_model(apply, variables, jnp.ones((2, 5)))


def importance_like(masks, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda m: jnp.asarray(rng.uniform(0.1, 1, m.shape), jnp.float32), masks)


def slowly(cost, importance, target, floors, multiples, together=()):
  """Bundle by bundle; the cost is taken anew after each."""
  masks = jax.tree.map(np.array, cost.masks)
  while float(cost(masks)) > target:
    drops = jax.tree.map(np.asarray, cost.per_feature(masks))
    best = None
    for unit in units_of(masks, together):
      bundle = []
      for name, row in unit:
        alive = np.flatnonzero(masks[name][row])
        q, floor = multiples.get(name, 1), floors.get(name, 1)
        width = max((len(alive) - 1) // q * q, floor)
        score = np.asarray(importance[name])[row] / (drops[name][row] + 1e-6)
        first = sorted(alive, key=lambda k: (score[k], k))[: max(len(alive) - width, 0)]
        bundle.append([(name, (*row, k)) for k in first])
      if not all(bundle):
        continue
      members = [member for part in bundle for member in part]
      signal, price = (sum(float(t[name][at]) for name, at in members) for t in (importance, drops))
      if best is None or signal / (price + 1e-6) < best[0]:
        best = (signal / (price + 1e-6), members)
    if best is None:
      break
    for name, at in best[1]:
      masks[name][at] = 0
  return masks


def units_of(masks, together):
  for name, leaf in masks.items():
    rows = [(name, row) for row in np.ndindex(leaf.shape[:-1])]
    yield from [rows] if name in together else [[row] for row in rows]


def same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("make", [linear, network])
def test_multiples_go_as_a_loop_says(make, share):
  cost = make()
  importance = importance_like(cost.masks)
  multiples = {"a": 8, "b": 4}
  target = share * cost.dense
  found = fp.select_masks(cost, importance, target, multiple_of=multiples)
  same(found, slowly(cost, importance, target, {"x.block": 0}, multiples))
  assert float(cost(found)) <= target
  for name, multiple in multiples.items():
    width = int(found[name].sum())
    assert width % multiple == 0 or width in (1, cost.masks[name].size)


def test_widths_are_multiples_at_any_time():
  cost = network()
  tx = fp.fisher_prune(
    cost, prune_every=1, multiple_of=4, min_features={"a": 6, "b": 1}, target=0.05 * cost.dense
  )
  state, seen = tx.init({}), []
  grads = jax.tree.map(lambda s: jnp.sqrt(s)[None], importance_like(cost.masks))
  update = jax.jit(lambda state: tx.update({}, state, mask_grads=grads)[1])
  for _ in range(12):
    state = update(state)
    seen.append(tuple(int(m.sum()) for m in fp.get_masks(state).values()))
  assert {a for a, _ in seen} <= {20, 16, 12, 8, 6}
  assert {b for _, b in seen} <= {16, 12, 8, 4, 1}
  assert seen[-1] == (6, 1)
  assert all(sum(before) > sum(after) for before, after in itertools.pairwise(seen[:6]))
  assert "6/20" in fp.summary(state)


def test_in_double_precision_the_choices_are_the_same():
  cost = network()
  importance = importance_like(cost.masks)
  for options in ({"multiple_of": 4}, {"recost_every": 5}, {"tie": ["a"], "recost_every": 3}):
    expected = fp.select_masks(cost, importance, 0.5 * cost.dense, **options)
    with jax.enable_x64(True):
      same(fp.select_masks(network(), importance, 0.5 * cost.dense, **options), expected)


@pytest.mark.parametrize("recost_every", [2, 7, 1000])
def test_a_cost_that_is_taken_anew_less_often_meets_the_target_as_exactly(recost_every):
  cost = linear()  # here every choice is the same, since nothing changes what others cost
  importance = importance_like(cost.masks)
  for share in (0.9, 0.55, 0.31):
    expected = fp.select_masks(cost, importance, share * cost.dense)
    same(fp.select_masks(cost, importance, share * cost.dense, recost_every=recost_every), expected)
  cost = network()
  target = 0.4 * cost.dense
  found = fp.select_masks(cost, importance_like(cost.masks), target, recost_every=recost_every)
  assert float(cost(found)) <= target
  # What went last went alone: with any one feature more that went, it would be above.
  dead = [(name, k) for name, m in found.items() for k in np.flatnonzero(np.asarray(m) == 0)]
  assert any(bool(cost.exceeds({**found, name: found[name].at[k].set(1)}, target)) for name, k in dead)


def test_masks_at_their_floors_are_in_nobodys_way():
  cost = linear()
  importance = {**importance_like(cost.masks), "a": jnp.full(20, 1e-3)}  # the smallest, of which none may go
  found = fp.select_masks(cost, importance, 0.7 * cost.dense, exclude=["a"], recost_every=4)
  same(found, fp.select_masks(cost, importance, 0.7 * cost.dense, exclude=["a"]))
  assert float(cost(found)) <= 0.7 * cost.dense


def test_floors_hold_where_many_go_at_once():
  cost = linear()
  found = fp.select_masks(
    cost, importance_like(cost.masks), 30.0, min_features={"a": 3, "rows": 0.25}, recost_every=100
  )
  assert int(found["a"].sum()) >= 3
  assert (found["rows"].sum(-1) >= 2).all()
  assert float(cost(found)) <= 30


def test_rows_of_a_stack_lose_features_together():
  cost = linear()
  importance = importance_like(cost.masks)
  target = 0.3 * cost.dense
  found = fp.select_masks(cost, importance, target, tie=["rows"])
  assert len({int(row.sum()) for row in found["rows"]}) == 1
  same(found, slowly(cost, importance, target, {"x.block": 0}, {}, together=("rows",)))
  even = fp.select_masks(cost, importance, target, tie=["rows"], multiple_of={"rows": 4}, recost_every=50)
  assert {int(row.sum()) for row in even["rows"]} <= {8, 4, 1}


def test_what_is_excluded_keeps_everything():
  cost = linear()
  found = fp.select_masks(cost, importance_like(cost.masks), 0.6 * cost.dense, exclude=["r*", "x.block"])
  assert int(found["rows"].sum()) == 24
  assert int(found["x.block"].sum()) == 1
  assert float(cost(found)) <= 0.6 * cost.dense
  # A multiple that would not fit such a mask is no matter, then.
  fp.fisher_prune(linear(), multiple_of={"x.block": 2, "*": 1}, exclude=["x.block"])


def test_at_once_is_what_the_transformation_chooses():
  cost = network()
  importance = importance_like(cost.masks)
  for options in ({}, {"cost_weight": 1e-3}, {"multiple_of": 4}, {"recost_every": 5}, {"min_features": 0.3}):
    target = 0.5 * cost.dense
    tx = fp.fisher_prune(cost, prune_every=1, target=target, features_per_prune=36, **options)
    grads = jax.tree.map(lambda s: jnp.sqrt(2 * s)[None], importance)
    _, state = tx.update({}, tx.init({}), mask_grads=grads)
    same(fp.select_masks(cost, fp.get_importance(state), target, **options), fp.get_masks(state))


def test_it_starts_from_masks():
  cost = linear()
  masks = {**masks_of(), "b": jnp.zeros(16).at[:5].set(1)}
  found = fp.select_masks(cost, importance_like(masks), 60.0, masks=masks)
  assert all((np.asarray(found[name]) <= np.asarray(masks[name])).all() for name in masks)
  with pytest.raises(ValueError, match="masks must keep min_features=6 of b, got 5"):
    fp.fisher_prune(cost, masks=masks, min_features={"b": 6})


def test_signals_are_those_of_single_examples():
  rng = np.random.default_rng(0)
  w = {"a": jnp.asarray(rng.normal(size=(3, 6))), "b": jnp.asarray(rng.normal(size=6))}
  batches = [(jnp.asarray(rng.normal(size=(n, 3))), jnp.asarray(rng.normal(size=n))) for n in (4, 4, 3)]

  def loss_fn(w, masks, batch):
    x, y = batch
    return (
      jnp.mean((jnp.tanh(x @ w["a"]) * masks["m"] @ w["b"] - y) ** 2)
      if masks["m"].ndim == 1
      else jnp.mean((jnp.sum(jnp.tanh(x @ w["a"]) * masks["m"] * w["b"], axis=1) - y) ** 2)
    )

  masks = {"m": jnp.ones(6)}
  found = fp.estimate_importance(loss_fn, w, masks, iter(batches))
  one = lambda masks, x, y: loss_fn(w, masks, (x[None], y[None]))
  rows = [jax.grad(one)(masks, x, y)["m"] for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
  np.testing.assert_allclose(found["m"], 0.5 * np.mean(np.square(rows), axis=0), rtol=1e-5)
  with pytest.raises(ValueError, match="at least one example"):
    fp.estimate_importance(loss_fn, w, masks, [])


def test_where_the_target_cannot_be_met_it_says_so():
  cost = linear()
  with pytest.warns(UserWarning, match=r"target of 5 .*not met.*Lower min_features"):
    found = fp.select_masks(cost, importance_like(cost.masks), 5.0, min_features=4)
  assert int(found["a"].sum()) == 4


def test_a_cost_far_below_one_weighs_as_much():
  """Seconds, say: what is added to prices against a division by zero must stay next to nothing of them."""
  flops = network()
  importance = importance_like(flops.masks)
  seconds = 1e-12 * flops
  own = fp.CostModel.from_functions(
    flops.masks, lambda m: 1e-12 * flops(m), lambda m: jax.tree.map(lambda d: 1e-12 * d, flops.per_feature(m))
  )
  for options in ({}, {"multiple_of": 4}, {"recost_every": 5}):
    expected = fp.select_masks(flops, importance, 0.5 * flops.dense, **options)
    for cost in (seconds, own):
      same(fp.select_masks(cost, importance, 0.5 * cost.dense, **options), expected)
  assert fp.summary(fp.fisher_prune(seconds).init({})).endswith(f"cost {seconds.dense:.3g}")


def test_bad_input_is_refused():
  cost = linear()
  importance = importance_like(cost.masks)
  for options, message in (
    ({"exclude": ["nothing*"]}, r"exclude must name masks \(a, b, rows\[0\].*nothing"),
    ({"tie": ["z"]}, "tie must name masks"),
    ({"multiple_of": {"z": 2}}, "multiple_of must name masks"),
    ({"multiple_of": 0}, "multiple_of must be a whole number, at least 1"),
    ({"multiple_of": 2.5}, "multiple_of must be a whole number"),
    ({"multiple_of": 32}, r"multiple_of must be at most 20, the size of the mask a.*Name the masks"),
    ({"recost_every": 0}, "recost_every must be at least 1"),
    ({"min_features": {"a": 21}}, "min_features must be at most 20"),
  ):
    with pytest.raises(ValueError, match=message):
      fp.fisher_prune(cost, **options)
  with pytest.raises(TypeError, match="exclude must be a list of glob patterns"):
    fp.fisher_prune(cost, exclude="a")
  with pytest.raises(TypeError, match=r"fp.select_masks takes the options .*, got burn_in"):
    fp.select_masks(cost, importance, 10.0, burn_in=3)
  for target in (0.0, -1.0):
    with pytest.raises(ValueError, match="target must be"):
      fp.select_masks(cost, importance, target)
  with pytest.raises(ValueError, match=r"importance must have the shape \(20,\)"):
    fp.select_masks(cost, {**importance, "a": jnp.ones(3)}, 10.0)
  rng = np.random.default_rng(0)
  large = fp.cost_model(
    lambda v, x: (x @ v["w"]) * v["masks"],
    {"w": rng.normal(size=(50, 40)), "masks": jnp.ones(40)},
    jnp.ones((2, 50)),
  )
  with pytest.warns(
    UserWarning, match=r"target of 0.5 FLOPs is far below the dense cost of .*pass target=0.5 \* cost.dense"
  ):
    fp.fisher_prune(large, target=0.5)


def test_the_target_is_a_hyperparameter_under_either_name():
  cost = linear()
  tx = fp.inject_hyperparams(fp.fisher_prune)(cost, target=40.0, multiple_of={"a": 4}, exclude=["b"])
  state = tx.init({})
  assert float(state.hyperparams["target"]) == 40.0
  tx = fp.fisher_prune(cost, target=lambda step: 100.0 / step, prune_every=1, features_per_prune=99)
  state = tx.init({})
  grads = jax.tree.map(lambda s: jnp.sqrt(s)[None], importance_like(cost.masks))
  grads["rows"] = jnp.moveaxis(grads["rows"], 0, 1)
  for step in (1, 2):
    _, state = tx.update({}, state, mask_grads=grads)
    assert float(fp.get_state(state).cost) <= 100.0 / step
