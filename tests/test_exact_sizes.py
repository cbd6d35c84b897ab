"""Exact and equal widths, multiples and depth, in any combination, with a target and without one."""

import functools
import math
import runpy
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp

SIZE, LAYERS = 12, 3
ALL = "hidden?"
"""Matches the widths of all layers, stacked or not."""
X = jax.random.normal(jax.random.key(0), (4, 5))


def layer(x, p):
  return x + jnp.tanh(x @ p["up"]) @ p["down"]


def random_layers(rng, *stack):
  return {name: rng.normal(size=(*stack, *s)) for name, s in (("up", (6, SIZE)), ("down", (SIZE, 6)))}


def separate():
  """Layers with parameters of their own."""
  rng = np.random.default_rng(0)
  params = {f"hidden{at}": random_layers(rng) for at in range(LAYERS)}

  def apply(p, x):
    for at in range(LAYERS):
      x = layer(x, p[f"hidden{at}"])
    return x @ p["last"]

  return apply, {**params, "first": rng.normal(size=(5, 6)), "last": rng.normal(size=(6, 2))}


def stacked():
  """Layers in a loop."""
  rng = np.random.default_rng(1)

  def apply(p, x):
    x, _ = jax.lax.scan(lambda x, q: (layer(x, q), None), x, p["hiddens"])
    return x @ p["last"]

  return apply, {
    "hiddens": random_layers(rng, LAYERS),
    "first": rng.normal(size=(5, 6)),
    "last": rng.normal(size=(6, 2)),
  }


def both():
  """Some layers in a loop, and some of their own before and behind it."""
  rng = np.random.default_rng(2)
  params = {"hiddens": random_layers(rng, 2), **{f"hidden{at}": random_layers(rng) for at in range(2)}}

  def apply(p, x):
    x = layer(x, p["hidden0"])
    x, _ = jax.lax.scan(lambda x, q: (layer(x, q), None), x, p["hiddens"])
    return layer(x, p["hidden1"]) @ p["last"]

  return apply, {**params, "first": rng.normal(size=(5, 6)), "last": rng.normal(size=(6, 2))}


NETWORKS = {"separate": separate, "stacked": stacked, "both": both}


@functools.cache
def network(name, blocks=True):
  """A function of parameters in single precision, its parameters and a pruner, whose masks are named by their parameters."""
  raw, params = NETWORKS[name]()
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32) / math.sqrt(w.shape[-2]), params)

  def apply(p, x):
    return raw(p, x @ p["first"])

  return apply, params, fp.Pruner(apply, params, X, keep=1.0, blocks=blocks)


def rows_of(masks):
  """Every row of every mask by its name; those of a stack with a number."""
  found = {}
  for name, mask in masks.items():
    rows = np.asarray(mask).reshape(-1, mask.shape[-1])
    found |= {f"{name}[{at}]" if mask.ndim > 1 else name: row for at, row in enumerate(rows)}
  return found


def fits(name, pattern):
  return fnmatchcase(name, pattern) or fnmatchcase(name.split("[")[0], pattern)


def units_of(names, tie):
  """Names of rows that keep one width, each with itself at least."""
  units = [{name} for name in names]
  for pattern in tie:
    some = [unit for unit in units if any(fits(name, pattern) for name in unit)]
    units = [*(unit for unit in units if unit not in some), set().union(*some)]
  return units


