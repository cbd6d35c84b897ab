"""Edges of training: losses without masks, bad batches, parts of the parameters, numbers as they are written."""

import itertools
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import fisherprune_jax as fp
from fisherprune_jax._training.floors import floors_of

KEYS = jax.random.split(jax.random.key(0), 8)
W = {"a": jax.random.normal(KEYS[0], (3, 4)), "b": jax.random.normal(KEYS[1], (4, 2))}
MASKS = {"m": jnp.ones(4), "n": jnp.ones(2)}
X = jax.random.normal(KEYS[2], (6, 3))


def net(v, x):
  return jnp.tanh(x @ v["params"]["a"]) * v["masks"]["m"] @ v["params"]["b"] * v["masks"]["n"]


def loss(params, masks, x):
  return jnp.mean(jnp.sum(net({"params": params, "masks": masks}, x) ** 2, -1))


COST = fp.cost_model(net, {"params": W, "masks": MASKS}, X)


def sizes(n):
  return fp.CostModel.from_functions({"m": jnp.ones(n)}, lambda m: jnp.sum(m["m"]), lambda m: m)


# Losses that ignore masks.


@jax.custom_vjp
def with_own_rule(h, mask):
  return h * mask


with_own_rule.defvjp(lambda h, mask: (h * mask, (h, mask)), lambda saved, g: (g * saved[1], g * saved[0]))


def scanned(used):
  def apply(w, masks, x):
    def layer(h, own):
      return jnp.tanh(h @ own[0]) * (own[1] if used else 1.0), None

    stack = jnp.stack([W["a"] @ jnp.eye(4, 3)] * 2)
    return (jax.lax.scan(layer, x, (w * stack, masks["m"]))[0] * masks["n"]).mean()

  return apply


def row(h, mask):
  return h * mask


TAKES = {
  "product": row,
  "fp.apply_mask": fp.apply_mask,
  "jit": jax.jit(row),
  "remat": jax.checkpoint(row),
  "custom_vjp": with_own_rule,
  "vmap": jax.vmap(row),
  "cond": lambda h, mask: jax.lax.cond(h.sum() > 0, row, lambda h, mask: h, h, mask),
  "stopped in part": lambda h, mask: h * mask + h * jax.lax.stop_gradient(mask),
}
IGNORES = {
  "nothing": lambda h, mask: h,
  "jit": jax.jit(lambda h, mask: h),
  "remat": jax.checkpoint(lambda h, mask: h),
  "vmap": jax.vmap(lambda h, mask: h),
  "cond": lambda h, mask: jax.lax.cond(h.sum() > 0, lambda h, mask: h, lambda h, mask: -h, h, mask),
  "stopped": lambda h, mask: h * jax.lax.stop_gradient(mask),
  "rounded": lambda h, mask: h * jnp.round(mask),
}


def loss_by(take):
  return lambda w, masks, x: jnp.mean(take(x * w, masks["m"]) * masks["n"])


PAIR = {"m": jnp.ones(3), "n": jnp.ones(3)}


@pytest.mark.parametrize("jitted", [False, True])
def test_a_loss_that_takes_its_masks_is_no_matter(jitted):
  """Warnings are errors here."""
  for take in TAKES.values():
    step = fp.value_and_mask_grads(loss_by(take))
    (jax.jit(step) if jitted else step)(1.5, PAIR, X)
  step = fp.value_and_mask_grads(scanned(True))
  step(1.5, {"m": jnp.ones((2, 3)), "n": jnp.ones(3)}, X)


@pytest.mark.parametrize("way", IGNORES)
def test_masks_that_no_gradient_can_reach_are_named_once(way):
  step = fp.value_and_mask_grads(loss_by(IGNORES[way]))
  with pytest.warns(UserWarning, match=r"gradient cannot reach m. Features"):
    _, (_, grads) = step(1.5, PAIR, X)
  step(1.5, PAIR, X)  # a second warning would be an error
  jax.jit(step)(1.5, PAIR, X)
  np.testing.assert_array_equal(grads["m"], 0)
  assert (np.abs(grads["n"]) > 0).any()


