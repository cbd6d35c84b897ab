"""Where zeros are not all there is to it: derivative rules, signs of zero, reductions of nothing, no results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import io_callback

import fisherprune_jax as fp

pytestmark = [
  pytest.mark.usefixtures("x64"),
  pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule"),
]
MASK = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def variables():
  params = {"a": draw(0, 3, 6), "b": draw(1, 6, 2), "c": draw(2, 6)}
  return {"params": params, "masks": {"m": jnp.asarray(MASK)}}


def hidden(v, x):
  """Six features, two of which are off."""
  return (x @ v["params"]["a"]) * v["masks"]["m"]


def other(v, x):
  """Six features, all of them on, of the same weights."""
  return jnp.sin(x @ v["params"]["a"])


def read(v, y):
  return y @ v["params"]["b"]


def close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(y, x, rtol=1e-10, atol=1e-10)


def loss_of(y):
  return sum(
    jnp.sum(jnp.sin(leaf + 1.0)) for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.inexact)
  )


def check(apply, differentiable=True):
  """Outputs, gradients by parameters and by the input, and the cost; returns the compact network."""
  v, x = variables(), draw(3, 4, 3)
  small = fp.compact(apply, v, x)
  close(apply(v, x), small(small.variables, x))
  if differentiable:
    by_hand = lambda p, x: loss_of(apply({**v, "params": p}, x))
    compact = lambda p, x: loss_of(small({"params": p}, x))
    grads, dx = jax.grad(by_hand, (0, 1))(v["params"], x)
    close((small.shrink(grads), dx), jax.grad(compact, (0, 1))(small.variables["params"], x))
    # A second derivative, along the weights themselves.
    along = lambda f, p: jax.grad(lambda s: f(jax.tree.map(lambda w: s * w, p), x))
    if differentiable == "twice":
      close(
        jax.grad(along(by_hand, v["params"]))(1.0), jax.grad(along(compact, small.variables["params"]))(1.0)
      )
  cost = fp.cost_model(apply, v, x)
  assert small.cost * 4 == pytest.approx(cost.exact(v["masks"]))
  return small


@jax.custom_vjp
def reverse(y, factor):
  return y


reverse.defvjp(lambda y, factor: (y, factor), lambda factor, g: (-factor * g, jnp.zeros_like(factor)))


@jax.custom_vjp
def straight_through(hard, soft):
  return hard


straight_through.defvjp(lambda hard, soft: (hard, None), lambda _, g: (jnp.zeros_like(g), g))


@jax.custom_vjp
def clip_norm(y):
  return y


clip_norm.defvjp(lambda y: (y, None), lambda _, g: (g / jnp.linalg.norm(g),))


@jax.custom_vjp
def doubled_forwards(y):
  return y


doubled_forwards.defvjp(lambda y: (2 * y + 1, None), lambda _, g: (g,))


@jax.custom_jvp
def mixing(y):
  return y


mixing.defjvp(lambda p, t: (p[0], 3 * t[0] + jnp.sum(t[0], -1, keepdims=True)))


@jax.custom_jvp
def routed(y, z):
  return y


routed.defjvp(lambda p, t: (p[0], t[1] * p[1]))


@jax.custom_jvp
def from_its_own_rule(y):
  return jnp.tanh(y)


@from_its_own_rule.defjvp
def _from_its_own_rule_jvp(primals, tangents):
  return from_its_own_rule(*primals), tangents[0] * (1 - from_its_own_rule(*primals) ** 2)


@jax.custom_jvp
def without_a_derivative(y):
  return jnp.tanh(y)


@without_a_derivative.defjvp
def _without_a_derivative_jvp(primals, tangents):
  raise NotImplementedError("there is none")


@jax.custom_vjp
def outer_of_inner(y, z):
  return clip_norm(routed(y, z))


outer_of_inner.defvjp(
  lambda y, z: (outer_of_inner(y, z), (y, z)),
  lambda saved, g: (g * jnp.cos(saved[1]), jnp.flip(g, -1) * saved[0]),
)

RULES = {
  "gradient reversal by a number": lambda v, y, z: reverse(y, 0.7),
  "gradient reversal by a parameter": lambda v, y, z: reverse(y, v["params"]["c"]),
  "straight through a rounding": lambda v, y, z: straight_through(jnp.round(y), y),
  "straight through to another branch": lambda v, y, z: straight_through(y, z),
  "from another branch to a masked one": lambda v, y, z: straight_through(z, y),
  "clipped by its norm": lambda v, y, z: clip_norm(y),
  "another value when differentiated": lambda v, y, z: doubled_forwards(y),
  "features mixed forwards": lambda v, y, z: mixing(y),
  "another operand's tangent": lambda v, y, z: routed(y, z),
  "a rule that calls its function": lambda v, y, z: from_its_own_rule(y),
  "one after the other": lambda v, y, z: clip_norm(reverse(straight_through(y, z), 0.5)),
  "one inside of another": lambda v, y, z: outer_of_inner(y, z),
}


def in_scan(f):
  def looped(y, z):
    return lax.scan(lambda y, _: (0.9 * f(y, z) + 0.1 * y, jnp.sum(y)), y, None, length=3)[0]

  return looped


PLACES = {
  "alone": lambda f: f,
  "jit": jax.jit,
  "remat": jax.checkpoint,
  "scan": in_scan,
  "vmap": jax.vmap,
  "cond": lambda f: lambda y, z: lax.cond(jnp.sum(z) > -100, f, lambda y, z: y, y, z),
  "rematerialised scan": lambda f: jax.checkpoint(in_scan(f)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
def test_derivative_rules_of_the_user(rule, place):
  def apply(v, x):
    return read(v, PLACES[place](functools.partial(RULES[rule], v))(hidden(v, x), other(v, x)))

  check(apply)


@pytest.mark.parametrize("rule", ["a rule that calls its function", "another operand's tangent"])
def test_second_derivatives_by_rules_of_the_user(rule):
  check(lambda v, x: read(v, RULES[rule](v, hidden(v, x), other(v, x))), "twice")


def test_an_elementwise_rule_keeps_nothing_alive():
  small = check(lambda v, x: read(v, from_its_own_rule(hidden(v, x))))
  assert small.variables["params"]["a"].shape == (3, 4)
  assert small.variables["params"]["b"].shape == (4, 2)


def test_a_function_whose_rule_raises_still_computes():
  small = check(lambda v, x: read(v, without_a_derivative(hidden(v, x))), differentiable=False)
  assert small.variables["params"]["b"].shape == (4, 2)
  with pytest.raises(NotImplementedError, match="there is none"):
    jax.grad(lambda p: loss_of(small({"params": p}, draw(3, 4, 3))))(small.variables["params"])


def root(y):
  return lax.custom_root(
    lambda z: z**3 + z - y, y, lambda f, z: lax.fori_loop(0, 40, lambda _, z: z - f(z) / (3 * z**2 + 1), z), lambda g, r: r / g(jnp.ones_like(r))
  )  # fmt: skip


def solved(y):
  matrix = jnp.eye(6) + 0.1 * jnp.cos(jnp.arange(36.0)).reshape(6, 6)
  solve = lambda f, b: jnp.linalg.solve(matrix, b)
  return jax.vmap(
    lambda b: lax.custom_linear_solve(
      lambda z: matrix @ z, b, solve, lambda f, b: jnp.linalg.solve(matrix.T, b)
    )
  )(y)


USERS = {
  "custom_root": root,
  "custom_linear_solve": solved,
  "relu6": jax.nn.relu6,
  "softplus": jax.nn.softplus,
  "logsumexp": lambda y: jax.nn.logsumexp(y, axis=-1, keepdims=True) * y,
  "silu": jax.nn.silu,
  "safe norm": lambda y: y / optax.safe_norm(y, 1e-3, axis=-1, keepdims=True),
  "sigmoid focal": lambda y: optax.sigmoid_focal_loss(y, jnp.full_like(y, 0.3)),
  "huber": lambda y: optax.huber_loss(y),
  "cosine": lambda y: optax.cosine_distance(y, jnp.ones_like(y), epsilon=1e-3)[:, None] * y,
  "ctc-like logaddexp": lambda y: jnp.logaddexp(y, 0.3),
  "erf": jax.scipy.special.erf,
  "entropy": lambda y: jax.scipy.special.entr(jax.nn.sigmoid(y)),
  "xlogy": lambda y: jax.scipy.special.xlogy(jax.nn.sigmoid(y), 2 + jnp.tanh(y)),
  "log_ndtr": jax.scipy.special.log_ndtr,
  "betainc": lambda y: jax.scipy.special.betainc(2.0, 3.0, jax.nn.sigmoid(y)),
  "sinc": jnp.sinc,
  "clipped by value": lambda y: jnp.clip(y, -0.5, 0.5),
}


@pytest.mark.parametrize("name", USERS)
def test_what_jax_and_optax_write_rules_for(name):
  check(lambda v, x: read(v, USERS[name](hidden(v, x))))


SIGNS = {
  "atan2 over it": lambda y, z: jnp.arctan2(y, z - 2),
  "atan2 of it": lambda y, z: jnp.arctan2(jnp.cos(z), y),
  "atan2 behind what keeps signs": lambda y, z: jnp.arctan2(-jnp.sinh(jnp.tanh(y)), z - 2),
  "atan2 of a sum of two": lambda y, z: jnp.arctan2(y + 0.5 * y, z - 2),
  "atan2 of a transpose of it": lambda y, z: jnp.arctan2(jnp.transpose(jnp.transpose(y)), z - 2),
  "atan2 of a maximum": lambda y, z: jnp.arctan2(jnp.maximum(y, -0.0), z - 2),
  "angle": lambda y, z: jnp.angle(-1 - jnp.abs(z) + 1j * y),
  "complex logarithm": lambda y, z: jnp.log(lax.complex(-1 - jnp.abs(z), y)).imag,
  "complex root": lambda y, z: jnp.sqrt(lax.complex(-1 - jnp.abs(z), y)).imag,
  "copysign": lambda y, z: jnp.copysign(z, y),
  "signbit": lambda y, z: jnp.where(jnp.signbit(y), z, 2 * z),
  "bits": lambda y, z: lax.bitcast_convert_type(y, jnp.int64),
  "half the bits": lambda y, z: lax.bitcast_convert_type(y, jnp.int32),
  "bits of a cast": lambda y, z: lax.bitcast_convert_type(y.astype(jnp.bfloat16), jnp.int16),
  "top_k": lambda y, z: lax.top_k(y, 5)[1],
  "divided by it": lambda y, z: jnp.arctan(1 / y),
  "a negative power": lambda y, z: jnp.arctan((-y) ** -3),
  "rsqrt": lambda y, z: jnp.tanh(lax.rsqrt(y * 1.0)),
  "nextafter": lambda y, z: jnp.nextafter(z, y) - z,
  "a total order": lambda y, z: lax.lt_to_p.bind(y, jnp.zeros_like(y)) * z,
  "a callback": lambda y, z: jax.pure_callback(
    np.signbit, jax.ShapeDtypeStruct(y.shape, bool), y, vmap_method="expand_dims"
  ),
  "qr": lambda y, z: jnp.linalg.qr(y, mode="r"),
  "seen in a loop": lambda y, z: lax.fori_loop(0, 3, lambda _, y: jnp.where(jnp.signbit(y), -y, 0.5 * y), y),
  "handed on by a loop": lambda y, z: jnp.copysign(z, lax.scan(lambda y, _: (-y, y), y, None, length=3)[0]),
  "in a branch": lambda y, z: lax.cond(jnp.sum(z) > -100, lambda y: jnp.copysign(1.0, y), jnp.sin, y),
  "behind a checkpoint": lambda y, z: jnp.copysign(z, jax.checkpoint(jnp.sin)(y)),
  "behind a custom rule": lambda y, z: jnp.copysign(z, reverse(y, 0.3)),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_of_zero(name):
  with np.errstate(all="ignore"):
    check(lambda v, x: SIGNS[name](hidden(v, x), other(v, x)), differentiable=False)


DERIVATIVES_OF_SIGNS = ["atan2 over it", "atan2 of it", "atan2 behind what keeps signs", "copysign", "signbit", "handed on by a loop"]  # fmt: skip


@pytest.mark.parametrize("name", DERIVATIVES_OF_SIGNS)
def test_derivatives_where_signs_of_zero_show(name):
  check(lambda v, x: read(v, SIGNS[name](hidden(v, x), other(v, x))))


def test_a_sum_of_several_terms_hides_signs():
  small = check(lambda v, x: jnp.arctan2(*jnp.split(read(v, hidden(v, x)), 2, axis=1)))
  assert small.variables["params"]["a"].shape == (3, 4)


def test_a_denominator_that_cannot_be_zero_hides_signs():
  small = check(lambda v, x: read(v, hidden(v, x) / (1 + hidden(v, x) ** 2)))
  assert small.variables["params"]["a"].shape == (3, 4)


NOTHING = {
  "prod": lambda y: jnp.prod(y[:, None][:, :0], axis=1),
  "all": lambda y: jnp.all(y[:, None][:, :0] > 0, axis=1).astype(y.dtype),
  "any": lambda y: jnp.any(y[:, None][:, :0] > 0, axis=1).astype(y.dtype),
  "sum": lambda y: jnp.sum(y[:, None][:, :0], axis=1),
  "max": lambda y: jnp.maximum(lax.reduce_max_p.bind(y[:, None][:, :0], axes=(1,), out_sharding=None), -3.0),
  "max from": lambda y: jnp.max(y[:, None][:, :0], axis=1, initial=-3.0),
  "min from": lambda y: jnp.min(y[:, None][:, :0], axis=1, initial=3.0),
  "over two axes": lambda y: jnp.prod(y[:, None, None][:, :0] * jnp.ones((3, 1)), axis=(1, 2)),
  "logsumexp": lambda y: jnp.exp(
    jax.nn.logsumexp(jnp.concatenate([y[:, None][:, :0], y[:, None]], 1), axis=1)
  ),
  "generic": lambda y: lax.reduce(y[:, None][:, :0], 1.5, lambda a, b: a * b + 0.1 * a, (1,)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_reductions_of_nothing(name):
  check(
    lambda v, x: read(v, NOTHING[name](hidden(v, x))),
    differentiable=name not in ("max", "all", "any", "generic"),
  )


WINDOWS = [
  # base dilation, window dilation, strides, padding
  (2, 1, 1, (0, 0)),
  (3, 1, 1, (0, 0)),
  (1, 2, 1, (2, 2)),
  (2, 2, 1, (1, 3)),
  (2, 3, 2, (3, 0)),
  (1, 1, 1, (2, 0)),
  (1, 1, 2, (1, 1)),
  (1, 1, 1, (-1, 2)),
  (1, 1, 1, (-1, -1)),
]


@pytest.mark.parametrize("case", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", ["max", "min", "sum", "prod"])
def test_windows_of_nothing(kind, case):
  base, dilation, stride, pad = case
  init, combine = {
    "max": (-jnp.inf, lax.max),
    "min": (jnp.inf, lax.min),
    "sum": (0.0, lax.add),
    "prod": (1.0, lax.mul),
  }[kind]

  def apply(v, x):
    y = hidden(v, x)[:, :, None] * jnp.arange(1.0, 5.0)
    y = lax.reduce_window(
      y, init, combine, (1, 1, 2), (1, 1, stride), ((0, 0), (0, 0), pad), (1, 1, base), (1, 1, dilation)
    )
    return read(v, jnp.sum(jnp.clip(y, -5, 5), -1))

  check(apply, differentiable=False)


def test_a_window_that_always_holds_an_entry_keeps_zeros():
  apply = lambda v, x: read(v, jnp.sum(lax.reduce_window(hidden(v, x)[:, :, None] * jnp.ones(4), -jnp.inf, lax.max, (1, 1, 3), (1, 1, 1), "SAME"), -1))  # fmt: skip
  assert check(apply, False).variables["params"]["b"].shape == (4, 2)


PRINTS = {
  "a message": lambda y: jax.debug.print("here"),
  "a value": lambda y: jax.debug.print("{}", jnp.sum(y)),
  "a callback": lambda y: jax.debug.callback(lambda z: None, y),
  "in a loop": lambda y: lax.scan(lambda c, _: (c, jax.debug.print("{}", jnp.sum(c))), y, None, length=2),
  "in a branch": lambda y: lax.cond(jnp.sum(y) > 0, lambda: jax.debug.print("yes"), lambda: None),
  "in a loop that goes on": lambda y: lax.while_loop(
    lambda i: i < 3, lambda i: (jax.debug.print("{}", i), i + 1)[1], 0
  ),
  "in a checkpoint": lambda y: jax.checkpoint(lambda y: (jax.debug.print("{}", jnp.sum(y)), jnp.sin(y))[1])(
    y
  ),
}


@pytest.mark.parametrize("name", PRINTS)
def test_what_prints_is_left_out(name, capfd):
  def apply(v, x):
    PRINTS[name](hidden(v, x))
    return read(v, hidden(v, x))

  small = check(apply)
  assert small.variables["params"]["a"].shape == (3, 4)
  jax.effects_barrier()
  capfd.readouterr()
  jax.block_until_ready(small(small.variables, draw(3, 4, 3)))
  jax.effects_barrier()
  assert capfd.readouterr().out == ""


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("looped", [False, True])
def test_what_acts_on_the_world_is_kept(ordered, looped):
  seen = []

  def act(y):
    io_callback(lambda z: seen.append(np.array(z)), None, y, ordered=ordered)

  def apply(v, x):
    y = hidden(v, x)
    if looped:
      y, _ = lax.scan(lambda y, _: (0.5 * y, act(y)), y, None, length=2)
    else:
      act(y)
    return read(v, y)

  v, x = variables(), draw(3, 4, 3)
  small = fp.compact(apply, v, x)
  close(apply(v, x), small(small.variables, x))
  jax.effects_barrier()
  assert len(seen) == (4 if looped else 2)
  close(seen[: len(seen) // 2], seen[len(seen) // 2 :])
  assert not np.signbit(seen[0] - seen[len(seen) // 2]).any() or looped


RAGGED = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
"""Neither a row nor a column of two by three is dead."""


def grid(y):
  return y.reshape(-1, 2, 3)


def scaled(v, y):
  return grid(y) * grid(v["params"]["c"])


MERGED = {
  # name: function of the variables, the features before their mask and the mask; widths of the first and last layer
  "split and merged before the mask": (lambda v, y, m: scaled(v, y).reshape(-1, 6) * m, (3, 3)),
  "through an activation": (lambda v, y, m: jax.nn.relu(scaled(v, y)).reshape(-1, 6) * m, (3, 3)),
  "under a checkpoint": (lambda v, y, m: jax.checkpoint(jnp.tanh)(scaled(v, y)).reshape(-1, 6) * m, (3, 3)),
  "shuffled before the mask": (lambda v, y, m: jnp.swapaxes(grid(y), 1, 2).reshape(-1, 6) * m, (3, 3)),
  "shuffled behind the mask": (lambda v, y, m: jnp.swapaxes(grid(y * m), 1, 2).reshape(-1, 6), (3, 3)),
  "two readers, both masked": (
    lambda v, y, m: scaled(v, y).reshape(-1, 6) * m + jnp.sin(scaled(v, y)).reshape(-1, 6) * m,
    (3, 3),
  ),
  "two readers, one of all": (
    lambda v, y, m: scaled(v, y).reshape(-1, 6) * m + jnp.sum(scaled(v, y)),
    (6, 6),
  ),
  "a rule that mixes what is masked": (lambda v, y, m: clip_norm(scaled(v, y)).reshape(-1, 6) * m, (3, 3)),
  "a rule that mixes, of which a sum reads all": (
    lambda v, y, m: clip_norm(scaled(v, y)).reshape(-1, 6) * m + jnp.sum(clip_norm(scaled(v, y))),
    (6, 6),
  ),
  "a loop": (
    lambda v, y, m: lax.scan(
      lambda y, _: (scaled(v, jnp.tanh(y)).reshape(-1, 6) * m, None), y, None, length=2
    )[0],
    (3, 3),
  ),
  "a loop that carries it split": (
    lambda v, y, m: (
      lax.scan(lambda y, _: (jnp.tanh(y), None), scaled(v, y), None, length=2)[0].reshape(-1, 6) * m
    ),
    (3, 3),
  ),
  "a loop that is given it split, masked": (
    lambda v, y, m: lax.scan(
      lambda c, _: (c + jnp.tanh(grid(y * m)), None), jnp.zeros_like(grid(y)), None, length=2
    )[0].reshape(-1, 6),
    (3, 3),
  ),
  "a loop over its rows, split": (
    lambda v, y, m: lax.scan(lambda c, row: (c, jnp.sin(row)), 0.0, scaled(v, y))[1].reshape(-1, 6) * m,
    (3, 3),
  ),
  "a loop over its rows, split and masked": (
    lambda v, y, m: lax.scan(lambda c, row: (c, jnp.sin(row)), 0.0, grid(y * m))[1].reshape(-1, 6),
    (3, 3),
  ),
  "branches": (
    lambda v, y, m: lax.cond(jnp.sum(y) > 0, jnp.tanh, jnp.sin, scaled(v, y)).reshape(-1, 6) * m,
    (6, 3),
  ),
  "branches, of which one reads all": (
    lambda v, y, m: (
      lax.cond(v["params"]["c"][0] > 0, lambda y: jnp.cumsum(y, -1), jnp.sin, scaled(v, y)).reshape(-1, 6) * m
    ),
    (6, 3),
  ),
  "masked, then branches": (
    lambda v, y, m: lax.cond(jnp.sum(v["params"]["c"]) > 0, jnp.tanh, jnp.sin, scaled(v, y * m)).reshape(
      -1, 6
    ),
    (3, 3),
  ),
  "statistics over what is masked": (
    lambda v, y, m: (grid(y * m) * jnp.sum(scaled(v, y * m), -1, keepdims=True)).reshape(-1, 6),
    (3, 3),
  ),
}


@pytest.mark.parametrize("name", MERGED)
def test_a_mask_over_merged_axes_that_is_no_product(name, monkeypatch):
  monkeypatch.setattr(f"{__name__}.MASK", RAGGED)
  function, widths = MERGED[name]
  small = check(lambda v, x: read(v, function(v, x @ v["params"]["a"], v["masks"]["m"])))
  params = small.variables["params"]
  assert (params["a"].shape[1], params["b"].shape[0]) == widths


CHOSEN = {
  "greater": lambda m, x: jnp.where(m > 0, x, 0.0),
  "cast": lambda m, x: jnp.where(m.astype(bool), jnp.cos(x), 0.0),
  "select": lambda m, x: lax.select(jnp.broadcast_to(m != 0, x.shape), x + 1, jnp.zeros_like(x)),
  "of what is masked": lambda m, x: jnp.where(x * m > 0, jnp.exp(x), 0.0),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_mask_that_chooses_between_something_and_zero(name):
  """As good as a product: what it does not choose is gone."""
  apply = lambda v, x: read(v, jnp.tanh(CHOSEN[name](v["masks"]["m"], x @ v["params"]["a"])))
  small = check(apply)
  assert small.variables["params"]["a"].shape == (3, 4)
  assert not small.blockers
