"""Automatic masks over the table of unmasked networks: what is found, and that it prunes as masks by hand would."""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from fisherprune_jax._auto.skipping import WHOLE
from tests.auto_models import EXAMPLES, UNMASKED, Unmasked, members

pytestmark = pytest.mark.usefixtures("x64")
ALL = pytest.mark.parametrize("name", UNMASKED)
DIFFERENTIABLE = pytest.mark.parametrize(
  "name", [name for name, model in UNMASKED.items() if model.differentiable]
)


@dataclass(frozen=True, eq=False)
class Setup:
  """A network of the table: its automatic masks, variables without masks, 0/1 masks, and a batch."""

  model: Unmasked
  auto: Any
  variables: Any
  masks: Any
  args: tuple[Any, ...]

  def masked(self, variables: Any, masks: Any, *args: Any) -> Any:
    return self.auto.apply({**variables, "masks": masks}, *args)

  @functools.cached_property
  def values(self) -> Any:
    """``f(weights, variables, masks, *args)``: outputs, and gradients by all but the weights of the examples.

    Of the masks as they are stored; many properties call this one function, which is compiled once.
    """
    return jax.jit(lambda weights, *args: outputs_and_gradients(self.model, self.masked, weights, *args))

  @functools.cached_property
  def small(self) -> Any:
    return fp.compact(self.auto.apply, {**self.variables, "masks": self.masks}, *self.args)

  @functools.cached_property
  def cost(self) -> Any:
    return fp.cost_model(self.auto.apply, self.auto.variables, *self.args)


@functools.cache
def setup(name: str) -> Setup:
  model = UNMASKED[name]
  variables, args = model.variables(0, jnp.float64), model.inputs(0, jnp.float64)
  auto = fp.auto_mask(model.apply, variables, *args)
  rest = {key: part for key, part in auto.variables.items() if key != "masks"}
  return Setup(model, auto, rest, random_masks(auto.masks), args)


def random_masks(masks: Any) -> Any:
  """Masks of which every row loses a feature and keeps one; on the host, where nothing has to be compiled."""
  rng = np.random.default_rng(0)

  def draw(mask: Any) -> np.ndarray:
    values = rng.random(mask.shape) < 0.7
    values[..., 0], values[..., -1] = True, False
    return rng.permuted(values, axis=-1).astype(np.float32)

  return jax.tree.map(draw, masks)


ONES = np.ones(EXAMPLES)


def losses(outputs: Any) -> jax.Array:
  """One for each example: of a projection of its outputs."""
  found = 0.0
  for at, y in enumerate(jax.tree.leaves(outputs)):
    y = y.reshape(y.shape[0], -1)
    found += jnp.sin(y + 1.0) @ np.random.default_rng(at).normal(size=y.shape[1])
  return found


def outputs_and_gradients(model: Unmasked, function: Any, weights: Any, *args: Any) -> Any:
  """Outputs, and the gradients of the weighted sum of losses by every argument that is no integer."""
  if not model.differentiable:
    return function(*args), ()
  places = [at for at, arg in enumerate(args) if jnp.issubdtype(jax.tree.leaves(arg)[0].dtype, jnp.inexact)]

  def loss(*args: Any) -> Any:
    outputs = function(*args)
    return weights @ losses(outputs), outputs

  grads, outputs = jax.grad(loss, places, has_aux=True)(*args)
  return outputs, grads


def close(expected: Any, found: Any, tolerance: float) -> None:
  """Equal to a share of the norm, or of one where that is smaller, leaf by leaf."""
  for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    assert x.shape == y.shape
    assert np.linalg.norm(np.asarray(x - y)) <= tolerance * max(np.linalg.norm(np.asarray(x)), 1.0)


