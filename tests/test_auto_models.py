"""Automatic masks over the table of unmasked networks: what is found, and that it prunes as masks by hand would."""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp
from tests.auto_models import EXAMPLES, UNMASKED, Unmasked
from tests.models import random_masks

pytestmark = pytest.mark.usefixtures("x64")
ALL = pytest.mark.parametrize("name", UNMASKED)
DIFFERENTIABLE = pytest.mark.parametrize(
  "name", [name for name, model in UNMASKED.items() if model.differentiable]
)


@dataclass(frozen=True, eq=False)
class Setup:
  """A network of the table with its masks: ``variables`` without them, random ones, and a batch."""

  model: Unmasked
  auto: Any
  variables: Any
  masks: Any
  args: tuple[Any, ...]

  def masked(self, variables: Any, masks: Any, *args: Any) -> Any:
    return self.auto.apply({**variables, "masks": masks}, *args)

  @functools.cached_property
  def of_masked(self) -> Any:
    """``f(variables, masks, *args)``: outputs, and gradients by everything, compiled once for a batch size."""
    return jax.jit(lambda *args: outputs_and_gradients(self.model, self.masked, *args))

  @functools.cached_property
  def small(self) -> Any:
    return fp.compact(self.auto.apply, {**self.variables, "masks": self.masks}, *self.args)


@functools.cache
def setup(name: str) -> Setup:
  model = UNMASKED[name]
  variables, args = model.variables(0, jnp.float64), model.inputs(0, jnp.float64)
  auto = fp.auto_mask(model.apply, variables, *args)
  masks = random_masks(auto.masks, 0, 0.5)
  rest = {key: part for key, part in auto.variables.items() if key != "masks"}
  return Setup(model, auto, rest, masks, args)


def losses(outputs: Any) -> jax.Array:
  """One for each example: of a projection of its outputs."""
  found = 0.0
  for at, y in enumerate(jax.tree.leaves(outputs)):
    y = y.reshape(y.shape[0], -1)
    projection = np.random.default_rng(at).normal(size=y.shape[1])
    found += jnp.sin(y + 1.0) @ projection
  return found


def outputs_and_gradients(model: Unmasked, function: Any, *args: Any) -> Any:
  """Outputs, and the gradients of the summed losses by every argument that is no integer."""
  if not model.differentiable:
    return function(*args), ()
  places = [at for at, arg in enumerate(args) if jnp.issubdtype(jax.tree.leaves(arg)[0].dtype, jnp.inexact)]

  def loss(*args: Any) -> Any:
    outputs = function(*args)
    return jnp.sum(losses(outputs)), outputs

  grads, outputs = jax.grad(loss, places, has_aux=True)(*args)
  return outputs, grads


def close(expected: Any, found: Any, tolerance: float) -> None:
  """Equal to a share of the norm, or of one where that is smaller, leaf by leaf."""
  for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    assert x.shape == y.shape
    assert np.linalg.norm(np.asarray(x - y)) <= tolerance * max(np.linalg.norm(np.asarray(x)), 1.0)


@ALL
def test_what_is_written_down_is_there(name):
  """Members are axes of variables, at least as long as their group; labels and axes are not written down twice."""
  model = UNMASKED[name]
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables())
  }
  for size, members, layers in model.groups.values():
    assert all(shapes[path][axis] % size == 0 or shapes[path][axis] > size > 1 for path, axis in members)
    assert layers is None or all(shapes[path][0] == layers for path, _ in members)
  assert all(shapes[path][axis] for path, axis in model.skipped)
  assert len({(g.size, g.members) for g in model.groups.values()}) == len(model.groups)


def found_groups(auto: Any) -> Counter[Any]:
  return Counter((g.size, frozenset(g.members)) for g in auto.groups)


@ALL
def test_the_groups_are_those_written_down(name):
  model, auto = UNMASKED[name], setup(name).auto
  assert found_groups(auto) == Counter((g.size, g.members) for g in model.groups.values())
  assert {g.kind for g in auto.groups} == {"features"}
  layers = {(g.size, g.members): g.layers for g in model.groups.values()}
  for g in auto.groups:
    rows = layers[g.size, frozenset(g.members)]
    assert auto.masks[g.name].shape == ((g.size,) if rows is None else (rows, g.size))
  assert auto.masks.keys() == {g.name for g in auto.groups}
  assert len(auto.masks) == len(auto.groups)
  assert {(each.path, each.axis) for each in auto.skipped} >= model.skipped


@ALL
@pytest.mark.parametrize("examples", [1, 4])
def test_groups_and_names_do_not_hang_on_the_batch_size(name, examples):
  model, auto = UNMASKED[name], setup(name).auto
  other = fp.auto_mask(model.apply, model.variables(0, jnp.float64), *model.inputs(0, jnp.float64, examples))
  assert {(g.name, g.size, frozenset(g.members)) for g in other.groups} == {
    (g.name, g.size, frozenset(g.members)) for g in auto.groups
  }


@ALL
def test_masks_of_ones_change_nothing(name):
  s = setup(name)
  plain = s.model.variables(0, jnp.float64)
  ones = s.of_masked(s.variables, jax.tree.map(jnp.ones_like, s.masks), *s.args)[0]
  original, without = jax.jit(lambda v, *args: (s.model.apply(v, *args), s.auto.apply(v, *args)))(
    plain, *s.args
  )
  close(original, ones, 1e-12)
  close(original, without, 1e-15)