def test_masks_of_a_loop_and_of_all_layers_are_named():
  stacked = {"m": jnp.ones((2, 3)), "n": jnp.ones(3)}
  with pytest.warns(UserWarning, match=r"cannot reach m. F"):
    fp.value_and_mask_grads(scanned(False))(1.5, stacked, X)
  with pytest.warns(UserWarning, match=r"cannot reach m, n. F"):
    fp.value_and_mask_grads(lambda w, masks, x: jnp.mean(w * x), has_aux=False)(1.5, PAIR, X)
  with pytest.warns(UserWarning, match=r"cannot reach m, n. F"):
    fp.value_and_mask_grads(lambda w, masks, x: (jnp.mean(x), masks), has_aux=True)(1.5, PAIR, X)
  with pytest.warns(UserWarning, match=r"cannot reach m. F"):
    fp.estimate_importance(loss_by(IGNORES["jit"]), 1.5, PAIR, [X, X])


def test_a_mask_of_a_module_that_is_not_called_is_named():
  class Net(nnx.Module):
    def __init__(self):
      self.used, self.unused = fp.nnx.Mask(3), fp.nnx.Mask(3)

    def __call__(self, x):
      return self.used(x)

  with pytest.warns(UserWarning, match=r"cannot reach unused. F"):
    fp.nnx.value_and_mask_grads(lambda model, x: jnp.mean(model(x)))(Net(), X)


def test_the_gradients_are_those_without_the_check():
  """One example at a time, by plain JAX."""
  _, (_, found) = jax.jit(fp.value_and_mask_grads(loss))(W, MASKS, X)
  for name, n in itertools.product(MASKS, range(len(X))):
    expected = jax.grad(loss, argnums=1)(W, MASKS, X[n : n + 1])[name]
    np.testing.assert_allclose(found[name][n], expected, rtol=1e-5)


# Batches and importance.


@pytest.mark.parametrize("method", ["fisher", "taylor", "fisher_magnitude"])
def test_bad_batches_are_left_out(method):
  given = {"method": method, "cost": COST}
  good = fp.estimate_importance(loss, W, MASKS, [X, X[:2]], **given)
  bad = [X[:0], X, X.at[0, 0].set(jnp.nan), X[:2], X.at[3].set(jnp.inf) * 0]
  message = "3 of 5 batches were skipped: the gradients of 2 are not finite and 1 are empty"
  with pytest.warns(UserWarning, match=message):
    found = fp.estimate_importance(loss, W, MASKS, bad, **given)
  jax.tree.map(np.testing.assert_array_equal, found, good)
  with pytest.raises(ValueError, match=r"batches must hold one with examples and finite gradients, got 2"):
    fp.estimate_importance(loss, W, MASKS, [X[:0], X * jnp.nan], **given)


def test_one_batch_is_no_list_of_batches():
  pair = lambda params, masks, batch: loss(params, masks, batch["x"])
  batch = {"x": X}
  for wrong, kind in (
    (batch, "dict"),
    (X, "float32"),
    (np.asarray(X), "float32"),
    ((X, X[:, 0]), "tuple"),
    (None, "None"),
  ):
    with pytest.raises(TypeError, match=f"batches must be a list .* got {kind}.*pass \\[batch\\]"):
      fp.estimate_importance(pair, W, MASKS, wrong)
  used_up = iter([batch])
  fp.estimate_importance(pair, W, MASKS, used_up)
  with pytest.raises(ValueError, match=r"at least one example, got 0. Iterators may be used up"):
    fp.estimate_importance(pair, W, MASKS, used_up)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_signals_that_are_not_finite_are_named(bad):
  importance = {"m": jnp.array([1.0, 2, bad, 4]), "n": jnp.ones(2)}
  with pytest.raises(ValueError, match=r"importance must be finite, got .* at feature 2 of the mask m"):
    fp.select_masks(COST, importance, 0.6 * COST.dense)
  with pytest.raises(
    ValueError, match=r"method='magnitude' must be finite, got .* at feature 0 of the mask m"
  ):
    fp.estimate_importance(None, {**W, "a": W["a"] * bad}, MASKS, (), method="magnitude", cost=COST)


@pytest.mark.parametrize("target", [None, 0.0, -1.0, "half"])
def test_masks_are_selected_for_a_target_or_for_widths(target):
  importance = {"m": jnp.array([3.0, 1, 4, 2]), "n": jnp.array([2.0, 1])}
  with pytest.raises(ValueError, match=r"target must be a positive number, got .*pass widths"):
    fp.select_masks(COST, importance, target)


