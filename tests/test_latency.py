"""Costs that are measured: against multiply-accumulates under a clock that counts them, and on a real one."""

import itertools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from fisherprune_jax._latency import clock, fitting, grids, measuring, whole
from tests.models import CASES, random_masks
from tests.test_saving import full_disk

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
PRODUCTS = ("dot_general", "conv_general_dilated")
CHOSEN = """
  mlp cnn_valid conv_transposed conv_grouped mobile_net_block residual_branches_masked_apart dense_net channel_shuffle
  lstm_scanned scanned_layers tied_embeddings attention_grouped transformer_block mixture_of_experts
  convolution_with_batch_groups factorisation_over_the_mask
""".split()
"""Each of a kind of its own: widths that are tied, merged, added up, of turns of a loop; and no product at all."""


def products(kernel, points, repeats):
  """A clock that counts multiply-accumulates."""
  return [
    float(
      sum(
        c.scale * c.taps * math.prod(kernel.sizes(w)[f] for f in (*c.outer, *c.inner))
        for c in kernel.spec.flops
      )
    )
    for w in points
  ]


@pytest.fixture
def counting_clock(monkeypatch):
  monkeypatch.setattr(measuring, "grid_of", lambda size, fractions, multiple_of: range(1, size + 1))
  monkeypatch.setattr(grids, "_seconds", products)

  def count(apply_fn, tree, args, batch_axes, masks, repeats):
    options = {"masks": tree.masks, "batch_axes": batch_axes, "measure": "macs", "primitives": PRODUCTS}
    cost = fp.cost_model(apply_fn, tree.variables, *args, **options)
    trees = [jax.tree.unflatten(jax.tree.structure(tree.mask_tree), leaves) for leaves in masks]
    return [*map(cost.exact, trees), 0.0]

  monkeypatch.setattr(whole, "_seconds", count)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_clock_that_counts_finds_what_is_counted(name, counting_clock):
  case = CASES[name]
  apply, variables, x = case.module().apply, case.variables(), case.inputs()
  masks = random_masks(variables["masks"], 0, 0.7)
  cost = fp.measure_latency(apply, variables, x)  # at every width: where some are tied, counts are on no line
  macs = fp.cost_model(apply, variables, x, measure="macs", primitives=PRODUCTS)
  assert cost.dense == pytest.approx(macs.dense, rel=1e-6)
  assert float(cost(masks)) == pytest.approx(float(macs(masks)), rel=1e-6)
  for found, expected in zip(
    *map(jax.tree.leaves, (cost.per_feature(masks), macs.per_feature(masks))), strict=True
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * max(macs.dense, 1))
  now = {"dense": 0.0, "now": 0.0}
  for row in cost.breakdown(masks):
    now = {key: now[key] + getattr(row, key) for key in now}
  assert now["dense"] == pytest.approx(macs.dense, rel=1e-5)
  assert now["now"] == pytest.approx(float(macs(masks)), rel=1e-5)


def two_layers(v, x):
  return jnp.tanh((x @ v["a"]) * v["masks"]) @ v["b"]


V = {"a": jnp.ones((16, 48)), "b": jnp.ones((48, 8)), "masks": jnp.ones(48)}
X = jnp.ones((4, 16))


@pytest.fixture
def whole_clock(monkeypatch):
  """Says what whole networks of ``two_layers`` take, by width; any call takes 2 seconds."""

  def say(seconds):
    def timed(apply_fn, tree, args, batch_axes, masks, repeats):
      return [*(float(seconds(int(leaves[0].sum()))) for leaves in masks), 2.0]

    monkeypatch.setattr(whole, "_seconds", timed)

  return say


def test_times_between_those_measured_are_on_a_line(monkeypatch, whole_clock):
  taken = {12: 1.0, 20: 5.0, 48: 6.0}
  monkeypatch.setattr(grids, "_seconds", lambda kernel, points, repeats: [taken[n] for (n,) in points])
  line = lambda n: np.interp(n, [0, *taken], [0, *taken.values()])
  whole_clock(lambda n: 2 * line(n) + 12 * n / 48)  # of both products, and of tanh
  cost = fp.measure_latency(two_layers, V, X, fractions=(0.25, 0.5, 1.0), multiple_of=4)
  assert cost.dense == 6.5  # of one of four examples
  for width, seconds in ((48, 6.0), (34, 5.5), (20, 5.0), (16, 3.0), (12, 1.0), (6, 0.5), (0, 0.0)):
    masks = (jnp.arange(48) < width).astype(jnp.float32)
    expected = (2 + 2 * seconds + 12 * width / 48) / 4
    assert float(cost(masks)) == pytest.approx(expected)
    assert cost.exact(masks) == pytest.approx(4 * expected)
    assert (2 * cost + cost).exact(masks) == pytest.approx(12 * expected)
    if width:
      drop = expected - float(cost(masks.at[0].set(0)))
      np.testing.assert_allclose(cost.per_feature(masks), masks * drop, rtol=1e-4)


