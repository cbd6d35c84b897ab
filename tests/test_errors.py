"""Bad input is refused with a message that names the argument and the value."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from jax.tree_util import Partial

import fisherprune_jax as fp
from fisherprune_jax._errors import require_same_tree

MODEL = nn.Sequential([nn.Dense(4), nn.relu, fp.Mask(), nn.Dense(3), fp.Mask(), nn.Dense(1)])
X = jnp.ones((2, 5))
COST = fp.CostModel.from_functions(
  {"a": jnp.ones(4), "b": jnp.ones((2, 3))},
  total=lambda m: sum(map(jnp.sum, jax.tree.leaves(m))),
  per_feature=lambda m: m,
)
FITTING = {"a": jnp.ones((5, 4)), "b": jnp.ones((2, 5, 3))}


def prune(**options: Any) -> Callable[[], Any]:
  return lambda: fp.fisher_prune(COST, **options)


def stepped(**options: Any) -> Callable[[], Any]:
  """Two steps outside ``jit``, where values can be seen."""

  def act() -> Any:
    tx = fp.fisher_prune(COST, **options)
    state = tx.init(X)
    for _ in range(2):
      _, state = tx.update(X, state, mask_grads=FITTING)

  return act


def update(mask_grads: Any, name: str | None = None, **extra: Any) -> Callable[[], Any]:
  def act() -> Any:
    tx = optax.chain(optax.sgd(0.1), fp.fisher_prune(COST, name=name))
    return tx.update(X, tx.init(X), X, mask_grads=mask_grads, **extra)

  return act


@functools.cache
def variables() -> Any:
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), X)
  return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def masked(value: Any) -> Any:
  """The variables of the model with another first mask."""
  return variables() | {"masks": variables()["masks"] | {"layers_2": {"mask": value}}}


def compact_in_jit() -> Any:
  return jax.jit(lambda v: fp.compact(MODEL.apply, v, X).variables)(variables())


OTHERS = {
  "wider": nn.Sequential([nn.Dense(6), nn.relu, fp.Mask(), nn.Dense(3), fp.Mask(), nn.Dense(1)]),
  "shallower": nn.Sequential([nn.Dense(4), nn.relu, fp.Mask(), nn.Dense(1)]),
}


def made(model: nn.Module) -> tuple[Any, Any, Any]:
  """Variables, a transformation and its state."""
  variables = model.init(jax.random.key(0), X)
  tx = optax.chain(fp.fisher_prune(fp.cost_model(model.apply, variables, X)), optax.adam(0.1))
  return variables, tx, tx.init(variables["params"])


def step(masks: Any, opt_state: Any) -> Any:
  """A step of the model with given masks and a given optimizer state."""
  variables, tx, _ = made(MODEL)
  loss = lambda params, masks, x: jnp.mean(MODEL.apply({"params": params, "masks": masks}, x))
  _, (grads, mask_grads) = fp.value_and_mask_grads(loss)(variables["params"], masks, X)
  return tx.update(grads, opt_state, variables["params"], mask_grads=mask_grads)


def with_state_of(other: str) -> Callable[[], Any]:
  return lambda: step(variables()["masks"], made(OTHERS[other])[2])


def with_masks_of(other: str) -> Callable[[], Any]:
  return lambda: step(made(OTHERS[other])[0]["masks"], made(MODEL)[2])


def with_restored_state_of(other: str) -> Callable[[], Any]:
  """Flax restores whatever shapes were saved."""

  def act() -> Any:
    saved = flax.serialization.to_bytes(made(OTHERS[other])[2])
    return step(variables()["masks"], flax.serialization.from_bytes(made(MODEL)[2], saved))

  return act


def shrunk_state_of(other: str, **options: Any) -> Callable[[], Any]:
  def act() -> Any:
    small = fp.compact(MODEL.apply, variables(), X, **options)
    _, tx, state = made(MODEL)
    return small.shrink_opt_state(tx, (made(OTHERS[other])[2][0], state[1]))

  return act


# What is done, the type of the error, and what the message has to say: the argument, then the value.
TABLE: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
  "prune_every of 0": (prune(prune_every=0), ValueError, ("prune_every must be at least 1", "got 0")),
  "negative prune_every": (prune(prune_every=-3), ValueError, ("prune_every", "got -3")),
  "fractional prune_every": (
    prune(prune_every=2.5),
    TypeError,
    ("prune_every must be a Python int", "float"),
  ),
  "prune_every of True": (prune(prune_every=True), TypeError, ("prune_every must be a Python int", "bool")),
  "negative burn_in": (prune(burn_in=-1), ValueError, ("burn_in must be at least 0", "got -1")),
  "burn_in of None": (prune(burn_in=None), TypeError, ("burn_in must be a Python int", "NoneType")),
  "decay of 1": (prune(decay=1.0), ValueError, ("decay must be in [0, 1)", "got 1.0")),
  "negative decay": (prune(decay=-0.1), ValueError, ("decay must be in [0, 1)", "got -0.1")),
  "decay that is no number": (prune(decay=float("nan")), ValueError, ("decay must be in [0, 1)", "got nan")),
  "decay that is a string": (prune(decay="0.9"), TypeError, ("decay must be in [0, 1)", "got str")),
  "decay that is a vector": (prune(decay=jnp.ones(2) / 2), TypeError, ("decay", "float32[2]")),
  "unknown cost_weight": (prune(cost_weight="AUTO"), ValueError, ("cost_weight must be 'auto'", "'AUTO'")),
  "cost_weight of None": (prune(cost_weight=None), TypeError, ("cost_weight must be 'auto'", "NoneType")),
  "cost_weight of nan": (prune(cost_weight=float("nan")), ValueError, ("cost_weight must be", "got nan")),
  "unknown method": (
    prune(method="movement"),
    ValueError,
    ("method must be one of", "'fisher'", "or an fp.Criterion", "'movement'"),
  ),
  "a function as method": (
    prune(method=len),
    ValueError,
    ("method must be one of", "'fisher'", "or an fp.Criterion", "<built-in function len>"),
  ),
  "negative target": (prune(target=-5.0), ValueError, ("target must be", "at least 0", "-5.0")),
  "target in half precision": (
    prune(target=jnp.bfloat16(100)),
    TypeError,
    ("target must have at least the precision of float32", "bfloat16[]", "hyperparam_dtype"),
  ),
  "floor above a mask": (prune(min_features=4), ValueError, ("min_features must be at most 3", "got 4")),
  "negative floor": (prune(min_features=-1), ValueError, ("min_features must be at least 0", "got -1")),
  "no feature per prune": (
    prune(features_per_prune=0),
    ValueError,
    ("features_per_prune must be at least 1", "got 0"),
  ),
  "a function as cost": (
    lambda: fp.fisher_prune(len),
    TypeError,
    ("cost must be a CostModel", "got builtin"),
  ),
  "a number as cost": (lambda: fp.fisher_prune(3.0), TypeError, ("cost must be a CostModel", "got float")),
  "a cost of nothing": (
    lambda: fp.fisher_prune(fp.CostModel.from_functions({}, lambda m: jnp.float32(0), lambda m: m)),
    ValueError,
    ("cost must", "mask", "got {}"),
  ),
  "update without mask_grads": (update(None), ValueError, ("mask_grads=None", "fp.value_and_mask_grads")),
  "mask_grads of another tree": (
    update({"a": FITTING["a"]}),
    ValueError,
    ("mask_grads must have the structure of the masks", "got nothing at b", "fp.value_and_mask_grads"),
  ),
  "mask_grads without the example axis": (
    update(COST.masks),
    ValueError,
    ("mask_grads for a mask of shape (4,)", "('B', 4)", "got (4,)"),
  ),
  "stacked mask_grads without the example axis": (
    update(FITTING | {"b": jnp.ones((2, 3))}),
    ValueError,
    ("mask_grads for a mask of shape (2, 3)", "(2, 'B', 3)", "got (2, 3)"),
  ),
  "mask_grads with the example axis in front of the stack": (
    update(FITTING | {"b": jnp.ones((5, 2, 3))}),
    ValueError,
    ("mask_grads for a mask of shape (2, 3)", "(2, 'B', 3)", "got (5, 2, 3)"),
  ),
  "mask_grads of another width": (
    update(FITTING | {"a": jnp.ones((5, 7))}),
    ValueError,
    ("mask_grads for a mask of shape (4,)", "('B', 4)", "got (5, 7)"),
  ),
  "mask_grads of two batch sizes": (
    update(FITTING | {"b": jnp.ones((2, 6, 3))}),
    ValueError,
    ("mask_grads must have the same number B of examples", "5", "6"),
  ),
  "negative example_weights": (
    update(FITTING, example_weights=jnp.array([1.0, 1, -0.5, 1, 1])),
    ValueError,
    ("example_weights must be finite and at least 0", "got -0.5", "weight 0"),
  ),
  "example_weights of nan": (
    update(FITTING, example_weights=[1.0, 1.0, float("nan"), 1.0, 1.0]),
    ValueError,
    ("example_weights must be finite and at least 0", "got nan"),
  ),
  "infinite example_weights": (
    update(FITTING, example_weights=jnp.full(5, jnp.inf)),
    ValueError,
    ("example_weights must be finite and at least 0", "got inf"),
  ),
  "a decay schedule that is never a decay": (
    prune(decay=lambda n: 1.5),
    ValueError,
    ("decay as a schedule must be in [0, 1) at every step", "got 1.5", "step 1"),
  ),
  "a decay schedule that leaves its range": (
    stepped(decay=lambda n: 0.6 * n),
    ValueError,
    ("decay as a schedule must be in [0, 1) at every step", "got 1.2", "step 2"),
  ),
  "a decay schedule of vectors": (
    prune(decay=lambda n: jnp.ones(3) / 2),
    ValueError,
    ("decay as a schedule must be in [0, 1)", "got float32[3]"),
  ),
  "a target schedule below zero": (
    stepped(target=lambda n: 5 - 3 * n),
    ValueError,
    ("target as a schedule must be", "at least 0", "got -1.0", "step 2"),
  ),
  "a weight schedule of nan": (
    stepped(cost_weight=lambda n: jnp.where(n > 1, jnp.nan, 0.1)),
    ValueError,
    ("cost_weight as a schedule must be", "got nan", "step 2"),
  ),
  "a name that is a path": (prune(name="a/b"), ValueError, ("name must be a string without '/'", "'a/b'")),
  "a name that is no string": (prune(name=3), ValueError, ("name must be a string without '/'", "got 3")),
  "mask_grads of two prunings without names": (
    update(FITTING, name="first"),
    ValueError,
    ("mask_grads must be a mapping from names with 'first' among them", "['a', 'b']", "'first': mask_grads"),
  ),
  "mask_grads that are no mapping": (
    update(jnp.ones((5, 4)), name="first"),
    ValueError,
    ("mask_grads must be a mapping from names", "float32[5, 4]"),
  ),
  "example_weights of another length": (
    update(FITTING, example_weights=jnp.ones(4)),
    ValueError,
    ("example_weights must have shape (5,)", "got (4,)"),
  ),
  "a model without masks": (
    lambda: fp.cost_model(MODEL.apply, {"params": variables()["params"]}, X),
    ValueError,
    ("must hold masks", "none in the collection 'masks'"),
  ),
  "a selector that finds no mask": (
    lambda: fp.cost_model(MODEL.apply, variables(), X, masks=lambda path: False),
    ValueError,
    ("must hold masks", "none in the paths chosen by `masks`"),
  ),
  "compacting a model without masks": (
    lambda: fp.compact(MODEL.apply, {"params": variables()["params"]}, X),
    ValueError,
    ("must hold masks", "none in the collection 'masks'"),
  ),
  "masks of another tree": (
    lambda: COST({"a": jnp.ones(4)}),
    ValueError,
    ("masks must have the structure of the cost model's masks", "got nothing at b", "Build the cost model"),
  ),
  "masks of another width": (
    lambda: COST({"a": jnp.ones(9), "b": jnp.ones((2, 3))}),
    ValueError,
    ("mask must have the shape (4,)", "got (9,)"),
  ),
  "costs of features of another model": (
    lambda: COST.per_feature({"a": jnp.ones(9), "b": jnp.ones((2, 3))}),
    ValueError,
    ("mask must have the shape (4,)", "got (9,)"),
  ),
  "exact cost of another model": (
    lambda: fp.cost_model(MODEL.apply, variables(), X).exact(COST.masks),
    ValueError,
    (
      "masks must have the structure of the cost model's masks",
      "got nothing at layers_2, but something at a",
    ),
  ),
  "the optimizer state of a wider model": (
    with_state_of("wider"),
    ValueError,
    ("A mask of the optimizer state must have the shape (4,)", "got (6,)", "tx.init", "restore"),
  ),
  "the optimizer state of a model with other masks": (
    with_state_of("shallower"),
    ValueError,
    (
      "the masks of the optimizer state must have the structure",
      "got nothing at layers_4",
      "tx.init",
      "restore",
    ),
  ),
  "a restored state of a wider model": (
    with_restored_state_of("wider"),
    ValueError,
    ("A mask of the optimizer state must have the shape (4,)", "got (6,)", "tx.init", "restore"),
  ),
  "masks of a wider model in a step": (
    with_masks_of("wider"),
    ValueError,
    (
      "A mask for an input of shape (2, 4) must have shape (2, 4)",
      "got (2, 6)",
      "masks are those of this model",
    ),
  ),
  "masks of a model with others in a step": (
    with_masks_of("shallower"),
    ValueError,
    ("must hold a mask for every Mask layer, got none at layers_4", "all masks that init made"),
  ),
  "shrinking the pruning state of a model with other masks": (
    shrunk_state_of("shallower", keep_masks=True),
    ValueError,
    ("masks of opt_state must have the structure", "got nothing at layers_4", "compacted with"),
  ),
  "shrinking the pruning state of a wider model": (
    shrunk_state_of("wider", keep_masks=True),
    ValueError,
    ("must have its parameter's shape (4,)", "float32[6]"),
  ),
  "a step number in place of masks": (
    lambda: COST(jnp.int32(0)),
    TypeError,
    ("takes a tree of masks", "got a scalar", "static_args", "hyperparam_dtype"),
  ),
  "masks that are no switches": (
    lambda: fp.compact(MODEL.apply, masked(jnp.array([1, 0.5, 0, 1])), X),
    ValueError,
    ("Masks must be 0 or 1", "got 0.5", "masks/layers_2/mask"),
  ),
  "masks of nan": (
    lambda: fp.compact(MODEL.apply, masked(jnp.array([1, jnp.nan, 0, 1])), X),
    ValueError,
    ("Masks must be 0 or 1", "got nan", "masks/layers_2/mask"),
  ),
  "compacting in jit": (
    compact_in_jit,
    TypeError,
    ("compact needs concrete masks", "got float32[4] at masks/layers_2/mask", "outside jit"),
  ),
  "compacting abstract masks": (
    lambda: fp.compact(MODEL.apply, masked(jax.ShapeDtypeStruct((4,), jnp.float32)), X),
    TypeError,
    ("compact needs concrete masks", "float32[4]"),
  ),
  "a feature axis that is not there": (
    lambda: fp.Mask(axis=3).init(jax.random.key(0), X),
    ValueError,
    ("axis must be an axis of its input", "got 3 for shape (2, 5)"),
  ),
  "an example axis that is not there": (
    lambda: fp.Mask(batch_axis=-3).init(jax.random.key(0), X),
    ValueError,
    ("batch_axis must be an axis of its input", "got -3 for shape (2, 5)"),
  ),
  "the cost of a call on a scalar": (
    lambda: fp.cost_model(MODEL.apply, variables(), jnp.float32(1)),
    ValueError,
    ("`args` must lead with the example axis", "float32[]"),
  ),
  "the cost of a call on nothing": (
    lambda: fp.cost_model(MODEL.apply, variables()),
    ValueError,
    ("`args` must lead with the example axis", "got no"),
  ),
  "compacting a call on a scalar": (
    lambda: fp.compact(MODEL.apply, variables(), jnp.float32(1)),
    ValueError,
    ("`args` must lead with the example axis", "float32[]"),
  ),
  "compacting a call on nothing": (
    lambda: fp.compact(MODEL.apply, variables()),
    ValueError,
    ("`args` must lead with the example axis", "got no"),
  ),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_named_with_its_value(name):
  act, kind, parts = TABLE[name]
  with pytest.raises(kind, match=".*".join(map(re.escape, parts))) as error:
    act()
  assert type(error.value) is kind


def test_the_good_neighbours_of_the_table_pass():
  """So that no row of it fails for another reason than its own."""
  for options in ({"decay": 0}, {"min_features": 3}, {"cost_weight": -1}, {"decay": lambda n: 0.5}):
    fp.fisher_prune(COST, **options)
  update(FITTING, example_weights=jnp.ones(5))()
  assert COST(COST.masks) == 10
  assert fp.cost_model(MODEL.apply, variables(), X).dense > 0
  assert fp.compact(MODEL.apply, masked(jnp.array([1, 0, 0, 1])), X).cost > 0


class Pair(NamedTuple):
  a: Any
  b: Any


X3 = jnp.ones(3)
# What is got, what is wanted, and what is said to differ first.
TREES: dict[str, tuple[Any, Any, str]] = {
  "missing": ({"a": X3}, {"a": X3, "b": X3}, "nothing at b"),
  "missing below": ({"p": {"a": X3}, "q": [X3]}, {"p": {"a": X3}, "q": [X3, X3]}, "nothing at q/1"),
  "added": ({"a": X3, "b": X3, "c": X3}, {"a": X3, "b": X3}, "one more at c"),
  "renamed": ({"p": {"a": X3}}, {"p": {"b": X3}}, "nothing at p/b, but something at p/a"),
  "the first of two": ({"p": {}, "q": {}}, {"p": {"x": X3}, "q": {"x": X3}}, "nothing at p/x"),
  "a list": ([X3], (X3,), "list in place of tuple at the root"),
  "frozen": ({"a": X3}, FrozenDict({"a": X3}), "dict in place of FrozenDict at the root"),
  "a tuple with names": (Pair(X3, X3), {"a": X3, "b": X3}, "Pair in place of dict at the root"),
  "an array": ({"a": X3}, {"a": {"x": X3}}, "float32[3] in place of dict at a"),
  "no array": (Pair(X3, {"x": X3}), Pair(X3, X3), "dict in place of float32[3] at b"),
  "None": ({"a": None}, {"a": X3}, "NoneType in place of float32[3] at a"),
  "nothing in place of None": ({"a": ()}, {"a": None}, "tuple in place of NoneType at a"),
  "other keys of a node": (Partial(len, X3), Partial(sum, X3), "Partial of another kind at the root"),
}


@pytest.mark.parametrize("name", TREES)
def test_the_first_path_that_differs_is_named(name):
  found, wanted, difference = TREES[name]
  with pytest.raises(ValueError, match=r"^ours must have the structure of theirs, got ") as error:
    require_same_tree(found, wanted, "ours", "theirs", "Do so.")
  assert str(error.value) == f"ours must have the structure of theirs, got {difference}. Do so."
  for tree in (found, wanted):
    require_same_tree(tree, jax.tree.map(lambda x: x + 1, tree), "ours", "theirs", "Do so.")


# Names that are one once their keys are joined

SLASHED = {
  "a/b": jnp.ones((3, 4)),
  "a": {"b": jnp.ones((3, 5))},
  "o": jnp.ones((4, 2)),
  "q": jnp.ones((5, 2)),
}


def two_branches(p, x):
  return jnp.tanh(x @ p["a/b"]) @ p["o"] + jnp.tanh(x @ p["a"]["b"]) @ p["q"]


def test_variables_whose_joined_names_are_one_are_told_apart(tmp_path):
  x = jnp.arange(6.0).reshape(2, 3) / 6
  auto = fp.auto_mask(two_branches, SLASHED, x)
  np.testing.assert_allclose(auto.apply(auto.variables, x), two_branches(SLASHED, x), rtol=1e-6)
  masks = {name: mask.at[0].set(0) for name, mask in auto.masks.items()}
  variables = {**SLASHED, "masks": masks}
  small = fp.compact(auto.apply, variables, x)
  assert small.variables["a/b"].shape == (3, 3)
  assert small.variables["a"]["b"].shape == (3, 4)
  np.testing.assert_allclose(small(small.variables, x), auto.apply(variables, x), rtol=1e-5)
  small.save(tmp_path / "file")
  loaded = fp.load(tmp_path / "file")
  np.testing.assert_allclose(loaded(loaded.variables, x), auto.apply(variables, x), rtol=1e-5)


def test_groups_whose_names_would_be_one_have_a_mask_each():
  kernels = {"a/b": {"k": jnp.ones((3, 4))}, "a": {"b": {"k": jnp.ones((3, 5))}}}
  p = {**kernels, "o": jnp.ones((4, 2)), "q": jnp.ones((5, 2))}
  apply = lambda p, x: two_branches({**p, "a/b": p["a/b"]["k"], "a": {"b": p["a"]["b"]["k"]}}, x)
  auto = fp.auto_mask(apply, p, jnp.ones((2, 3)))
  assert sorted(mask.size for mask in auto.masks.values()) == [4, 5]
  assert len({group.name for group in auto.groups}) == 2


ONE_NAME = {
  "a slash in a key": {"a/b": jnp.ones(4), "a": {"b": jnp.ones(4)}},
  "a stack": {"a": jnp.ones((2, 4)), "a[1]": jnp.ones(4)},
  "a mask of a layer": {"a": {"mask": jnp.ones(4)}, "a/mask": jnp.ones(4)},
}


@pytest.mark.parametrize("how", ONE_NAME)
@pytest.mark.parametrize("use", [fp.cost_model, fp.compact, fp.measure_latency])
def test_masks_of_one_name_are_refused(how, use):
  variables = {"w": jnp.ones((3, 4)), "masks": ONE_NAME[how]}

  def apply(v, x):
    product = 1.0
    for mask in jax.tree.leaves(v["masks"]):
      product = product * mask.reshape(-1, 4)[0]
    return (x @ v["w"]) * product

  with pytest.raises(ValueError, match=r"a unique name.*got 'a.*' for two masks.*Rename"):
    use(apply, variables, jnp.ones((2, 3)))


def test_statistics_whose_joined_names_are_one_are_returned_each_to_its_own():
  stats = {"a/b": jnp.zeros(4), "a": {"b": jnp.zeros(4)}}
  variables = {"w": jnp.ones((3, 4)), "s": stats, "masks": jnp.array([1.0, 0, 1, 1])}

  def apply(v, x):
    h = (x @ v["w"]) * v["masks"]
    return h.sum(1), {"s": {"a/b": v["s"]["a/b"] + h.mean(0), "a": {"b": v["s"]["a"]["b"] + 2 * h.mean(0)}}}

  x = jnp.ones((2, 3))
  small = fp.compact(apply, variables, x, state_from=lambda out: out[1])
  found, expected = small(small.variables, x)[1], apply(variables, x)[1]
  kept = jnp.array([0, 2, 3])
  np.testing.assert_allclose(found["s"]["a/b"], expected["s"]["a/b"][kept])
  np.testing.assert_allclose(found["s"]["a"]["b"], expected["s"]["a"]["b"][kept])


@pytest.mark.parametrize("kind", [np.float64, np.int64, np.complex128])
def test_arrays_of_64_bits_from_numpy_are_taken_as_jax_takes_them(kind):
  """Without a warning, and as the smaller types that they are there."""
  variables = {"w": np.ones((5, 4), kind), "masks": np.ones(4)}
  apply = lambda v, x: (x @ v["w"]) * v["masks"]
  x = np.ones((2, 5))
  cost = fp.cost_model(apply, variables, x)
  small = fp.compact(apply, {**variables, "masks": np.array([1.0, 0, 0, 1])}, x)
  assert small(small.variables, x).shape == (2, 4)
  assert small.cost < cost.dense
  assert fp.auto_mask(
    lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], {"a": np.ones((5, 3)), "b": np.ones((3, 2))}, x
  ).groups
