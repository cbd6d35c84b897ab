"""How the budget of ``Pruner`` falls."""

import numpy as np
import optax


def falling(dense: float, target: float, start: int, stop: int) -> optax.Schedule:
  """The budget at a step: the dense cost up to ``start``, the target from ``stop`` on, and a straight line between.

  A schedule is float32. The target is rounded down, so that it is never exceeded; but one that allows the whole network is
  rounded up, so that it does.

  >>> budget = falling(100.0, 20.0, start=10, stop=50)
  >>> [float(budget(step)) for step in (1, 10, 30, 50, 99)]
  [100.0, 100.0, 60.0, 20.0, 20.0]
  """
  return optax.linear_schedule(
    _up(dense), _up(dense) if target >= dense else _down(target), stop - start, start
  )


def _down(number: float) -> float:
  """The largest float32 that is not above a number."""
  near = np.float32(number)
  return float(near if float(near) <= number else np.nextafter(near, np.float32(0)))


def _up(number: float) -> float:
  """The smallest float32 that is not below a number."""
  near = np.float32(number)
  return float(near if float(near) >= number else np.nextafter(near, np.float32(np.inf)))
