"""``fp.auto_mask``: what it says, what it refuses, and the same groups in other functions of the same variables."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from fisherprune_jax._training.floors import floors_of


def normal(*shape: int, seed: int = 0) -> jax.Array:
  return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


PARAMS = {"a": normal(3, 6), "c": normal(6, 5), "b": normal(5, 2)}
X = normal(4, 3)


def mlp(params, x):
  return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["c"]) @ params["b"]


def only_last(params, x):
  return x @ params["b"]


@pytest.fixture(scope="module")
def auto():
  return fp.auto_mask(mlp, PARAMS, X)


def test_the_table_shows_groups_with_their_share_and_what_was_skipped(auto):
  text = str(auto)
  dense, last = 6 * 5 + 6 + 5 * 11 + 5 + 2 * 9, 2 * 9  # per example: dots, tanh
  rows = [line.split() for line in text.splitlines()]
  assert rows[0] == ["group", "kind", "size", "axes", "FLOPs"]
  assert rows[1][:4] == ["a", "features", "6", "2"]
  assert rows[2][:4] == ["c", "features", "5", "2"]
  assert float(rows[2][4].rstrip("%")) <= 100
  assert dense > last
  assert "a, axis 0" in text
  assert "it reaches an argument" in text
  assert "b, axis 1" in text
  assert "it reaches an output" in text
  assert repr(auto) == "AutoMask(2 groups, 2 axes skipped)"


def test_many_skipped_axes_are_counted():
  params = {f"w{i}": normal(3, 3) for i in range(30)}

  def tower(params, x):
    for w in params.values():
      x = jax.nn.softmax(x @ w)
    return x @ jnp.ones((3, 3))

  with pytest.raises(
    ValueError, match=r"(?s)no group at all.*w0, axis 0 \(3\): it reaches an argument.*exp|softmax|max"
  ):
    fp.auto_mask(tower, params, X)
  params["a"], params["b"] = normal(3, 4), normal(4, 3)
  found = fp.auto_mask(
    lambda p, x: tower({k: p[k] for k in p if k != "a" and k != "b"}, x @ p["a"] @ p["b"]), params, X
  )
  assert re.search(r"and \d+ more: auto.skipped", str(found))


def test_a_tree_that_is_no_mapping_becomes_params():
  auto = fp.auto_mask(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], [normal(3, 4), normal(4, 2)], X)
  assert [group.name for group in auto.groups] == ["0"]
  assert set(auto.variables) == {"params", "masks"}
  plain = auto.apply([normal(3, 4), normal(4, 2)], X)
  np.testing.assert_array_equal(plain, auto.apply(auto.variables, X))


def test_variables_without_params_may_come_as_these(auto):
  masks = {**auto.masks, "a": jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])}
  expected = auto.apply({**PARAMS, "masks": masks}, X)
  as_params = {"params": PARAMS, "masks": masks}  # as fp.TrainState has them
  np.testing.assert_array_equal(expected, auto.apply(as_params, X))
  small = fp.compact(auto.apply, as_params, X)
  assert small.variables["params"]["a"].shape == (3, 4)


def test_names_are_those_of_modules():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2, name="head")(nn.relu(nn.Dense(4, name="body")(x)))

  auto = fp.auto_mask(Net().apply, Net().init(jax.random.key(0), X), X)
  assert auto.groups == (
    fp.Group("body", 4, (("params/body/bias", 0), ("params/body/kernel", 1), ("params/head/kernel", 0))),
  )


@pytest.mark.parametrize("select", [["c"], "c", {"c"}, lambda group: group.size == 5])
def test_select(select):
  auto = fp.auto_mask(mlp, PARAMS, X, select=select)
  assert list(auto.masks) == ["c"]
  assert fp.Skipped("a", 1, 6, "group 'a' is not selected") in auto.skipped


@pytest.mark.parametrize(
  ("select", "message"),
  [
    (["nope"], r"select must hold names of groups \(a, c\), got \['nope'\]"),
    (lambda group: False, "select must choose a group, of a, c"),
    ([], "select must choose a group"),
  ],
)
def test_a_selection_of_nothing(select, message):
  with pytest.raises(ValueError, match=message):
    fp.auto_mask(mlp, PARAMS, X, select=select)


def test_bad_variables():
  with pytest.raises(TypeError, match=r"variables must be a tree of arrays, got str at kind.*eqx.partition"):
    fp.auto_mask(lambda p, x: mlp(p["w"], x), {"w": PARAMS, "kind": "mlp"}, X)
  with pytest.raises(ValueError, match="variables must hold arrays"):
    fp.auto_mask(lambda p, x: x, {}, X)
  with pytest.raises(ValueError, match=r"holds no masks, got variables with a collection 'masks'"):
    fp.auto_mask(mlp, {**PARAMS, "masks": {"m": jnp.ones(3)}}, X)
  with pytest.raises(ValueError, match="must lead with the example axis"):
    fp.auto_mask(lambda p: mlp(p, X), PARAMS)


def test_masks_of_another_model_or_selection(auto):
  one = fp.auto_mask(mlp, PARAMS, X, select=["a"])
  for masks in (one.masks, {**auto.masks, "more": jnp.ones(2)}, {}, jnp.ones(6)):
    with pytest.raises(ValueError, match=r"Pass a tree like auto\.masks"):
      auto.apply({**PARAMS, "masks": masks}, X)
  with pytest.raises(ValueError, match=r"mask of group 'a' must have shape \(6,\).*got \(5,\)"):
    auto.apply({**PARAMS, "masks": {**auto.masks, "a": jnp.ones(5)}}, X)
  mixed = {**auto.masks, "a": jnp.ones((4, 6))}
  with pytest.raises(ValueError, match="All masks must have an example axis of one length, or none"):
    auto.apply({**PARAMS, "masks": mixed}, X)
  with pytest.raises(
    ValueError, match=r"arrays of examples, got an array of shape .* that has no example axis"
  ):
    auto.apply({**PARAMS, "masks": fp.per_example(auto.masks, 7)}, X)


def test_variables_of_another_model(auto):
  with pytest.raises(ValueError, match=r"with 'a' of shape \(3, 6\), got none there, but \['other/a'"):
    auto.wrap(lambda v, x: mlp(v["other"], x))({"other": PARAMS, "masks": auto.masks}, X)
  with pytest.raises(ValueError, match=r"with 'a' of shape \(3, 6\), got of shape \(3, 7\)"):
    auto.apply({**PARAMS, "a": normal(3, 7), "c": normal(7, 5), "masks": auto.masks}, X)


def test_another_form_that_lacks_splits_or_ties_a_group(auto):
  variables = {**PARAMS, "masks": auto.masks}
  with pytest.raises(ValueError, match=r"but it reads none of 'c' \(b, axis 0; c, axis 1\)"):
    auto.wrap(lambda v, x: jnp.tanh(x @ v["a"]) @ jnp.ones((6, 2)))(variables, X)

  def split(v, x):
    h = jnp.tanh(x @ v["a"])
    return jnp.tanh(jnp.concatenate([h[:, :2], 2 * h[:, 2:]], 1) @ v["c"]) @ v["b"] + jnp.sum(h[:, :2])

  with pytest.raises(ValueError, match="but it splits it: 'a'"):
    auto.wrap(split)(variables, X)
  square = {"a": normal(3, 4), "c": normal(4, 4), "b": normal(4, 2)}
  two = fp.auto_mask(mlp, square, X)

  def tied(v, x):
    h = jnp.tanh(x @ v["a"])
    return (jnp.tanh(h @ v["c"]) + h) @ v["b"]

  with pytest.raises(ValueError, match="but it ties it to 'a': 'c'"):
    two.wrap(tied)({**square, "masks": two.masks}, X)


def test_the_training_form_of_a_network_with_batch_norm_and_dropout():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
      x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(5, (3, 3))(x)))
      x = nn.Dropout(0.3, deterministic=not train)(x).mean((1, 2))
      return nn.Dense(2)(x)

  net, x = Net(), normal(4, 5, 5, 2)
  variables = net.init(jax.random.key(0), x)
  auto = fp.auto_mask(net.apply, variables, x)
  assert ("batch_stats/BatchNorm_0/mean", 0) in auto.groups[0].members
  train = auto.wrap(net.apply)
  rngs = {"dropout": jax.random.key(1)}
  options = {"train": True, "mutable": ["batch_stats"], "rngs": rngs}
  masked = train(auto.variables, x, **options)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), masked, net.apply(variables, x, **options)
  )
  dead = {**variables, "masks": {"Conv_0": jnp.zeros(5)}}
  np.testing.assert_allclose(
    train(dead, x, **options)[0], jnp.broadcast_to(variables["params"]["Dense_0"]["bias"], (4, 2))
  )
  grads = jax.grad(lambda m: train({**variables, "masks": m}, x, **options)[0].sum())(
    fp.per_example(auto.masks, 4)
  )
  assert grads["Conv_0"].shape == (4, 5)


def test_a_function_is_traced_once_for_each_shape():
  count = []

  def counted(params, x):
    count.append(x.shape)
    return mlp(params, x)

  auto = fp.auto_mask(counted, PARAMS, X)
  count.clear()
  for _ in range(3):
    auto.apply(auto.variables, X)
    auto.apply({**PARAMS, "masks": fp.per_example(auto.masks, 4)}, X)
  auto.apply(auto.variables, X[:2])
  assert count == [(4, 3), (4, 3), (2, 3)]
  step = jax.jit(auto.apply)
  count.clear()
  for _ in range(3):
    step(auto.variables, X)
  assert count == [(4, 3)]


def test_arrays_of_the_caller_may_be_used_without_being_given(auto):
  @jax.jit
  def outer(scale, masks):
    return auto.wrap(lambda v, x: scale * mlp(v, x))({**PARAMS, "masks": masks}, X)

  np.testing.assert_allclose(outer(2.0, auto.masks), 2 * mlp(PARAMS, X), rtol=1e-5, atol=1e-5)


def test_per_example_masks_of_a_batch_of_one(auto):
  each = fp.per_example({name: m.at[0].set(0) for name, m in auto.masks.items()}, 1)
  one = auto.apply({**PARAMS, "masks": each}, X[:1])
  np.testing.assert_allclose(one, auto.apply({**PARAMS, "masks": jax.tree.map(lambda m: m[0], each)}, X[:1]))


def test_examples_along_another_axis():
  auto = fp.auto_mask(
    lambda p, x: jnp.swapaxes(mlp(p, jnp.swapaxes(x, 0, 1)), 0, 1), PARAMS, normal(7, 4, 3), batch_axes=1
  )
  masks = fp.per_example(auto.masks, 4)
  x = normal(7, 4, 3)
  for n in range(4):
    only = {name: m.at[n].set(0) for name, m in masks.items()}
    y, full = auto.apply({**PARAMS, "masks": only}, x), auto.apply(PARAMS, x)
    np.testing.assert_allclose(np.delete(y, n, 1), np.delete(full, n, 1), rtol=1e-6)
    assert (np.asarray(y[:, n]) == 0).all()


def residual(params, x):
  x = x @ params["in"]
  for layer in ("one", "two"):
    x = x + jnp.tanh(x @ params[layer]["up"]) @ params[layer]["down"]
  return x @ params["out"]


RESIDUAL = {
  "in": normal(3, 6),
  "one": {"up": normal(6, 7), "down": normal(7, 6)},
  "two": {"up": normal(6, 8), "down": normal(8, 6)},
  "out": normal(6, 2),
}


def test_residual_branches_are_blocks():
  auto = fp.auto_mask(residual, RESIDUAL, X, blocks=True)
  assert [(g.name, g.kind, g.size) for g in auto.groups if g.kind == "block"] == [
    ("one.block", "block", 1),
    ("two.block", "block", 1),
  ]
  masks = {**auto.masks, "one.block": jnp.zeros(1)}
  without = {**RESIDUAL, "one": jax.tree.map(jnp.zeros_like, RESIDUAL["one"])}
  variables = {**RESIDUAL, "masks": masks}
  np.testing.assert_allclose(auto.apply(variables, X), residual(without, X), rtol=1e-6)
  small = fp.compact(auto.apply, variables, X)
  np.testing.assert_allclose(small(small.variables, X), residual(without, X), rtol=1e-5)
  assert not any(leaf.size for leaf in jax.tree.leaves(small.variables["one"]))
  cost = fp.cost_model(auto.apply, auto.variables, X)
  twice = cost.exact(auto.masks) - cost.exact(masks)
  assert twice == 4 * (7 * 11 + 7 + 6 * 13)  # the sum itself stays


def test_blocks_may_go_while_features_keep_their_floor():
  masks = {"a": jnp.ones(4), "one.block": jnp.ones(1), "stack.block": jnp.ones((3, 1))}
  assert [f.ravel().tolist() for f in floors_of(masks, 1).values()] == [[1], [0], [0, 0, 0]]
  assert floors_of(masks, {"one*": 1})["one.block"].tolist() == [1]
  assert floors_of(masks, {"one*": 1})["a"].tolist() == [1]
  assert floors_of(masks, 0.3)["a"].tolist() == [2]
  assert floors_of(masks, {"a": 3, "one.block": 1, "stack.block": jnp.array([0, 1, 0])})[
    "stack.block"
  ].tolist() == [[0], [1], [0]]


def test_a_block_goes_where_it_matters_least():
  auto = fp.auto_mask(residual, RESIDUAL, X, blocks=True)
  cost = fp.cost_model(auto.apply, auto.variables, X)
  tx = fp.fisher_prune(cost, prune_every=1)
  grads = jax.tree.map(lambda m: jnp.ones((4, *m.shape)), auto.masks)
  grads = {**grads, "two.block": jnp.zeros((4, 1))}
  _, state = tx.update({}, tx.init({}), mask_grads=grads)
  assert fp.get_masks(state)["two.block"].tolist() == [0]
  assert fp.history(state)[0].mask == "two.block"
  assert "two.block" in fp.summary(state)


ORDER = """
import jax.numpy as jnp
import fisherprune_jax as fp
attend = lambda p, x: jnp.einsum("bthd,bshd->bths", *(jnp.einsum("btc,chd->bthd", x, p[n]) for n in "qk")).sum((2, 3)) @ p["o"]
p = {"q": jnp.ones((5, 3, 4)), "k": jnp.ones((5, 3, 4)), "o": jnp.ones((6, 2))}
print([(g.name, g.members) for g in fp.auto_mask(attend, p, jnp.ones((2, 6, 5))).groups])
"""


def test_groups_come_in_one_order_in_all_processes():
  """Python's strings hash otherwise in every process; masks have to be the same in all that share a training."""
  runs = [
    subprocess.Popen(
      [sys.executable, "-c", ORDER],
      env={**os.environ, "PYTHONHASHSEED": str(seed)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for seed in (1, 2, 3)
  ]
  printed = {run.communicate()[0] for run in runs}
  assert len(printed) == 1
  assert "q.heads" in printed.pop()


class Setting:
  """Mutable; equal and hashed by its name alone."""

  def __init__(self, scale):
    self.name, self.scale = "setting", scale

  def __eq__(self, other):
    return self.name == other.name

  def __hash__(self):
    return hash(self.name)


@dataclasses.dataclass  # with __eq__, so without __hash__
class Config:
  scale: float


SCALED = {
  "number": (lambda k: k, float),
  "numpy number": (np.float32, lambda one: one),
  "text": (str, float),
  "mapping": (lambda k: {"scale": k, "name": "x"}, lambda one: one["scale"]),
  "list": (lambda k: [k, None], lambda one: one[0]),
  "dataclass": (Config, lambda one: one.scale),
  "hashable": (Setting, lambda one: one.scale),
  "function": (lambda k: lambda: k, lambda one: one()),
  "set": (lambda k: {k}, lambda one: next(iter(one))),
}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", SCALED)
def test_what_is_no_array_may_change_between_calls(kind, by_name):
  make, read = SCALED[kind]
  f = lambda p, x, scale: jnp.tanh(x @ p["a"]) @ p["o"] * read(scale)
  p, x = {"a": jnp.ones((3, 4)), "o": jnp.ones((4, 1))}, jnp.ones((1, 3))
  auto = fp.auto_mask(lambda p, x: f(p, x, make(1.0)), p, x)
  variables, run = {**p, "masks": auto.masks}, auto.wrap(f)
  call = lambda one: run(variables, x, scale=one) if by_name else run(variables, x, one)
  for k in (1.0, 2.0, 3.0, 1.0):  # new objects, some where freed ones were
    np.testing.assert_allclose(call(make(k)), f(p, x, make(k)), rtol=1e-6)
  if hasattr(one := make(1.0), "scale"):
    call(one)
    one.scale = 10.0
    np.testing.assert_allclose(call(one), f(p, x, one), rtol=1e-6)


def test_values_that_are_equal_but_of_other_types_are_told_apart():
  def f(p, x, power):
    return jnp.tanh(x @ p["a"]) @ p["o"] * (2 if power is True else 3 if type(power) is int else 5)

  p, x = {"a": jnp.ones((3, 4)), "o": jnp.ones((4, 1))}, jnp.ones((1, 3))
  auto = fp.auto_mask(lambda p, x: f(p, x, 1), p, x)
  run = auto.wrap(f)
  for power in (1, True, 1.0, np.int32(1), (1,), (True,), {1: 2}, {True: 2}):
    np.testing.assert_allclose(run(auto.variables, x, power), f(p, x, power), rtol=1e-6)


def test_what_a_function_reads_from_outside_may_change_between_analyses():
  outside = {"scale": 1.0}
  f = lambda p, x: jnp.tanh(x @ p["a"]) @ p["o"] * outside["scale"]
  p, x = {"a": jnp.ones((3, 4)), "o": jnp.ones((4, 1))}, jnp.ones((1, 3))
  auto = fp.auto_mask(f, p, x)
  for scale in (1.0, 2.0):
    outside["scale"] = scale
    small = fp.compact(auto.apply, auto.variables, x)
    for y in (small(small.variables, x), auto.wrap(f)(auto.variables, x)):
      np.testing.assert_allclose(y, f(p, x), rtol=1e-6)


@pytest.mark.parametrize(
  ("mix", "width"),
  [
    (lambda h: h + h[:, ::-1], 6),
    (lambda h: sum(h[:, i : i + 4] for i in range(3)), 4),
    (lambda h: h + jnp.roll(h, 1, -1), 6),
  ],
)
def test_an_axis_that_is_cut_into_single_entries_is_skipped_with_a_line(mix, width):
  params = {"e": normal(3, 4), "a": normal(4, 6), "o": normal(width, 2)}
  auto = fp.auto_mask(lambda p, x: mix(jnp.tanh(jnp.tanh(x @ p["e"]) @ p["a"])) @ p["o"], params, X)
  (first, *_), reasons = auto.skipped, {(s.path, s.axis): s.why for s in auto.skipped}
  assert (first.path, first.axis, first.size) == ("a", 1, 6)
  assert reasons["a", 1].startswith("single entries of it are used in different ways, at ")
  assert __file__ in reasons["a", 1]
  assert [s.why for s in auto.skipped[-2:]] == ["it reaches an argument", "it reaches an output"]


def test_the_table_has_one_line_for_kernels_and_one_for_outputs():
  params = {"a": normal(3, 3, 2, 4), "b": normal(5, 5, 4, 6), "o": normal(6, 3), "c": normal(3)}
  conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
  conv = functools.partial(conv, dimension_numbers=("NHWC", "HWIO", "NHWC"))

  def network(p, x):
    return jnp.tanh(conv(jnp.tanh(conv(x, p["a"])), p["b"])).mean((1, 2)) @ p["o"] + p["c"]

  lines = str(fp.auto_mask(network, params, normal(2, 7, 7, 2))).splitlines()
  rows = [re.split(r"  +", line) for line in lines[lines.index("") + 2 :]]
  assert [row[0] for row in rows] == ["a, axis 0 and 3 more", "a, axis 2", "c, axis 0 and 1 more"]
  assert [row[2].partition(",")[0] for row in rows] == [
    "it is the size of a kernel",
    "it reaches an argument",
    "it reaches an output",
  ]


def test_cost_and_compact_need_no_arguments():
  def mlp(params, x, y):
    return jnp.tanh((x + y) @ params["w"]) @ params["v"]

  params, x, y = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}, jnp.ones((2, 3)), jnp.ones(3)
  auto = fp.auto_mask(mlp, params, x, y, batch_axes=(0, None))
  axes = {"batch_axes": (0, None)}
  for measure in ("flops", "params"):
    expected = fp.cost_model(auto.apply, auto.variables, x, y, measure=measure, **axes)
    assert auto.cost(measure=measure).dense == expected.dense
  masked = {**params, "masks": {"w": jnp.array([1.0, 0, 1, 0])}}
  small = auto.compact(masked)
  assert small.variables["w"].shape == (3, 2)
  assert small.cost == fp.compact(auto.apply, masked, x, y, **axes).cost


def test_what_a_variable_is_broadcast_along_is_no_axis_of_it():
  """Haiku's biases have the shape of the image, by ``broadcast_to``; positions are no features."""
  params = {"a": normal(3, 3, 2, 4), "b": normal(4), "s": normal(), "o": normal(7 * 7 * 4, 3)}

  def network(p, x):
    h = jax.lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jnp.tanh(h + jnp.broadcast_to(p["b"], h.shape) + jnp.broadcast_to(p["s"], h.shape[1:]))
    return h.reshape(len(h), -1) @ p["o"]

  auto = fp.auto_mask(network, params, normal(2, 7, 7, 2))
  assert [(group.name, group.size) for group in auto.groups] == [("a", 4)]
  assert auto.groups[0].members == (("a", 3), ("b", 0), ("o", 0))
  assert ("o", 0, 7) in [(skipped.path, skipped.axis, skipped.size) for skipped in auto.skipped]


def test_any_variable_that_an_array_is_computed_from_may_bring_an_axis():
  params = {"scale": normal(3), "a": normal(3, 6), "o": normal(6, 2)}
  network = lambda p, x: jnp.tanh(x @ (p["scale"][:, None] * p["a"])) @ p["o"]
  assert [group.name for group in fp.auto_mask(network, params, X).groups] == ["a"]
