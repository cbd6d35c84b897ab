"""What the state says of itself: history, replay, summary, metrics, plots."""

import functools
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp

MASKS = {"conv": {"mask": jnp.ones(4)}, "layers": jnp.ones((2, 3))}
PRICE = {"conv": {"mask": 5.0}, "layers": 2.0}


def cost_of_masks(masks):
  return sum(p * jnp.sum(m) for p, m in zip(*map(jax.tree.leaves, (PRICE, masks)), strict=True))


COST = fp.CostModel.from_functions(
  MASKS, cost_of_masks, lambda masks: jax.tree.map(lambda p, m: p * m, PRICE, masks)
)


@functools.cache
def trained(steps=12, **options):
  """A chain's state after some steps, and the masks after each."""
  tx = optax.chain(optax.adam(0.1), fp.fisher_prune(COST, **{"prune_every": 2, **options}))
  params, rng, seen = {"w": jnp.ones(3)}, np.random.default_rng(0), []
  state = tx.init(params)
  update = jax.jit(lambda state, g: tx.update(params, state, params, mask_grads=g)[1])
  for _ in range(steps):
    state = update(state, jax.tree.map(lambda m: rng.normal(size=(*m.shape[:-1], 5, m.shape[-1])), MASKS))
    seen.append(fp.get_masks(state))
  return state, [MASKS, *seen]


@pytest.mark.parametrize("several", [1, 3])
def test_history_says_what_went_when_in_order(several):
  state, masks = trained(features_per_prune=several)
  expected = []
  for step in range(1, len(masks)):
    gone = jax.tree.map(lambda a, b: np.asarray(a - b), masks[step - 1], masks[step])
    expected += [(step, "conv", int(k)) for k in np.flatnonzero(gone["conv"]["mask"])]
    expected += [
      (step, f"layers[{row}]", int(k)) for row in range(2) for k in np.flatnonzero(gone["layers"][row])
    ]
  assert fp.history(state) == expected
  assert len(expected) >= 5


def test_masks_are_replayed_at_every_step():
  state, masks = trained()
  for step, expected in enumerate(masks):
    for a, b in zip(*map(jax.tree.leaves, (fp.masks_at(state, step), expected)), strict=True):
      np.testing.assert_array_equal(a, b)


def test_history_and_masks_survive_serialization():
  state, _ = trained()
  blank = optax.chain(optax.adam(0.1), fp.fisher_prune(COST)).init({"w": jnp.ones(3)})
  restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state))
  assert fp.history(restored) == fp.history(state)
  assert isinstance(fp.get_state(restored), fp.FisherPruneState)
  for a, b in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


def test_metrics_are_those_of_the_state_and_can_be_had_under_jit():
  state, _ = trained()
  found, inside = fp.metrics(state), jax.jit(fp.metrics)(state)
  assert found.keys() == inside.keys()
  importance, masks = fp.get_importance(state), fp.get_masks(state)
  for name, signal, mask, price in (
    ("conv", importance["conv"]["mask"], masks["conv"]["mask"], 5.0),
    ("layers[0]", importance["layers"][0], masks["layers"][0], 2.0),
    ("layers[1]", importance["layers"][1], masks["layers"][1], 2.0),
  ):
    alive = np.asarray(signal)[np.asarray(mask) > 0]
    expected = {
      "alive": alive.size,
      "importance_min": alive.min(),
      "importance_max": alive.max(),
      "cost_share": price * alive.size / float(cost_of_masks(masks)),
    }
    for key, value in expected.items():
      np.testing.assert_allclose(found[f"pruning/{name}/{key}"], value, rtol=1e-6)
      np.testing.assert_allclose(inside[f"pruning/{name}/{key}"], value, rtol=1e-6)
  assert found["pruning/step"] == 12
  assert found["pruning/cost"] == cost_of_masks(masks)
  assert found["pruning/alive"] == sum(float(m.sum()) for m in jax.tree.leaves(masks))
  assert all(np.ndim(value) == 0 for value in found.values())


def test_the_summary_has_a_line_for_each_mask():
  state, _ = trained()
  masks = fp.get_masks(state)
  header, *rows, footer = fp.summary(state).splitlines()
  assert header.split()[:2] == ["mask", "alive"]
  assert [row.split()[:2] for row in rows] == [
    ["conv", f"{int(masks['conv']['mask'].sum())}/4"],
    ["layers[0]", f"{int(masks['layers'][0].sum())}/3"],
    ["layers[1]", f"{int(masks['layers'][1].sum())}/3"],
  ]
  assert footer.startswith(f"step 12, cost {float(cost_of_masks(masks)):,.0f}")
  assert len({len(row) for row in (header, *rows)}) == 1


def test_the_summary_says_what_went_wrong():
  tx = fp.fisher_prune(COST, prune_every=1, min_features=3)
  grads = jax.tree.map(lambda m: jnp.ones((*m.shape[:-1], 2, m.shape[-1])), MASKS)
  state = tx.init({})
  for scale in (jnp.nan, 1.0, 1.0):
    _, state = tx.update({}, state, mask_grads=jax.tree.map(lambda g: g * scale, grads))  # noqa: B023
  assert fp.summary(state).splitlines()[-1].startswith("step 3, cost 27; 1 batches skipped")
  assert "no feature left that may be masked" in fp.summary(state)


def test_shares_cost_nothing_where_the_cost_is_zero():
  state = fp.fisher_prune(fp.CostModel.from_functions(MASKS, lambda m: 0.0, lambda m: m)).init({})
  assert all(np.isfinite(x) for x in fp.metrics(state).values())


def test_plots_show_cost_and_widths():
  state, masks = trained(features_per_prune=2)
  figure = fp.plot_history(state, COST, target=20.0)
  top, bottom = figure.axes
  (cost_line, target) = top.lines
  steps = [*map(int, cost_line.get_xdata())]
  np.testing.assert_allclose(cost_line.get_ydata(), [float(cost_of_masks(masks[n])) for n in steps])
  assert set(steps) >= {n for n, _, _ in fp.history(state)} | {0, 12}
  assert set(target.get_ydata()) == {20.0}
  widths = {line.get_label(): line.get_ydata() for line in bottom.lines}
  np.testing.assert_allclose(widths["conv"], [float(masks[n]["conv"]["mask"].sum()) / 4 for n in steps])
  np.testing.assert_allclose(widths["layers[1]"], [float(masks[n]["layers"][1].sum()) / 3 for n in steps])


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ImportError, match=r"pip install 'fisherprune-jax\[plots\]'"):
    fp.plot_history(trained()[0], COST)
