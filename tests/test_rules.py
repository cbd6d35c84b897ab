"""Rules of users: what is taught shrinks exactly, and a bad rule is an error that names it."""

import dataclasses
import functools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import fisherprune_jax as fp
from fisherprune_jax import rules
from fisherprune_jax._graph import compat
from fisherprune_jax.rules import Flops, Pick, Prod, Spec, Sum


def made(name, function, shaped):
  primitive = Primitive(name)
  primitive.def_impl(function)
  primitive.def_abstract_eval(shaped)
  mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
  return primitive


def like(x):
  return x


cube_p = made("cube_of_a_user", lambda x: x * x * x, like)
ad.defjvp(cube_p, lambda g, x: g * 3 * x * x)


def product(x, w, *, columns):
  return (x @ w).reshape(x.shape[0], columns)


def product_shape(x, w, *, columns):
  return jax.core.ShapedArray((x.shape[0], columns), x.dtype)


product_p = made("product_of_a_user", product, product_shape)
ad.defbilinear(product_p, lambda ct, x, w, *, columns: ct @ w.T, lambda ct, x, w, *, columns: x.T @ ct)


def bind_product(node, arrays, sizes):
  return [product_p.bind(*arrays, columns=sizes["m"])]


def rule_of_a_product(node, infos):
  x, w = node.ins
  axes = ("n", "k"), ("k", "m")
  return Spec(
    ins=axes,
    outs=(("n", "m"),),
    sizes=rules.sized((axes[0], x.shape), (axes[1], w.shape)),
    kills=frozenset({0, 1}),
    flops=(Flops(("n", "m"), ("k",)),),
    bind=bind_product,
  )


@pytest.fixture(autouse=True)
def taught():
  """The two primitives with their right rules, whatever the test before made of them."""
  fp.register_rule(cube_p, rules.elementwise)
  fp.register_rule(product_p, rule_of_a_product)


def apply(variables, x):
  params, mask = variables["params"], variables["masks"]["m"]
  hidden = cube_p.bind(product_p.bind(x, params["w"], columns=mask.shape[0]) * mask)
  return product_p.bind(hidden, params["v"], columns=3)


def network(mask=(1, 0, 0, 1, 0, 1), dtype=jnp.float32):
  rng = np.random.default_rng(0)
  w, v, x = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((4, 6), (6, 3), (5, 4)))
  return {"params": {"w": w, "v": v}, "masks": {"m": jnp.asarray(mask, jnp.float32)}}, x


# What is taught.


@pytest.mark.parametrize("mask", [(1, 0, 0, 1, 0, 1), (1,) * 6, (0, 0, 0, 0, 1, 0), (0,) * 6])
def test_a_taught_network_shrinks_exactly(x64, mask):
  variables, x = network(mask, jnp.float64)
  small = fp.compact(apply, variables, x, strict=True)
  live = int(sum(mask))
  assert jax.tree.map(jnp.shape, small.variables["params"]) == {"v": (live, 3), "w": (4, live)}
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-12, atol=1e-12)

  def loss(call, variables, x):
    return (jnp.tanh(call(variables, x)) ** 2).sum()

  masked, gx = jax.grad(functools.partial(loss, apply), (0, 1))(variables, x)
  compact, found_gx = jax.grad(functools.partial(loss, small), (0, 1))(small.variables, x)
  np.testing.assert_allclose(found_gx, gx, rtol=1e-10, atol=1e-10)
  for name, expected in small.shrink(masked["params"]).items():
    np.testing.assert_allclose(compact["params"][name], expected, rtol=1e-10, atol=1e-10)


def flops_by_hand(mask, examples=5):
  """Of both products and the cubes, counted in a loop over what is there."""
  total = 0
  for _ in range(examples):
    for alive in mask:
      total += (2 * 4 - 1 + 1) if alive else 0  # its inner product, its cube
    total += 3 * max(2 * sum(mask) - 1, 0)
  return total


@pytest.mark.parametrize("mask", [(1, 0, 0, 1, 0, 1), (1,) * 6, (0, 0, 0, 0, 1, 0), (0,) * 6])
def test_what_is_taught_costs_what_a_loop_counts(mask):
  variables, x = network(mask)
  cost = fp.cost_model(apply, variables, x)
  assert cost.exact(variables["masks"]) == flops_by_hand(mask)
  drops = cost.per_feature(variables["masks"])["m"]
  for k, alive in enumerate(mask):
    without = [int(m and i != k) for i, m in enumerate(mask)]
    assert float(drops[k]) == (flops_by_hand(mask) - flops_by_hand(without)) / 5 * alive


