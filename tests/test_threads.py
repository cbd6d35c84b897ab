"""Tracing in several threads at once: the same costs as one after another, and one object for each expression."""

import gc
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from jax.extend.core import Primitive

import fisherprune_jax as fp
from tests.models import CASES, random_masks
from tests.test_sets import random_set

THREADS = 8


@pytest.fixture
def eager_switching():
  """Threads are switched as often as Python can, so that a race is one within a second."""
  before = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  yield
  sys.setswitchinterval(before)


def together(function, inputs):
  """``function`` of every input, each in a thread of its own, all begun at once."""
  barrier = threading.Barrier(len(inputs))

  def run(x):
    barrier.wait()
    return function(x)

  with ThreadPoolExecutor(len(inputs)) as pool:
    return list(pool.map(run, inputs))


@pytest.mark.thorough
@pytest.mark.usefixtures("eager_switching")
def test_threads_that_build_one_expression_get_one_object():
  def build(seed):
    return [random_set(random.Random(f"{seed}/{n}"), 4, 8) for n in range(40)]

  for seed in range(15):
    gc.collect()
    first, *others = together(build, [seed] * THREADS)
    for found in others:
      assert all(a is b for a, b in zip(first, found, strict=True))
    serials = {}
    for s in everything_in(first):
      assert serials.setdefault(s.serial, s) is s


def everything_in(found):
  """The expressions and all their parts."""
  rest = list(found)
  while rest:
    s = rest.pop()
    yield s
    rest += s.parts


MODELS = ("mlp", "cnn_with_flatten", "residual_network", "dense_net", "gated_unit", "mask_after_flatten")


@pytest.mark.usefixtures("eager_switching")
def test_models_traced_in_threads_cost_what_they_cost_alone():
  def costs(name):
    case = CASES[name]
    found = fp.cost_model(case.module().apply, case.variables(), case.inputs())
    masks = [random_masks(found.masks, seed) for seed in range(3)]
    return [found.dense, *(found.exact(m) for m in masks), *(found.breakdown(m) for m in masks)]

  names = MODELS * 2
  alone = list(map(costs, names))
  gc.collect()
  assert together(costs, names) == alone


def test_a_primitive_without_a_rule_is_announced_by_one_thread_only():
  unknown = Primitive("unknown_to_threads")
  unknown.def_abstract_eval(lambda x: x)

  def trace(_):
    variables = {"w": np.ones((3, 4), np.float32), "masks": np.ones(4, np.float32)}
    x = np.ones((2, 3), np.float32)
    return fp.cost_model(lambda v, x: unknown.bind((x @ v["w"]) * v["masks"]), variables, x)

  with pytest.warns(UserWarning, match="no rule for the primitive `unknown_to_threads`") as said:
    together(trace, range(THREADS))
  assert len(said) == 1