def test_products_that_come_to_more_than_the_whole_are_scaled_down(monkeypatch, whole_clock):
  monkeypatch.setattr(grids, "_seconds", lambda kernel, points, repeats: [float(n) for (n,) in points])
  whole_clock(lambda n: n)  # though each of both takes n
  cost = fp.measure_latency(two_layers, V, X)
  assert cost.dense == 12.5
  assert float(cost(V["masks"].at[:24].set(0))) == pytest.approx(6.5)


def test_networks_that_were_timed_whole_have_their_own_times(monkeypatch, whole_clock):
  """Whatever their products come to; and a feature's drop is a difference of two such times, on each piece and across."""
  monkeypatch.setattr(grids, "_seconds", lambda kernel, points, repeats: [float(n) for (n,) in points])
  taken = {48: 100.0, 24: 30.0, 17: 26.0, 12: 25.0}
  whole_clock(taken.__getitem__)
  cost = fp.measure_latency(two_layers, V, X)
  masks = lambda n: (jnp.arange(48) < n).astype(jnp.float32)
  for width, seconds in taken.items():
    assert float(cost(masks(width))) == pytest.approx((2 + seconds) / 4, rel=1e-5)
  for width in (48, 25, 24, 13, 5, 1):
    drop = float(cost(masks(width))) - float(cost(masks(width - 1)))
    assert drop > 0
    np.testing.assert_allclose(cost.per_feature(masks(width)), masks(width) * drop, rtol=1e-3)
    rows = cost.breakdown(masks(width))
    assert sum(row.now for row in rows) == pytest.approx(float(cost(masks(width))), rel=1e-5)


def test_a_network_that_took_longer_than_a_larger_one_is_level_with_it(monkeypatch, whole_clock):
  monkeypatch.setattr(grids, "_seconds", lambda kernel, points, repeats: [float(n) for (n,) in points])
  whole_clock({48: 100.0, 24: 120.0, 17: 26.0, 12: 25.0}.__getitem__)
  cost = fp.measure_latency(two_layers, V, X)
  assert cost.dense == pytest.approx(25.5)
  for width, seconds in ((24, 100), (17, 26), (12, 25)):
    assert float(cost((jnp.arange(48) < width).astype(jnp.float32))) == pytest.approx((2 + seconds) / 4)


def test_calls_are_never_all_that_a_network_takes(monkeypatch):
  """Both are timed apart, so a call of nothing may come out longer than one of a small network."""
  monkeypatch.setattr(grids, "_seconds", lambda kernel, points, repeats: [float(n) for (n,) in points])
  taken = iter(([11.0, 4.0, 3.0, 2.0], [5.0]))
  monkeypatch.setattr(whole, "medians", lambda runs, repeats, visit: np.array(next(taken)))
  cost = fp.measure_latency(two_layers, V, X)
  assert cost.dense == pytest.approx(11 / 4)
  for width, seconds in ((24, 4), (17, 3), (12, 2)):
    assert float(cost((jnp.arange(48) < width).astype(jnp.float32))) == pytest.approx(seconds / 4)
  assert float(cost.per_feature(V["masks"]).min()) > 0