def test_a_taught_network_exports_with_a_symbolic_batch():
  variables, x = network()
  small = fp.compact(apply, variables, x)
  exported = small.export(x)
  for batch in (1, 7):
    other = jnp.ones((batch, 4))
    np.testing.assert_allclose(exported.call(other), apply(variables, other), rtol=1e-5)


def test_a_rule_may_build_on_the_one_it_replaces():
  plain = rules.rule_for("tanh")
  assert plain is rules.rule_for(lax.tanh_p)

  def dear(node, infos):
    spec = plain(node, infos)
    return dataclasses.replace(spec, flops=tuple(count._replace(scale=10) for count in spec.flops))

  def tanh(variables, x):
    return jnp.tanh(x * variables["masks"]["m"])

  variables, x = {"masks": {"m": jnp.ones(4)}}, jnp.ones((2, 4))
  before = fp.cost_model(tanh, variables, x)
  fp.register_rule("tanh", dear, override=True)
  try:
    assert fp.cost_model(tanh, variables, x).dense == 40
    assert before.dense == 4
    assert float(before(variables["masks"])) == 4  # it keeps the rules that it was traced with
  finally:
    fp.register_rule("tanh", plain, override=True)
  assert fp.cost_model(tanh, variables, x).dense == 4


def test_a_rule_that_does_not_cover_a_case_leaves_it_whole():
  fp.register_rule(cube_p, lambda node, infos: None)
  variables, x = network()
  with pytest.warns(UserWarning, match="no rule for the primitive `cube_of_a_user`"):
    small = fp.compact(apply, variables, x)
  assert small.variables["params"]["w"].shape == (4, 6)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-5)


# Who may register what.


@pytest.mark.parametrize("primitive", ["scan", "while", "cond", "jit", "custom_jvp_call", "custom_vjp_call"])
def test_primitives_that_run_programs_are_refused(primitive):
  with pytest.raises(ValueError, match=f"runs no programs, got '{primitive}'.*that they use"):
    fp.register_rule(primitive, rules.elementwise, override=True)


def test_primitives_that_run_programs_are_refused_as_objects():
  found = {eqn.primitive for eqn in jax.make_jaxpr(lambda x: lax.map(jnp.sin, x))(jnp.ones(3)).jaxpr.eqns}
  (scan_p,) = found
  with pytest.raises(ValueError, match="got 'scan'"):
    fp.register_rule(scan_p, rules.elementwise)


@pytest.mark.parametrize("primitive", ["sin", lax.sin_p])
def test_built_in_rules_are_replaced_only_when_asked_for(primitive):
  before = rules.rule_for("sin")
  with pytest.raises(ValueError, match=r"rule of the library's own, got 'sin'\. Say override=True"):
    fp.register_rule(primitive, rules.elementwise)
  assert rules.rule_for("sin") is before


@pytest.mark.parametrize(
  "primitive", [None, 3, "", jnp.sin, ("sin",)], ids=["None", "number", "no name", "function", "tuple"]
)
def test_what_is_no_primitive_is_refused(primitive):
  with pytest.raises(ValueError, match="given as a JAX primitive or as its name, got"):
    fp.register_rule(primitive, rules.elementwise)


@pytest.mark.parametrize("rule", [None, "elementwise", Spec((), (), {})], ids=["None", "name", "Spec"])
def test_what_is_no_rule_is_refused(rule):
  with pytest.raises(ValueError, match=r"a function rule\(node, infos\) that returns a Spec or None, got"):
    fp.register_rule(cube_p, rule)


def test_rules_can_be_registered_from_several_threads():
  variables, x = network()
  dense = fp.cost_model(apply, variables, x).dense
  start = threading.Barrier(4)

  def work(at):
    start.wait()
    for turn in range(20):
      fp.register_rule(f"primitive_{at}_{turn}", rules.elementwise)
      fp.register_rule(product_p, rule_of_a_product)
      if turn % 5 == at:
        assert fp.cost_model(apply, variables, x).dense == dense
    return all(rules.rule_for(f"primitive_{at}_{turn}") is rules.elementwise for turn in range(20))

  with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(work, range(4)))


