"""A good Optax citizen: alone, chained and wrapped, everything that must hold of any transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import sam

import fisherprune_jax as fp
from tests.compiling import nothing_compiled

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.linspace(0.0, 1.0, 4)}
COST = fp.CostModel.from_functions(
  {"a": jnp.ones(4), "layers": jnp.ones((2, 3))},
  total=lambda m: 3.0 * jnp.sum(m["a"]) + jnp.sum(m["layers"]),
  per_feature=lambda m: {"a": 3.0 * m["a"], "layers": m["layers"]},
)
STEPS = 8


def prune(**options):
  return fp.fisher_prune(COST, prune_every=2, decay=0.9, target=10.0, **options)


def grads_at(step):
  rng = np.random.default_rng(step)
  return (
    jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS),
    jax.tree.map(
      lambda m: jnp.asarray(rng.normal(size=(*m.shape[:-1], 5, m.shape[-1])), m.dtype), COST.masks
    ),
  )


OPTIMIZERS = {
  "sgd": optax.sgd(0.1, momentum=0.9),
  "adam": optax.adam(0.1),
  "adamw": optax.adamw(0.1),
  "lion": optax.lion(0.1),
  "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
}


def injected_updates():
  """A chain whose hyperparameters, those of the pruning among them, are in the state."""

  @optax.inject_hyperparams
  def make(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)

  return optax.chain(
    make(0.1), fp.inject_hyperparams(fp.fisher_prune)(COST, prune_every=2, decay=0.9, target=10.0)
  )


SGD = OPTIMIZERS["sgd"]
TABLE = {
  "alone": (prune, optax.identity),
  **{
    f"{when} {name}": (
      lambda opt=opt, when=when: optax.chain(*((prune(), opt) if when == "before" else (opt, prune()))),
      lambda opt=opt: opt,
    )
    for name, opt in OPTIMIZERS.items()
    for when in ("before", "after")
  },
  "named_chain": (lambda: optax.named_chain(("sgd", SGD), ("prune", prune())), lambda: SGD),
  "masked": (
    lambda: optax.chain(optax.masked(optax.chain(SGD, prune()), {"w": True, "b": False})),
    lambda: optax.masked(SGD, {"w": True, "b": False}),
  ),
  "partition": (
    lambda: optax.partition({"x": optax.chain(SGD, prune()), "y": optax.adam(0.1)}, {"w": "x", "b": "y"}),
    lambda: optax.partition({"x": SGD, "y": optax.adam(0.1)}, {"w": "x", "b": "y"}),
  ),
  "inject_hyperparams": (injected_updates, lambda: SGD),
  "apply_if_finite": (lambda: optax.apply_if_finite(optax.chain(SGD, prune()), 3), lambda: SGD),
  "clip_by_global_norm": (
    lambda: optax.chain(optax.clip_by_global_norm(1.0), SGD, prune()),
    lambda: optax.chain(optax.clip_by_global_norm(1.0), SGD),
  ),
  "schedule": (
    lambda: optax.chain(SGD, optax.scale_by_schedule(lambda n: 0.9**n), prune()),
    lambda: optax.chain(SGD, optax.scale_by_schedule(lambda n: 0.9**n)),
  ),
  "schedule_free": (
    lambda: optax.contrib.schedule_free(optax.chain(optax.sgd(0.1), prune()), 0.1),
    lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
  ),
  "MultiSteps beside it": (
    lambda: optax.chain(prune(), optax.MultiSteps(SGD, 2).gradient_transformation()),
    lambda: optax.MultiSteps(SGD, 2).gradient_transformation(),
  ),
}


@pytest.fixture(params=TABLE, scope="module")
def case(request):
  return TABLE[request.param]


def assert_equal(a, b, **tolerances):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_allclose(x, y, **(tolerances or {"rtol": 0, "atol": 0}))


@functools.cache
def alone():
  """What fisher_prune does to the same mask gradients by itself."""
  tx = prune()
  state, states = tx.init(PARAMS), []
  for n in range(STEPS):
    _, state = jax.jit(tx.update)({}, state, mask_grads=grads_at(n)[1])
    states.append(state)
  return states


def test_masks_are_those_of_fisher_prune_alone_and_updates_those_of_the_optimizer(case):
  tx, plain = case[0](), optax.with_extra_args_support(case[1]())
  params = plain_params = PARAMS
  state, plain_state = tx.init(params), plain.init(params)
  update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
  for n, expected in enumerate(alone()):
    grads, mask_grads = grads_at(n)
    updates, state = update(grads, state, params, mask_grads=mask_grads)
    plain_updates, plain_state = plain_update(grads, plain_state, plain_params)
    assert_equal(updates, plain_updates, rtol=1e-6, atol=1e-7)
    params, plain_params = (
      optax.apply_updates(p, u) for p, u in ((params, updates), (plain_params, plain_updates))
    )
    assert_equal(fp.get_state(state), expected, rtol=1e-6)
  assert sum(float(jnp.sum(m)) for m in jax.tree.leaves(fp.get_masks(state))) <= 7


def test_unexpected_extra_arguments_are_tolerated(case):
  tx = optax.with_extra_args_support(case[0]())
  grads, mask_grads = grads_at(0)
  extras = {"value": jnp.ones([]), "something": "else", "grad_fn": print}
  updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, mask_grads=mask_grads, **extras)
  expected = tx.update(grads, tx.init(PARAMS), PARAMS, mask_grads=mask_grads)
  assert_equal((updates, state), expected)
  assert int(fp.get_state(state).step) == 1


def test_a_second_call_does_not_compile_again(case):
  tx = case[0]()

  @jax.jit
  def step(grads, mask_grads, state):
    return tx.update(grads, state, PARAMS, mask_grads=mask_grads)

  state = jax.jit(tx.init)(PARAMS)
  batches = [grads_at(n) for n in range(3)]
  _, state = step(*batches[0], state)
  with nothing_compiled():
    for batch in batches[1:]:
      _, state = step(*batch, state)


def test_dtypes_and_structure_are_stable(case):
  tx = case[0]()
  state = tx.init(PARAMS)
  grads, mask_grads = grads_at(0)

  def update(state):
    return tx.update(grads, state, PARAMS, mask_grads=mask_grads)[1]

  after = jax.lax.cond(jnp.ones([]) > 0, update, lambda state: state, state)
  scanned, _ = jax.lax.scan(lambda s, _: (update(s), None), state, length=STEPS)
  types = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), s) for s in (state, after, scanned)]
  assert types[0] == types[1] == types[2]
  abstract = jax.eval_shape(tx.init, jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == types[0]


def test_states_can_be_donated(case):
  tx = case[0]()

  def update(state, grads, mask_grads):
    return tx.update(grads, state, PARAMS, mask_grads=mask_grads)[1]

  step, keeping = jax.jit(update, donate_argnums=0), jax.jit(update)
  state = jax.tree.map(jnp.array, tx.init(PARAMS))
  expected = tx.init(PARAMS)
  for n in range(STEPS):
    state = step(state, *grads_at(n))
    expected = keeping(expected, *grads_at(n))
  assert_equal(fp.get_masks(state), fp.get_masks(expected))


def test_optax_maps_over_what_is_like_the_parameters_alone(case):
  tx = case[0]()
  state = tx.init(PARAMS)
  doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
  assert jax.tree.structure(doubled) == jax.tree.structure(state)
  assert_equal(fp.get_state(doubled), fp.get_state(state))


def test_optax_finds_the_fields_of_the_state(case):
  state = case[0]().init(PARAMS)
  for name in ("masks", "scores", "pruned_at", "exhausted"):
    assert optax.tree.get(state, name) is getattr(fp.get_state(state), name) or jax.tree.all(
      jax.tree.map(jnp.array_equal, optax.tree.get(state, name), getattr(fp.get_state(state), name))
    )
  cut = optax.tree.set(state, pruned_at=jax.tree.map(lambda m: 7 * jnp.ones_like(m), COST.masks))
  assert float(fp.get_state(cut).pruned_at["a"][0]) == 7


HYPERPARAMETERS = {
  "numbers": {"decay": 0.8, "cost_weight": 0.01, "target": 12},
  "schedules": {
    "decay": lambda n: 0.5 + 0.04 * n,
    "cost_weight": lambda n: 0.01 * n,
    "target": optax.linear_schedule(18.0, 8.0, STEPS),
  },
}


@pytest.mark.parametrize("kind", HYPERPARAMETERS)
def test_hyperparameters_can_be_injected(kind):
  """Injected schedules count from 0, as Optax does; those of ``fisher_prune`` from 1."""
  options = HYPERPARAMETERS[kind]
  tx = fp.inject_hyperparams(fp.fisher_prune)(COST, prune_every=2, **options)
  shifted = {k: (lambda n, v=v: v(n - 1)) if callable(v) else v for k, v in options.items()}
  plain = fp.fisher_prune(COST, prune_every=2, **shifted)
  state, expected = tx.init(PARAMS), plain.init(PARAMS)
  update = jax.jit(lambda state, g: tx.update({}, state, mask_grads=g)[1])
  for n in range(STEPS):
    state = update(state, grads_at(n)[1])
    expected = plain.update({}, expected, mask_grads=grads_at(n)[1])[1]
    assert_equal(fp.get_state(state), expected, rtol=1e-5)
    assert set(state.hyperparams) == {"decay", "cost_weight", "target"}
    for name, value in options.items():
      now = value(n) if callable(value) else value
      assert float(state.hyperparams[name]) == pytest.approx(float(now)), name
  assert expected.cost <= state.hyperparams["target"] < COST.dense


SWALLOWED = {
  "lookahead": lambda tx: optax.lookahead(tx, 3, 0.5),
  "sam": lambda tx: sam(tx, optax.sgd(0.05)),
  "MultiSteps in a chain": lambda tx: optax.chain(optax.MultiSteps(tx, 2).gradient_transformation()),
}
SWALLOWED_ALONE = {
  "lookahead": SWALLOWED["lookahead"],
  "sam": lambda tx: optax.GradientTransformation(*sam(tx, optax.sgd(0.05))),
  "MultiSteps in a chain": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


@pytest.mark.parametrize("wrapper", SWALLOWED)
def test_wrappers_that_swallow_extra_arguments_are_named(wrapper):
  """``sam`` refuses extra arguments by itself; whoever then leaves them out gets the message too."""
  tx = optax.with_extra_args_support(SWALLOWED[wrapper](optax.chain(SGD, prune())))
  grads, mask_grads = grads_at(0)
  params = optax.LookaheadParams.init_synced(PARAMS) if wrapper == "lookahead" else PARAMS
  extras = {} if wrapper == "sam" else {"mask_grads": mask_grads}
  if wrapper == "sam":
    with pytest.raises(TypeError, match="mask_grads"):
      tx.update(grads, tx.init(params), params, mask_grads=mask_grads)
  with pytest.raises(
    ValueError, match=r"got mask_grads=None.*lookahead.*sam.*optax.chain\(wrapped, fp.fisher_prune"
  ):
    tx.update(grads, tx.init(params), params, **extras)


@pytest.mark.parametrize("wrapper", SWALLOWED)
def test_the_arrangement_that_the_message_names_works(wrapper):
  """The optimizer is wrapped alone, the pruning stands beside it."""
  tx = optax.chain(optax.with_extra_args_support(SWALLOWED_ALONE[wrapper](SGD)), prune())
  grads, mask_grads = grads_at(0)
  params = optax.LookaheadParams.init_synced(PARAMS) if wrapper == "lookahead" else PARAMS
  _, state = tx.update(grads, tx.init(params), params, mask_grads=mask_grads)
  assert_equal(fp.get_state(state), alone()[0], rtol=1e-6)


@pytest.mark.parametrize("order", ["before", "after"])
def test_multi_steps_beside_it_keeps_every_micro_batchs_signal(order):
  """Masks may change in the middle of an accumulation unless ``prune_every`` is a multiple of k."""
  k = 3
  accumulate = optax.MultiSteps(SGD, k).gradient_transformation()
  pruning = fp.fisher_prune(COST, prune_every=2 * k, burn_in=k)
  tx = optax.chain(*((pruning, accumulate) if order == "before" else (accumulate, pruning)))
  state, expected = tx.init(PARAMS), 0
  for n in range(4 * k):
    grads, mask_grads = grads_at(n)
    _, state = tx.update(grads, state, PARAMS, mask_grads=mask_grads)
    signal = 0.5 * jnp.mean(mask_grads["a"] ** 2, axis=0)
    expected = 0.96 * expected + 0.04 * signal
  np.testing.assert_allclose(fp.get_state(state).scores["a"], expected, rtol=1e-5)
  assert [p.step for p in fp.history(state)] == [6, 12]
