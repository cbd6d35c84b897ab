"""The cost model against brute force, against a count of the compact program, and against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from tests.counting import count
from tests.models import CASES, Case, random_masks

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def model_of(case: Case) -> tuple[fp.CostModel, dict, jax.Array]:
  variables, x = case.variables(), case.inputs()
  return fp.cost_model(case.module().apply, variables, x), variables, x


@ALL
def test_every_feature_costs_what_brute_force_says(case):
  cost, variables, x = model_of(case)
  states = [
    variables["masks"],
    *(random_masks(variables["masks"], seed, alive) for seed, alive in [(0, 0.8), (1, 0.4)]),
  ]
  for masks in states:
    before = cost.exact(masks)
    assert cost(masks) * x.shape[0] == pytest.approx(before, rel=1e-6)
    found = cost.per_feature(masks)
    for leaf, (path, mask) in enumerate(jax.tree_util.tree_leaves_with_path(masks)):
      drops = np.asarray(jax.tree.leaves(found)[leaf]) * x.shape[0]
      for k in np.ndindex(mask.shape):
        expected = before - cost.exact(without(masks, path, k))
        assert drops[k] == pytest.approx(expected, rel=1e-6), (path, k)


def without(masks, path, k):
  return jax.tree_util.tree_map_with_path(lambda p, m: m.at[k].set(0) if p == path else m, masks)


@ALL
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_cost_is_what_the_compact_program_does(case, seed):
  cost, variables, x = model_of(case)
  masks = variables["masks"] if seed is None else random_masks(variables["masks"], seed)
  small = fp.compact(case.module().apply, variables | {"masks": masks}, x)
  jaxpr = jax.make_jaxpr(small)(small.variables, x)
  leaves = len(jax.tree.leaves(small.variables))
  assert count(jaxpr, [False] * leaves + [True]) == cost.exact(masks)
  assert small.cost == pytest.approx(float(cost(masks)), rel=1e-6)


@pytest.mark.parametrize(
  "case", [c for c in CASES.values() if c.valid], ids=[n for n, c in CASES.items() if c.valid]
)
def test_xla_counts_the_same(case):
  variables, x = case.variables(), case.inputs()
  masks = random_masks(variables["masks"], 3)
  apply = case.module().apply
  ours = fp.cost_model(apply, variables, x).exact(masks)
  small = fp.compact(apply, variables | {"masks": masks}, x)
  xla = jax.jit(small).lower(small.variables, x).cost_analysis()
  # Of K terms XLA counts 2 K operations where we count 2 K - 1, and of a reduction K - 1 where we count K.
  products = ("dot_general", "conv_general_dilated")
  reductions = ("reduce_sum", "reduce_window_sum")
  expected = ours + outputs_of(products, small, x) - outputs_of(reductions, small, x)
  assert xla["flops"] + xla.get("transcendentals", 0) == expected


def outputs_of(primitives, small, x):
  """How many numbers these primitives give in the compact program."""
  jaxpr = jax.make_jaxpr(small)(small.variables, x)
  (call,) = jaxpr.eqns
  eqns = getattr(call.params["jaxpr"], "jaxpr", call.params["jaxpr"]).eqns
  return sum(eqn.outvars[0].aval.size for eqn in eqns if eqn.primitive.name in primitives)


def test_costs_are_those_written_down_by_hand():
  variables, x = CASES["mlp"].variables(), CASES["mlp"].inputs()
  cost = fp.cost_model(CASES["mlp"].module().apply, variables, x)
  # dense, bias, activation: 5 -> 7 -> 6 -> 4
  assert cost.dense == 7 * 9 + 7 + 7 + 6 * 13 + 6 + 6 + 4 * 11 + 4
  only = fp.cost_model(CASES["mlp"].module().apply, variables, x, primitives=("dot_general",))
  assert only.dense == 7 * 9 + 6 * 13 + 4 * 11


def test_the_batch_size_of_the_trace_does_not_matter():
  case = CASES["batch_norm_before_the_mask"]
  apply, variables = case.module().apply, case.variables()
  costs = {
    n: fp.cost_model(apply, variables, jax.ShapeDtypeStruct((n, 6, 6, 3), jnp.float32)).dense
    for n in (1, 2, 64)
  }
  assert len(set(costs.values())) == 1


def test_breakdown_adds_up_and_names_the_users_lines():
  cost, variables, _ = model_of(CASES["cnn_with_flatten"])
  masks = random_masks(variables["masks"], 0)
  rows = cost.breakdown(masks)
  assert sum(row.dense for row in rows) == pytest.approx(cost.dense)
  assert sum(row.now for row in rows) == pytest.approx(float(cost(masks)))
  assert all("tests/models.py" in row.where for row in rows)


def test_an_empty_mask_leaves_no_negative_cost():
  cost, variables, x = model_of(CASES["mlp"])
  masks = jax.tree.map(jnp.zeros_like, variables["masks"])
  assert cost.exact(masks) == (4 + 0) * x.shape[0]
  assert all(not leaf.any() for leaf in jax.tree.leaves(cost.per_feature(masks)))


def test_masks_may_be_chosen_by_path():
  case = CASES["mlp"]
  variables, x = case.variables(), case.inputs()
  by_path = fp.cost_model(case.module().apply, variables, x, masks=lambda path: path[0].key == "masks")
  by_name = fp.cost_model(case.module().apply, variables, x)
  masks = random_masks(variables["masks"], 0)
  tree = {"masks": masks, "params": jax.tree.map(lambda _: None, variables["params"])}
  assert by_path.exact(tree) == by_name.exact(masks)


def test_strict_raises_exactly_where_something_is_kept():
  for case in CASES.values():
    build = lambda: fp.cost_model(case.module().apply, case.variables(), case.inputs(), strict=True)  # noqa: B023
    if case.removable:
      build()
    else:
      with pytest.raises(ValueError, match="strict=True"):
        build()


def test_cost_and_per_feature_run_under_jit_without_retracing():
  cost, variables, _ = model_of(CASES["dense_net"])
  traces = []

  @jax.jit
  def both(masks):
    traces.append(1)
    return cost(masks), cost.per_feature(masks)

  for seed in range(3):
    masks = random_masks(variables["masks"], seed)
    total, drops = both(masks)
    assert total == cost(masks)
    assert jax.tree.structure(drops) == jax.tree.structure(masks)
  assert len(traces) == 1