# Rules that are wrong.


def says(**changes):
  """A rule that is right but for what is said."""

  def bad_rule(node, infos):
    return dataclasses.replace(rule_of_a_product(node, infos), **changes)

  return bad_rule


def sizes(**changes):
  return {"sizes": {"n": 5, "k": 4, "m": 6} | changes}


def three_sizes(extra):
  return {"n": 5, "k": 4, "m": 6} | extra


WRONG = {
  "operands_missing": (says(ins=(("n", "k"),)), "`ins` one tuple of axes for each operand, 2 in all"),
  "operands_too_many": (
    says(ins=(("n", "k"), ("k", "m"), ())),
    "`ins` one tuple of axes for each operand, 2",
  ),
  "operands_as_a_list": (says(ins=[("n", "k"), ("k", "m")]), "`ins` one tuple of axes for each operand"),
  "results_missing": (says(outs=()), "`outs` one tuple of axes for each result, 1 in all"),
  "results_without_a_comma": (says(outs=("n", "m")), r"result, 1 in all, got \('n', 'm'\)\. A tuple of one"),
  "rank_of_an_operand": (
    says(ins=(("n", "k"), ("k",))),
    r"each of the 2 axes of operand 1, of shape \(4, 6\)",
  ),
  "rank_of_a_result": (
    says(outs=(("n",),)),
    r"each of the 2 axes of result 0, of shape \(5, 6\), got \('n',\)",
  ),
  "axes_as_a_name": (says(ins=(("n", "k"), "km")), "axes of operand 1, .* got 'km'"),
  "an_axis_that_is_none": (
    says(outs=(("n", 3),)),
    "an axis of result 0 of a factor, Prod, Sum, Pick or None",
  ),
  "a_factor_without_size": (says(outs=(("n", "z"),)), r"size of every factor, .* result 0 too, got \['z'\]"),
  "a_size": (says(**sizes(k=5)), "an axis of operand 0 its size, 4, got 'k' of size 5"),
  "a_size_of_the_result": (says(**sizes(m=1)), "an axis of operand 1 its size, 6, got 'm' of size 1"),
  "a_size_as_text": (says(**sizes(k="4")), r"`sizes` as whole numbers .*, got \{'k': '4'\}"),
  "a_size_below_zero": (says(**sizes(k=-1)), r"`sizes` as whole numbers .*, got \{'k': -1\}"),
  "a_size_that_is_a_fraction": (says(**sizes(k=4.0)), r"`sizes` as whole numbers .*, got \{'k': 4\.0\}"),
  "sizes_as_pairs": (says(sizes=(("n", 5),)), "`sizes` as a dictionary"),
  "a_product_of_sizes": (
    says(outs=(("n", Prod(("a", "b"))),), sizes=three_sizes({"a": 2, "b": 2})),
    r"its size, 6, got Prod\(parts=\('a', 'b'\)\) of size 4",
  ),
  "a_sum_of_sizes": (
    says(outs=(("n", Sum(("a", "b"))),), sizes=three_sizes({"a": 2, "b": 2})),
    r"its size, 6, got Sum\(parts=\('a', 'b'\)\) of size 4",
  ),
  "a_product_of_no_factors": (says(outs=(("n", Prod(())),)), "an axis of result 0 of a tuple of factors"),
  "a_product_as_text": (says(outs=(("n", Prod("km")),)), "an axis of result 0 of a tuple of factors"),
  "a_factor_twice_in_a_sum": (
    says(outs=(("n", Sum(("a", "a"))),), sizes=three_sizes({"a": 3})),
    "use a factor once in an axis of result 0",
  ),
  "a_part_without_size": (says(outs=(("n", Prod(("a", "m"))),)), r"size of every factor.*got \['a'\]"),
  "a_pick_of_another_length": (says(outs=(("n", Pick("m", np.arange(5))),)), "its size, 6, got .* of size 5"),
  "a_pick_beyond_the_end": (
    says(outs=(("n", Pick("m", np.arange(1, 7))),)),
    "among the 6 entries of 'm', or -1 for a zero, got positions 1 to 6",
  ),
  "a_pick_before_the_start": (says(outs=(("n", Pick("m", np.arange(-2, 4))),)), "got positions -2 to 3"),
  "a_pick_by_fractions": (says(outs=(("n", Pick("m", np.ones(6))),)), "a NumPy vector of integers"),
  "a_pick_by_a_list": (says(outs=(("n", Pick("m", [0] * 6)),)), "a NumPy vector of integers"),
  "a_pick_of_no_factor": (says(outs=(("n", Pick("z", np.arange(6))),)), r"size of every factor.*got \['z'\]"),
  "a_pick_of_an_operand": (
    says(ins=(("n", Pick("k", np.arange(4))), ("k", "m"))),
    "use Pick in a result alone",
  ),
  "a_pick_of_another_operand": (says(outs=(("n", Pick("m", np.arange(6))),)), "selects from operand 0"),
  "an_operand_that_kills": (says(kills=frozenset({2})), "`kills` as a set of numbers of its 2 operands, got"),
  "an_operand_below_zero": (says(neutral=frozenset({-1})), "`neutral` as a set of numbers of its 2 operands"),
  "an_operand_by_name": (says(sees=frozenset({"x"})), "`sees` as a set of numbers of its 2 operands"),
  "an_operand_alone": (says(blind=1), "`blind` as a set of numbers of its 2 operands, got 1"),
  "a_factor_alive": (
    says(alive=frozenset({"z"})),
    r"`alive` as a set of factors that `sizes` has, got .*'z'",
  ),
  "a_factor_whole": (says(whole=frozenset({"z"})), "`whole` as a set of factors"),
  "factors_as_text": (says(whole="k"), "`whole` as a set of factors that `sizes` has, got 'k'"),
  "a_factor_weak": (says(weak=frozenset({0})), "`weak` as a set of factors"),
  "a_factor_of_no_axis": (says(sizes=three_sizes({"taps": 9})), r"every factor on an axis, got \['taps'\]"),
  "flops_without_a_comma": (says(flops=Flops(("n", "m"))), "`flops` as a tuple of Flops"),
  "flops_as_a_number": (says(flops=(7,)), "`flops` as a tuple of Flops"),
  "flops_of_no_factor": (says(flops=(Flops(("n", "z")),)), "by tuples of factors that `sizes` has"),
  "flops_within_no_factor": (says(flops=(Flops(("n",), ("z",)),)), "by tuples of factors that `sizes` has"),
  "flops_of_text": (says(flops=(Flops("nm"),)), "by tuples of factors that `sizes` has"),
  "flops_in_fractions": (says(flops=(Flops(("n",), scale=0.5),)), "whole numbers for `scale` and `taps`"),
  "same_as_no_operand": (says(same_as=2), "`same_as` of an operand with the axes of the one result, got 2"),
  "same_as_another_shape": (
    says(same_as=1),
    "`same_as` of an operand with the axes of the one result, got 1",
  ),
  "a_reason_that_is_none": (says(opaque=None), "`opaque` as a reason in words, got None"),
  "a_bind_that_is_none": (says(bind=3), r"`bind` as a function bind\(node, arrays, sizes\), got 3"),
  "no_spec": (
    lambda node, infos: {"ins": ()},
    r"return a Spec or None, got \{'ins': \(\)\}\. fp\.rules\.Spec",
  ),
  "no_call": (lambda node: None, r"return a Spec or None, got TypeError: .*, which it raised\."),
  "an_error": (
    lambda node, infos: node.params["none"],
    "return a Spec or None, got KeyError: 'none', which it raised",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_an_error_that_names_it(name):
  rule, message = WRONG[name]
  fp.register_rule(product_p, rule)
  variables, x = network()
  where = r"^The rule tests\.test_rules\.\S+ for the primitive `product_of_a_user` \(.*test_rules\.py:\d+ \(apply\)\) must "
  for use in (fp.cost_model, fp.compact):
    with pytest.raises(ValueError, match=message) as error:
      use(apply, variables, x)
    assert error.match(where)
    assert error.match(", got ")


def test_an_error_inside_a_rule_is_the_cause_of_the_one_that_names_it():
  fp.register_rule(product_p, WRONG["an_error"][0])
  variables, x = network()
  with pytest.raises(ValueError, match="KeyError") as error:
    fp.cost_model(apply, variables, x)
  assert isinstance(error.value.__cause__, KeyError)


def test_rules_are_named_whatever_they_are():
  class Rule:
    def __call__(self, node, infos):
      return 3

  variables, x = network()
  for rule, name in (
    (functools.partial(says(), infos=()), r"tests\.test_rules\.says\.<locals>\.bad_rule"),
    (Rule(), r"tests\.test_rules\.\S*Rule"),
  ):
    fp.register_rule(product_p, rule)
    with pytest.raises(ValueError, match=f"^The rule {name} for"):
      fp.cost_model(apply, variables, x)


def shuffled(x):
  return x[:, ::-1]


shuffle_p = made("shuffle_of_a_user", shuffled, like)
INDEX = np.arange(6)[::-1]


def of_a_shuffle(**changes):
  def rule(node, infos):
    names = rules.names_of(node.ins[0].shape)
    spec = Spec(
      (names,), ((names[0], Pick(names[1], INDEX)),), rules.sized((names, node.ins[0].shape)), moves=True
    )
    return dataclasses.replace(spec, **changes)

  return rule


def shuffling(variables, x):
  hidden = shuffle_p.bind(x @ variables["params"]["w"] * variables["masks"]["m"])
  return hidden @ variables["params"]["v"]


def test_a_taught_selection_shrinks_exactly():
  fp.register_rule(shuffle_p, of_a_shuffle())
  variables, x = network()
  small = fp.compact(shuffling, variables, x, strict=True)
  assert jax.tree.map(jnp.shape, small.variables["params"]) == {"v": (3, 3), "w": (4, 3)}
  np.testing.assert_allclose(small(small.variables, x), shuffling(variables, x), rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"outs": (("d0", Pick("d1", np.arange(-1, 5))),)}, "not say `moves` where a Pick puts zeros in"),
    ({"outs": (("d0", Pick("d1", INDEX, filled=True)),)}, "a number for operand 1 where a Pick is `filled`"),
    ({"outs": (("d0", Pick("d0", np.array([0] * 6))),)}, "selects from operand 0 along axes in the same"),
    ({"outs": ((Pick("d0", np.arange(5)[::-1]), None),)}, "selects from operand 0 along axes in the same"),
  ],
)
def test_a_wrong_selection_is_an_error(changes, message):
  fp.register_rule(shuffle_p, of_a_shuffle(**changes))
  with pytest.raises(ValueError, match=message):
    fp.compact(shuffling, *network())


