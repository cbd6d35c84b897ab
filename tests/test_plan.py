"""What making a compact network takes, and what it holds on to."""

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisherprune_jax as fp
from fisherprune_jax._graph import liveness
from tests.models import CASES, random_masks


class Norms(nn.Module):
  """Two norms over masks, on lines of their own."""

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(fp.Mask()(nn.relu(nn.Dense(8)(x))))
    y = fp.Mask()(nn.relu(nn.Dense(6)(x)))
    return nn.Dense(2)(nn.LayerNorm()(y))


def norms():
  model, x = Norms(), jnp.ones((3, 4))
  variables = model.init(jax.random.key(0), x)
  return model.apply, {**variables, "masks": random_masks(variables["masks"], 0)}, x


@pytest.fixture
def counted(monkeypatch):
  """How often a function is traced, and how often a program is analysed."""
  counts = {"traces": 0, "analyses": 0}
  analyse = liveness.analyse

  def count(*args, **kwargs):
    counts["analyses"] += 1
    return analyse(*args, **kwargs)

  monkeypatch.setattr(liveness, "analyse", count)

  def tracing(function):
    def traced(*args):
      counts["traces"] += 1
      return function(*args)

    return traced

  return counts, tracing


def test_a_cost_model_takes_one_trace_and_one_analysis(counted):
  counts, tracing = counted
  apply, variables, x = norms()
  cost = fp.cost_model(tracing(apply), variables, x)
  cost(variables["masks"]), cost.per_feature(variables["masks"]), cost.breakdown(variables["masks"])
  assert counts == {"traces": 1, "analyses": 1}


@pytest.mark.parametrize("options", [{}, {"keep_masks": True}])
def test_compacting_takes_one_trace_and_one_analysis(counted, options):
  counts, tracing = counted
  apply, variables, x = norms()
  small = fp.compact(tracing(apply), variables, x, **options)
  small(small.variables, x)
  assert counts == {"traces": 1, "analyses": 1}


def test_a_report_takes_an_analysis_for_each_line_and_one_for_all(counted):
  counts, tracing = counted
  apply, variables, x = norms()
  small = fp.compact(tracing(apply), variables, x)
  before = counts["analyses"]
  lines = {blocker.where for blocker in small.blockers}
  assert len(lines) > 1
  text = small.report()
  assert small.report() == text
  # One in which nothing is in the way, one for each line, and one for all of them together.
  assert counts == {"traces": 1, "analyses": before + len(lines) + 2}


def test_a_new_batch_size_takes_one_more_trace(counted):
  counts, tracing = counted
  apply, variables, x = norms()
  small = fp.compact(tracing(apply), variables, x)
  other = jnp.ones((7, 4))
  for _ in range(2):
    small(small.variables, other)
    jax.grad(lambda v: small(v, other).sum())(small.variables)
  assert counts["traces"] == 2


def released(arrays):
  """Which of these arrays are gone, when nobody else holds them."""
  gc.collect()
  return [reference() is None for reference in arrays]


@pytest.mark.parametrize("options", [{}, {"keep_masks": True}], ids=str)
@pytest.mark.parametrize("name", ["cnn_with_flatten", "scanned_layers", "batch_norm_after_the_mask"])
def test_the_dense_weights_are_released(name, options):
  case = CASES[name]
  variables, x = case.variables(), case.inputs()
  variables = {**variables, "masks": random_masks(variables["masks"], 1)}
  rest = {name: part for name, part in variables.items() if name != "masks"}
  references = [weakref.ref(leaf) for leaf in jax.tree.leaves(rest)]
  small = fp.compact(case.module().apply, variables, x, **options)
  y, text = small(small.variables, x), small.report()
  del variables, rest
  assert all(released(references))
  np.testing.assert_array_equal(small(small.variables, x), y)
  assert small.report() == text


def test_the_dense_weights_of_a_module_are_released():
  model = nnx.Sequential(
    nnx.Linear(4, 8, rngs=nnx.Rngs(0)), fp.nnx.Mask(8), nnx.Linear(8, 2, rngs=nnx.Rngs(1))
  )
  model.layers[1].mask[...] = jnp.arange(8.0) % 2
  x = jnp.ones((3, 4))
  references = [weakref.ref(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
  small = fp.nnx.compact(model, x)
  small(small.variables, x)
  del model
  assert all(released(references))