def chain(size, multiple, least):
  """The widths that a row comes through."""
  return [size, *range((size - 1) // multiple * multiple, least, -multiple), least]


class Case:
  """One combination of options, and what must hold of its masks."""

  def __init__(self, kind, seed):
    rng = np.random.default_rng(seed)
    _, _, self.pruner = network(kind)
    self.cost = self.pruner.cost
    self.importance = jax.tree.map(
      lambda m: jnp.asarray(rng.uniform(0.1, 1, m.shape), jnp.float32), self.cost.masks
    )
    features = [name for name in self.cost.masks if not name.endswith(".block")]
    up = [name for name in features if name != "first"]
    self.tie = [[], [ALL], up[:2], ["hiddens"] if "hiddens" in up else up[-1:]][rng.integers(4)]
    self.widths = [None, {ALL: int(rng.integers(0, SIZE + 1))}, {up[0]: 5}, {"first": 4, up[-1]: 7}][
      rng.integers(4)
    ]
    multiples = [None, 2, 3, {ALL: 4}, {up[0]: 3, "first": 2}]
    self.multiple_of = multiples[rng.integers(len(multiples))]
    self.blocks = sum(m.size for name, m in self.cost.masks.items() if name.endswith(".block"))
    self.depth = [None, int(rng.integers(0, self.blocks + 1))][rng.integers(2)]
    self.share = [None, 0.8, 0.5, 0.35][rng.integers(4)]
    if self.widths is None and self.depth is None and self.share is None:
      self.share = 0.6
    self.recost_every = [None, 4, 50][rng.integers(3)]

  @property
  def options(self):
    found = {"tie": self.tie, "widths": self.widths, "multiple_of": self.multiple_of, "depth": self.depth}
    return {name: value for name, value in found.items() if value is not None}

  @property
  def target(self):
    return None if self.share is None else self.share * self.cost.dense

  def masks(self, target):
    return fp.select_masks(self.cost, self.importance, target, recost_every=self.recost_every, **self.options)

  def exact(self, unit):
    """The width that is given for one of the rows that share it, or None."""
    for name in unit:
      for pattern, width in (self.widths or {}).items():
        if fits(name, pattern):
          return width
    return None

  def multiple(self, name):
    if name.split("[")[0].endswith(".block"):
      return 1
    if isinstance(self.multiple_of, dict):
      return next((value for pattern, value in self.multiple_of.items() if fits(name, pattern)), 1)
    return self.multiple_of or 1

  def check_widths(self, masks, done=True):
    rows = rows_of(masks)
    for unit in units_of(rows, self.tie):
      (width,) = {int(rows[name].sum()) for name in unit}
      size, exact = rows[next(iter(unit))].size, self.exact(unit)
      multiple = math.lcm(*(self.multiple(name) for name in unit))
      if exact is not None and done:
        assert width == exact, (unit, self.options)
      least = exact if exact is not None else 0 if "block" in next(iter(unit)) else 1
      assert width in chain(size, multiple, least), (unit, width, self.options)
    if self.depth is not None and done:
      assert sum(int(row.sum()) for name, row in rows.items() if ".block" in name) == self.depth

  def check_budget(self, masks, base):
    """The cost is at most the target; with one bundle more it would be above. ``base`` are the masks without a target."""
    target = self.target
    if float(self.cost(base)) <= target:
      jax.tree.map(np.testing.assert_array_equal, masks, base)
      return
    assert float(self.cost(masks)) <= target, self.options
    before = rows_of(base)
    costs = []
    for unit in units_of(before, self.tie):
      more = jax.tree.map(np.array, masks)
      now = rows_of(more)  # views
      for name in unit:
        dead = np.flatnonzero((now[name] == 0) & (before[name] > 0))
        multiple = math.lcm(*(self.multiple(other) for other in unit))
        width = int(now[name].sum())
        wider = [w for w in chain(now[name].size, multiple, 0) if w > width]
        now[name][dead[: (wider[-1] if wider else width) - width]] = 1
      if any((a != b).any() for a, b in zip(jax.tree.leaves(more), jax.tree.leaves(masks), strict=True)):
        costs.append(float(self.cost(more)))
    assert max(costs) > target, self.options


def reachable(case, base):
  """Whether the target is above the cost of the smallest network that the options allow."""
  least = jax.tree.map(np.array, base)
  rows = rows_of(least)
  for unit in units_of(rows, case.tie):
    for name in unit:
      if case.exact(unit) is None and ".block" not in name:
        rows[name][np.flatnonzero(rows[name])[1:]] = 0
  return float(case.cost(least)) <= case.target


SEEDS = range(24)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_combination_is_exact_and_meets_the_budget_closely(kind, seed):
  case = Case(kind, seed)
  if case.widths is None and case.depth is None:
    base = case.cost.masks
  else:
    base = case.masks(None)
    case.check_widths(base)
  if case.share is not None and reachable(case, base):
    masks = case.masks(case.target)
    case.check_widths(masks)
    case.check_budget(masks, base)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_in_training_ties_and_multiples_hold_at_every_step(kind, seed):
  case = Case(kind, seed)
  case.share, case.tie, case.widths, case.depth = 0.5, [ALL], [None, {"first": 3}, {ALL: 7}][seed], None
  options = {**case.options, "features_per_prune": 5, "method": "fisher"}
  tx = fp.fisher_prune(case.cost, prune_every=1, target=case.target, **options)
  grads = jax.tree.map(lambda s: jnp.sqrt(2 * s)[..., None, :], case.importance)
  update = jax.jit(lambda state: tx.update({}, state, mask_grads=grads)[1])
  state = tx.init({})
  for _ in range(30):
    state = update(state)
    case.check_widths(fp.get_masks(state), done=False)
  masks = fp.get_masks(state)
  case.check_widths(masks)
  base = case.cost.masks if case.widths is None else case.masks(None)
  case.check_budget(masks, base)


@pytest.mark.parametrize("kind", NETWORKS)
def test_several_targets_are_nested_and_each_is_exact(kind):
  case = Case(kind, 0)
  case.widths, case.tie, case.multiple_of, case.depth = {"first": 5}, [ALL], {ALL: 2}, None
  shares = [0.8, 0.5, 0.35]
  found = case.masks([share * case.cost.dense for share in shares])
  base = case.masks(None)
  for case.share, masks, wider in zip(shares, found, [base, *found], strict=False):
    case.check_widths(masks)
    case.check_budget(masks, base)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a <= b).all()), masks, wider)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_compact_network_has_the_shapes_that_config_tells_and_equal_outputs(kind):
  apply, params, _ = network(kind)
  pruner = fp.Pruner(apply, params, X, keep=0.6, tie=[ALL], widths={"first": 4}, multiple_of={ALL: 3})
  params, masks = pruner.one_shot(params, [X], reconstruct=False)
  config = pruner.config(masks)
  small = pruner.compact(params, masks)
  assert config["first"] == small.variables["first"].shape[-1] == 4
  (width,) = {width for name, width in config.items() if name != "first"}
  assert width in (9, 6, 3)
  assert small.cost <= 0.6 * pruner.cost.dense
  for name, mask in masks.items():
    if name != "first":
      assert small.variables[name]["up"].shape == (*mask.shape[:-1], 4, width)
      assert small.variables[name]["down"].shape == (*mask.shape[:-1], width, 4)
  masked = pruner.apply(params, masks, X)
  np.testing.assert_allclose(small(small.variables, X), masked, atol=1e-5)
  # The same code, with the widths of the arrays that it is given.
  np.testing.assert_allclose(apply(small.variables, X), masked, atol=1e-5)


