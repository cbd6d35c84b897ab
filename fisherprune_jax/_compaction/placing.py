"""Places a smaller array on the devices of the larger one, sharded alike where sizes allow."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from fisherprune_jax._errors import warn

Names = tuple[str, ...]
"""The mesh axes that shard an array's axis."""


def put_like(leaf: jax.Array | np.ndarray, array: np.ndarray) -> jax.Array:
  """A smaller array on the device, sharded like the leaf if that is committed."""
  if not isinstance(leaf, jax.Array) or not leaf.committed:
    return jax.device_put(array)
  return jax.device_put(array, sharding_for(leaf, array.shape))


def sharding_for(leaf: jax.Array, shape: Sequence[int]) -> Sharding:
  """The sharding of a leaf for a smaller array of the same axes.

  An axis that no longer divides is replicated. If that needs more memory than the leaf did, another axis is sharded, if
  one divides. A warning reports both cases.

  >>> mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  >>> leaf = jax.device_put(np.ones((4, 6)), NamedSharding(mesh, PartitionSpec(None, "d")))
  >>> tuple(sharding_for(leaf, (4, 3)).spec)
  (None, 'd')
  """
  sharding = leaf.sharding
  if not isinstance(sharding, NamedSharding) or len(sharding.spec) > len(shape):
    return sharding
  sizes = dict(sharding.mesh.shape)
  wanted = [_names(part) for part in (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))]
  kept = [names if n % _parts(names, sizes) == 0 else () for n, names in zip(shape, wanted, strict=True)]
  lost = [at for at, names in enumerate(wanted) if kept[at] != names]
  for at in lost:
    if math.prod(shape) // _parts(sum(kept, ()), sizes) > math.prod(sharding.shard_shape(leaf.shape)):
      other = _other_axis(shape, kept, _parts(wanted[at], sizes))
      if other is not None:
        kept[other] = wanted[at]
  if lost:
    _say(shape, wanted, lost, kept)
  spec = PartitionSpec(*(None if not names else names if len(names) > 1 else names[0] for names in kept))
  return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _names(part: object) -> Names:
  if part is None or part is PartitionSpec.UNCONSTRAINED:
    return ()
  return (part,) if isinstance(part, str) else tuple(part)  # type: ignore[arg-type]


def _parts(names: Names, sizes: dict[str, int]) -> int:
  return math.prod(sizes[name] for name in names)


def _other_axis(shape: Sequence[int], kept: Sequence[Names], parts: int) -> int | None:
  """The longest unsharded axis that divides."""
  free = [at for at, n in enumerate(shape) if not kept[at] and n and n % parts == 0]
  return max(free, key=lambda at: shape[at], default=None)


def _say(shape: Sequence[int], wanted: Sequence[Names], lost: Sequence[int], kept: Sequence[Names]) -> None:
  at = lost[0]
  names = "', '".join(wanted[at])
  other = next((axis for axis, found in enumerate(kept) if found == wanted[at]), None)
  where = "is whole on every device" if other is None else f"is split along axis {other} instead"
  warn(
    f"An array of shape {tuple(shape)} cannot be split along axis {at} over the mesh axis '{names}', as the dense one was: it "
    f"{where}. For widths that divide, prune with multiple_of= the size of that mesh axis."
  )
