"""How the budget of ``Pruner`` falls."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def falling(
  dense: float, target: float, start: int, stop: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
  """The budget at a step: the dense cost up to ``start``, the target from ``stop`` on, and a straight line between.

  In float32 the target is rounded down, so that it is never exceeded.

  >>> budget = falling(100.0, 20.0, start=10, stop=50)
  >>> [float(budget(step)) for step in (1, 10, 30, 50, 99)]
  [100.0, 100.0, 60.0, 20.0, 20.0]
  """
  end = np.float32(target)
  if float(end) > target:
    end = np.nextafter(end, np.float32(0))

  def budget(step: jax.typing.ArrayLike) -> jax.Array:
    done = jnp.clip((jnp.asarray(step, jnp.float32) - start) / (stop - start), 0, 1)
    return jnp.where(done < 1, dense + (end - np.float32(dense)) * done, end)

  return budget