def test_exact_widths_win_over_multiples_floors_and_exceptions():
  _, _, pruner = network("both")
  alike = jax.tree.map(jnp.ones_like, pruner.cost.masks)
  given = {"widths": {"hidden0": 5, ALL: 7}, "multiple_of": 4, "min_features": 6, "exclude": [ALL]}
  config = pruner.config(fp.select_masks(pruner.cost, alike, **given))
  assert (config["hidden0"], config["hidden1"], config["hiddens"]) == (5, 7, 7)  # the first pattern counts
  tied = fp.select_masks(pruner.cost, alike, widths={"hidden0": 5}, tie=[ALL], multiple_of=4)
  assert {pruner.config(tied)[name] for name in ("hidden0", "hidden1", "hiddens")} == {5}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"widths": {ALL: SIZE + 1}},
      "widths must be whole numbers from 0 to 12, the size of the mask hidden0, got 13",
    ),
    ({"widths": {ALL: 2.5}}, "widths must be whole numbers from 0 to 12"),
    ({"widths": {"up": 3}}, r"widths must name masks \(first, hidden0.*got \['up'\]"),
    ({"tie": ["layer*"]}, "tie must name masks"),
    ({"multiple_of": {"up": 2}}, "multiple_of must name masks"),
    ({"multiple_of": 8}, r"multiple_of must be at most 6, the size of the mask first.*Name the masks"),
    (
      {"tie": ["first", "*[!k]"]},
      r"tie must name masks of one size .*'first': 6, .*'hidden0': 12.*for each size",
    ),
    (
      {"tie": [ALL], "widths": {"hidden0": 3, "hiddens": 4}},
      r"widths must be equal for masks that tie .*'hidden0': 3",
    ),
    ({"depth": 5}, "depth must be at most 4, the number of residual blocks, got 5"),
    ({"depth": 2, "widths": {"*.block": 1}}, "depth must be at least 4, the blocks that"),
  ],
)
def test_what_contradicts_itself_is_refused(options, message):
  apply, params, pruner = network("both")
  with pytest.raises(ValueError, match=message):
    fp.Pruner(apply, params, X, keep=0.5, blocks=True, **options)
  with pytest.raises(ValueError, match=message):
    fp.select_masks(pruner.cost, pruner.cost.masks, 0.5 * pruner.cost.dense, **options)


def test_a_hugging_face_model_with_a_smaller_config_takes_the_weights(capsys):
  transformers = pytest.importorskip("transformers")
  if int(transformers.__version__.split(".")[0]) >= 5:
    pytest.skip("version 5 has no Flax models")
  runpy.run_path(str(Path(__file__).parent.parent / "examples" / "quickstart_hugging_face.py"))
  assert "equal outputs" in capsys.readouterr().out