def test_what_reading_variables_takes_falls_with_them(monkeypatch, whole_clock):
  """Two layers of 48 by 48 behind one mask each: their products take nothing, their entries do."""
  monkeypatch.setattr(grids, "_seconds", lambda kernel, points, repeats: [0.0 for _ in points])

  def three_layers(v, x):
    h = (x @ v["a"]) * v["masks"]["m"]
    return ((h @ v["b"]) * v["masks"]["n"]) @ v["c"]

  v = {"a": jnp.ones((3, 48)), "b": jnp.ones((48, 48)), "c": jnp.ones((48, 3))}
  v["masks"] = {"m": jnp.ones(48), "n": jnp.ones(48)}
  entries = lambda n: 6 * n + n * n
  whole_clock(lambda n: 1e-3 * entries(n))
  cost = fp.measure_latency(three_layers, v, jnp.ones((4, 3)))
  masks = {"m": (jnp.arange(48) < 10).astype(jnp.float32), "n": jnp.ones(48)}
  assert float(cost(masks)) == pytest.approx((2 + 1e-3 * (3 * 10 + 10 * 48 + 48 * 3)) / 4)
  drops = cost.per_feature(masks)
  np.testing.assert_allclose(drops["m"], masks["m"] * 1e-3 * 51 / 4, rtol=1e-4)
  np.testing.assert_allclose(drops["n"], 1e-3 * 13 / 4, rtol=1e-4)


def test_factors_that_fit_best_are_none_below_zero():
  """Against all factors on a grid."""
  rng = np.random.default_rng(0)
  for _ in range(20):
    rows, seconds = rng.uniform(0.1, 1, (3, 2)), rng.uniform(0.5, 2, 3)
    found = np.array(fitting.fitted(rows, seconds))
    assert rows[0] @ found == pytest.approx(seconds[0])
    off = lambda f: np.square(rows @ f / seconds - 1).sum() + (f[0] - 1) ** 2  # noqa: B023
    tried = [np.array(f) for f in itertools.product(np.linspace(0, 20, 201), repeat=2)]
    best = min(tried, key=off)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, best * seconds[0] / (rows[0] @ best), atol=0.25)


def test_a_width_that_took_longer_than_a_larger_one_does_not():
  from fisherprune_jax._latency.tables import monotone

  seconds = np.random.default_rng(0).normal(size=(4, 5, 3))
  found = monotone(seconds)
  for axis in range(3):
    assert (np.diff(found, axis=axis) >= 0).all()
  np.testing.assert_array_equal(monotone(found), found)


def test_a_real_clock():
  wide = {"a": jnp.ones((256, 2048)), "b": jnp.ones((2048, 256)), "masks": jnp.ones(2048)}
  x = jnp.ones((32, 256))
  cost = fp.measure_latency(two_layers, wide, x, repeats=3)
  small = cost(wide["masks"].at[:1536].set(0))
  assert cost.unit == "seconds"
  assert 0 < float(small) < 0.6 * cost.dense
  assert {row.unit for row in cost.breakdown(wide["masks"])} == {"seconds"}
  assert sum(row.dense for row in cost.breakdown(wide["masks"])) == pytest.approx(cost.dense, rel=1e-5)


@pytest.mark.parametrize("name", ["mlp", "scanned_layers", "lstm_scanned", "mixture_of_experts"])
def test_a_real_clock_on_networks_that_are_compacted_to_be_timed(name):
  """Stacks, loops, branches; of shapes alone as of arrays."""
  case = CASES[name]
  given = case.variables(), case.inputs()
  masks = random_masks(given[0]["masks"], 0, 0.7)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(given)]
  for variables, x in (given, jax.tree.unflatten(jax.tree.structure(given), shapes)):
    cost = fp.measure_latency(case.module().apply, variables, x, repeats=1, fractions=(1.0,))
    assert 0 < float(cost(masks)) <= cost.dense * (1 + 1e-6)
    assert all((drop >= 0).all() for drop in jax.tree.leaves(cost.per_feature(masks)))


@pytest.mark.parametrize("x64", [False, True])
def test_times_are_float32_as_other_costs_are(x64):
  with jax.enable_x64(x64):
    v, x = jax.tree.map(jnp.float32, (V, X))
    cost = fp.measure_latency(two_layers, v, x, repeats=1)
    assert cost(v["masks"]).dtype == cost.per_feature(v["masks"]).dtype == jnp.float32


def test_a_network_is_pruned_to_a_time(counting_clock):
  cost = fp.measure_latency(two_layers, V, X)
  tx = fp.fisher_prune(cost, target=0.5 * cost.dense, prune_every=1, features_per_prune=48, multiple_of=8)
  grads = jnp.broadcast_to(jnp.arange(1.0, 49), (4, 48))
  _, state = jax.jit(lambda g, s: tx.update({}, s, mask_grads=g))(grads, tx.init({}))
  np.testing.assert_array_equal(fp.get_masks(state), jnp.arange(48) >= 24)


