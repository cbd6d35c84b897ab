"""Widths rounded up: the same outputs and gradients, and no more than enough."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from fisherprune_jax._compaction.rounding import round_up
from fisherprune_jax._graph import sets
from fisherprune_jax._graph.evaluate import Evaluation
from tests.models import CASES
from tests.test_compaction import DIFFERENTIABLE, close, outputs_and_gradients, pruned, values_with_masks

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
NEVER_NEEDED = ("pad_and_slice", "channels_picked_by_index")  # entries that go whatever the masks are


@DIFFERENTIABLE
def test_same_outputs_and_gradients(case, x64):
  apply, variables, x = pruned(case, 3, jnp.float64, alive=0.4)
  small = fp.compact(apply, variables, x, round_to=4)
  close(*outputs_and_gradients(values_with_masks(case), small, variables, x), 1e-10)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("multiple", [3])
def test_widths_are_multiples_or_whole_and_the_cost_is_known(case, multiple):
  apply, variables, x = pruned(case, 4, alive=0.4)
  small = fp.compact(apply, variables, x, round_to=multiple)
  cost = fp.cost_model(apply, variables, x)
  assert small.cost == cost.exact(small.masks) / x.shape[0] >= cost.exact(variables["masks"]) / x.shape[0]
  for kept, given in zip(jax.tree.leaves(small.masks), jax.tree.leaves(variables["masks"]), strict=True):
    assert (kept >= np.asarray(given)).all()
  full = {name: part for name, part in variables.items() if name != "masks"}
  if case.name not in NEVER_NEEDED:
    for new, old in zip(jax.tree.leaves(small.variables), jax.tree.leaves(full), strict=True):
      assert all(n % multiple == 0 or n == m for n, m in zip(new.shape, old.shape, strict=True))


class Pair(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = fp.Mask(name="a")(nn.relu(nn.Dense(20, name="one")(x)))
    x = fp.Mask(name="b")(nn.relu(nn.Dense(30, name="two")(x)))
    return nn.Dense(3, name="three")(x)


def pair(a, b):
  x = jnp.ones((2, 5))
  variables = Pair().init(jax.random.key(0), x)
  masks = {name: {"mask": jnp.arange(n) < k} for name, n, k in (("a", 20, a), ("b", 30, b))}
  return variables | {"masks": jax.tree.map(lambda m: m.astype(jnp.float32), masks)}, x


@pytest.mark.parametrize(("a", "b", "widths"), [(5, 9, (8, 16)), (8, 16, (8, 16)), (17, 25, (20, 30))])
def test_just_enough_features_stay(a, b, widths):
  variables, x = pair(a, b)
  small = fp.compact(Pair().apply, variables, x, round_to=8)
  assert small.variables["params"]["two"]["kernel"].shape == widths


def test_kept_masks_say_which_features_are_dead():
  variables, x = pair(5, 9)
  small = fp.compact(Pair().apply, variables, x, keep_masks=True, round_to=8)
  masks = small.variables["masks"]
  assert [m.shape[0] for m in jax.tree.leaves(masks)] == [8, 16]
  assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [5, 9]
  close(Pair().apply(variables, x), small(small.variables, x), 1e-6)


def test_export_and_another_batch_size():
  variables, x = pair(5, 9)
  small = fp.compact(Pair().apply, variables, x, round_to=8)
  other = jnp.ones((7, 5))
  close(Pair().apply(variables, other), small(small.variables, other), 1e-6)
  close(Pair().apply(variables, other), small.export(x).call(other), 1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_a_union_grows_by_as_little_as_can_be(seed):
  rng = np.random.default_rng(seed)
  masks = {name: rng.random(9) < 0.3 for name in "ab"}
  a, b = (sets.leaf(name, 9) for name in "ab")
  widths = [a, sets.union(a, b)]
  grown = round_up(masks, widths, 3)

  def fits(masks):
    return all(int(Evaluation(masks).count(s)) % 3 == 0 for s in widths)

  def bigger(mask):
    free = np.flatnonzero(~mask)
    for n in range(free.size + 1):
      for chosen in itertools.combinations(free, n):
        yield np.where(np.isin(np.arange(9), chosen), True, mask)

  assert fits(grown)
  least = min(
    int(Evaluation({"a": x, "b": y}).count(widths[1]))
    for x in bigger(masks["a"])
    for y in bigger(masks["b"])
    if fits({"a": x, "b": y})
  )
  assert int(Evaluation(grown).count(widths[1])) == least


@pytest.mark.parametrize("kind", ["take", "concat", "outer", "any", "and"])
def test_every_kind_of_set_can_grow(kind):
  a, b = sets.leaf("a", 6), sets.leaf("b", 6)
  s = {
    "take": sets.take(a, [5, 4, 3, -1, 1, 1]),
    "concat": sets.concat([a, b]),
    "outer": sets.outer([a, b]),
    "any": sets.any_over(sets.take(a, [0, 1, 2, 3]), (2, 2), 0),
    "and": sets.intersection(a, b),
  }[kind]
  masks = {"a": np.arange(6) == 1, "b": np.arange(6) < 2}
  grown = round_up(masks, [s], 2)
  assert int(Evaluation(grown).count(s)) % 2 == 0
  assert all((grown[name] >= masks[name]).all() for name in masks)


def test_what_cannot_grow_is_left_alone():
  dead_end = sets.take(sets.leaf("a", 4), [0, -1, -1])
  grown = round_up({"a": np.ones(4)}, [dead_end], 2)
  assert grown["a"].sum() == 4


def test_round_to_must_be_positive():
  variables, x = pair(5, 9)
  with pytest.raises(ValueError, match="round_to must be at least 1, got 0"):
    fp.compact(Pair().apply, variables, x, round_to=0)