def paths(tree: Any) -> list[str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def found_groups(auto: Any) -> Counter[Any]:
  return Counter((g.size, frozenset(g.members)) for g in auto.groups)


def written_down(model: Any) -> dict[Any, Any]:
  """The groups of a model, without the axes that stay."""
  return {(g.size, g.members - model.stay): g for g in model.groups.values()}


@ALL
def test_what_is_written_down_is_there(name):
  """Members are axes of variables, at least as long as their group; nothing is written down twice."""
  model, variables = UNMASKED[name], setup(name).model.variables(0, jnp.float64)
  shapes = dict(zip(paths(variables), (leaf.shape for leaf in jax.tree.leaves(variables)), strict=True))
  for size, found, layers in model.groups.values():
    assert all(shapes[path][axis] % size == 0 or shapes[path][axis] > size > 1 for path, axis in found)
    assert layers is None or all(shapes[path][0] == layers for path, _ in found)
  assert all(shapes[path][axis] for path, axis in model.skipped)
  assert len({(g.size, g.members) for g in model.groups.values()}) == len(model.groups)


@ALL
def test_the_groups_are_those_written_down(name):
  model, auto = UNMASKED[name], setup(name).auto
  assert found_groups(auto) == Counter(written_down(model).keys())
  assert {g.kind for g in auto.groups} == {"features"}
  layers = {key: g.layers for key, g in written_down(model).items()}
  for g in auto.groups:
    rows = layers[g.size, frozenset(g.members)]
    assert auto.masks[g.name].shape == ((g.size,) if rows is None else (rows, g.size))
  assert auto.masks.keys() == {g.name for g in auto.groups}
  assert len(auto.masks) == len(auto.groups)
  assert {(each.path, each.axis) for each in auto.skipped} >= model.skipped


@ALL
def test_every_axis_is_in_a_group_or_skipped_with_a_reason(name):
  model, auto = UNMASKED[name], setup(name).auto
  variables = model.variables(0, jnp.float64)
  said = {place for g in auto.groups for place in g.members} | {(s.path, s.axis) for s in auto.skipped}
  shapes = zip(paths(variables), (leaf.shape for leaf in jax.tree.leaves(variables)), strict=True)
  assert said == {(path, axis) for path, shape in shapes for axis in range(len(shape))}
  plain = (
    "it reaches an argument",
    "it reaches an output",
    "it has one entry",
    "the function does not use it",
  )
  places = [
    s.why.rpartition(", at ")[2] for s in auto.skipped if s.why not in (*plain, "the iterations of a loop")
  ]
  assert all(re.match(r"/.*\.py:\d+ \(", place) for place in places), places


@ALL
@pytest.mark.parametrize("examples", [1, 4])
def test_groups_and_names_do_not_hang_on_the_batch_size(name, examples):
  model, auto = UNMASKED[name], setup(name).auto
  variables, args = model.variables(0, jnp.float64), model.inputs(0, jnp.float64, examples)
  other = fp.auto_mask(model.apply, variables, *args)
  named = lambda auto: {(g.name, g.size, frozenset(g.members)) for g in auto.groups}
  assert named(other) == named(auto)


@ALL
def test_without_masks_it_is_the_original(name):
  """Operation by operation."""
  s = setup(name)
  variables = s.model.variables(0, jnp.float64)
  assert traced(s.auto.apply, variables, *s.args) == traced(s.model.apply, variables, *s.args)


def traced(function: Any, *args: Any) -> str:
  """A jaxpr without the addresses that it shows."""
  return re.sub(" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))


@ALL
def test_compact_is_what_is_masked(name):
  """Outputs, and gradients by variables and arguments, in double precision."""
  s = setup(name)
  outputs, grads = s.values(ONES, s.variables, s.masks, *s.args)
  of_small = jax.jit(lambda *args: outputs_and_gradients(s.model, s.small, ONES, *args))
  small, small_grads = of_small(s.small.variables, *s.args)
  close(outputs, small, 1e-10)
  if s.model.differentiable:
    of_variables, _, *of_args = grads
    kept = {key: s.small.shrink(part) for key, part in of_variables.items()}
    close((kept, of_args), (small_grads[0], list(small_grads[1:])), 1e-10)


@ALL
def test_one_example_alone(name):
  """At another batch size masks of ones change nothing, and compact is what is masked, which is as it is in a batch."""
  s = setup(name)
  one = tuple(arg[:1] for arg in s.args)

  @jax.jit
  def run(variables: Any, masks: Any, small: Any) -> Any:
    plain = jax.tree.unflatten(jax.tree.structure(s.model.variables()), jax.tree.leaves(variables))
    return s.model.apply(plain, *one), s.masked(variables, masks, *one), s.small(small, *one)

  original, ones, _ = run(s.variables, jax.tree.map(np.ones_like, s.masks), s.small.variables)
  close(original, ones, 1e-12)
  _, masked, small = run(s.variables, s.masks, s.small.variables)
  close(masked, small, 1e-10)
  close(jax.tree.map(lambda y: y[:1], s.values(ONES, s.variables, s.masks, *s.args)[0]), masked, 1e-10)


DRAWS = 6


def alive(s: Setup, masks: Any) -> list[list[np.ndarray]]:
  """Of every leaf of the variables, along every axis, where any of some random networks has a gradient."""
  found: list[Any] = []
  for seed in range(1, 1 + DRAWS):
    drawn = jax.tree.leaves(s.model.variables(seed, jnp.float64))
    variables = jax.tree.unflatten(jax.tree.structure(s.variables), drawn)
    grads = s.values(ONES, variables, masks, *s.model.inputs(seed, jnp.float64))[1][0]
    found.append([np.asarray(g) != 0 for g in jax.tree.leaves(grads)])
  any_draw = [np.any(leaves, axis=0) for leaves in zip(*found, strict=True)]
  return [
    [leaf.any(tuple(other for other in range(leaf.ndim) if other != axis)) for axis in range(leaf.ndim)]
    for leaf in any_draw
  ]


@DIFFERENTIABLE
def test_nothing_stays_without_a_gradient(name):
  """As small as can be: what is kept of a variable is the box of the entries that matter under the masks.

  Entries that have no gradient though nothing is masked, such as rows of a table that no example reads, stay as well.
  """
  s = setup(name)
  matter, ever = alive(s, s.masks), alive(s, jax.tree.map(np.ones_like, s.masks))
  needed = [
    int(np.prod([np.sum(a | ~b) for a, b in zip(*axes, strict=True)]))
    for axes in zip(matter, ever, strict=True)
  ]
  kept = [leaf.size for leaf in jax.tree.leaves(s.small.variables)]
  table = dict(zip(paths(s.variables), zip(kept, needed, strict=True), strict=True))
  assert sum(kept) <= 1.01 * sum(needed), table


@ALL
def test_every_group_goes_from_all_its_members(name):
  """An axis that groups make up, merged or end to end, is as long as what is left of them; any other is shorter."""
  s = setup(name)
  names = paths(s.model.variables(0, jnp.float64))
  full, left = (
    dict(zip(names, map(np.shape, jax.tree.leaves(tree)), strict=True))
    for tree in (s.variables, s.small.variables)
  )
  sizes: dict[Any, list[tuple[int, int]]] = {}
  for g in s.auto.groups:
    alive = int(np.max(np.sum(s.masks[g.name], axis=-1)))  # of a stack, the widest layer
    for member in g.members:
      sizes.setdefault(member, []).append((g.size, alive))
  for (path, axis), parts in sizes.items():
    before, after = full[path][axis], left[path][axis]
    merged, laid = np.prod(parts, axis=0), np.sum(parts, axis=0)
    made_up = [lengths[1] for lengths in (merged, laid) if lengths[0] == before]
    assert after in made_up if made_up else after < before, (path, axis)


@ALL
def test_members_that_stay_are_said_to(name):
  """They are those written down, are as long as they were, and the report names them with their parameters."""
  s = setup(name)
  stay = {(one.path, one.axis) for one in s.auto.skipped if one.why.startswith(WHOLE)}
  assert stay == s.model.stay
  full, left = (
    dict(zip(paths(tree), jax.tree.leaves(tree), strict=True)) for tree in (s.variables, s.small.variables)
  )
  said = {(held.path, held.axis): blocker for blocker in s.small.blockers for held in blocker.holds}
  for path, axis in stay:
    assert left[path].shape[axis] == full[path].shape[axis]
    assert said[path, axis].parameters > 0
    assert "of variables alone" in said[path, axis].reason or said[path, axis].reason.endswith("non-zero")


@ALL
def test_the_cost_is_that_of_the_compact_network(name):
  s = setup(name)
  assert 0 < s.small.cost == s.cost.exact(s.masks) / EXAMPLES < s.cost.dense
  assert float(s.cost(s.masks)) == pytest.approx(s.small.cost, rel=2e-7)  # no float32 is a third


@DIFFERENTIABLE
def test_rows_of_mask_gradients_are_those_of_single_examples(name):
  s = setup(name)
  mean = lambda _, masks, args, variables: jnp.mean(losses(s.masked(variables, masks, *args)))
  gradients = jax.jit(fp.value_and_mask_grads(mean))  # of no parameters: less to compile
  for masks in (s.masks, jax.tree.map(np.ones_like, s.masks)):
    rows = gradients({}, masks, s.args, s.variables)[1][1]
    singles = [s.values(weights, s.variables, masks, *s.args)[1][1] for weights in np.eye(EXAMPLES)]
    close(jax.tree.map(lambda *of_each: np.stack(of_each, axis=-2), *singles), rows, 1e-6)
  silent = [key for key, leaf in rows.items() if not np.abs(leaf).max(axis=-1).all()]
  assert len(silent) == (name == "conditional")  # of the branch that is not taken


ONCE = {
  "plain": {"first": "conv_1/kernel 2", "third": "head/kernel 0"},
  "residual": {"trunk": "inner_0/kernel 2, inner_1/kernel 2, shortcut/kernel 2"},
  "mobile_net": {"inner": "project/kernel 2"},
  "vit": {"depth": "query/kernel 2, query/bias 1", "values": "out/kernel 1", "heads": "out/kernel 0"},
  "decoder": {"inner": "down/kernel 0"},
  "weights_shared": {"shared": "w 0, head 0"},
  "scanned_arrays": {"written": "read 0"},
  "recurrent": {"second state": "s 0, out 0"},
}
"""Of some groups the members that read them: a mask in front of these is the same as a factor on these."""


@pytest.mark.parametrize("name", ONCE)
def test_a_mask_stands_once_before_all_that_reads_it(name):
  """Its gradient is that of factors on its readers; one that stood twice would have twice that."""
  s = setup(name)
  ones = jax.tree.map(np.ones_like, s.masks)
  of_variables, of_masks = s.values(ONES, s.variables, ones, *s.args)[1][:2]
  products = dict(
    zip(
      paths(s.variables),
      jax.tree.map(np.multiply, *map(jax.tree.leaves, (s.variables, of_variables))),
      strict=True,
    )
  )
  names = {(g.size, frozenset(g.members)): g.name for g in s.auto.groups}
  for label, readers in ONCE[name].items():
    size, found, _ = s.model.groups[label]
    expected = sum(
      np.sum(np.moveaxis(products[path], axis, 0).reshape(size, -1), axis=1)
      for path, axis in members(readers)
    )
    close(expected, of_masks[names[size, found - s.model.stay]], 1e-6)


TRAINED = """
  residual channel_shuffle group_norm vit decoder swin scanned_layers lstm mamba features_concatenated conditional
  list_of_arrays
""".split()


@pytest.mark.parametrize("name", TRAINED)
def test_training_comes_down_to_the_target(name):
  """Two steps, of which the second prunes; then what is left is as small as the state says."""
  s = setup(name)
  least = jax.tree.map(lambda m: np.broadcast_to(np.eye(1, m.shape[-1], dtype=m.dtype)[0], m.shape), s.masks)
  target = 0.5 * (s.cost.dense + float(s.cost(least)))
  features = sum(m.size for m in jax.tree.leaves(s.masks))
  prune = fp.fisher_prune(s.cost, prune_every=2, target=target, features_per_prune=features)
  tx = optax.chain(optax.sgd(1e-3), prune)
  params, rest = s.variables["params"], {key: part for key, part in s.variables.items() if key != "params"}

  def loss(params: Any, masks: Any, args: Any) -> jax.Array:
    return jnp.mean(losses(s.masked({"params": params, **rest}, masks, *args)))

  @jax.jit
  def step(params: Any, state: Any, args: Any) -> Any:
    _, (grads, mask_grads) = fp.value_and_mask_grads(loss)(params, fp.get_masks(state), args)
    updates, state = tx.update(grads, state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  params, state = step(params, state, s.args)
  assert float(fp.get_state(state).cost) == s.cost.dense
  params, state = step(params, state, s.args)
  masks = jax.tree.map(np.asarray, fp.get_masks(state))
  assert all(mask.any(-1).all() for mask in jax.tree.leaves(masks))
  small = fp.compact(s.auto.apply, {"params": params, **rest, "masks": masks}, *s.args)
  assert small.cost == float(fp.get_state(state).cost) <= target
