"""Products of activations and parameters as matrices, all rows of them and some."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from fisherprune_jax._graph.program import trace
from fisherprune_jax._reconstruction import regression
from fisherprune_jax._reconstruction.products import (
  operand_matrix,
  parameter_matrix,
  result_matrix,
  row_step,
  some_rows,
)


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize(
  ("x", "w", "layout", "options"),
  [
    ((2, 9, 6), (3, 6, 4), ("NWC", "WIO", "NWC"), {}),
    ((2, 9, 6), (3, 2, 6), ("NWC", "WIO", "NWC"), {"window_strides": (2,), "feature_group_count": 3}),
    ((2, 9, 6), (3, 6, 4), ("NWC", "WIO", "NWC"), {"lhs_dilation": (2,), "padding": [(2, -1)]}),
    (
      (2, 6, 7, 8),
      (5, 6, 3, 2),
      ("NCHW", "OIHW", "NHWC"),
      {"rhs_dilation": (2, 3), "padding": [(1, 2), (0, 1)]},
    ),
    ((3, 4, 5, 6, 2), (2, 2, 3, 2, 4), ("NDHWC", "DHWIO", "NCDHW"), {"window_strides": (1, 2, 1)}),
  ],
)
def test_a_convolution_is_a_product_of_matrices(x, w, layout, options, step):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=shape)) for shape in (x, w))
  given = {"window_strides": (1,) * (x.ndim - 2), "padding": [(0, 0)] * (x.ndim - 2), **options}
  program, _ = trace(lambda a, b: jax.lax.conv_general_dilated(a, b, dimension_numbers=layout, **given), x, w)
  (node,) = program.nodes
  y = jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, precision="highest", **given)
  found = operand_matrix(node, 1, x, step) @ parameter_matrix(node, 1, w)
  np.testing.assert_allclose(found, some_rows(result_matrix(node, 1, y), step, 1), rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
    result_matrix(node, 1, y, step), some_rows(result_matrix(node, 1, y), step, 1)
  )


@pytest.mark.parametrize("shape", [(8, 16, 16), (6, 10, 15), (64, 32), (7, 5)])
def test_some_rows_show_every_place_of_an_image(shape):
  (node,) = trace(jnp.matmul, jnp.ones((*shape, 3)), jnp.ones((3, 2)))[0].nodes
  step = row_step(node, 1, 300)
  taken = some_rows(jnp.arange(np.prod(shape)), step, 0)
  assert min(300, np.prod(shape)) <= len(set(taken.tolist())) == len(taken) < 600
  for axis, places in enumerate(np.unravel_index(taken, shape)):
    counts = np.bincount(places, minlength=shape[axis])
    assert counts.min() > 0
    assert counts.max() < 3 * counts.mean()
  assert row_step(node, 1, 0) == np.prod(shape)


def test_many_positions_say_what_some_of_them_say(monkeypatch):
  """Statistics of a fifth of the rows refit about as well as those of all."""
  x = jax.random.normal(jax.random.key(0), (8, 24, 24, 3))
  w = [0.3 * jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(3, 3, 3, 8), (3, 3, 8, 4)])]

  def net(v, x):
    conv = lambda x, w: jax.lax.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return conv(jnp.tanh(conv(x, v["w"][0])) * v["masks"], v["w"][1])

  masks = jnp.array([1.0, 0, 1, 1, 0, 1, 0, 1])
  variables, batches = {"w": w, "masks": masks}, list(jnp.split(x, 4))
  dense = net({**variables, "masks": jnp.ones(8)}, x)
  error = lambda v: float(jnp.linalg.norm(net(v, x) - dense))
  whole = error(fp.reconstruct(net, variables, batches, ridge=1e-3))
  monkeypatch.setattr(regression, "MORE_ROWS", 0)
  monkeypatch.setattr(regression, "ROWS", 12)
  some = error(fp.reconstruct(net, variables, batches, ridge=1e-3))
  assert whole < some < 1.05 * whole
  assert some < 0.9 * error(variables)
