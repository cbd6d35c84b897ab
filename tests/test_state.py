"""State that a function returns shrinks with the entries that others demand, whatever control flow it goes through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp
from fisherprune_jax._graph import updates

RNG = np.random.default_rng(0)
N, H, L = 5, 6, 3
ROWS = np.asarray([[0, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]], float)

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape):
  return RNG.normal(size=shape) / 2


def params(kind):
  if kind.startswith(("rows", "nested")):
    return {"a": normal(L, N, H), "b": normal(L, H, N)}
  return {"a": normal(N, H), "b": normal(H, N), "w": normal(H, H), "ws": normal(L, H, H)}


def new_state(s, y):
  return 0.9 * s + 0.1 * y.mean(0)


def hidden(v, x):
  return jnp.tanh(x @ v["p"]["a"]) * v["masks"]


def plain(v, x):
  y = hidden(v, x)
  return y @ v["p"]["b"], {"s": new_state(v["s"], y)}


def branches(v, x):
  def one(x, s):
    return hidden(v, x), s * 0.5

  def other(x, s):
    return jnp.sin(x @ v["p"]["a"]) * v["masks"], s + 1.0

  y, s = lax.cond(x.sum() > 0, one, other, x, v["s"])
  return (y * s) @ v["p"]["b"], {"s": s}


def remat(v, x):
  y = jax.checkpoint(lambda x, s: jnp.tanh(x @ v["p"]["a"] + s) * v["masks"])(x, v["s"])
  return y @ v["p"]["b"], {"s": y[0]}


def counted_loop(v, x):
  def body(_, carry):
    y, s = carry
    y = jnp.tanh(y @ v["p"]["w"] + s) * v["masks"]
    return y, new_state(s, y)

  y, s = lax.fori_loop(0, 3, body, (hidden(v, x), v["s"]))
  return y @ v["p"]["b"], {"s": s}


def while_loop(v, x):
  def body(carry):
    i, y, s = carry
    y = jnp.tanh(y @ v["p"]["w"] + s) * v["masks"]
    return i + 1, y, new_state(s, y)

  _, y, s = lax.while_loop(lambda carry: carry[0] < 3, body, (0, hidden(v, x), v["s"]))
  return y @ v["p"]["b"], {"s": s}


def stack_under_one_mask(v, x):
  def layer(y, each):
    w, s = each
    y = jnp.tanh(y @ w + s) * v["masks"]
    return y, new_state(s, y)

  y, s = lax.scan(layer, hidden(v, x), (v["p"]["ws"], v["s"]))
  return y @ v["p"]["b"], {"s": s}


def rows(v, x):
  def layer(y, each):
    a, b, s, m = each
    z = jnp.tanh(y @ a + s) * m
    return y + z @ b, new_state(s, z)

  y, s = lax.scan(layer, x, (v["p"]["a"], v["p"]["b"], v["s"], v["masks"]))
  return y, {"s": s}


def rows_computed_with(v, x):
  given = {**v, "p": {"a": v["p"]["a"] * 2, "b": v["p"]["b"]}, "s": v["s"] + 1}
  y, new = rows(given, x)
  return y, {"s": (new["s"] - 1) * 1.0}


def nested(v, x):
  def layer(y, each):
    a, b, s, m = each

    def inner(y, _):
      z = jnp.tanh(y @ a + s) * m
      return y + z @ b, z

    y, zs = lax.scan(inner, y, None, length=2)
    return y, new_state(s, zs[-1])

  y, s = lax.scan(layer, x, (v["p"]["a"], v["p"]["b"], v["s"], v["masks"]), reverse=True)
  return y, {"s": s}


def read_by_nothing_else(v, x):
  return hidden(v, x) @ v["p"]["b"], {"s": v["s"] * 0.5}


LEFT = {
  plain: (3,),
  branches: (3,),
  remat: (3,),
  counted_loop: (3,),
  while_loop: (3,),
  stack_under_one_mask: (3, 3),
  rows: (3, 3),
  rows_computed_with: (3, 5),  # the state is computed with after the loop: what any layer keeps
  nested: (3, 3),
  read_by_nothing_else: (6,),
}


@pytest.mark.parametrize("network", LEFT, ids=lambda network: network.__name__)
def test_state_shrinks_and_stays_that_of_the_masked_network(network):
  kind, left = network.__name__, LEFT[network]
  stacked = kind.startswith(("rows", "nested"))
  state = normal(L, H) if stacked or kind.startswith("stack") else normal(H)
  given = {"p": params(kind), "masks": ROWS if stacked else ROWS[0], "s": state}
  x = normal(4, N)
  small = fp.compact(network, given, x, state_from=lambda output: output[1])
  cost = fp.cost_model(network, given, x, state_from=lambda output: output[1])
  assert small.variables["s"].shape == left
  assert cost.exact(given["masks"]) == round(small.cost * 4)
  assert small.blockers == []
  full, compact = dict(given), dict(small.variables)
  for _ in range(3):
    (y, new), (found, new_compact) = network(full, x), small(compact, x)
    np.testing.assert_allclose(found, y, atol=1e-12)
    full, compact = {**full, **new}, {**compact, **new_compact}
  whole = small.shrink({name: tree for name, tree in full.items() if name != "masks"})
  np.testing.assert_allclose(compact["s"], whole["s"], atol=1e-12)


def test_state_that_does_not_settle_is_kept_whole(monkeypatch):
  """As if the returned entries kept growing."""
  monkeypatch.setattr(updates, "MOST_PASSES", 0)
  given = {"p": params("rows"), "masks": ROWS, "s": normal(L, H)}
  x = normal(4, N)
  small = fp.compact(rows, given, x, state_from=lambda output: output[1])
  assert small.variables["s"].shape == (L, H)
  (y, new), (found, new_compact) = rows(given, x), small(small.variables, x)
  np.testing.assert_allclose(found, y, atol=1e-12)
  live = ROWS > 0
  np.testing.assert_allclose(np.where(live, new_compact["s"], 0), np.where(live, new["s"], 0), atol=1e-12)