# Numbers.


FRACTIONS = {
  "as written": [(f, n) for n in (10, 50, 100, 300) for f in (0.07, 0.14, 0.1, 0.29, 0.57, 0.999)],
  "float32": [(np.float32(f), n) for n in (10, 100, 300) for f in (0.1, 0.07, 0.7)],
  "float16": [(np.float16(f), n) for n in (10, 100) for f in (0.1, 0.07, 0.7)],
  "jnp": [(kind(f), n) for n in (10, 100) for f in (0.1, 0.7) for kind in (jnp.float32, jnp.bfloat16)],
}


@pytest.mark.parametrize("kind", FRACTIONS)
def test_fractions_count_as_they_are_written(kind):
  for fraction, n in FRACTIONS[kind]:
    expected = math.ceil(Decimal(f"{float(fraction):.3g}") * n)
    given = (fraction, {"m": fraction}) if kind == "jnp" else (fraction, {"m": fraction}, {"*": fraction})
    for floor in given:
      assert floors_of({"m": np.ones(n)}, floor)["m"] == expected, (floor, n)


def test_quotients_count_as_whole_numbers():
  for n in range(2, 60):
    for k in range(1, n):
      for fraction in (k / n, np.float32(k) / np.float32(n)):
        assert floors_of({"m": np.ones(n)}, fraction)["m"].tolist() == [k]


def test_floors_of_other_shapes_are_named():
  stack = fp.CostModel.from_functions({"b": jnp.ones((2, 4))}, lambda m: jnp.sum(m["b"]), lambda m: m)
  for floors in (2, np.array([2, 2]), {"b": np.array([2, 3])}, {"b": jnp.int32(2)}):
    if not isinstance(floors, np.ndarray):
      fp.fisher_prune(stack, min_features=floors)
  for cost, floors in (
    (sizes(4), {"m": np.array([2])}),
    (stack, {"b": np.array([1, 2, 3])}),
    (sizes(4), np.array([2, 2])),
  ):
    with pytest.raises(ValueError, match=r"min_features .*got array"):
      fp.fisher_prune(cost, min_features=floors)
  for multiple in (np.nan, np.inf, np.array([2, 2])):
    with pytest.raises(ValueError, match=r"multiple_of must be a whole number"):
      fp.fisher_prune(sizes(4), multiple_of=multiple)
  with pytest.raises(TypeError, match=r"debias must be True or False"):
    fp.fisher_prune(sizes(4), debias=np.array([True, False]))
  with pytest.raises(ValueError, match=r"method must be one of"):
    fp.fisher_prune(sizes(4), method=np.array(["fisher"]))


def test_a_decay_that_is_one_in_float32_is_an_error():
  for decay in (1 - 1e-9, np.float64(1 - 1e-9), jnp.float32(1 - 1e-9), lambda n: np.float64(1 - 1e-9)):
    with pytest.raises(ValueError, match=r"decay .*must be in \[0, 1\).*got .*float32"):
      fp.fisher_prune(sizes(3), decay=decay)
  tx = fp.fisher_prune(sizes(3), decay=0.9999999)
  state = tx.init({})
  for _ in range(3):
    _, state = tx.update({}, state, mask_grads={"m": jnp.array([[1.0, 2, 3]])})
  np.testing.assert_allclose(fp.get_importance(state)["m"], [0.5, 2, 4.5], rtol=1e-5)
  assert int(state.skipped) == 0


def test_costs_are_summed():
  parts = [COST, 0.5 * COST, COST * np.float32(0.1)]
  assert sum(parts).dense == pytest.approx(1.6 * COST.dense, rel=1e-12)
  assert sum(parts, start=0.0).exact(MASKS) == (COST + 0.5 * COST + 0.1 * COST).exact(MASKS)
  assert sum([COST]) is COST
  for wrong in (1, -1.0, None):
    with pytest.raises(TypeError, match=r"unsupported operand"):
      wrong + COST
    with pytest.raises(TypeError, match=r"unsupported operand"):
      COST + wrong


