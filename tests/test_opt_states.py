"""Optimizer states that are not just shaped like ``params``: other collections, parts, per-axis statistics."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import fisherprune_jax as fp

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)))


class Adapted(nn.Module):
  """A dense layer, and a low-rank adapter beside it in a collection of its own."""

  features: int

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(self.features)(x)
    init = lambda *shape: 0.3 * jax.random.normal(jax.random.key(len(shape)), shape)
    a = self.variable("adapters", "a", init, x.shape[-1], 2).value
    b = self.variable("adapters", "b", lambda: 0.1 + init(2, self.features)).value
    return y + x @ a @ b


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = fp.Mask(name="first")(nn.relu(Adapted(12, name="inner")(x)))
    x = fp.Mask(name="second")(nn.relu(Adapted(10, name="middle")(x)))
    return Adapted(3, name="outer")(x)


@functools.cache
def variables():
  made = Network().init(jax.random.key(0), X)
  rng = np.random.default_rng(1)
  masks = jax.tree.map(lambda m: jnp.asarray(rng.random(m.shape) < 0.5, jnp.float32), made["masks"])
  wide = lambda tree: jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), tree)
  return {**wide({k: v for k, v in made.items() if k != "masks"}), "masks": masks}


def follows(apply, full, tx, part, put, masks, **options):
  """Trains a part of the variables, compacts, trains both on; how far the compact run is from the masked one."""

  def stepper(apply, fixed):
    def loss(trained, rest):
      return jnp.mean((apply({**put(rest, trained), **fixed}, X) - 1.0) ** 2)

    @jax.jit
    def step(trained, state, rest):
      grads = jax.grad(loss)(trained, rest)
      updates, state = tx.update(grads, state, trained)
      return optax.apply_updates(trained, updates), state

    return step

  rest = {name: tree for name, tree in full.items() if name != "masks"}
  trained = part(rest)
  state = tx.init(trained)
  dense = stepper(apply, {"masks": jax.tree.map(jnp.ones_like, masks)})
  for _ in range(3):  # so that the state holds something at what goes, too
    trained, state = dense(trained, state, rest)
  small = fp.compact(apply, {**put(rest, trained), "masks": masks}, X)
  thin, thin_state = part(small.variables), small.shrink_opt_state(tx, state, **options)
  step, thin_step = stepper(apply, {"masks": masks}), stepper(small, {})
  for _ in range(8):
    trained, state = step(trained, state, rest)
    thin, thin_state = thin_step(thin, thin_state, small.variables)
  expected = part(small.shrink(put(rest, trained)))
  assert jax.tree.structure(expected) == jax.tree.structure(thin)
  assert any(a.shape != b.shape for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(thin), strict=True))
  pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(thin), strict=True)
  return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def chosen(tree, names):
  return {name: tree[name] for name in names}


LABELS = {"params": "frozen", "adapters": "trained"}


def labels(tree):
  return {name: jax.tree.map(lambda _, label=LABELS[name]: label, part) for name, part in tree.items()}


def only_adapters(tree):
  return {name: jax.tree.map(lambda _, own=name == "adapters": own, part) for name, part in tree.items()}


def all_but_adapters(tree):
  return jax.tree.map(lambda own: not own, only_adapters(tree))


ADAM = optax.adam(0.01)
BOTH = {"frozen": optax.set_to_zero(), "trained": ADAM}
TWO = {"frozen": optax.sgd(0.01, momentum=0.9), "trained": ADAM}
EVERYTHING = (lambda v: chosen(v, ["params", "adapters"]), lambda v, t: {**v, **t})
HEADLESS = (
  lambda v: {name: v["params"][name] for name in ("inner", "middle")},
  lambda v, t: {**v, "params": {**v["params"], **t}},
)
PARTS = {
  "parameters": (ADAM, operator.itemgetter("params"), lambda v, t: {**v, "params": t}),
  "another collection": (ADAM, operator.itemgetter("adapters"), lambda v, t: {**v, "adapters": t}),
  "two collections": (ADAM, *EVERYTHING),
  "partition by a function": (optax.partition(BOTH, labels), *EVERYTHING),
  "partition by a tree": (lambda: optax.partition(TWO, labels(chosen(variables(), LABELS))), *EVERYTHING),
  "masked": (
    optax.chain(optax.masked(ADAM, only_adapters), optax.masked(optax.set_to_zero(), all_but_adapters)),
    *EVERYTHING,
  ),
  "a sub-tree": (
    ADAM,
    lambda v: v["params"]["middle"],
    lambda v, t: {**v, "params": {**v["params"], "middle": t}},
  ),
  "a sub-tree of another collection": (
    ADAM,
    lambda v: v["adapters"]["inner"],
    lambda v, t: {**v, "adapters": {**v["adapters"], "inner": t}},
  ),
  "some of the parameters": (ADAM, *HEADLESS),
  "some leaves": (
    ADAM,
    lambda v: {"inner": {"Dense_0": {"kernel": v["params"]["inner"]["Dense_0"]["kernel"]}}},
    lambda v, t: {
      **v,
      "params": {
        **v["params"],
        "inner": {"Dense_0": {**v["params"]["inner"]["Dense_0"], **t["inner"]["Dense_0"]}},
      },
    },
  ),
}


@pytest.mark.parametrize("name", PARTS)
def test_an_optimizer_of_a_part_goes_on_where_it_was(name, x64):
  tx, part, put = PARTS[name]
  tx = tx if isinstance(tx, optax.GradientTransformation) else tx()
  assert follows(Network().apply, variables(), tx, part, put, variables()["masks"]) < 1e-9


def test_a_part_of_any_make_is_named(x64):
  """A tuple of layers cannot be found by the paths in the state."""
  part = lambda v: (v["params"]["inner"], v["adapters"]["middle"])
  put = lambda v, t: {
    **v,
    "params": {**v["params"], "inner": t[0]},
    "adapters": {**v["adapters"], "middle": t[1]},
  }
  masks = variables()["masks"]
  assert follows(Network().apply, variables(), ADAM, part, put, masks, of=part) < 1e-9
  with pytest.raises(ValueError, match=r"opt_state must belong to the full parameters.*of=lambda variables"):
    follows(Network().apply, variables(), ADAM, part, put, masks)


def test_what_fits_several_parts_has_to_be_said(x64):
  full = {
    "params": {"w": jnp.ones((3, 2))},
    "one": {"w": jnp.arange(16.0).reshape(8, 2)},
    "two": {"w": -jnp.arange(16.0).reshape(8, 2)},
    "masks": {"m": jnp.array([1.0, 0.0])},
  }
  apply = lambda v, x: (
    ((x @ v["one"]["w"]) * v["masks"]["m"]) @ v["params"]["w"].T + x @ v["two"]["w"] @ jnp.ones((2, 3))
  )
  small = fp.compact(apply, full, X)
  state = ADAM.init(full["two"])
  with pytest.raises(ValueError, match=r"fits several: 'one', 'two'. Say which, as in of=lambda"):
    small.shrink_opt_state(ADAM, state)
  for name, width in {"one": 1, "two": 2}.items():
    thin = small.shrink_opt_state(ADAM, state, of=operator.itemgetter(name))
    assert thin[0].mu["w"].shape == (8, width)


def test_an_init_that_fails_names_the_way_out(x64):
  small = fp.compact(Network().apply, variables(), X)
  tx = optax.partition(BOTH, labels({"adapters": variables()["adapters"]}))
  state = optax.adam(0.1).init(variables()["params"])
  with pytest.raises(ValueError, match=r"(?s)tx must be the transformation that made opt_state.*of=lambda"):
    small.shrink_opt_state(tx, state)


# Statistics that are shaped otherwise.


def axis_index(mask):
  return np.flatnonzero(np.asarray(mask))


LAYOUTS = {
  "by names": (lambda p: p, lambda p: p),
  "in a list": (
    lambda p: [p["w0"], p["b0"], p["w1"]],
    lambda p: dict(zip(("w0", "b0", "w1"), p, strict=True)),
  ),
  "after numbers": (
    lambda p: {"0": p["w0"], "1": {"0": p["b0"], "1": p["w1"]}},
    lambda p: {"w0": p["0"], "b0": p["1"]["0"], "w1": p["1"]["1"]},
  ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_each_axis_are_sliced_along_it(layout):
  lay, read = LAYOUTS[layout]
  params = lay({"w0": jnp.ones((8, 6)), "b0": jnp.ones(6), "w1": jnp.ones((6, 6))})
  mask = jnp.array([1.0, 0, 0, 1, 0, 1])

  def apply(v, x):
    p = read(v["params"])
    return ((x @ p["w0"] + p["b0"]) * v["masks"]["m"]) @ p["w1"]

  small = fp.compact(apply, {"params": params, "masks": {"m": mask}}, X)
  tx = optax.sm3(0.1)
  numbers = iter(range(1, 100))
  state = jax.tree.map(lambda x: next(numbers) + jnp.arange(x.size * 1.0).reshape(x.shape), tx.init(params))
  thin = small.shrink_opt_state(tx, state)
  before, after = (read(s[0].mu) for s in (state, thin))
  at = np.flatnonzero(mask)
  np.testing.assert_array_equal(after["w0"][0], before["w0"][0])
  np.testing.assert_array_equal(after["w0"][1], before["w0"][1][at])
  np.testing.assert_array_equal(after["b0"][0], before["b0"][0][at])
  np.testing.assert_array_equal(after["w1"][0], before["w1"][0][at])
  np.testing.assert_array_equal(after["w1"][1], before["w1"][1])
  expected = jax.tree.map(jnp.shape, tx.init(small.variables["params"]))
  assert jax.tree.map(jnp.shape, thin) == expected
  tx.update(small.variables["params"], thin, small.variables["params"])


def test_stacked_layers_of_unequal_widths_start_their_axes_anew(x64):
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return x + nn.Dense(8, param_dtype=x.dtype)(
        fp.Mask()(nn.relu(nn.Dense(9, param_dtype=x.dtype)(x)))
      ), None

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes = {"params": 0, "masks": 0}
      return nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)(name="s")(x, None)[0]

  full = Stack().init(jax.random.key(0), X)
  masks = {"s": {"Mask_0": {"mask": jnp.arange(18.0).reshape(2, 9) % 4 < jnp.array([[1], [2]])}}}
  masks = jax.tree.map(lambda m: m.astype(jnp.float32), masks)
  small = fp.compact(Stack().apply, {**full, "masks": masks}, X)
  tx = optax.sm3(0.1)
  with pytest.warns(UserWarning, match="restart from zero") as said:
    thin = small.shrink_opt_state(tx, tx.init(full["params"]))
  assert "0/mu/s/Dense_1/kernel/2" in str(said[0].message)
  assert said[0].filename == __file__
  assert "kernel/0" not in str(said[0].message)
  p = small.variables["params"]
  tx.update(p, thin, p)


# The table of the guide: what follows the masked run, and what starts anew or goes its own way.

FOLLOWING = {
  "adadelta": optax.adadelta(0.1),
  "adagrad": optax.adagrad(0.1),
  "rmsprop": optax.rmsprop(0.01, momentum=0.9),
  "amsgrad": optax.amsgrad(0.01),
  "adan": optax.adan(0.01),
  "novograd": optax.novograd(0.01),
  "rprop": optax.rprop(0.01),
  "schedule-free": contrib.schedule_free_sgd(0.01),
  "ademamix": contrib.ademamix(0.01),
  "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
}
NOT_FOLLOWING = {
  "adafactor": optax.adafactor(0.01),
  "sm3": optax.sm3(0.01),
  "lamb": optax.lamb(0.01),
  "lars": optax.lars(0.01),
  "fromage": optax.fromage(0.01),
  "muon": contrib.muon(0.01),
  "centralize": optax.chain(optax.centralize(), optax.sgd(0.01)),
  "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)),
  "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
  "scale_by_trust_ratio": optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.01)),
  "scale_by_param_block_norm": optax.chain(optax.scale_by_param_block_norm(), optax.sgd(0.01)),
}


@pytest.mark.parametrize("name", [*FOLLOWING, *NOT_FOLLOWING])
def test_which_optimizers_follow_the_masked_run(name, x64):
  tx = {**FOLLOWING, **NOT_FOLLOWING}[name]
  off = follows(Network().apply, variables(), tx, *PARTS["parameters"][1:], variables()["masks"])
  assert np.isfinite(off)
  assert (off < 1e-9) == (name in FOLLOWING)


def test_one_vector_of_everything_starts_anew_and_trains_on(x64):
  tx = optax.flatten(optax.adam(0.01))
  with pytest.warns(UserWarning, match="these restart from zero: 0/mu, 0/nu"):
    assert follows(Network().apply, variables(), tx, *PARTS["parameters"][1:], variables()["masks"]) < 1


# Pruning states.


@functools.cache
def two_networks():
  """A generator and a discriminator as one function, each with masks of its own."""

  class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(8)(fp.Mask(name="m")(nn.relu(nn.Dense(6)(x))))

  def apply(v, x):
    return tuple(Small().apply({name: v[name][which] for name in v}, x) for which in ("g", "d"))

  made = {which: Small().init(jax.random.key(n), X) for n, which in enumerate("gd")}
  full = {name: {which: made[which][name] for which in "gd"} for name in ("params", "masks")}
  costs = {which: fp.cost_model(Small().apply, made[which], X) for which in "gd"}
  tx = optax.chain(optax.adam(0.1), *(fp.fisher_prune(costs[which], name=which) for which in "gd"))
  return apply, full, tx


@pytest.mark.parametrize("alike", [False, True])
def test_two_prunings_are_shrunk_each_with_its_own_masks(alike):
  apply, full, tx = two_networks()
  g = jnp.array([1.0, 0, 1, 0, 1, 1])
  masks = {"g": {"m": {"mask": g}}, "d": {"m": {"mask": g if alike else g[::-1]}}}
  state = tx.init(full["params"])
  for which in "gd":
    state = fp.set_masks(state, masks[which], which)
  full = {**full, "masks": masks}
  kept = fp.compact(apply, full, X, keep_masks=True).shrink_opt_state(tx, state)
  for which in "gd":
    np.testing.assert_array_equal(fp.get_masks(kept, which)["m"]["mask"], np.ones(4))
  inert = fp.compact(apply, full, X).shrink_opt_state(tx, state)
  assert [fp.get_masks(inert, which) for which in "gd"] == [{}, {}]
  with pytest.raises(ValueError, match="masks of opt_state must be those of the compact network, got others"):
    fp.compact(apply, full, X, keep_masks=True).shrink_opt_state(tx, tx.init(full["params"]))


class Lora(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.LoRALinear(8, 12, lora_rank=2, rngs=rngs)
    self.mask = fp.nnx.Mask(12)
    self.outer = nnx.LoRALinear(12, 3, lora_rank=2, rngs=rngs)

  def __call__(self, x):
    return self.outer(self.mask(nnx.relu(self.inner(x))))


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.Param], ids=["adapters", "all"])
def test_adapters_of_a_module_train_on(wrt):
  model, x = Lora(nnx.Rngs(0)), jnp.asarray(X, jnp.float32)

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(lambda m: jnp.mean((m(x) - 1) ** 2), argnums=nnx.DiffState(0, wrt))(model)
    optimizer.update(model, grads)

  model.mask.mask[...] = jnp.asarray(np.arange(12) % 3 == 0, jnp.float32)
  optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=wrt)
  for _ in range(3):
    step(model, optimizer)
  small = fp.nnx.compact(model, x)
  thin = fp.nnx.module(small, model)
  thinner = fp.nnx.shrink_optimizer(small, thin, optimizer)
  for _ in range(3):
    step(model, optimizer)
    step(thin, thinner)
  np.testing.assert_allclose(thin(x), model(x), rtol=1e-4, atol=1e-5)
  assert thin.inner.lora.lora_b.shape == (2, 4)