def test_what_was_timed_once_is_not_timed_again(tmp_path, monkeypatch):
  path = tmp_path / "folder" / "times.json"
  seen = []
  first = fp.measure_latency(
    two_layers, V, X, repeats=1, cache=path, track=lambda items: seen.extend(items) or items
  )
  assert len(seen) == 2  # kernels
  (machine,) = json.loads(path.read_text())
  assert machine == clock.machine()
  monkeypatch.setattr(grids, "medians", None)
  again = fp.measure_latency(two_layers, V, X, cache=path)
  masks = V["masks"].at[:7].set(0)
  assert (again.dense, float(again(masks))) == (first.dense, float(first(masks)))
  monkeypatch.setattr(clock, "machine", lambda: "another")
  with pytest.raises(TypeError, match="NoneType"):
    fp.measure_latency(two_layers, V, X, cache=path)
  assert [p.name for p in path.parent.iterdir()] == ["times.json"]


def test_on_a_full_disk_the_file_stays_as_it_was(tmp_path, monkeypatch):
  path = tmp_path / "times.json"
  clock.Memory(path).add({"a": 1.0})
  before = path.read_text()

  with monkeypatch.context() as patched:
    patched.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
      clock.Memory(path).add({"b": 2.0})
  assert path.read_text() == before
  assert [p.name for p in tmp_path.iterdir()] == ["times.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"cpu": 3}', '{"cpu": {"a": "long"}}', '{"cpu": {"a": -1}}'])
def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path, text):
  path = tmp_path / "times.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"cache must be a JSON file that fp\.measure_latency wrote"):
    fp.measure_latency(two_layers, V, X, cache=path)
  assert path.read_text() == text


def test_bad_input_is_refused():
  for fractions in ((), (0.5,), (0.5, 0.5, 1.0), (1.0, 0.5), (0.0, 1.0), (0.5, 2.0), ("half", 1.0)):
    with pytest.raises(ValueError, match="fractions must rise from above 0 to 1"):
      fp.measure_latency(two_layers, V, X, fractions=fractions)
  for name in ("repeats", "multiple_of"):
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1, got 0"):
      fp.measure_latency(two_layers, V, X, **{name: 0})
  with pytest.raises(ValueError, match="masks"):
    fp.measure_latency(lambda v, x: x @ v["a"], {"a": V["a"]}, X)


def test_it_knows_what_goes_with_a_feature(counting_clock):
  cost = fp.measure_latency(two_layers, V, X)
  weights = {key: part for key, part in V.items() if key != "masks"}
  importance = fp.estimate_importance(None, weights, V["masks"], (), method="magnitude", cost=cost)
  np.testing.assert_allclose(importance, 1.0, rtol=1e-6)


def programs_in(path):
  (times,) = json.loads(path.read_text()).values()
  return sum(name.startswith("program ") for name in times)


def test_which_variables_are_masks_tells_programs_apart(tmp_path):
  net = lambda v, x: (jnp.tanh(x @ v["a"] * v["m"]) @ v["c"] * v["n"]) @ v["b"]
  variables = {"a": V["a"], "c": jnp.ones((48, 48)), "b": V["b"], "m": V["masks"], "n": V["masks"]}
  path = tmp_path / "times.json"
  for number, names in enumerate(("mn", "m", "n", "mn"), start=1):
    masks = lambda keys, names=names: keys[0].key in names
    fp.measure_latency(net, variables, X, masks=masks, repeats=1, cache=path)
    assert programs_in(path) == 5 * min(number, 3)


def test_what_is_computed_of_what_tells_programs_apart(tmp_path):
  """The same equations on the same shapes; once the sine of a cosine is asked for, once that of the features."""
  path = tmp_path / "times.json"

  def net(of_cosine):
    def apply(v, x):
      h = x @ v["a"] * v["masks"]
      c = jnp.cos(h)
      return (c + jnp.sin(c if of_cosine else h)) @ v["b"]

    return apply

  for number, of_cosine in enumerate((True, False, True), start=1):
    fp.measure_latency(net(of_cosine), V, X, repeats=1, cache=path)
    assert programs_in(path) == 5 * min(number, 2)


def test_what_is_asked_for_tells_programs_apart(tmp_path):
  """The same equations: once the sine is of use, once the cosine, twice the one and nothing else."""
  path = tmp_path / "times.json"

  def net(which):
    def apply(v, x):
      h = x @ v["a"] * v["masks"]
      results = jnp.sin(h) @ v["b"], jnp.cos(h) @ v["b"]
      return results[which]

    return apply

  for number, which in enumerate((0, 1, 0), start=1):
    fp.measure_latency(net(which), V, X, repeats=1, cache=path)
    assert programs_in(path) == 5 * min(number, 2)


