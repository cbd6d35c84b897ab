"""Masks on positions, on either side of a window: parameters by position keep what the windows hang on, and no more."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp

N = 9
LAYOUT = ("NHC", "HIO", "NHC")
WINDOWS: dict[str, Any] = {
  "valid": lambda x, k: lax.conv_general_dilated(x, k, [1], "VALID", dimension_numbers=LAYOUT),
  "strided": lambda x, k: lax.conv_general_dilated(x, k, [2], "SAME", dimension_numbers=LAYOUT),
  "dilated": lambda x, k: lax.conv_general_dilated(x, k, [1], [(1, 2)], None, [2], LAYOUT),
  "transposed": lambda x, k: lax.conv_transpose(x, k, [2], "SAME", dimension_numbers=LAYOUT),
  "one tap": lambda x, k: lax.conv_general_dilated(x, k[:1], [1], "VALID", dimension_numbers=LAYOUT),
  "average": lambda x, k: lax.reduce_window(x, 0.0, lax.add, (1, 3, 1), (1, 2, 1), "VALID"),
  "maximum": lambda x, k: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME"),
}


@pytest.mark.parametrize("in_front", [True, False])
@pytest.mark.parametrize("name", WINDOWS)
def test_positions(name: str, in_front: bool) -> None:
  """What is left of parameters on both sides of a window is what has a gradient, and the function is the same."""
  rng = np.random.default_rng(0)
  slide, x = WINDOWS[name], jnp.asarray(rng.normal(size=(2, N, 3)))
  kernel = jnp.asarray(rng.normal(size=(3, 3, 3)))
  places = slide(x, kernel).shape[1]
  mask = (np.arange(N if in_front else places) % 5 == 1).astype(np.float32)
  before, after = (jnp.asarray(rng.normal(size=(n, 1))) for n in (N, places))
  params = {"before": before, "kernel": kernel, "after": after}

  def apply(variables: Any, x: Any) -> Any:
    p, m = variables["params"], variables["masks"]["m"][:, None]
    x = x * p["before"] * (m if in_front else 1)
    return jnp.sum(slide(x, p["kernel"]) * p["after"] * (1 if in_front else m), 1)

  variables = {"params": params, "masks": {"m": jnp.asarray(mask)}}
  grads = jax.grad(lambda p: jnp.sum(jnp.sin(apply({**variables, "params": p}, x))))(params)
  small = fp.compact(apply, variables, x)
  for side in ("before", "after"):
    gradient = np.asarray(grads[side]).any(1)
    kept = np.isin(np.asarray(params[side]), np.asarray(small.variables["params"][side]))[:, 0]
    assert (kept >= gradient).all()
    assert name == "maximum" or (kept == gradient).all()
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-5, atol=1e-6)
