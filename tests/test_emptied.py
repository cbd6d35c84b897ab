"""Masks that were emptied: all that computed only for them goes, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from tests.counting import count
from tests.models import CASES, random_masks

pytestmark = pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def emptied(masks, seed):
  """Random masks, of which each leaf in turn, a row of each stack, and some leaves at random are emptied."""
  drawn, rng = random_masks(masks, seed), np.random.default_rng(seed)
  leaves, tree = jax.tree.flatten(drawn)
  gone = [{at} for at in range(len(leaves))]
  if len(leaves) > 2:
    gone = [gone[at] for at in rng.permutation(len(leaves))[:2]]
    gone.append({at for at in range(len(leaves)) if rng.random() < 0.5})
  for chosen in gone:
    yield jax.tree.unflatten(tree, [0 * m if at in chosen else m for at, m in enumerate(leaves)])
  if any(m.ndim > 1 for m in leaves):
    yield jax.tree.unflatten(tree, [m.at[(0,) * (m.ndim - 1)].set(0) for m in leaves])


def loss_of(apply):
  def loss(rest, masks, x):
    y = apply({**rest, "masks": masks}, x)
    return jnp.sum(jnp.sin(y + 1.0)), y

  return loss


def close(expected, found):
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-10 * max(1.0, float(np.abs(a).max(initial=0))))


@ALL
def test_outputs_and_gradients_are_those_of_the_masked_network(case, x64):
  apply, variables, x = case.module().apply, case.variables(0, jnp.float64), case.inputs(0, jnp.float64)
  rest = {name: part for name, part in variables.items() if name != "masks"}
  loss = loss_of(apply)
  run = jax.jit(jax.grad(loss, (0, 2), has_aux=True) if case.differentiable else lambda *a: (0, loss(*a)[1]))
  for masks in emptied(variables["masks"], 1):
    small = fp.compact(apply, {**rest, "masks": masks}, x)
    grads, y = run(rest, masks, x)
    if not np.isfinite(np.asarray(y)).all():
      continue  # the masked network divides by the number of features
    thin = lambda rest, x: (lambda y: (jnp.sum(jnp.sin(y + 1.0)), y))(small(rest, x))  # noqa: B023
    if not case.differentiable:
      close(y, small(small.variables, x))
      continue
    found, z = jax.jit(jax.grad(thin, (0, 1), has_aux=True))(small.variables, x)
    close(y, z)
    close((small.shrink(grads[0]), grads[1]), found)
    # What went has no gradient: all that there is of it is in what was kept.
    for full, kept in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(found[0]), strict=True):
      np.testing.assert_allclose(np.square(full).sum(), np.square(kept).sum(), rtol=1e-8, atol=1e-12)


@ALL
def test_costs_are_those_of_brute_force_and_of_the_compact_program(case):
  apply, variables, x = case.module().apply, case.variables(), case.inputs()
  cost = fp.cost_model(apply, variables, x)
  rest = {name: part for name, part in variables.items() if name != "masks"}
  for masks in emptied(variables["masks"], 2):
    # The last feature of every mask that has any takes along what computes only for it.
    last = jax.tree.map(lambda m: m * (jnp.cumsum(m, -1) == 1), masks)
    before, drops = cost.exact(last), cost.per_feature(last)
    assert float(cost(last)) * x.shape[0] == pytest.approx(before, rel=1e-6)
    for leaf, (path, mask) in enumerate(jax.tree_util.tree_leaves_with_path(last)):
      for k in map(tuple, np.argwhere(mask)):
        fewer = jax.tree_util.tree_map_with_path(lambda p, m: m.at[k].set(0) if p == path else m, last)  # noqa: B023
        found = jax.tree.leaves(drops)[leaf][k] * x.shape[0]
        assert found == pytest.approx(before - cost.exact(fewer), rel=1e-6), (path, k)
    small = fp.compact(apply, {**rest, "masks": masks}, x)
    exact = cost.exact(masks)
    assert small.cost * x.shape[0] == pytest.approx(exact, rel=1e-6)
    assert not cost.exceeds(masks, exact / x.shape[0])
    assert not exact or cost.exceeds(masks, (exact - 1) / x.shape[0])
    # What comes behind an emptied mask may no longer depend on the arguments; it is run, and counts.
    of_arguments, all_of_it = flops(small, small.variables, x)
    assert of_arguments <= exact <= all_of_it
    assert exact == all_of_it or len(set(flops(apply, variables, x))) == 2


def flops(function, variables, x):
  """What a program counts that depends on the arguments, and in all."""
  jaxpr, leaves = jax.make_jaxpr(function)(variables, x), len(jax.tree.leaves(variables))
  return [count(jaxpr, [False] * leaves + [True], constants) for constants in (False, True)]
