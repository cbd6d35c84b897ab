"""Common factors of two shapes."""

import math

import numpy as np
import pytest
from jax import export

from fisherprune_jax._graph.rules.reshaping import factorise

CASES = {
  "flatten": ((2, 3, 4, 5), (2, 60), [["f0"], ["f1"], ["f2"], ["f3"]], [["f0"], ["f1", "f2", "f3"]]),
  "split heads": ((2, 3, 8), (2, 3, 2, 4), [["f0"], ["f1"], ["f2", "f3"]], [["f0"], ["f1"], ["f2"], ["f3"]]),
  "add axes": ((4,), (1, 1, 4), [["f0"]], [[], [], ["f0"]]),
  "one feature": ((1,), (1, 1, 1), [["f0"]], [[], [], ["f0"]]),
  "regroup": ((4, 6), (8, 3), [["f0"], ["f1", "f2"]], [["f0", "f1"], ["f2"]]),
}


@pytest.mark.parametrize(("before", "after", "ins", "outs"), CASES.values(), ids=CASES)
def test_known_factors(before, after, ins, outs):
  found = factorise(before, after)
  assert (found.ins, found.outs) == (ins, outs)
  assert not found.whole


def test_shapes_without_common_factors_stay_whole():
  found = factorise((2, 3, 4), (2, 2, 6))
  assert found.whole == {"f1", "f2", "f3", "f4"}


@pytest.mark.parametrize(
  ("before", "after"), [((3, 0, 4, 4), (3, 0, 8)), ((0, 5), (0,)), ((7, 0), (0, 2, 3))]
)
def test_arrays_of_nothing_say_nothing_of_their_other_axes(before, after):
  found = factorise(before, after)
  for shape, axes in ((before, found.ins), (after, found.outs)):
    assert shape == tuple(math.prod(found.sizes[f] for f in parts) for parts in axes)


@pytest.mark.parametrize("seed", range(200))
def test_factors_multiply_to_both_shapes_in_order(seed):
  rng = np.random.default_rng(seed)
  numbers = rng.choice([1, 2, 2, 3, 4, 5], size=rng.integers(1, 7)).tolist()

  def grouped():
    cuts = sorted(rng.integers(0, len(numbers) + 1, size=rng.integers(0, 4)).tolist())
    return tuple(math.prod(numbers[a:b]) for a, b in zip([0, *cuts], [*cuts, len(numbers)], strict=True))

  before, after = grouped(), grouped()
  found = factorise(before, after)
  for shape, axes in ((before, found.ins), (after, found.outs)):
    for size, parts in zip(shape, axes, strict=True):
      assert size == math.prod(found.sizes[f] for f in parts)
  if not found.whole:
    linked = [[f for parts in axes for f in parts] for axes in (found.ins, found.outs)]
    assert linked[0] == linked[1]


@pytest.mark.parametrize("seed", range(100))
def test_a_symbol_among_the_sizes_changes_no_factor(seed):
  """The same factors are found with a symbol as with a prime number that no other size has a part in."""
  rng = np.random.default_rng(seed)
  (symbol,) = export.symbolic_shape("b")
  numbers = rng.choice([2, 2, 3, 4, 5], size=rng.integers(2, 7)).tolist()
  at = int(rng.integers(len(numbers)))

  def grouped():
    return sorted(rng.integers(0, len(numbers) + 1, size=rng.integers(0, 4)).tolist())

  cuts = grouped(), grouped()

  def factors(size):
    sizes = [*numbers[:at], size, *numbers[at + 1 :]]
    shapes = ([math.prod(sizes[a:b]) for a, b in zip([0, *c], [*c, len(sizes)], strict=True)] for c in cuts)
    return factorise(*shapes)

  free, fixed = factors(symbol), factors(1009)
  assert (free.ins, free.outs, free.whole) == (fixed.ins, fixed.outs, fixed.whole)
  values = [n if isinstance(n, int) else 1009 * int(n // symbol) for n in free.sizes.values()]
  assert values == list(fixed.sizes.values())