def test_primitives_are_names_that_can_count():
  cost = lambda primitives, measure="flops": fp.cost_model(
    net, {"params": W, "masks": MASKS}, X, primitives=primitives, measure=measure
  )
  assert cost(["dot_general", "conv_general_dilated"]).dense == cost({"dot_general"}).dense > 0
  for wrong in ("dot_general", b"dot_general", (), [jax.lax.tanh_p], 3):
    with pytest.raises(TypeError, match=r"primitives must be a list of names"):
      cost(wrong)
  for measure in ("flops", "macs", "bytes", fp.Roofline(1e9, 1e9)):
    with pytest.raises(ValueError, match=r"got 'dot_generall'. The nearest are dot_general"):
      cost(("tanh", "dot_generall"), measure)
  with pytest.raises(ValueError, match=r"got 'scan', which runs a program.*this network has .*dot_general"):
    cost(("scan",))


# States without types, parts of the parameters, several networks.


def test_a_state_restored_without_its_types_is_told_so():
  tx = optax.chain(optax.adam(1e-3), fp.fisher_prune(sizes(4)))
  data = serialization.to_bytes(tx.init(W))
  raw = serialization.msgpack_restore(data)
  find = (fp.get_state, fp.get_masks, fp.get_importance, fp.summary, fp.history, fp.metrics)
  for state, act in itertools.product((raw, {"opt": [raw]}), find):
    with pytest.raises(ValueError, match=r"restored without them.*from_bytes.*StandardRestore"):
      act(state)
  with pytest.raises(ValueError, match=r"restored without them"):
    fp.set_masks(raw, {"m": jnp.ones(4)})
  with pytest.raises(ValueError, match=r"restored without them"):
    fp.fisher_prune(sizes(4)).update({}, raw["1"], mask_grads={"m": jnp.ones((2, 4))})
  jax.tree.map(np.testing.assert_array_equal, serialization.from_bytes(tx.init(W), data), tx.init(W))


def towers(v, x):
  p, m = v["params"], v["masks"]
  h = jnp.tanh(x @ p["enc"]["l"]["w"]) * m["e"]
  g = jnp.tanh(x @ p["dec"]["l"]["w"]) * m["d"]
  return h @ p["enc"]["l"]["o"] + g @ p["dec"]["l"]["o"] + h @ p["enc"]["z"]


def tower(seed):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in (("w", (3, 4)), ("o", (4, 2)))}


TOWERS = {"enc": {"l": tower(0), "z": tower(1)["o"]}, "dec": {"l": tower(2)}}
HALVES = {"e": jnp.ones(4), "d": jnp.ones(4)}


def norms(*leaves):
  """Of the features along the axis of four."""
  found = np.sqrt(
    sum(np.square(np.moveaxis(leaf, list(leaf.shape).index(4), 0)).reshape(4, -1).sum(1) for leaf in leaves)
  )
  return found / found.mean()


def test_a_part_of_the_parameters_is_exact_or_an_error():
  masks = {"e": jnp.ones(4), "d": jnp.ones(4)}
  cost = fp.cost_model(towers, {"params": TOWERS, "masks": masks}, X)
  one = lambda v, x: towers({**v, "masks": {**v["masks"], "d": jnp.ones(4)}}, x)
  own = fp.cost_model(one, {"params": TOWERS, "masks": {"e": masks["e"]}}, X)
  magnitude = lambda cost, params, masks: fp.estimate_importance(
    None, params, masks, (), method="magnitude", cost=cost
  )
  enc, dec = TOWERS["enc"], TOWERS["dec"]
  expected = norms(enc["l"]["w"], enc["l"]["o"], enc["z"])
  np.testing.assert_allclose(magnitude(cost, TOWERS, masks)["e"], expected, rtol=1e-5)
  for part in (enc, {"enc": enc}, TOWERS):
    np.testing.assert_allclose(magnitude(own, part, {"e": masks["e"]})["e"], expected, rtol=1e-5)
  partly = {"enc": {"l": {"w": enc["l"]["w"]}}, "dec": dec}
  found = magnitude(cost, partly, masks)
  np.testing.assert_allclose(found["e"], norms(enc["l"]["w"]), rtol=1e-5)
  np.testing.assert_allclose(found["d"], norms(dec["l"]["w"], dec["l"]["o"]), rtol=1e-5)
  with pytest.raises(ValueError, match=r"got none for d. Pass all parameters"):
    magnitude(cost, enc, masks)
  for unclear in (dec, enc["l"]):
    with pytest.raises(
      ValueError, match=r"got .*, which may be params/.*/l/o or params/.*/l/o. Pass the parameters of the"
    ):
      magnitude(cost, unclear, masks)
  hidden = {"enc": enc, "dec": {"l": optax.MaskedNode()}}
  np.testing.assert_allclose(magnitude(own, hidden, {"e": masks["e"]})["e"], expected, rtol=1e-5)