@ALL
@pytest.mark.parametrize("examples", [EXAMPLES, 1])
def test_compact_is_what_is_masked(name, examples):
  """Outputs, and gradients by variables and arguments, in double precision; at another batch size, too."""
  s = setup(name)
  args = tuple(arg[:examples] for arg in s.args)
  outputs, grads = s.of_masked(s.variables, s.masks, *args)
  small, small_grads = jax.jit(lambda *args: outputs_and_gradients(s.model, s.small, *args))(
    s.small.variables, *args
  )
  close(outputs, small, 1e-10)
  if s.model.differentiable:
    of_variables, _, *of_args = grads
    close((shrunk(s.small, of_variables), of_args), (small_grads[0], list(small_grads[1:])), 1e-10)


def shrunk(small: Any, variables: Any) -> Any:
  """What is kept of a tree like the variables, collection by collection."""
  return {key: small.shrink(part) for key, part in variables.items()}


DRAWS = 6


def alive(s: Setup, masks: Any) -> list[list[np.ndarray]]:
  """Of every leaf of the variables, along every axis, where any of some random networks has a gradient."""
  found = None
  for seed in range(1, 1 + DRAWS):
    plain = s.model.variables(seed, jnp.float64)
    variables = jax.tree.unflatten(jax.tree.structure(s.variables), jax.tree.leaves(plain))
    grads = s.of_masked(variables, masks, *s.model.inputs(seed, jnp.float64))[1][0]
    grads = [np.asarray(g) != 0 for g in jax.tree.leaves(grads)]
    found = grads if found is None else [a | b for a, b in zip(found, grads, strict=True)]
  return [
    [leaf.any(tuple(other for other in range(leaf.ndim) if other != axis)) for axis in range(leaf.ndim)]
    for leaf in found
  ]


@DIFFERENTIABLE
def test_nothing_stays_without_a_gradient(name):
  """As small as can be: what is kept of a variable is the box of the entries that matter under the masks.

  Entries that have no gradient though nothing is masked, such as rows of a table that no example reads, stay as well.
  """
  s = setup(name)
  matter, ever = alive(s, s.masks), alive(s, jax.tree.map(jnp.ones_like, s.masks))
  needed = [
    int(np.prod([np.sum(a | ~b) for a, b in zip(*axes, strict=True)]))
    for axes in zip(matter, ever, strict=True)
  ]
  kept = [leaf.size for leaf in jax.tree.leaves(s.small.variables)]
  assert sum(kept) <= 1.01 * sum(needed), dict(
    zip(paths(s.variables), zip(kept, needed, strict=True), strict=True)
  )


def paths(tree: Any) -> list[str]:
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


@ALL
def test_the_cost_is_that_of_the_compact_network(name):
  s = setup(name)
  cost = fp.cost_model(s.auto.apply, s.auto.variables, *s.args)
  assert 0 < s.small.cost == float(cost(s.masks)) < cost.dense


@DIFFERENTIABLE
def test_masks_of_every_example_and_training(name):
  """Gradients by masks are those of single examples, and a few steps come down to the target."""
  s = setup(name)
  cost = fp.cost_model(s.auto.apply, s.auto.variables, *s.args)
  least = jax.tree.map(lambda m: jnp.zeros_like(m).at[..., 0].set(1), s.masks)
  target = 0.5 * (cost.dense + float(cost(least)))
  features = sum(m.size for m in jax.tree.leaves(s.masks))
  tx = optax.chain(
    optax.sgd(1e-3), fp.fisher_prune(cost, prune_every=2, flops_target=target, features_per_prune=features)
  )
  params, rest = s.variables["params"], {key: part for key, part in s.variables.items() if key != "params"}

  def loss(params: Any, masks: Any, args: Any) -> jax.Array:
    return jnp.mean(losses(s.masked({"params": params, **rest}, masks, *args)))

  @jax.jit
  def step(params: Any, state: Any, args: Any) -> Any:
    _, (grads, mask_grads) = fp.value_and_grads(loss)(params, fp.get_masks(state), args)
    updates, state = tx.update(grads, state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), state, mask_grads

  state = tx.init(params)
  ones = fp.get_masks(state)
  singles = [
    s.of_masked(s.variables, ones, *(arg[n : n + 1] for arg in s.args))[1][1] for n in range(EXAMPLES)
  ]
  params, state, mask_grads = step(params, state, s.args)
  close(jax.tree.map(lambda *rows: np.stack(rows, axis=-2), *singles), mask_grads, 1e-6)
  assert float(fp.get_state(state).cost) == cost.dense
  params, state, _ = step(params, state, s.args)
  masks = fp.get_masks(state)
  assert all(np.asarray(m).any(-1).all() for m in jax.tree.leaves(masks))
  variables = {"params": params, **rest, "masks": masks}
  small = fp.compact(s.auto.apply, variables, *s.args)
  assert small.cost <= target
  close(jax.jit(s.auto.apply)(variables, *s.args), jax.jit(small)(small.variables, *s.args), 1e-10)
