"""``fp.reconstruct`` against loops of ridge regressions in NumPy, and on networks whose masked features have a twin that stays."""

import functools
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fisherprune_jax as fp
from tests.auto_models import UNMASKED
from tests.fuzz import run_seed
from tests.fuzz_auto import find
from tests.reconstruct_kinds import KINDS, normal, weights


def by_path(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def error(found: Any, expected: Any) -> float:
  """The squared error over the square of what is expected."""
  pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
  square = lambda x: float(np.sum(np.square(np.asarray(x, np.float64))))
  missing = sum(square(np.asarray(x, np.float64) - np.asarray(y, np.float64)) for x, y in pairs)
  return missing / sum(square(y) for _, y in pairs)


# Features that have a twin.


def half(auto: Any, names: Any, first: int) -> Any:
  """Masks without every second feature of some groups, from the first or the second; the last of an odd number stays."""
  masks = {name: np.ones(mask.shape, np.float32) for name, mask in auto.masks.items()}
  for name in names:
    masks[name][..., first : auto.masks[name].shape[-1] // 2 * 2 : 2] = 0
  return masks


def twinned(auto: Any, args: Any) -> Any:
  """The variables of a network in which features 2k and 2k + 1 of every group are the same."""
  rest = {key: part for key, part in auto.variables.items() if key != "masks"}
  leaves = {path: np.array(leaf) for path, leaf in by_path(rest).items()}
  for group in auto.groups:
    kept: list[Any] = []
    for name, axis in group.members:
      path = name if name in leaves else f"params/{name}"  # of a tree that is no mapping
      rows = np.moveaxis(leaves[path], axis, 0)
      places = [np.arange(first, group.size // 2 * 2, 2) for first in (0, 1)]
      if (
        len(rows) != group.size
      ):  # it is a part of the axis: what is kept without the one or the other tells which
        kept = kept or [_kept(auto, half(auto, [group.name], first), args) for first in (1, 0)]
        with_one, with_other = (each[f"{path}/{axis}"] for each in kept)
        places = [np.setdiff1d(with_one, with_other), np.setdiff1d(with_other, with_one)]
      rows[places[1]] = rows[places[0]]
  found = jax.tree.unflatten(jax.tree.structure(rest), list(map(jnp.asarray, leaves.values())))
  return {**found, "masks": auto.masks}


def _kept(auto: Any, masks: Any, args: Any) -> dict[str, np.ndarray]:
  return by_path(fp.compact(auto.apply, {**auto.variables, "masks": masks}, *args).kept)


def recovery(auto: Any, variables: Any, names: Any, batches: Any, fresh: Any) -> tuple[float, float]:
  """The error on other data without the twins of some groups, and that after the refitting."""
  masked = {**variables, "masks": half(auto, names, 1)}
  fitted = fp.reconstruct(auto.apply, masked, batches, ridge=1e-6)
  run = jax.jit(auto.apply)
  dense = run(variables, *fresh)
  return error(run(masked, *fresh), dense), error(run(fitted, *fresh), dense)


# Loops of regressions.


def regression(x: np.ndarray, missing: np.ndarray, ridge: float, bias: bool) -> Any:
  """The change of the parameters, and of the bias."""
  live = (x != 0).any(0)
  level = ridge * np.mean(np.sum(x[:, live] ** 2, 0))
  middle, offset = (x.mean(0), missing.mean(0)) if bias else (0, 0)
  a, b = (x - middle)[:, live], missing - offset
  change = np.zeros((x.shape[1], missing.shape[1]))
  change[live] = np.linalg.solve(a.T @ a + level * np.eye(live.sum()), a.T @ b)
  return change, offset - middle @ change if bias else 0.0


def refit(params: Any, layer: str, x: Any, added: Any, target: Any, ridge: float, mask: Any = 1) -> Any:
  """Refits a layer in place, so that it and what is added come to the target under a mask; returns what they come to."""
  w, b = params[f"w{layer}"], params.get(f"b{layer}")
  missing = (target - (x @ w + (0 if b is None else b) + added)) * mask
  change, of_bias = regression(x, missing, ridge, b is not None)
  params[f"w{layer}"] = w + change
  if b is not None:
    params[f"b{layer}"] = b + of_bias
  return x @ params[f"w{layer}"] + params.get(f"b{layer}", 0) + added


def mlp(p: Any, x: Any) -> Any:
  h = jnp.tanh(x @ p["w1"] + p["b1"])
  return jnp.tanh(h @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]


def mlp_by_hand(p: Any, masks: Any, x: np.ndarray, ridge: float) -> Any:
  first, p = np.tanh(x @ p["w1"] + p["b1"]), dict(p)
  second = first @ p["w2"] + p["b2"]
  out = np.tanh(second) @ p["w3"] + p["b3"]
  second = refit(p, "2", first * masks["w1"], 0, second, ridge)
  refit(p, "3", np.tanh(second) * masks["w2"], 0, out, ridge)
  return p


def without_bias(p: Any, x: Any) -> Any:
  return jax.nn.relu(x @ p["w1"]) @ p["w2"]


def without_bias_by_hand(p: Any, masks: Any, x: np.ndarray, ridge: float) -> Any:
  h, p = np.maximum(x @ p["w1"], 0), dict(p)
  refit(p, "2", h * masks["w1"], 0, h @ p["w2"], ridge)
  return p


def residual(p: Any, x: Any) -> Any:
  h = x @ p["w1"]
  h = h + jnp.tanh(h @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]
  h = h + jnp.tanh(h @ p["w4"]) @ p["w5"]
  return h @ p["w6"] + p["b6"]


def residual_by_hand(p: Any, masks: Any, x: np.ndarray, ridge: float) -> Any:
  """The stream is complete behind each block; the first layer reads nothing masked."""
  stream = masks["w1"]
  p, h = dict(p), x @ p["w1"]
  inner = h @ p["w2"] + p["b2"]
  after = h + np.tanh(inner) @ p["w3"] + p["b3"]
  gate = after @ p["w4"]
  last = after + np.tanh(gate) @ p["w5"]
  out = last @ p["w6"] + p["b6"]
  inner = refit(p, "2", h * stream, 0, inner, ridge)
  h = refit(p, "3", np.tanh(inner) * masks["w2"], h, after, ridge)
  gate = refit(p, "4", h * stream, 0, gate, ridge)
  h = refit(p, "5", np.tanh(gate) * masks["w4"], h, last, ridge, stream)  # only one product reads it
  refit(p, "6", h * stream, 0, out, ridge)
  return p


MLP = {"w1": (3, 10), "b1": (10,), "w2": (10, 8), "b2": (8,), "w3": (8, 2), "b3": (2,)}
RESIDUAL = {"w1": (3, 8), "w2": (8, 7), "b2": (7,), "w3": (7, 8), "b3": (8,), "w4": (8, 6), "w5": (6, 8)}
LOOPS = {
  "mlp": (mlp, mlp_by_hand, MLP),
  "without_bias": (without_bias, without_bias_by_hand, {"w1": (3, 10), "w2": (10, 2)}),
  "residual": (residual, residual_by_hand, {**RESIDUAL, "w6": (8, 2), "b6": (2,)}),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_it_is_a_loop_of_regressions(name, ridge):
  fn, by_hand, shapes = LOOPS[name]
  params, batches = weights(shapes), [jnp.asarray(normal(16, 3, seed=at)) for at in range(5)]
  auto = fp.auto_mask(fn, params, batches[0])
  masks = half(auto, auto.masks, 1)
  found = fp.reconstruct(auto.apply, {**params, "masks": masks}, batches, ridge=ridge)
  params = {key: np.asarray(leaf, np.float64) for key, leaf in params.items()}
  expected = by_hand(params, masks, np.concatenate(batches).astype(np.float64), ridge)
  assert any(np.abs(expected[key] - params[key]).max() > 0.1 for key in params)
  for key, leaf in expected.items():
    np.testing.assert_allclose(found[key], leaf, 1e-3, 1e-4, err_msg=key)


# Kinds of products.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", KINDS)
def test_twins_are_made_up_for(name):
  fn, init, shape = KINDS[name]
  x, fresh = (jnp.asarray(normal(80, *shape, seed=seed)) for seed in range(2))
  auto = fp.auto_mask(fn, init(x), x)
  before, after = recovery(auto, twinned(auto, (x,)), auto.masks, [x], (fresh,))
  assert before > 1e-2
  assert after < 1e-4 * before


def test_products_that_are_added_share_what_is_missing():
  def gates(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"] + jnp.sin(x @ p["c"]) @ p["d"]

  params = weights({"a": (6, 16), "b": (16, 3), "c": (6, 16), "d": (16, 3)})
  x, fresh = (jnp.asarray(normal(200, 6, seed=seed)) for seed in range(2))
  auto = fp.auto_mask(gates, params, x)
  before, after = recovery(auto, twinned(auto, (x,)), auto.masks, [x], (fresh,))
  assert after < 0.02 * before  # one round leaves 0.07


def table_lookup(p, x):
  h = jnp.tanh(p["table"][jnp.argmax(x, -1)] @ p["a"])
  return jnp.tanh(h @ p["b"]) @ p["table"].T


def normalised(p, x):
  h = jnp.tanh(jnp.tanh(x @ p["a"]) @ (p["b"] * lax.rsqrt(jnp.sum(p["b"] ** 2, 0))))
  return h @ p["c"]


def looped(p, x):
  step = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ p["b"]))
  return lax.while_loop(lambda carry: carry[0] < 3, step, (0, jnp.tanh(x @ p["a"])))[1] @ p["c"]


def ragged(p, x):
  h, half = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["c"]), len(x) // 2
  return lax.ragged_dot(h, p["b"], jnp.array([half, len(x) - half]))


SQUARE = {"a": (3, 6), "b": (6, 6), "c": (6, 2)}
LEFT = {
  "normalised": (normalised, SQUARE, "its parameters are computed, by 'mul'"),
  "looked_up": (
    table_lookup,
    {"table": (3, 4), "a": (4, 6), "b": (6, 4)},
    "its parameters are read by 'gather' too",
  ),
  "ragged": (
    ragged,
    {"a": (3, 6), "b": (2, 6, 2), "c": (6, 6)},
    "a 'ragged_dot_general' of this kind is not refitted",
  ),
  "looped": (looped, SQUARE, "it is inside of a 'while'"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_a_reason(name):
  fn, shapes, reason = LEFT[name]
  params, x = weights(shapes), jnp.asarray(normal(40, 3))
  auto = fp.auto_mask(fn, params, x)
  masked = {**params, "masks": half(auto, auto.masks, 1)}
  with pytest.warns(
    UserWarning, match=rf"(?s)left these products as they are.*test_reconstruct\.py:\d+.*{reason}"
  ):
    fitted = fp.reconstruct(auto.apply, masked, [x], ridge=1e-2)
  dense = auto.apply(params, x)
  assert error(auto.apply(fitted, x), dense) < error(auto.apply(masked, x), dense)
  alone, *others = [key for key in params if np.array_equal(fitted[key], params[key])]
  assert {alone, *others} >= {"table" if name == "looked_up" else "b"}


def test_a_bias_of_two_layers_stays():
  params = weights({"a": (3, 6), "v": (6, 4), "w": (6, 4), "b": (4,), "o": (4, 2)})
  fn = lambda p, x: (jnp.tanh(x @ p["a"] @ p["v"] + p["b"]) * jnp.sin(x @ p["a"] @ p["w"] + p["b"])) @ p["o"]
  x = jnp.asarray(normal(40, 3))
  auto = fp.auto_mask(fn, params, x)
  fitted = fp.reconstruct(auto.apply, {**params, "masks": half(auto, ["a"], 1)}, [x])
  np.testing.assert_array_equal(fitted["b"], params["b"])
  assert not np.array_equal(fitted["v"], params["v"])


# Batches.


@functools.cache
def small() -> Any:
  """A network with automatic masks, its variables with some masked, and a batch."""
  params, x = weights(MLP), jnp.asarray(normal(24, 3), jnp.float32)
  auto = fp.auto_mask(mlp, params, x)
  return auto, {**params, "masks": half(auto, auto.masks, 1)}, x


def same(a: Any, b: Any) -> None:
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, 1e-3, 1e-4)


def test_batches_may_be_tuples_single_arguments_or_a_generator():
  auto, masked, x = small()
  parts = jnp.split(x, 4)
  expected = fp.reconstruct(auto.apply, masked, parts)
  assert not np.allclose(expected["w3"], masked["w3"])
  same(fp.reconstruct(auto.apply, masked, ((part,) for part in parts)), expected)
  same(fp.reconstruct(auto.apply, masked, [x]), expected)  # it is cut into as many
  same(fp.reconstruct(auto.apply, masked, iter([np.asarray(x)])), expected)


def test_batches_of_several_sizes():
  auto, masked, x = small()
  expected = fp.reconstruct(auto.apply, masked, [x], ridge=0.1)
  same(fp.reconstruct(auto.apply, masked, [x[:9], x[9:10], x[10:19], x[19:]], ridge=0.1), expected)


def test_a_batch_that_is_not_finite_counts_for_nothing():
  auto, masked, x = small()
  parts = jnp.split(x, 6)
  parts[1], left = parts[1].at[0, 0].set(jnp.nan), [*parts[:1], *parts[2:]]
  found = fp.reconstruct(auto.apply, masked, parts, ridge=0.1)
  same(found, fp.reconstruct(auto.apply, masked, left, ridge=0.1))
  assert not np.allclose(found["w3"], masked["w3"])


def test_one_batch_size_alone():
  _, masked, x = small()
  fixed = lambda p, x: mlp(p, x.reshape(24, 3))
  auto = fp.auto_mask(fixed, {k: v for k, v in masked.items() if k != "masks"}, x)
  found = fp.reconstruct(auto.apply, masked, [x])
  dense = fixed(masked, x)
  assert error(auto.apply(found, x), dense) < 0.2 * error(auto.apply(masked, x), dense)


def test_weights_leave_padding_out():
  auto, masked, x = small()
  parts = [(x[at : at + 6], jnp.ones(6)) for at in range(0, 24, 6)]
  run = lambda variables, x, counts: auto.apply(variables, x)
  counts = lambda x, counts: counts
  expected = fp.reconstruct(run, masked, parts)
  pad = lambda a, value: jnp.concatenate([a, jnp.full((2, *a.shape[1:]), value)])
  for value in (50.0, jnp.nan):
    padded = [(pad(a, value), pad(b, 0)) for a, b in parts]
    same(fp.reconstruct(run, masked, padded, weights=counts), expected)
  twice = [(a, b.at[:3].set(2)) for a, b in parts]
  again = [*parts, *[(a[:3], b[:3]) for a, b in parts]]
  found = fp.reconstruct(run, masked, twice, weights=counts, ridge=0.1)
  same(found, fp.reconstruct(run, masked, again, ridge=0.1))


def test_weights_of_positions():
  params = weights({"a": (3, 6), "b": (6, 2)})
  x, counts = jnp.asarray(normal(8, 5, 3)), jnp.asarray(normal(8, 5) > 0, jnp.float32)
  auto = fp.auto_mask(lambda p, x, counts: jnp.tanh(x @ p["a"]) @ p["b"], params, x, counts)
  masked = {**params, "masks": half(auto, ["a"], 1)}
  found = fp.reconstruct(auto.apply, masked, [(x, counts)], weights=lambda x, counts: counts, ridge=0.1)
  live = counts > 0
  same(found, fp.reconstruct(auto.apply, masked, [(x[live], counts[live])], ridge=0.1))


def test_progress_and_reference():
  auto, masked, x = small()
  seen: list[Any] = []
  track = lambda items: (seen.append(item) or item for item in items)
  params = {key: leaf for key, leaf in masked.items() if key != "masks"}
  expected = fp.reconstruct(auto.apply, masked, [x])
  same(fp.reconstruct(auto.apply, masked, [x], progress=track, reference=params), expected)
  assert len(seen) == 2
  other = {**params, "w3": 2 * params["w3"], "b3": 2 * params["b3"]}
  found = fp.reconstruct(auto.apply, masked, [x], reference=other)
  dense = mlp(other, x)
  assert error(auto.apply(found, x), dense) < 0.2 * error(auto.apply(masked, x), dense)


def test_errors():
  auto, masked, x = small()
  params = {key: leaf for key, leaf in masked.items() if key != "masks"}
  for variables, batches, options, message in [
    (params, [x], {}, "must hold masks"),
    (masked, [], {}, "batches must hold at least one batch"),
    (masked, [x], {"ridge": 0.0}, "ridge must be positive, got 0.0"),
    (masked, [x], {"ridge": -1.0}, "ridge must be positive"),
    (masked, [x], {"reference": {"w1": params["w1"]}}, "reference must have the structure of variables"),
    (masked, [x], {"reference": {**params, "w3": jnp.ones((8, 3))}}, "reference must"),
  ]:
    with pytest.raises(ValueError, match=message):
      fp.reconstruct(auto.apply, variables, batches, **options)
  for variables, batches, message in [
    ([1, 2], [x], "variables must be a mapping"),
    (masked, x, "For a single batch pass"),
  ]:
    with pytest.raises(TypeError, match=message):
      fp.reconstruct(auto.apply, variables, batches)


@pytest.mark.skipif(jax.device_count() < 8, reason="eight host devices are made in conftest.py")
def test_sharded_batches_and_parameters():
  auto, masked, x = small()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  put = lambda leaf, *axes: jax.device_put(leaf, NamedSharding(mesh, P(*axes)))
  placed = {key: jax.tree.map(put, leaf) for key, leaf in masked.items()}
  placed["w3"], placed["w2"] = put(masked["w3"], "data"), put(masked["w2"], None, "data")
  parts = [put(x[:8], "data"), put(x[8:], "data")]
  found = fp.reconstruct(auto.apply, placed, parts, ridge=0.1)
  same(found, fp.reconstruct(auto.apply, masked, [x], ridge=0.1))
  for key in ("w2", "w3", "b3"):
    assert found[key].sharding == placed[key].sharding


# Tables of networks.

UNREAD = {
  # what only other activations read
  **dict.fromkeys(
    ["in_chunks", "relative_positions", "cross_attention", "heads_in_the_batch"], "query.depth"
  ),
  **dict.fromkeys(["rotary_by_pairs", "rotary_by_every_two", "grouped_queries_by_jax"], "query.depth"),
  "rotary_by_positions": "q*.depth",
  "rotary_in_a_scan": "q.depth",
  "fused_by_reshape": "qkv.depth.3",
  "one_example_at_a_time": "q.heads q.depth",
  "ensemble": "w.width.0.0",
  "two_towers": "left",
  "factorisation_machine": "*",
  "features_multiplied": "bottom",
  "kernels_of_each_example": "first",
  # heads and places that are told apart by constants, so that they have no twin
  "biases_and_head_masks": "q*.heads q*.depth",
  "sines_and_windows": "stem",
  "mixer": "back",
  # features that a norm takes together
  **dict.fromkeys(["vit", "vit_in_two_passes"], "patches query.depth"),
  "decoder": "embed query.depth",
  "mamba": "stem select.depth",
  "mixer_of_cut_patches": "patches",
  "group_norm": "*.1",
  "group_norm_in_two_passes": "*.1",
  "scaled_and_shifted": "bend",
  # products whose parameters are computed
  "weight_norm": "v",
  "weight_standardisation": "a",
  "spectral_norm": "*",
  "cosine_classifier": "*",
  "power_iteration_in_a_loop": "*",
  "queries_projected_alone": "a",
  "linear_recurrence": "*",
  # states, which read what their own parameters make
  **dict.fromkeys(["weights_shared", "for_loop", "while_loop", "recurrent", "lstm_both_ways"], "*"),
  "lstm": "before",
  "gru": "cell*",
  "recurrent_layers_in_a_scan": "w",
  # two products with a sum: the first makes up for the other one's twins as well as it can
  "scanned_arrays": "u",
  "weights_of_each_place": "local*",
}


def check_kept(apply: Any, masked: Any, fitted: Any, batches: Any, dense: Any) -> None:
  """Tree, shapes, dtypes, masks and what is no parameter are as before; all is finite, and no further from the dense one."""
  assert jax.tree.structure(fitted) == jax.tree.structure(masked)
  for (path, old), new in zip(by_path(masked).items(), jax.tree.leaves(fitted), strict=True):
    assert (new.shape, new.dtype) == (old.shape, jnp.asarray(old).dtype), path
    assert np.isfinite(np.asarray(new, np.float64)).all(), path
    if not path.startswith("params/") or not jnp.issubdtype(old.dtype, jnp.floating):
      np.testing.assert_array_equal(new, old, err_msg=path)
  expected = [apply(dense, *batch) for batch in batches]
  before, after = (error([apply(v, *batch) for batch in batches], expected) for v in (masked, fitted))
  assert after <= (1 + 1e-6) * before + 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", UNMASKED)
@pytest.mark.filterwarnings("ignore:fp.reconstruct left")
def test_networks(name):
  """Twins of groups that products with parameters read are made up for, on other data; else nothing is worse."""
  model = UNMASKED[name]
  args, fresh = (model.inputs(seed, jnp.float64, 24) for seed in range(2))
  auto = fp.auto_mask(model.apply, model.variables(0, jnp.float64), *args)
  names = [g for g in auto.masks if not any(fnmatch(g, part) for part in UNREAD.get(name, "").split())]
  variables, run = twinned(auto, args), jax.jit(auto.apply)
  masked = {**variables, "masks": half(auto, names or auto.masks, 1)}
  fitted = fp.reconstruct(auto.apply, masked, [args], ridge=1e-6)
  check_kept(run, masked, fitted, [args, fresh] if names else [args], variables)
  if names:
    dense = run(variables, *fresh)
    before, after = error(run(masked, *fresh), dense), error(run(fitted, *fresh), dense)
    assert before > 1e-3
    assert after < 0.01 * before


def test_most_networks_make_up_for_twins():
  assert len([name for name in UNMASKED if UNREAD.get(name) != "*"]) >= 79


def check_random(net: Any, other: int) -> None:
  """A random network with the masks of its groups, on batches of two sizes."""
  found = find(net, other)
  variables, batches = found.variables, [(net.batch(n),) for n in (net.shape[0], other)]
  fitted = fp.reconstruct(found, variables, batches)
  dense = {**variables, "masks": jax.tree.map(jnp.ones_like, variables["masks"])}
  check_kept(jax.jit(found), variables, fitted, batches, dense)


@pytest.mark.parametrize("block", range(5))
@pytest.mark.filterwarnings("ignore:fp.reconstruct left")
def test_random_networks(block):
  for seed in range(2000 + 3 * block, 2003 + 3 * block):
    run_seed(seed, check_random)


@pytest.mark.parametrize("name", ["normed", "stack_of_arrays"])
def test_parameters_of_half_precision(name):
  fn, init, shape = KINDS[name]
  x = jnp.asarray(normal(80, *shape), jnp.bfloat16)
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init(x))
  auto = fp.auto_mask(fn, {"params": params}, x)
  masked = {"params": params, "masks": half(auto, auto.masks, 1)}
  fitted, run = fp.reconstruct(auto.apply, masked, [x]), jax.jit(auto.apply)
  check_kept(run, masked, fitted, [(x,)], auto.variables)
  dense = run(auto.variables, x)
  assert error(run(fitted, x), dense) < 0.5 * error(run(masked, x), dense)
