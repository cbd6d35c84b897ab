"""What analysis, prices and compaction make grows with the network, and no faster; nothing hangs.

Sizes are compared, not times: of the families of ``benchmarks/growth.py`` at N and 2 N.
"""

import contextlib
import gc
import importlib.util
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from fisherprune_jax._compaction.kept import Kept
from fisherprune_jax._cost.counters import FlopsCounter
from fisherprune_jax._cost.measures import cost_of
from fisherprune_jax._graph import sets
from fisherprune_jax._graph.prices import Prices
from fisherprune_jax._graph.sets import expression, junctions
from fisherprune_jax._graph.structured import costs_of
from fisherprune_jax._graph.terms import collect
from fisherprune_jax._graph.traced import trace_apply
from fisherprune_jax._graph.variables import VariableTree, sizes_of
from tests.fuzz import time_limit

_spec = importlib.util.spec_from_file_location(
  "growth", Path(__file__).parent.parent / "benchmarks/growth.py"
)
growth = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(growth)
FAMILIES = pytest.mark.parametrize("family", growth.FAMILIES)
SECONDS = 120.0
"""Far more than any test here takes: a limit against what never ends."""


@pytest.fixture(autouse=True)
def _limit():
  with time_limit(SECONDS):
    yield


def masks_of(masks, seed):
  """Random masks that leave something alive."""
  rng = np.random.default_rng(seed)
  drawn = {name: (rng.random(m.shape) < 0.7).astype(np.float32) for name, m in masks.items()}
  return {name: m if m.any() else np.ones_like(m) for name, m in drawn.items()}


@contextlib.contextmanager
def counting():
  """Counts in a list how often two sets are united or intersected."""
  made, before = [], junctions._combined
  junctions._combined = lambda *args: made.append(0) or before(*args)
  try:
    yield made
  finally:
    junctions._combined = before


def sizes(family, n):
  """How much is made of a network: equations, set expressions, terms, gates, pairs, lines of ``per_feature``."""
  apply, variables, x = growth.network(family, n)
  tree = VariableTree(variables, "masks")
  with counting() as joins:
    model = trace_apply(apply, tree, (x,)).analyse()
    terms = collect(cost.term for cost in costs_of(model.program, model.live, FlopsCounter()))
  prices = Prices(terms, sizes_of(tree.mask_leaves))
  boxes = [model.live.stored(value).box for node in model.program.nodes for value in node.outs]
  found = sets.in_order(s for box in boxes for s in box)
  sharing, features = prices._circuit._sharing, prices._circuit.features
  return {
    "equations": len(model.program.nodes),
    "joins": len(joins),
    "sets": len(found),
    "parts": sum(len(s.parts) for s in found),
    "entries": sum(s.data.size for s in found if isinstance(s.data, np.ndarray)),
    "terms": len(terms),
    "gates": prices._circuit.size,
    "pairs": sharing._size if sharing.found else 0,
    "weights": prices._own.shape[0] * prices._circuit.size,
    "lines": len(jax.make_jaxpr(prices.drops)(jnp.ones(features, bool)).eqns),
  }


SMALL = {
  "plain": 20,
  "wide": 2000,
  "many_wide": 4,
  "elementwise": 20,
  "merged_heads": 16,
  "lookups": 300,
  "flattened": 32,  # fewer do not divide in as many ways
  "shuffles": 16,  # the first ten or so units are told apart by the last ones
}
SLACK = {
  # Reshapes cut the stream up: every later unit hangs on all earlier ones, and has a lane of its own.
  "shuffles": {"weights": 3.6},
  "grouped_norms": {"weights": 4.5},
  # The operands of its concatenations are as many.
  "dense_net": {"parts": 4.2, "joins": 4.2},
  # Each expert's gate is cut from an axis of N, and is so a set of N positions.
  "experts": {"entries": 4.2},
  # How many channels a piece lies across is a matter of arithmetic.
  "flattened": {"pairs": 3.3},
}


@FAMILIES
def test_what_is_made_grows_with_the_network(family):
  n = SMALL.get(family, min(growth.FAMILIES[family][1], 8))
  small, large = sizes(family, n), sizes(family, 2 * n)
  assert large["lines"] <= small["lines"] + 3
  slack = SLACK.get(family, {})
  for name, size in small.items():
    assert large[name] <= slack.get(name, 2.3) * size + 20, (name, small, large)


