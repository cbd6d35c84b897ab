"""Residual branches in any form and any tree of parameters, against functions with a switch put in by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisherprune_jax as fp

RNG = np.random.default_rng(0)
SHAPES = {"e": (3, 4), "u": (4, 5), "d": (5, 4), "g": (4, 4), "s": (4, 4), "o": (4, 2), "alpha": ()}
P = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
X = RNG.normal(size=(6, 3))


def branch(p, h):
  return jnp.tanh(h @ p["u"]) @ p["d"]


def gated(p, h, on):
  t = jax.nn.sigmoid(h @ p["g"])
  return on * t * branch(p, h) + (1 - t) * h


# What a block makes of the stream; ``on`` is its switch.
KINDS = {
  "plain": lambda p, h, on: h + on * branch(p, h),
  "first": lambda p, h, on: on * branch(p, h) + h,
  "difference": lambda p, h, on: h - on * branch(p, h),
  "difference, first": lambda p, h, on: on * branch(p, h) - h,
  "learned scale": lambda p, h, on: h + on * p["alpha"] * branch(p, h),
  "scaled": lambda p, h, on: (0.5 * h + on * 2.0 * branch(p, h)) / 1.5,
  "highway": gated,
  "projection": lambda p, h, on: h @ p["s"] + on * branch(p, h),
  "projection, last": lambda p, h, on: on * branch(p, h) + h @ p["s"],
}


def network(kind, p, x, on=1.0):
  return jnp.tanh(KINDS[kind](p, jnp.tanh(x @ p["e"]), on)) @ p["o"]


@pytest.mark.parametrize("tree", ["flat", "list", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_goes_as_a_whole(kind, tree, x64):
  make, read = {
    "flat": (dict, dict),
    "list": (lambda p: list(p.values()), lambda p: dict(zip(SHAPES, p, strict=True))),
    "nested": (lambda p: {"a": dict(p), "b": ()}, lambda p: p["a"]),
  }[tree]
  apply = lambda v, x: network(kind, read(v), x)
  auto = fp.auto_mask(apply, make(P), X, blocks=True)
  (block,) = (group for group in auto.groups if group.kind == "block")
  for on in (1.0, 0.0):
    variables = {**auto.variables, "masks": {**auto.masks, block.name: jnp.full(1, on)}}
    expected = network(kind, P, X, on)
    np.testing.assert_allclose(auto.apply(variables, X), expected, rtol=1e-9)
    small = fp.compact(auto.apply, variables, X)
    np.testing.assert_allclose(small(small.variables, X), expected, rtol=1e-9)
  kept = read(small.variables if tree == "flat" else small.variables.get("params", small.variables))
  assert not kept["u"].size
  assert not kept["d"].size


def test_sums_that_are_no_residual_are_no_blocks():
  def experts(p, x):  # a gate in both terms, but no term is computed from the other
    t = jax.nn.sigmoid(x @ p["e"])
    return (t * jnp.tanh(x @ p["e"] @ p["g"]) + (1 - t) * jnp.tanh(x @ p["e"] @ p["s"])) @ p["o"]

  def linear(p, x):
    return jnp.tanh(jnp.tanh(x @ p["e"]) @ p["g"] + jnp.tanh(x @ p["e"]) @ p["s"]) @ p["o"]

  for f in (experts, linear):
    kinds = {group.kind for group in fp.auto_mask(f, P, X, blocks=True).groups}
    assert kinds == {"features"}


class Residual(nn.Module):
  """Two branches with batch norm, and a shortcut with its own."""

  @nn.compact
  def __call__(self, x, train):
    norm = lambda x: nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dense(4)(x)
    x = x + norm(nn.Dense(4)(nn.relu(norm(nn.Dense(5)(x)))))
    x = nn.relu(x)
    x = norm(nn.Dense(6)(x)) + norm(nn.Dense(6)(nn.PReLU()(nn.Dense(5)(x))))
    return nn.Dense(2)(nn.Dropout(0.0, deterministic=not train)(nn.relu(x)))


@pytest.mark.parametrize("first", [False, True])
def test_blocks_of_training_and_serving_are_the_same(first):
  model = Residual()
  variables = model.init(jax.random.key(0), X, False)
  forms = {
    False: lambda v, x: model.apply(v, x, False),
    True: lambda v, x: model.apply(v, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})[
      0
    ],
  }
  auto = fp.auto_mask(forms[first], variables, X, blocks=True)
  blocks = [group for group in auto.groups if group.kind == "block"]
  assert len(blocks) == 2
  for train, form in forms.items():
    run = auto.wrap(form)
    np.testing.assert_allclose(run(auto.variables, X), form(variables, X), rtol=1e-4, atol=1e-5)
    for block in blocks:
      off = {**variables, "masks": {**auto.masks, block.name: jnp.zeros(1)}}
      assert not np.allclose(run(off, X), form(variables, X)), (train, block.name)


class Module(nnx.Module):
  def __init__(self, rngs):
    self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
    self.up, self.down = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
    self.norm, self.drop = nnx.BatchNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    x = self.first(x)
    return self.last(x + self.drop(self.down(nnx.relu(self.norm(self.up(x))))))


@pytest.mark.parametrize("first", ["train", "eval"])
def test_blocks_of_a_module_in_both_modes(first):
  model = Module(nnx.Rngs(0))
  getattr(model, first)()
  masked = fp.nnx.auto_mask(model, X, blocks=True)
  (block,) = (group.name for group in masked.groups if group.kind == "block")
  for mode in ("train", "eval"):
    getattr(model, mode)()
    assert np.isfinite(masked(X)).all()
  masked.masks[block][...] = jnp.zeros(1)
  np.testing.assert_allclose(masked(X), model.last(model.first(X)), rtol=1e-5, atol=1e-6)