def test_a_part_is_not_taken_for_what_has_its_name_elsewhere():
  """``w`` of the part is not ``w`` of the whole network."""
  apply = lambda v, x: (
    (jnp.tanh(x @ v["params"]["w"]) @ jnp.ones((4, 3)) @ v["params"]["in"]["w"])
    * v["masks"]["m"]
    @ v["params"]["in"]["o"]
  )
  params = {"w": tower(0)["w"], "in": tower(1)}
  cost = fp.cost_model(apply, {"params": params, "masks": {"m": jnp.ones(4)}}, X)
  for part in (params, params["in"]):
    found = fp.estimate_importance(None, part, {"m": jnp.ones(4)}, (), method="magnitude", cost=cost)["m"]
    np.testing.assert_allclose(found, norms(params["in"]["w"], params["in"]["o"]), rtol=1e-5)


def small(v, x):
  return jnp.tanh(x @ v["params"]["w"]) * v["masks"]["m"] @ v["params"]["o"]


NETS = {"generator": tower(3), "discriminator": tower(4)}
ONE = {"m": jnp.ones(4)}


def pruned(how, method):
  cost = fp.cost_model(small, {"params": NETS["generator"], "masks": ONE}, X)
  each = {name: fp.fisher_prune(cost, name=name, method=method, prune_every=2) for name in NETS}
  if how == "chain":
    return optax.chain(*each.values(), optax.sgd(0.0))
  return optax.partition({n: optax.chain(optax.sgd(0.0), tx) for n, tx in each.items()}, {n: n for n in NETS})


@pytest.mark.parametrize(("how", "method"), [("chain", "magnitude"), ("partition", "fisher_magnitude")])
def test_several_networks_have_magnitudes_of_their_own(how, method):
  tx = pruned(how, method)
  state, alone = tx.init(NETS), {}
  grads = {name: {"m": jax.random.normal(key, (5, 4))} for name, key in zip(NETS, KEYS, strict=False)}
  for name, params in NETS.items():
    cost = fp.cost_model(small, {"params": params, "masks": ONE}, X)
    single = fp.fisher_prune(cost, method=method, prune_every=2)
    _, alone[name] = jax.jit(single.update)({}, single.init({}), params, mask_grads=grads[name])
  _, state = jax.jit(tx.update)(NETS, state, NETS, mask_grads=grads)
  for name in NETS:
    np.testing.assert_allclose(
      fp.get_importance(state, name)["m"], fp.get_importance(alone[name])["m"], rtol=1e-6
    )


def test_networks_that_cannot_be_told_apart_are_named():
  cost = fp.cost_model(small, {"params": NETS["generator"], "masks": ONE}, X)
  for name in (None, "other"):
    tx = fp.fisher_prune(cost, name=name, method="magnitude")
    with pytest.raises(
      ValueError, match=r"several that it may be: discriminator, generator. Name the pruning"
    ):
      tx.update(NETS, tx.init(NETS), NETS)
  both = lambda v, x: [small({k: part[name] for k, part in v.items()}, x) for name in NETS]
  masks = dict.fromkeys(NETS, ONE)
  combined = fp.cost_model(both, {"params": NETS, "masks": masks}, X)
  tx = fp.fisher_prune(combined, method="magnitude")
  _, state = tx.update(NETS, tx.init(NETS), NETS)
  for name, params in NETS.items():
    np.testing.assert_allclose(
      fp.get_importance(state)[name]["m"], norms(params["w"], params["o"]), rtol=1e-5
    )


# Equal widths.