@pytest.mark.parametrize(
  ("bind", "got"),
  [
    (lambda node, arrays, sizes: product_p.bind(*arrays, columns=sizes["m"]), "in a list, got"),
    (lambda node, arrays, sizes: [arrays[0]], r"\[\(5, 3\)\], in a list, got \[\(5, 4\)\]"),
    (lambda node, arrays, sizes: [arrays[0]] * 2, "in a list, got"),
    (lambda node, arrays, sizes: [jnp.zeros((5, 6))], r"\[\(5, 3\)\], in a list, got \[\(5, 6\)\]"),
  ],
  ids=["bare", "another", "two", "full"],
)
def test_what_a_rule_computes_is_held_against_what_it_says(bind, got):
  fp.register_rule(product_p, says(bind=bind))
  variables, x = network()
  small = fp.compact(apply, variables, x)
  with pytest.raises((ValueError, TypeError), match=got):
    small(small.variables, x)


def padded(x, *, columns):
  return jnp.pad(x, ((0, 0), (0, columns - x.shape[1])))


def padded_shape(x, *, columns):
  return jax.core.ShapedArray((x.shape[0], columns), x.dtype)


def test_a_parameter_that_does_not_follow_is_an_error():
  padded_p = made("padded_of_a_user", padded, padded_shape)

  def entry_by_entry(node, infos):  # right, but for the parameter
    names = rules.names_of(node.ins[0].shape)
    return Spec((names,), (names,), rules.sized((names, node.ins[0].shape)))

  fp.register_rule(padded_p, entry_by_entry)

  def pad(variables, x):
    hidden = padded_p.bind(x @ variables["params"]["w"] * variables["masks"]["m"], columns=6)
    return hidden @ variables["params"]["v"]

  small = fp.compact(pad, *network())
  with pytest.raises(
    ValueError, match=r"entry_by_entry for the primitive `padded_of_a_user`.*A parameter that"
  ):
    small(small.variables, network()[1])


