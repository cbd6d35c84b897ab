"""Where dead entries stay, and the FLOPs that this leaves on the table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.extend import core
from jax.interpreters import mlir

import fisherprune_jax as fp
from fisherprune_jax._graph import blockers

X = jnp.ones((2, 5))
MASK = jnp.array([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])

unknown_p = core.Primitive("made_up_without_a_rule")
unknown_p.def_impl(jnp.tanh)
unknown_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(unknown_p, mlir.lower_fun(jnp.tanh, multiple_results=False))


class Net(nn.Module):
  uses: tuple = ()

  @nn.compact
  def __call__(self, x):
    x = fp.Mask(name="mask")(nn.Dense(6)(x))
    for use in self.uses:
      x = use(x)
    return nn.Dense(3)(x)


def network(*uses):
  net = Net(uses)
  variables = net.init(jax.random.key(0), X)
  return net.apply, variables | {"masks": {"mask": {"mask": MASK}}}


def cost(*uses, mask=MASK):
  apply, variables = network(*uses)
  return float(fp.cost_model(apply, variables, X)({"mask": {"mask": mask}}))


def exp(x):
  return jnp.exp(x)


def unknown(x):
  return unknown_p.bind(x)


def plus_one(x):
  return x + 1.0


def test_flops_that_one_use_keeps_are_the_difference_to_one_that_keeps_none():
  small = fp.compact(*network(exp), X)
  (blocker,) = small.blockers
  assert blocker.primitive == "exp"
  assert "test_blockers.py" in blocker.where
  assert blocker.flops == cost(exp) - cost(jnp.tanh) > 0
  report = small.report()
  assert f"{blocker.where}): {blocker.flops:,.0f} FLOPs per example" in report
  assert f"together leave {blocker.flops:,.0f} FLOPs per example" in report


def both_alive(x):
  return jnp.exp(x) + 1.0


def test_uses_in_a_row_on_one_line_count_together():
  small = fp.compact(*network(both_alive), X)
  assert small.blockers[0].flops == cost(both_alive) - cost(jnp.tanh, jnp.tanh)


def test_a_second_use_downstream_keeps_what_the_first_would_free():
  small = fp.compact(*network(exp, plus_one), X)
  (first,) = small.blockers  # the second reads what is alive anyway
  assert 0 < first.flops < cost(exp, plus_one) - cost(jnp.tanh, jnp.tanh)


def test_a_norm_over_the_masked_axis_is_one_line():
  small = fp.compact(*network(nn.LayerNorm(name="norm")), X)
  (_where,) = {b.where for b in small.blockers}
  (left,) = {b.flops for b in small.blockers}
  assert left > 0
  assert f"together leave {left:,.0f}" in small.report()


def test_nothing_is_said_where_nothing_stays():
  small = fp.compact(*network(jnp.tanh), X)
  assert small.blockers == []
  assert "on the table" not in small.report()


WRITES = {
  "dynamic_update_slice": lambda c, row, i: jax.lax.dynamic_update_slice_in_dim(c, row[:, None], i, 1),
  "set": lambda c, row, i: c.at[:, i].set(row),
  "add": lambda c, row, i: c.at[:, i].add(row),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("loop", ["scan", "fori_loop"])
def test_an_empty_cache_that_a_loop_fills_keeps_nothing(loop, write):
  """Each iteration writes a row of features; time is kept whole, features are removed, so there is nothing to report."""
  fill = WRITES[write]

  def apply(v, x):
    h = jnp.tanh(x @ v["a"]) * v["masks"]["h"]
    body = lambda c, i: fill(c, jnp.tanh(h[:, i] @ v["b"]), i)
    empty = jnp.zeros((*x.shape[:2], 5))
    if loop == "scan":
      filled = jax.lax.scan(lambda c, i: (body(c, i), None), empty, jnp.arange(x.shape[1]))[0]
    else:
      filled = jax.lax.fori_loop(0, x.shape[1], lambda i, c: body(c, i), empty)
    return (filled * v["masks"]["row"]) @ v["c"]

  masks = {"h": jnp.array([1.0, 0, 1, 1, 0, 1]), "row": jnp.array([0.0, 1, 1, 0, 1])}
  variables = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 5)), "c": jnp.ones((5, 3)), "masks": masks}
  small = fp.compact(apply, variables, jnp.ones((2, 8, 4)), strict=True)
  assert {name: v.shape for name, v in small.variables.items()} == {"a": (4, 4), "b": (4, 3), "c": (3, 3)}
  assert small.blockers == []


def test_an_unknown_primitive_is_announced_once_with_its_cost(monkeypatch):
  monkeypatch.setattr(blockers, "_announced", set())
  apply, variables = network(unknown)
  one = jnp.zeros(6).at[0].set(1.0)
  with pytest.warns(UserWarning, match="made_up_without_a_rule") as said:
    model = fp.cost_model(apply, variables, X)
  # Nothing is counted for a primitive without a rule, one per number for tanh.
  left = float(model({"mask": {"mask": one}})) - (cost(jnp.tanh, mask=one) - 1)
  assert f"up to {left:,.0f} FLOPs per example" in str(said[0].message)
  fp.cost_model(apply, variables, X)  # a second warning would be an error


WAYS = {
  "cost_model": lambda apply, variables: fp.cost_model(apply, variables, X),
  "compact": lambda apply, variables: fp.compact(apply, variables, X),
  "compact, masks kept": lambda apply, variables: fp.compact(apply, variables, X, keep_masks=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_warning_is_of_the_line_that_led_to_it(monkeypatch, way):
  monkeypatch.setattr(blockers, "_announced", set())
  with pytest.warns(UserWarning, match="made_up_without_a_rule") as said:
    WAYS[way](*network(unknown))
  assert said[0].filename == __file__