def shape_of(s):
  """A set as nested tuples, by its masks' keys: equal for sets that are nested alike."""
  found = {}
  for part in sets.in_order([s]):
    data = part.data.tolist() if isinstance(part.data, np.ndarray) else part.data
    data = None if isinstance(part, junctions.Junction) else str(data)
    found[part] = hash((type(part).__name__, part.size, data, *(found[p] for p in part.parts)))
  return found[s]


def unet(n):
  """A network whose second half reads the first half's results in reverse, with masks put into it."""

  def ones(*shape):
    return np.ones(shape, np.float32)

  def apply(p, x):
    h, skips = x @ p["e"], []
    for w in p["d"]:
      h = jnp.tanh(h @ w)
      skips.append(h)
    for w in p["u"]:
      h = jnp.tanh(jnp.concatenate([h, skips.pop()], -1) @ w)
    return h @ p["o"]

  params = {"e": ones(4, 5), "d": [ones(5, 5)] * n, "u": [ones(10, 5)] * n, "o": ones(5, 2)}
  return fp.auto_mask(apply, params, ones(2, 4))


def analysed(auto):
  """How much is joined to analyse a network, and how the sets that are found are nested; nothing of it stays."""
  with counting() as joins:
    model = trace_apply(auto.apply, VariableTree(auto.variables, "masks"), (np.ones((2, 4)),)).analyse()
  wheres = [model.live.stored(value) for node in model.program.nodes for value in node.outs]
  shapes = [shape_of(s) for where in wheres for s in (*where.box, where.when)]
  del model, wheres
  gc.collect()
  return len(joins), shapes


@pytest.mark.parametrize("others_are_held", [True, False])
def test_analysis_does_not_depend_on_what_was_analysed_before(others_are_held):
  auto, other = unet(16), unet(8)
  first = analysed(auto)
  masks = masks_of(other.masks, 0)
  small = fp.compact(other.apply, {**other.variables, "masks": masks}, np.ones((2, 4), np.float32))
  held = [small.report(), small, [sets.leaf(("other", at), 2) for at in range(1000)]]
  if not others_are_held:
    del small
    held.clear()
    gc.collect()
    np.random.default_rng(0).shuffle(expression._free)  # the numbers of sets that are gone, in any order
  assert analysed(auto) == first


@FAMILIES
def test_small_ones_cost_what_brute_force_says(family):
  n = {"merged_heads": 3, "wide": 12, "lookups": 20, "flattened": 5, "bottlenecks": 1}.get(family, 3)
  n = 1 if family == "many_wide" else n
  apply, variables, x = growth.network(family, n)
  cost = fp.cost_model(apply, variables, x)
  for seed in range(2):
    masks = masks_of(variables["masks"], seed)
    before, found = cost.exact(masks), cost.per_feature(masks)
    assert float(cost(masks)) * 2 == pytest.approx(before, rel=1e-6)
    for name, mask in masks.items():
      for k in [*np.ndindex(mask.shape)][:12]:
        fewer = np.array(mask)
        fewer[k] = 0
        assert found[name][k] * 2 == pytest.approx(before - cost.exact({**masks, name: fewer}), rel=1e-6)


@FAMILIES
def test_small_ones_compact_to_the_same_function(family):
  apply, variables, x = growth.network(family, 2 if family not in ("wide", "lookups") else 20)
  masked = {**variables, "masks": masks_of(variables["masks"], 1)}
  small = fp.compact(apply, masked, x)
  np.testing.assert_allclose(small(small.variables, x), apply(masked, x), rtol=2e-5, atol=2e-5)


def test_three_hundred_blocks_that_mask_the_stream_twice():
  apply, variables, x = growth.network("elementwise", 300)
  cost = fp.cost_model(apply, variables, x)
  masks = masks_of(variables["masks"], 0)
  masks["m0"], last = np.ones(8, np.float32), "m600"
  for at in range(2, 601, 2):  # the stream's own; those of the writes stay as they were drawn
    masks[f"m{at}"] = np.ones(8, np.float32)
  masks[last] = np.array([1, 1, 0, 1, 0, 1, 1, 1], np.float32)
  small = fp.compact(apply, {**variables, "masks": masks}, x)
  assert small.variables["params"]["p300"].shape == (6, 2)
  fewer = {**masks, "m300": np.where(np.arange(8) == 0, 0, masks["m300"])}
  assert cost.exact(fewer) < cost.exact(masks)


