"""Which entries of the first network a compact one keeps: its weights are looked up there, also after several times."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisherprune_jax as fp
from tests.models import CASES, random_masks


def numbered(tree):
  """A tree of arrays whose entries are all different, so that where one came from can be told."""
  leaves, structure = jax.tree.flatten(tree)
  ends = np.cumsum([leaf.size for leaf in leaves])
  return jax.tree.unflatten(
    structure,
    [
      jnp.arange(end - leaf.size + 1.0, end + 1).reshape(leaf.shape)
      for leaf, end in zip(leaves, ends, strict=True)
    ],
  )


def looked_up(full, index):
  """What the indices say is kept of a leaf, entry by entry; zeros for padding."""
  full = np.asarray(full)
  out = np.zeros([positions.shape[-1] for positions in index], full.dtype)
  for at in np.ndindex(out.shape):
    place = [p[i] if p.ndim == 1 else p[at[0], i] for p, i in zip(index, at, strict=True)]
    out[at] = 0 if -1 in place else full[tuple(place)]
  return out


def check(small, variables):
  """Every weight of a compact network is found in the first one, where ``kept`` says."""
  kept = jax.tree_util.tree_leaves_with_path(small.kept, is_leaf=lambda x: type(x) is tuple)
  leaves = jax.tree_util.tree_leaves_with_path(small.variables)
  full = dict(jax.tree_util.tree_leaves_with_path(variables))
  assert [path for path, _ in kept] == [path for path, _ in leaves]
  for (path, leaf), (_, index) in zip(leaves, kept, strict=True):
    assert all(positions.dtype.kind == "i" for positions in index)
    np.testing.assert_array_equal(leaf, looked_up(full[path], index), str(path))


def pruned(name):
  case = CASES[name]
  variables = case.variables()
  masks = random_masks(variables["masks"], 0)
  return case.module().apply, {**numbered({"params": variables["params"]}), "masks": masks}, case.inputs()


@pytest.mark.parametrize("name", ["mlp", "cnn_with_flatten", "scanned_layers"])
def test_every_weight_stands_where_it_says(name):
  apply, variables, x = pruned(name)
  check(fp.compact(apply, variables, x), variables)


def test_layers_of_a_stack_have_a_row_each_padded_with_minus_one():
  apply, variables, x = pruned("scanned_layers")
  small = fp.compact(apply, variables, x)
  rows = [i for i in jax.tree.leaves(small.kept) if i.ndim == 2]
  assert any((row == -1).any() for row in rows)


def fewer(masks, seed):
  """Some of the features that are left, of each mask, but never none."""
  random = np.random.default_rng(seed)

  def row(mask):
    alive = np.flatnonzero(mask)
    gone = random.permutation(alive)[: len(alive) // 2]
    return np.where(np.isin(np.arange(len(mask)), gone), 0, mask)

  return jax.tree.map(lambda m: jnp.asarray(np.apply_along_axis(row, -1, np.asarray(m))), masks)


@pytest.mark.parametrize("name", ["mlp", "cnn_with_flatten", "scanned_layers"])
def test_a_network_compacted_three_times_says_so_of_the_first_one(name):
  apply, variables, x = pruned(name)
  small, full = apply, variables
  for turn in range(3):
    small = fp.compact(small, variables, x, keep_masks=turn < 2)
    variables = {**small.variables, "masks": fewer(small.variables["masks"], turn)} if turn < 2 else None
  check(small, full)


def mlp(params, x):
  return jnp.tanh(jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]) @ params["u"]


PARAMS = numbered({"w": jnp.zeros((3, 6)), "b": jnp.zeros(6), "v": jnp.zeros((6, 5)), "u": jnp.zeros((5, 2))})
X = jnp.ones((2, 3))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, functools.partial])
def test_masks_that_are_found_anew_in_a_compact_network(wrap):
  auto = fp.auto_mask(mlp, PARAMS, X)
  masks = {"w": jnp.array([1.0, 0, 1, 0, 1, 1]), "v": jnp.array([0, 1.0, 1, 1, 0])}
  small = fp.compact(auto.apply, {**PARAMS, "masks": masks}, X)
  again = fp.auto_mask(wrap(small), small.variables, X)
  masks = {"w": jnp.array([0, 1.0, 1, 0]), "v": jnp.array([1.0, 0, 1])}
  smaller = fp.compact(again.apply, {**small.variables, "masks": masks}, X)
  np.testing.assert_array_equal(smaller.kept["v"][0], [2, 4])
  np.testing.assert_array_equal(smaller.kept["v"][1], [1, 3])
  check(smaller, PARAMS)
  assert smaller.dense == small.dense == fp.cost_model(auto.apply, auto.variables, X).dense


def test_a_network_that_is_hidden_is_named():
  auto = fp.auto_mask(mlp, PARAMS, X)
  masks = {"w": jnp.array([0, 1.0, 1, 1, 1, 1]), "v": jnp.ones(5)}
  small = fp.compact(auto.apply, {**PARAMS, "masks": masks}, X)
  again = fp.auto_mask(lambda variables, x: 2 * small(variables, x), small.variables, X)
  masks = {"w": jnp.array([0, 1.0, 1, 1, 1]), "v": jnp.ones(5)}
  variables = {**small.variables, "masks": masks}
  assert list(fp.compact(again.apply, variables, X).kept["b"][0]) == [1, 2, 3, 4]  # of what it was given
  assert list(fp.compact(again.apply, variables, X, parent=small).kept["b"][0]) == [2, 3, 4, 5]


def test_nnx_modules_that_are_compacted_twice():
  model = nnx.Sequential(nnx.Linear(2, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
  x = jnp.ones((4, 2))
  masked = fp.nnx.auto_mask(model, x)
  masked.masks["layers/0"][...] = jnp.array([0, 1.0, 1, 0, 1, 1])
  small = fp.nnx.compact(masked, x)
  again = fp.nnx.auto_mask(fp.nnx.module(small, masked), x)
  again.masks["model/layers/0"][...] = jnp.array([1.0, 0, 0, 1])
  kept = fp.nnx.compact(again, x).kept["params"]["model"]["model"]["layers"]
  assert list(kept[0]["bias"][0]) == list(kept[2]["kernel"][0]) == [1, 5]
  own = fp.nnx.shrink_module(small, masked, x)
  alone = fp.nnx.auto_mask(own, x)
  alone.masks["layers/0"][...] = jnp.array([0, 0, 1.0, 1])
  kept = fp.nnx.compact(alone, x, parent=small).kept["params"]["model"]["layers"]
  assert list(kept[0]["bias"][0]) == [4, 5]


def test_variables_of_linen_with_masks_kept_have_them_among_what_is_kept():
  model = nn.Sequential([nn.Dense(4), nn.relu, fp.Mask(), nn.Dense(3)])
  variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
  variables["masks"]["layers_2"]["mask"] = jnp.array([0, 1.0, 0, 1])
  small = fp.compact(model.apply, variables, jnp.ones((1, 2)), keep_masks=True)
  assert list(small.kept["masks"]["layers_2"]["mask"][0]) == [1, 3]