def separate(stacked=0):
  masks = {"a": jnp.ones(8), "b": jnp.ones(8), "other": jnp.ones(6)}
  if stacked:
    masks["c"] = jnp.ones((stacked, 8))
  price = {"a": 3.0, "b": 5.0, "other": 2.0, "c": 4.0}
  return fp.CostModel.from_functions(
    masks,
    lambda m: sum(price[name] * jnp.sum(leaf) for name, leaf in m.items()),
    lambda m: {name: price[name] * leaf for name, leaf in m.items()},
  )


def by_hand(cost, importance, target, tied):
  """One feature of every tied row, or one alone, by the score of their sums."""
  price = cost.per_feature(cost.masks)
  rows = {(n, r): np.asarray(x) for n, leaf in importance.items() for r, x in enumerate(np.atleast_2d(leaf))}
  left = {at: list(np.argsort(row, kind="stable")) for at, row in rows.items()}
  units = [[at for at in rows if at[0] in tied]] + [[at] for at in rows if at[0] not in tied]
  total = lambda: sum(len(kept) * float(np.ravel(price[at[0]])[0]) for at, kept in left.items())
  while total() > target:
    score = lambda unit: (
      sum(rows[at][left[at][0]] for at in unit) / sum(float(np.ravel(price[at[0]])[0]) for at in unit)
    )
    for at in min((u for u in units if all(len(left[at]) > 1 for at in u)), key=score):
      left[at].pop(0)
  return {at: sorted(kept) for at, kept in left.items()}


@pytest.mark.parametrize("stacked", [0, 2])
@pytest.mark.parametrize("recost_every", [None, 5])
def test_masks_of_one_pattern_keep_equal_widths(stacked, recost_every):
  cost, rng = separate(stacked), np.random.default_rng(stacked)
  importance = {
    name: jnp.asarray(rng.uniform(0.1, 1, m.shape), jnp.float32) for name, m in cost.masks.items()
  }
  for share in (0.8, 0.5, 0.3):
    found = fp.select_masks(cost, importance, share * cost.dense, tie=["[abc]"], recost_every=recost_every)
    kept = {
      (n, r): np.flatnonzero(x).tolist()
      for n, leaf in found.items()
      for r, x in enumerate(np.atleast_2d(leaf))
    }
    if recost_every is None:
      assert kept == by_hand(cost, importance, share * cost.dense, {"a", "b", "c"})
    assert len({len(k) for (name, _), k in kept.items() if name != "other"}) == 1
    assert float(cost(found)) <= share * cost.dense


def widths(found):
  return {name: int(m.sum()) for name, m in found.items()}


def test_equal_widths_with_other_options():
  cost = separate()
  importance = jax.tree.map(lambda m: jnp.arange(1.0, 1 + m.size), cost.masks)
  prune = lambda share, **options: widths(
    fp.select_masks(cost, importance, share * cost.dense, tie=["[ab]"], **options)
  )
  assert (
    prune(0.7, multiple_of={"a": 4, "b": 2})["a"] == prune(0.7, multiple_of={"a": 4, "b": 2})["b"] in (4, 8)
  )
  with pytest.warns(UserWarning, match="no feature is left that may be masked"):
    down = prune(0.05, min_features={"a": 3, "b": 5, "*": 1})
  assert (down["a"], down["b"]) == (5, 5)  # the larger floor
  start = {**cost.masks, "a": cost.masks["a"].at[:3].set(0)}
  for share in (0.7, 0.5, 0.4):
    found = prune(share, masks=start)
    assert found["a"] == found["b"] <= 5
  gone = {**cost.masks, "a": cost.masks["a"] * 0}
  found = prune(0.5, masks=gone)
  assert found["a"] == 0
  assert 1 <= found["b"] < 8


def test_patterns_that_share_a_mask_tie_all_of_them():
  cost = separate(2)
  importance = jax.tree.map(lambda m: jnp.arange(1.0, 1 + m.size).reshape(m.shape), cost.masks)
  found = fp.select_masks(cost, importance, 0.5 * cost.dense, tie=["[ab]", "[bc]"])
  assert {int(row.sum()) for name in "abc" for row in np.atleast_2d(found[name])} == {int(found["a"].sum())}
  with pytest.raises(ValueError, match=r"tie must name masks of one size.*'\*', got .*'other': 6"):
    fp.fisher_prune(cost, tie=["*"])