def test_two_that_remember_in_one_file_keep_what_the_other_found(tmp_path):
  one, other = (clock.Memory(tmp_path / "times.json") for _ in range(2))
  one.add({"a": 1.0})
  other.add({"b": 2.0})
  assert clock.Memory(tmp_path / "times.json").times == {"a": 1.0, "b": 2.0}


def test_what_loops_do_tells_programs_apart(tmp_path):
  def turns(of):
    return lambda v, x: jax.lax.fori_loop(0, 3, lambda _, c: of(c), x @ v["a"] * v["masks"]) @ v["b"]

  path = tmp_path / "times.json"
  for number, of in enumerate((jnp.sin, jnp.cos, jnp.sin), start=1):
    fp.measure_latency(turns(of), V, X, repeats=1, cache=path)
    assert programs_in(path) == 5 * min(number, 2)  # four widths, and what any call takes


BAD_TIMES = {
  "infinity": float("inf"),
  "minus infinity": -float("inf"),
  "nan": float("nan"),
  "nothing": 0,
  "less than nothing": -1.0,
  "years": 1e30,
  "a huge integer": 10**400,
  "an integer that cannot be printed": 10**4299,
  "true": True,
  "text": "1.0",
  "null": None,
  "a list": [1.0],
}


@pytest.mark.parametrize("how", BAD_TIMES)
def test_a_cache_with_a_time_that_is_none_is_refused(how, tmp_path):
  path = tmp_path / "times.json"
  for text in (
    json.dumps({clock.machine(): {"a": 1.0, "b": BAD_TIMES[how]}}),
    json.dumps({"another": {"b": BAD_TIMES[how]}}),
  ):
    path.write_text(text)
    with pytest.raises(
      ValueError, match=r"cache must be a JSON file.*'b' must take from 1e-12 to 1e\+09 seconds, got"
    ) as caught:
      fp.measure_latency(two_layers, V, X, cache=path)
    assert len(str(caught.value)) < 400
    assert path.read_text() == text


@pytest.mark.parametrize(
  "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\udcff", "NaN", '{"a": {"b": 1}', ""]
)
def test_a_cache_of_something_else_is_refused(text, tmp_path):
  path = tmp_path / "times.json"
  path.write_bytes(text.encode("utf-8", "surrogateescape"))
  with pytest.raises(ValueError, match="cache must be a JSON file"):
    fp.measure_latency(two_layers, V, X, cache=path)


def test_a_time_that_the_clock_cannot_tell_from_nothing_is_above_it(tmp_path):
  clock.Memory(tmp_path / "times.json").add({"a": 0.0})
  assert clock.Memory(tmp_path / "times.json").times == {"a": 1e-12}


def test_a_cache_where_none_can_be_written_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
  monkeypatch.setattr(grids, "medians", None)
  (tmp_path / "file").write_text("")
  with pytest.raises(IsADirectoryError, match="got the folder"):
    fp.measure_latency(two_layers, V, X, cache=tmp_path)
  with pytest.raises(OSError, match=r"a file can be written, got .*times\.json, where .*file is no folder"):
    fp.measure_latency(two_layers, V, X, cache=tmp_path / "file" / "times.json")
  monkeypatch.setattr(clock.os, "access", lambda *_: False)  # root may write anywhere
  with pytest.raises(OSError, match=r"may be written to\. Name another"):
    fp.measure_latency(two_layers, V, X, cache=tmp_path / "times.json")


def test_a_cache_that_knows_everything_need_not_be_written(tmp_path, monkeypatch):
  path = tmp_path / "times.json"
  first = fp.measure_latency(two_layers, V, X, repeats=1, cache=path)
  monkeypatch.setattr(clock.os, "access", lambda *_: False)
  assert fp.measure_latency(two_layers, V, X, repeats=1, cache=path).dense == first.dense


def test_a_cache_may_be_a_link_into_a_folder_that_is_not_there_yet(tmp_path):
  link, target = tmp_path / "link.json", tmp_path / "later" / "times.json"
  link.symlink_to(target)
  clock.Memory(link).add({"a": 1.0})
  assert link.is_symlink()
  assert clock.Memory(target).times == clock.Memory(link).times == {"a": 1.0}