def test_only_one_result_can_be_moved():
  twins_p = Primitive("twins_of_a_user")
  twins_p.multiple_results = True
  twins_p.def_impl(lambda x: [x, x])
  twins_p.def_abstract_eval(lambda x: [x, x])

  def both(node, infos):
    return dataclasses.replace(rules.elementwise(node, infos), moves=True)

  fp.register_rule(twins_p, both)
  with pytest.raises(ValueError, match="say `moves` of a primitive with an operand and one result"):
    fp.cost_model(lambda v, x: twins_p.bind(x * v["masks"]), {"masks": jnp.ones(4)}, jnp.ones((2, 4)))


def test_a_number_is_no_symbol():
  variables, x = network()
  fp.register_rule(product_p, says(sizes={"n": 5, "k": 4, "m": 6}))

  def one(variables, x):
    return product_p.bind(x, variables["params"]["w"], columns=6) * variables["masks"]["m"]

  small = fp.compact(one, variables, x)
  fp.register_rule(product_p, says(sizes={"n": 5, "k": 4, "m": 6}, bind=bind_product))
  with pytest.raises(ValueError, match=r"an axis of operand 0 its size, \w+, got 'n' of size 5"):
    small.export(x)


def test_symbols_differ_where_that_is_certain():
  a, b = jax.export.symbolic_shape("a, b")
  for left, right in ((a, 2 * a), (a, a + 1), (3, a), (a, 3), (2, 3), (0, a)):
    assert compat.differ(left, right)
  for left, right in ((a, a), (2 * a, a + a), (3, 3), (np.int64(3), 3), ((6 * b) // b, 6), (a, b)):
    assert not compat.differ(left, right)
  assert [compat.is_size(n) for n in (a, 0, 3, np.int32(4), -1, 2.0, True, "3", None)] == [True] * 4 + [
    False
  ] * 5


def test_rules_of_the_library_are_checked_too():
  plain = rules.rule_for("tanh")
  fp.register_rule("tanh", says(), override=True)
  try:
    with pytest.raises(ValueError, match=r"bad_rule for the primitive `tanh`"):
      fp.cost_model(lambda v, x: jnp.tanh(x * v["masks"]), {"masks": jnp.ones(4)}, jnp.ones((2, 4)))
  finally:
    fp.register_rule("tanh", plain, override=True)


def test_all_that_a_rule_is_made_of_is_public():
  for name in (
    "Spec",
    "Flops",
    "Prod",
    "Sum",
    "Pick",
    "Node",
    "Info",
    "elementwise",
    "opaque",
    "register_rule",
  ):
    assert hasattr(fp.rules, name)
  assert fp.rules.register_rule is fp.register_rule


def pallas_network(estimate):
  from jax.experimental import pallas as pl

  def kernel(x, out):
    out[...] = jnp.tanh(x[...])

  def call(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    cost = pl.CostEstimate(flops=96, transcendentals=4, bytes_accessed=0) if estimate else None
    return pl.pallas_call(kernel, out_shape=shape, interpret=True, cost_estimate=cost)(x)

  return lambda v, x: call((x @ v["w"]) * v["masks"]) @ v["v"]


@pytest.mark.parametrize("estimate", [True, False])
def test_a_pallas_kernel_is_kept_whole_at_the_cost_that_it_states(estimate):
  masks = jnp.array([1.0, 0, 1, 0])
  variables = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2)), "masks": masks}
  x, network = jnp.ones((5, 3)), pallas_network(estimate)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # once per process
    cost = fp.cost_model(network, variables, x)
    small = fp.compact(network, variables, x)
  assert cost.exact(jnp.ones(4)) == 5 * 4 * (5 + 1) + 5 * 2 * 7 + 100 * estimate
  np.testing.assert_allclose(small(small.variables, x), network(variables, x), rtol=1e-6)
  assert small.variables["w"].shape == (3, 4)
  assert "no rule for pallas_call" in str(small.report())
  names = [row.primitive for row in cost.breakdown(masks)]
  assert ("pallas_call" in names, "pallas_call (not counted)" in names) == (estimate, not estimate)
