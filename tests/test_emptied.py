"""Masks that were emptied: all that computed only for them goes, and nothing else does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fisherprune_jax as fp
from tests.counting import count
from tests.models import CASES, random_masks

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def emptied(masks, seed):
  """Random masks, of which each leaf in turn, a row of each stack, and some leaves at random are emptied."""
  drawn, rng = random_masks(masks, seed), np.random.default_rng(seed)
  leaves, tree = jax.tree.flatten(drawn)
  gone = [{at} for at in range(len(leaves))]
  if len(leaves) > 2:
    gone = [gone[at] for at in rng.permutation(len(leaves))[:2]]
    gone.append({at for at in range(len(leaves)) if rng.random() < 0.5})
  for chosen in gone:
    yield jax.tree.unflatten(tree, [0 * m if at in chosen else m for at, m in enumerate(leaves)])
  if any(m.ndim > 1 for m in leaves):
    yield jax.tree.unflatten(tree, [m.at[(0,) * (m.ndim - 1)].set(0) for m in leaves])


def loss_of(apply):
  def loss(rest, masks, x):
    y = apply({**rest, "masks": masks}, x)
    return jnp.sum(jnp.sin(y + 1.0)), y

  return loss


def close(expected, found):
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-10 * max(1.0, float(np.abs(a).max(initial=0))))


@ALL
def test_outputs_and_gradients_are_those_of_the_masked_network(case, x64):
  apply, variables, x = case.module().apply, case.variables(0, jnp.float64), case.inputs(0, jnp.float64)
  rest = {name: part for name, part in variables.items() if name != "masks"}
  loss = loss_of(apply)
  run = jax.jit(jax.grad(loss, (0, 2), has_aux=True) if case.differentiable else lambda *a: (0, loss(*a)[1]))
  for masks in emptied(variables["masks"], 1):
    small = fp.compact(apply, {**rest, "masks": masks}, x)
    grads, y = run(rest, masks, x)
    if not np.isfinite(np.asarray(y)).all():
      continue  # the masked network divides by the number of features
    thin = lambda rest, x: (lambda y: (jnp.sum(jnp.sin(y + 1.0)), y))(small(rest, x))  # noqa: B023
    if not case.differentiable:
      close(y, small(small.variables, x))
      continue
    found, z = jax.jit(jax.grad(thin, (0, 1), has_aux=True))(small.variables, x)
    close(y, z)
    close((small.shrink(grads[0]), grads[1]), found)
    # What went has no gradient: all that there is of it is in what was kept.
    for full, kept in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(found[0]), strict=True):
      np.testing.assert_allclose(np.square(full).sum(), np.square(kept).sum(), rtol=1e-8, atol=1e-12)


@ALL
def test_costs_are_those_of_brute_force_and_of_the_compact_program(case):
  apply, variables, x = case.module().apply, case.variables(), case.inputs()
  cost = fp.cost_model(apply, variables, x)
  rest = {name: part for name, part in variables.items() if name != "masks"}
  for masks in emptied(variables["masks"], 2):
    # The last feature of every mask that has any takes along what computes only for it.
    last = jax.tree.map(lambda m: m * (jnp.cumsum(m, -1) == 1), masks)
    before, drops = cost.exact(last), cost.per_feature(last)
    assert float(cost(last)) * x.shape[0] == pytest.approx(before, rel=1e-6)
    for leaf, (path, mask) in enumerate(jax.tree_util.tree_leaves_with_path(last)):
      for k in map(tuple, np.argwhere(mask)):
        fewer = jax.tree_util.tree_map_with_path(lambda p, m: m.at[k].set(0) if p == path else m, last)  # noqa: B023
        found = jax.tree.leaves(drops)[leaf][k] * x.shape[0]
        assert found == pytest.approx(before - cost.exact(fewer), rel=1e-6), (path, k)
    small = fp.compact(apply, {**rest, "masks": masks}, x)
    exact = cost.exact(masks)
    assert small.cost * x.shape[0] == pytest.approx(exact, rel=1e-6)
    assert not cost.exceeds(masks, exact / x.shape[0])
    assert not exact or cost.exceeds(masks, (exact - 1) / x.shape[0])
    # What comes behind an emptied mask may no longer depend on the arguments; it is run, and counts.
    of_arguments, all_of_it = flops(small, small.variables, x)
    assert of_arguments <= exact <= all_of_it
    assert exact == all_of_it or len(set(flops(apply, variables, x))) == 2


def flops(function, variables, x):
  """What a program counts that depends on the arguments, and in all."""
  jaxpr, leaves = jax.make_jaxpr(function)(variables, x), len(jax.tree.leaves(variables))
  return [count(jaxpr, [False] * leaves + [True], constants) for constants in (False, True)]


# Branches of a residual network, each under a mask of one entry, by all ways to lay it over an array.

SPREADS = {
  "a number": lambda f, m: f * m[0],
  "one axis": lambda f, m: f * m,
  "all axes": lambda f, m: f * m.reshape(1, 1, 1),
  "broadcast": lambda f, m: f * jnp.broadcast_to(m, f.shape),
  "the mask layer": lambda f, m: fp.apply_mask(f, jnp.broadcast_to(m, f.shape[-1:])),
}


def draw(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).normal(size=shape) / np.sqrt(shape[0])


def norm(p, x):
  centred = x - x.mean(-1, keepdims=True)
  return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * p["scale"] + p["shift"]


def attention(p, x):
  q, k, v = (x @ p[name] for name in "qkv")
  return jax.nn.softmax(jnp.einsum("btc,bsc->bts", q, k)) @ v @ p["o"]


def mlp(p, x):
  return jax.nn.gelu(x @ p["in"] + p["b"]) @ p["out"] + p["c"]


FORMS = {
  "pre-norm": lambda p, x, on: (lambda y: y + on(mlp(p["mlp"], norm(p["n2"], y)), 1))(
    x + on(attention(p["attention"], norm(p["n1"], x)), 0)
  ),
  "post-norm": lambda p, x, on: (lambda y: y + on(norm(p["n2"], mlp(p["mlp"], y)), 1))(
    x + on(norm(p["n1"], attention(p["attention"], x)), 0)
  ),
  "parallel": lambda p, x, on: (
    x + on(attention(p["attention"], norm(p["n1"], x)), 0) + on(mlp(p["mlp"], norm(p["n2"], x)), 1)
  ),
}
PARTS = {0: ("attention", "n1"), 1: ("mlp", "n2")}


def block(seed):
  c, h = 6, 9
  return {
    "n1": {"scale": 1 + draw(c, seed=seed), "shift": draw(c, seed=seed + 1)},
    "n2": {"scale": 1 + draw(c, seed=seed + 2), "shift": draw(c, seed=seed + 3)},
    "attention": {name: draw(c, c, seed=seed + at) for at, name in enumerate("qkvo")},
    "mlp": {"in": draw(c, h, seed=seed), "b": draw(h, seed=seed), "out": draw(h, c, seed=seed), "c": draw(c)},
  }


def residual(form, spread, wrap=lambda f: f):
  """Two blocks, each branch of which is under a mask of one entry, and a head."""

  def apply(v, x):
    for at, p in enumerate(v["params"]["blocks"]):
      masks = v["masks"][at]
      x = wrap(lambda p, masks, x: FORMS[form](p, x, lambda f, k: SPREADS[spread](f, masks[k])))(p, masks, x)
    return x.mean(1) @ v["params"]["head"]

  masks = [[jnp.array([on]) for on in ons] for ons in ((1.0, 0.0), (0.0, 1.0))]
  params = jax.tree.map(jnp.asarray, {"blocks": [block(0), block(10)], "head": draw(6, 2)})
  return apply, {"params": params, "masks": masks}, jnp.asarray(draw(3, 5, 6))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spread", SPREADS)
def test_a_branch_goes_with_its_norm(form, spread, x64):
  apply, v, x = residual(form, spread)
  small = check(apply, v, x)
  blocks = small.variables["params"]["blocks"]
  for at, masks in enumerate(v["masks"]):
    for k, names in PARTS.items():
      for name in names:
        sizes = {leaf.size for leaf in jax.tree.leaves(blocks[at][name])}
        assert (sizes == {0}) == (not masks[k][0]), (at, name)
  # Nothing is left of what went, nor is it multiplied by the masks that are on: it is the network written by hand.
  jaxpr = jax.make_jaxpr(small)(small.variables, x)
  names = [eqn.primitive.name for eqn in jaxpr.eqns[0].params["jaxpr"].eqns]
  assert names.count("rsqrt") == 2
  assert names.count("dot_general") == 6 + 2 + 1


@pytest.mark.parametrize("form", FORMS)
def test_all_branches_may_go(form, x64):
  apply, v, x = residual(form, "a number")
  small = check(apply, {**v, "masks": jax.tree.map(jnp.zeros_like, v["masks"])}, x)
  assert {leaf.size for leaf in jax.tree.leaves(small.variables["params"]["blocks"])} == {0}


def one_by_one(f):
  return jax.vmap(lambda p, masks, x: f(p, masks, x[None])[0], (None, None, 0))


def in_a_scan(f):
  return lambda p, masks, x: lax.scan(lambda y, _: (0.5 * f(p, masks, y), None), x, None, length=2)[0]


def in_a_branch(f):
  return lambda p, masks, x: lax.cond(jnp.sum(x) > 0, lambda y: f(p, masks, y), lambda y: y, x)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, one_by_one, in_a_scan, in_a_branch])
def test_branches_go_inside_of_what_runs_programs(wrap, x64):
  apply, v, x = residual("pre-norm", "a number", wrap)
  blocks = check(apply, v, x, batches=wrap is not in_a_branch).variables["params"]["blocks"]
  assert {leaf.size for leaf in jax.tree.leaves((blocks[0]["mlp"], blocks[0]["n2"]))} == {0}
  assert {leaf.size for leaf in jax.tree.leaves((blocks[1]["attention"], blocks[1]["n1"]))} == {0}


def test_a_while_loop_without_a_mask_turns_on(x64):
  def apply(v, x):
    turn = lambda s: (s[0] + 1, s[1] + jnp.tanh(s[1] @ v["params"]["w"]) * v["masks"]["m"][0])
    return lax.while_loop(lambda s: s[0] < 3, turn, (0, x))[1] @ v["params"]["head"]

  v = {"params": {"w": draw(4, 4), "head": draw(4, 2)}, "masks": {"m": jnp.zeros(1)}}
  small, x = fp.compact(apply, v, draw(3, 4)), draw(3, 4)
  close(apply(v, x), small(small.variables, x))
  assert small.variables["params"]["w"].shape == (0, 0)


def test_masks_kept_and_exports(x64):
  apply, v, x = residual("pre-norm", "all axes")
  kept = fp.compact(apply, v, x, keep_masks=True)
  close(apply(v, x), kept(kept.variables, x))
  again = fp.compact(kept, kept.variables, x)
  close(apply(v, x), again(again.variables, x))
  plain = fp.compact(apply, v, x)
  assert again.cost == plain.cost == kept.cost
  exported = plain.export(x)
  other = jnp.concatenate([x, 2 * x])
  close(apply(v, other), exported.call(other))


def test_optimizer_states_follow(x64):
  apply, v, x = residual("parallel", "the mask layer")
  small = fp.compact(apply, v, x)
  for tx in (optax.adam(1e-2), optax.sgd(1e-2, momentum=0.9)):
    state = tx.init(v["params"])
    thin = small.shrink_opt_state(tx, state)
    grads = jax.grad(lambda p: jnp.sum(small({"params": p}, x) ** 2))(small.variables["params"])
    updates, _ = tx.update(grads, thin, small.variables["params"])
    chex.assert_trees_all_equal_shapes(updates, small.variables["params"])


def test_statistics_of_an_emptied_layer_go_too(x64):
  def apply(v, x):
    p, stats, y = v["params"], {}, x
    for name in "ab":
      y = y @ p[name]
      mean, var = y.mean(0), y.var(0)
      old = v["stats"][name]
      stats[name] = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
      y = jax.nn.relu((y - mean) * lax.rsqrt(var + 1e-3)) * v["masks"][name]
    return y @ p["c"], {"stats": stats}

  stats = {name: {"mean": jnp.ones(n), "var": jnp.ones(n)} for name, n in (("a", 5), ("b", 6))}
  params = {"a": draw(4, 5), "b": draw(5, 6), "c": draw(6, 2)}
  for masks in ({"a": jnp.ones(5), "b": jnp.zeros(6)}, {"a": jnp.zeros(5), "b": jnp.ones(6)}):
    v, x = {"params": params, "stats": stats, "masks": masks}, draw(7, 4)
    small = fp.compact(apply, v, x, state_from=lambda out: out[1])
    (y, new), (z, found) = apply(v, x), small(small.variables, x)
    close(y, z)
    close(small.shrink(new["stats"]), found["stats"])
    assert {leaf.size for leaf in jax.tree.leaves(found["stats"])} == {
      0
    }  # nor is there anything without biases


def test_a_rule_that_makes_gradients_of_nothing_still_does(x64):
  @jax.custom_vjp
  def nudged(x, w):
    return x * w

  nudged.defvjp(
    lambda x, w: (x * w, (x, w)), lambda saved, g: (g * saved[1], jnp.sum(g * saved[0], 0) + saved[1])
  )

  def apply(v, x):
    y = x @ v["params"]["a"]
    return y + nudged(y, v["params"]["w"]) * v["masks"]["m"][0]

  v, x = {"params": {"a": draw(4, 5), "w": draw(5)}, "masks": {"m": jnp.zeros(1)}}, draw(3, 4)
  small = fp.compact(apply, v, x)
  masked = jax.grad(lambda p: jnp.sum(jnp.sin(apply({**v, "params": p}, x))))(v["params"])
  found = jax.grad(lambda p: jnp.sum(jnp.sin(small({"params": p}, x))))(small.variables["params"])
  assert np.abs(masked["w"]).max() > 0.1  # as is, though the loss does not hang on it
  close(masked, found)


def test_the_sign_of_a_zero_still_shows(x64):
  def apply(v, x):
    y = x + jnp.tanh(x @ v["params"]["w"]) * v["masks"]["m"][0]
    z = jnp.tanh(x @ v["params"]["u"]) * v["masks"]["n"][0]
    return y + jnp.copysign(1.0, z)

  ones = {"m": jnp.zeros(1), "n": jnp.zeros(1)}
  v, x = {"params": {"w": draw(4, 4), "u": draw(4, 4, seed=1)}, "masks": ones}, draw(3, 4)
  small = fp.compact(apply, v, x)
  close(apply(v, x), small(small.variables, x))
  assert small.variables["params"]["w"].size == 0
  assert small.variables["params"]["u"].size == 16


def test_a_product_takes_along_what_its_other_operand_is_for(x64):
  def apply(v, x):
    p, m = v["params"], v["masks"]["m"]
    gate = (x @ p["a"] * m) @ p["b"]
    other = jnp.tanh(x @ p["c"])
    scalar = jnp.sum(jnp.tanh(x @ p["d"]))  # of no axis at all
    return x @ p["head"] + gate * other * scalar

  params = {"a": draw(4, 5), "b": draw(5, 3), "c": draw(4, 3), "d": draw(4, 2), "head": draw(4, 3)}
  v, x = {"params": params, "masks": {"m": jnp.zeros(5)}}, draw(3, 4)
  small = check(apply, v, x, batches=False)
  assert {name: leaf.size for name, leaf in small.variables["params"].items() if leaf.size} == {"head": 12}
  assert fp.cost_model(apply, v, x).exact(v["masks"]) == 3 * 3 * 7 + 3 * 3
  last = {"m": jnp.zeros(5).at[2].set(1)}
  check(apply, {**v, "masks": last}, x, batches=False)


@pytest.mark.parametrize("count", [40, 80])
def test_long_chains_are_emptied_anywhere(count):
  kernels = [draw(3, 3, seed=at) for at in range(count)]

  def apply(v, x):
    for at, kernel in enumerate(v["params"]["kernels"]):
      x = jnp.tanh(x @ kernel) * v["masks"][at]
    return x @ v["params"]["head"]

  masks = [jnp.ones(3) for _ in range(count)]
  v, x = {"params": {"kernels": kernels, "head": draw(3, 2)}, "masks": masks}, draw(2, 3)
  cost = fp.cost_model(apply, v, x)
  last = [mask.at[1:].set(0) for mask in masks]  # without biases nothing is left without any of them
  # but for the head's zeros, of which nothing is computed
  drops = cost.per_feature(last)
  assert all(float(drop[0]) * 2 == cost.exact(last) for drop in drops)
  masks = [*masks[: count // 2], jnp.zeros(3), *masks[count // 2 + 1 :]]
  small = fp.compact(apply, {**v, "masks": masks}, x)
  assert {leaf.size for leaf in jax.tree.leaves(small.variables["params"])} == {0}
  assert small.cost == 0


def check(apply, v, x, batches=True):
  """Outputs, gradients and costs of the compact network, at another batch size too; returns it."""
  small = fp.compact(apply, v, x)
  rest = {"params": v["params"]}
  masked = lambda rest, x: (lambda y: (jnp.sum(jnp.sin(y + 1.0)), y))(apply({**rest, "masks": v["masks"]}, x))
  thin = lambda rest, x: (lambda y: (jnp.sum(jnp.sin(y + 1.0)), y))(small(rest, x))
  grads, y = jax.grad(masked, (0, 1), has_aux=True)(rest, x)
  found, z = jax.jit(jax.grad(thin, (0, 1), has_aux=True))(small.variables, x)
  close(y, z)
  close((small.shrink(grads[0]), grads[1]), found)
  cost = fp.cost_model(apply, v, x)
  before, drops = cost.exact(v["masks"]), cost.per_feature(v["masks"])
  assert small.cost * x.shape[0] == pytest.approx(before, rel=1e-6)
  for leaf, (path, mask) in enumerate(jax.tree_util.tree_leaves_with_path(v["masks"])):
    for k in map(tuple, np.argwhere(mask)):
      fewer = jax.tree_util.tree_map_with_path(lambda p, m: m.at[k].set(0) if p == path else m, v["masks"])  # noqa: B023
      drop = jax.tree.leaves(drops)[leaf][k] * x.shape[0]
      assert drop == pytest.approx(before - cost.exact(fewer), rel=1e-6), (path, k)
  other = jnp.concatenate([x, 2 * x[:1]]) if batches else x
  close(apply(v, other), small(small.variables, other))
  return small


def test_a_loop_that_only_something_dead_asks_for_costs_nothing():
  """After some passes over a body whatever is carried counts as asked for; the loop as a whole does not."""
  v = {"w": jnp.ones((2, 2)), "masks": {"a": jnp.ones(2), "b": jnp.zeros(2)}}

  def apply(v, x):
    turned = jax.lax.fori_loop(0, 3, lambda _, c: jnp.roll(c, 1, axis=1) * 0.5 * v["masks"]["a"], x)
    return (turned @ v["w"]) * v["masks"]["b"]

  x = jnp.ones((1, 2))
  small = fp.compact(apply, v, x)
  cost = fp.cost_model(apply, v, x)
  assert (
    cost.exact(v["masks"])
    == small.cost
    == count(jax.make_jaxpr(small)(small.variables, x), [False, True])
    == 0
  )
  one = {**v["masks"], "b": jnp.array([1.0, 0.0])}
  drop = cost.per_feature(one)["b"][0]
  assert drop == cost.exact(one) > 0
