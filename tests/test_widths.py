"""Exact widths, with a target or without one, at once and while training; and families of masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from tests.test_choices import importance_like, linear, network, same, slowly


def widths_of(masks):
  return {name: np.asarray(mask).sum(-1).astype(int).tolist() for name, mask in masks.items()}


def trained(cost, importance, steps, **options):
  """The widths after each step, with gradients of this importance."""
  tx = fp.fisher_prune(cost, prune_every=1, method="fisher", **options)
  grads = jax.tree.map(lambda s: jnp.sqrt(2 * s)[..., None, :], importance)
  update = jax.jit(lambda state: tx.update({}, state, mask_grads=grads)[1])
  state, seen = tx.init({}), []
  for _ in range(steps):
    state = update(state)
    seen.append(widths_of(fp.get_masks(state)))
  return seen, state


def test_without_a_target_they_alone_come_down_and_the_rest_stays_whole():
  cost = linear()
  importance = importance_like(cost.masks)
  found = fp.select_masks(cost, importance, widths={"a": 7, "rows[1]": 3, "b": 16})
  assert widths_of(found) == {"a": 7, "b": 16, "rows": [8, 3, 8], "x.block": 1}
  lowest = np.argsort(importance["a"])[:13]
  assert not found["a"][lowest].any()
  _, state = trained(cost, importance, 2, widths={"a": 7, "rows[1]": 3}, features_per_prune=99)
  same(fp.get_masks(state), found)


@pytest.mark.parametrize("make", [linear, network])
@pytest.mark.parametrize("share", [0.9, 0.4])
def test_with_a_target_they_are_exact_and_the_others_meet_it(make, share):
  cost = make()
  importance = importance_like(cost.masks)
  target = share * cost.dense
  found = fp.select_masks(cost, importance, target, widths={"a": 11})
  assert int(found["a"].sum()) == 11
  assert float(cost(found)) <= target or share < 0.5
  first = fp.select_masks(cost, importance, widths={"a": 11})
  expected = fp.select_masks(cost, importance, target, masks=first, exclude=["a"])
  same(found, expected)


def test_in_training_they_come_down_first_and_stay():
  cost = linear()
  importance = importance_like(cost.masks)
  seen, state = trained(cost, importance, 40, widths={"b": 12}, target=0.5 * cost.dense, features_per_prune=2)
  assert [step["b"] for step in seen[:4]] == [14, 12, 12, 12]
  assert seen[1] == {"a": 20, "b": 12, "rows": [8] * 3, "x.block": 1}
  assert seen[-1]["b"] == 12
  assert float(state.cost) <= 0.5 * cost.dense


def test_under_a_schedule_they_wait_for_the_budget():
  cost = linear()
  importance = importance_like(cost.masks)
  budget = optax.linear_schedule(cost.dense, 0.9 * cost.dense, 5)
  options = {"widths": {"a": 6}, "target": budget, "features_per_prune": 99}
  seen, state = trained(cost, importance, 6, **options)
  falling = [step["a"] for step in seen]
  assert falling == sorted(falling, reverse=True)
  assert falling[0] > falling[2] > 6
  assert falling[4:] == [6, 6]  # the budget alone would leave 15
  assert seen[-1]["b"] == 16
  assert float(state.cost) == cost.dense - 14 * 3


def test_tied_masks_share_a_width():
  cost = linear()
  importance = importance_like(cost.masks)
  found = fp.select_masks(cost, importance, widths={"rows[0]": 5}, tie=["rows"])
  assert widths_of(found)["rows"] == [5, 5, 5]
  even = fp.select_masks(cost, importance, widths={"a": 5}, multiple_of={"a": 4})
  assert widths_of(even)["a"] == 5
  with pytest.raises(ValueError, match=r"widths must be equal for masks that tie .*'rows\[0\]': 5"):
    fp.select_masks(cost, importance, widths={"rows[0]": 5, "rows": 4}, tie=["rows"])


def test_they_come_before_floors_and_exceptions():
  cost = linear()
  importance = importance_like(cost.masks)
  found = fp.select_masks(cost, importance, widths={"a": 2, "b": 0}, min_features=5, exclude=["b"])
  assert widths_of(found) == {"a": 2, "b": 0, "rows": [8] * 3, "x.block": 1}


@pytest.mark.parametrize(
  ("widths", "kind", "message"),
  [
    ({"z": 3}, ValueError, "widths must name masks"),
    ({"a": 21}, ValueError, r"from 0 to 20, the size of the mask a, got 21"),
    ({"a": -1}, ValueError, r"from 0 to 20"),
    ({"a": 0.5}, ValueError, r"whole numbers from 0 to 20"),
    (7, TypeError, r"widths must map patterns .*got 7"),
  ],
)
def test_bad_widths_are_refused(widths, kind, message):
  cost = linear()
  for act in (
    lambda: fp.select_masks(cost, importance_like(cost.masks), widths=widths),
    lambda: fp.fisher_prune(cost, widths=widths),
  ):
    with pytest.raises(kind, match=message):
      act()


def test_a_start_below_a_width_is_refused():
  cost = linear()
  masks = {**cost.masks, "a": cost.masks["a"].at[5:].set(0)}
  with pytest.raises(ValueError, match="keep"):
    fp.fisher_prune(cost, widths={"a": 8}, masks=masks)


@pytest.mark.parametrize("options", [{}, {"tie": ["rows"]}, {"exclude": ["b"]}])
def test_several_targets_give_the_masks_of_each(options):
  cost = linear()
  importance = importance_like(cost.masks)
  targets = [share * cost.dense for share in (0.5, 0.9, 0.3)]
  found = fp.select_masks(cost, importance, targets, **options)
  arrays = fp.select_masks(cost, importance, np.array(targets), **options)
  assert all(map(bool, jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), found, arrays))))
  for masks, target in zip(found, targets, strict=True):
    same(masks, fp.select_masks(cost, importance, target, **options))
  if not options:
    same(found[0], slowly(cost, importance, targets[0], {"x.block": 0}, {}))
