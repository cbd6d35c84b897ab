"""Automatic masks through functions with derivative rules, and through primitives that run programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp


def normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(shape).normal(size=shape)


PARAMS = {"a": normal(3, 6), "b": normal(6, 5), "c": normal(5, 4), "d": normal(4, 2)}
X = normal(4, 3)


@jax.custom_vjp
def product(x, w):
  return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def product_forwards(x, w):
  return x @ w


product_forwards.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


def hidden(x, w, v):
  return jnp.tanh(x @ w) @ v


two_layers = jax.custom_vjp(hidden)
two_layers.defvjp(lambda *args: (hidden(*args), args), lambda args, g: jax.vjp(hidden, *args)[1](g))


@jax.custom_vjp
def clip(x):
  return x


clip.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.linalg.norm(g, axis=-1, keepdims=True),))


@jax.custom_vjp
def normed(x):
  return jnp.tanh(x)


normed.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * jnp.linalg.norm(x, axis=-1, keepdims=True),))


def tail(p, h):
  return h @ p["b"] @ p["c"] @ p["d"]


FUNCTIONS = {
  "custom vjp": (lambda p, x: product(product(jnp.tanh(x @ p["a"]), p["b"]), p["c"]) @ p["d"], "abc"),
  "custom jvp": (lambda p, x: product_forwards(product_forwards(x @ p["a"], p["b"]), p["c"]) @ p["d"], "abc"),
  "hidden in a custom vjp": (lambda p, x: two_layers(jnp.tanh(x @ p["a"]), p["b"], p["c"]) @ p["d"], "ac"),
  "a rule over the cotangent": (lambda p, x: tail(p, clip(jnp.tanh(x @ p["a"]))), "abc"),
  "a rule over the operand": (lambda p, x: tail(p, normed(x @ p["a"])), "bc"),
  "remat": (lambda p, x: jax.checkpoint(hidden)(jnp.tanh(x @ p["a"]), p["b"], p["c"]) @ p["d"], "abc"),
  "jit": (lambda p, x: jax.jit(hidden)(jnp.tanh(x @ p["a"]), p["b"], p["c"]) @ p["d"], "abc"),
  "cond": (
    lambda p, x: (
      lax.cond(
        jnp.sum(x) > 0,
        lambda y: jnp.tanh(y @ p["b"]) @ p["c"],
        lambda y: jnp.sin(y @ p["b"]) @ p["c"],
        jnp.tanh(x @ p["a"]),
      )
      @ p["d"]
    ),
    "abc",
  ),
  "switch": (
    lambda p, x: tail(
      p,
      lax.switch(x.shape[0] % 3, [jnp.tanh, jnp.sin, lambda y: jnp.tanh(y @ p["b"] @ p["b"].T)], x @ p["a"]),
    ),
    "abc",
  ),
  "fori_loop": (
    lambda p, x: tail(
      p, lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["b"] @ p["b"].T) + h, jnp.tanh(x @ p["a"]))
    ),
    "abc",
  ),
  "scan over examples' steps": (
    lambda p, x: tail(
      p, lax.scan(lambda h, y: (jnp.tanh(h + y @ p["a"]), None), jnp.zeros((4, 6)), jnp.stack([x, 2 * x]))[0]
    ),
    "abc",
  ),
  "vmap": (lambda p, x: jax.vmap(lambda y: tail(p, jnp.tanh(y @ p["a"])))(x), "abc"),
  "weights normed over what they read": (
    lambda p, x: jnp.tanh(x @ p["a"]) @ (p["b"] / jnp.linalg.norm(p["b"], axis=0)) @ p["c"] @ p["d"],
    "abc",
  ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_groups_are_found_and_removed(name):
  function, names = FUNCTIONS[name]
  with jax.enable_x64(True):
    params, x = jax.tree.map(jnp.asarray, (PARAMS, X))
    auto = fp.auto_mask(function, params, x)
    assert sorted(auto.masks) == list(names)
    rng = np.random.default_rng(0)
    masks = {
      n: jnp.asarray(rng.random(m.shape) < 0.5, jnp.float32).at[0].set(1) for n, m in auto.masks.items()
    }
    small = fp.compact(auto.apply, {**params, "masks": masks}, x)

    def both(f, p, x):
      return jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(f(p, x))), argnums=(0, 1))(p, x)

    run = jax.jit(
      lambda p, thin, x: (both(lambda p, x: auto.apply({**p, "masks": masks}, x), p, x), both(small, thin, x))
    )
    (value, (of_params, of_x)), (value_too, (of_thin, of_x_too)) = run(params, small.variables, x)
    pairs = [(value, value_too), (of_x, of_x_too), (small.shrink(of_params), of_thin)]
    for expected, found in pairs:
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), expected, found)
    for group in auto.groups:
      for path, axis in group.members:
        if name != "weights normed over what they read" or path != "b":
          assert small.variables[path].shape[axis] == int(masks[group.name].sum())


def test_a_sum_under_a_rule_is_said():
  auto = fp.auto_mask(FUNCTIONS["hidden in a custom vjp"][0], PARAMS, X)
  (why,) = {s.why for s in auto.skipped if s.size == 5}
  assert why.startswith("dot_general sums over it under its own derivative rule, at ")