def test_a_lookup_in_a_large_table_is_as_large_as_the_table():
  table, mask = np.ones((30_000, 8), np.float32), np.array([1, 0, 1, 1, 0, 1, 1, 1], np.float32)

  def apply(v, x):
    rows = jnp.take(v["params"]["table"], jnp.zeros(3000, int), axis=0) * v["masks"]["m"]
    return x * rows.sum(0)

  variables, x = {"params": {"table": table}, "masks": {"m": mask}}, np.ones((2, 8), np.float32)
  small = fp.compact(apply, variables, x)
  assert small.variables["params"]["table"].shape == (1, 6)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x))
  tree = VariableTree(variables, "masks")
  model = trace_apply(apply, tree, (x,)).analyse()
  boxes = [model.live.stored(value).box for node in model.program.nodes for value in (*node.ins, *node.outs)]
  found = sets.in_order(s for box in boxes for s in box)
  assert max(s.data.size for s in found if isinstance(s.data, np.ndarray)) <= 30_000


@pytest.mark.parametrize("cut", [(49, 32), (32, 49), (14, 112), (112, 14), (98, 16), (7, 7, 32)])
def test_a_flattened_image_may_be_cut_anywhere(cut):
  kernel = np.random.default_rng(0).normal(size=(6, 32 * 49)).astype(np.float32)

  def apply(v, x):
    y = (x @ v["params"]["kernel"]).reshape(-1, 32, 7, 7) * v["masks"]["m"][:, None, None]
    return jnp.tanh(y).reshape(x.shape[0], -1).reshape(-1, *cut).sum(2)

  mask = (np.arange(32) % 3 == 0).astype(np.float32)
  variables, x = {"params": {"kernel": kernel}, "masks": {"m": mask}}, np.ones((2, 6), np.float32)
  cost = fp.cost_model(apply, variables, x)
  found = cost.per_feature(variables["masks"])["m"]
  for k in range(6):
    fewer = np.where(np.arange(32) == k, 0, mask)
    drop = cost.exact({"m": mask}) - cost.exact({"m": fewer})
    assert float(found[k]) * 2 == pytest.approx(drop, rel=1e-6)
  small = fp.compact(apply, variables, x)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-5, atol=1e-5)


def kept(*index, shape):
  return Kept(shape, tuple(None if i is None else np.array(i) for i in index))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16])
def test_concrete_weights_are_cut_without_compiling(dtype, caplog):
  k = kept([0, 3, 4], None, [1], shape=(5, 7, 3))
  stack = Kept((2, 5), (None, None), ((np.array([0, 2]),), (np.array([1]),)))
  leaf = np.arange(105).reshape(5, 7, 3).astype(dtype)
  rows = np.arange(10).reshape(2, 5).astype(dtype)
  given = [jnp.asarray(leaf), jnp.asarray(rows)]
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    found, layers = k.slice(given[0]), stack.slice(given[1])
  assert not [r for r in caplog.records if "ompiling" in r.getMessage()]
  np.testing.assert_array_equal(found, leaf[[0, 3, 4]][:, :, [1]])
  np.testing.assert_array_equal(layers, np.array([[0, 2], [6, 0]]).astype(dtype))
  assert isinstance(found, jax.Array)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, jax.jit(k.slice)(given[0]))
  np.testing.assert_array_equal(jax.vmap(k.slice)(given[0][None])[0], found)


def test_weights_stay_where_they_are_committed():
  k, leaf = kept([0, 2], shape=(4,)), jnp.arange(4.0)
  device = jax.devices()[0]
  assert not k.slice(leaf).committed
  committed = jax.device_put(leaf, device)
  assert k.slice(committed).committed
  assert k.slice(committed).sharding == committed.sharding
  keys = jax.random.split(jax.random.key(0), 4)
  assert (jax.random.key_data(k.slice(keys)) == jax.random.key_data(keys)[np.array([0, 2])]).all()


def test_compacting_does_not_make_what_only_prices_need():
  apply, variables, x = growth.network("plain", 3)
  tree = VariableTree(variables, "masks")
  model = trace_apply(apply, tree, (x,)).analyse()
  made = []
  before, Prices.__init__ = Prices.__init__, lambda self, *args: made.append(args)
  try:
    cost_of(model, tree, 2, FlopsCounter()).exact(variables["masks"])
  finally:
    Prices.__init__ = before
  assert not made
