"""Arrays that are split over the devices of several processes are compacted where they lie.

The processes are this file: ``python -m tests.test_several_processes ID COUNT PORT KIND OUT``.
"""

import contextlib
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisherprune_jax as fp
from tests.processes import run_two

LAYERS, WIDTH, HIDDEN, BATCH = 2, 16, 32, 8
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
# How many hidden features each layer keeps, and what is left of the kernel that makes them.
WIDTHS = {
  "alike": ((16, 16), (2, 16, 16)),
  "unlike": ((8, 16), (2, 16, 16)),  # unrolled, and padded to the widest
  "indivisible": ((12, 12), (2, 16, 12)),  # split along another axis
}
pytestmark = pytest.mark.slow


class Block(nn.Module):
  """A residual block with a mask over its hidden features."""

  @nn.compact
  def __call__(self, x, _):
    y = fp.Mask(name="mask")(nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm()(x))))
    return x + nn.Dense(WIDTH, name="down")(y), None


class Stack(nn.Module):
  """Blocks in a scan, and a layer after them."""

  @nn.compact
  def __call__(self, x):
    axes = {"variable_axes": {"params": 0, "masks": 0}, "split_rngs": {"params": True}}
    x, _ = nn.scan(Block, length=LAYERS, **axes)(name="layers")(x, None)
    return nn.Dense(WIDTH, name="head")(x)


MODEL = Stack()


def drawn_params():
  """The same in every process."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.ones((1, WIDTH)))["params"]
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, shapes)


def drawn_masks(widths):
  """A mask for each layer, with so many features left."""
  rng = np.random.default_rng(1)
  rows = [rng.permutation(HIDDEN) < width for width in widths]
  return {"layers": {"mask": {"mask": np.array(rows, np.float32)}}}


def on(mesh, x, *spec):
  return jax.make_array_from_callback(
    np.shape(x), NamedSharding(mesh, P(*spec)), lambda at: np.asarray(x)[at]
  )


def split(mesh, x):
  """An array over all devices of all processes, along its longest axis that divides."""
  axes = [at for at, size in enumerate(np.shape(x)) if size % mesh.size == 0]
  longest = max(axes, key=lambda at: np.shape(x)[at], default=None)
  return on(mesh, x, *("data" if at == longest else None for at in range(np.ndim(x))))


def bytes_here(tree):
  """On each device of this process."""
  held = dict.fromkeys(jax.local_devices(), 0)
  for leaf in jax.tree.leaves(tree):
    for part in leaf.addressable_shards:
      held[part.device] += part.data.nbytes
  return list(held.values())


def how_many_are_split_as_before(before, after):
  """Of arrays that lie on the devices of all processes; and of how many."""
  pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
  assert not any(leaf.is_fully_addressable for pair in pairs for leaf in pair)
  return sum(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs), len(pairs)


def gathered(tree):
  return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def compacted(mesh, widths):
  """What one process sees of a network that is split over all of them, before and after."""
  host, masks, tx = drawn_params(), drawn_masks(widths), optax.adam(1e-3)
  params, moments = (jax.tree.map(lambda x: split(mesh, x), tree) for tree in (host, tx.init(host)))
  variables = {"params": params, "masks": jax.tree.map(lambda m: on(mesh, m), masks)}
  small = fp.compact(MODEL.apply, variables, jax.ShapeDtypeStruct((2, WIDTH), np.float32))
  thin = small.shrink_opt_state(tx, moments)
  x = np.random.default_rng(2).normal(size=(BATCH, WIDTH)).astype(np.float32)
  thin_host = gathered(small.variables)
  found = small(thin_host, x)
  if all(kind is AxisType.Auto for kind in mesh.axis_types):
    together = jax.jit(small)(small.variables, on(mesh, x, "data"))
    np.testing.assert_allclose(gathered(together), found, rtol=1e-5, atol=1e-5)
  return {
    "split as before": how_many_are_split_as_before((params, moments), (small.variables["params"], thin)),
    "before": bytes_here((params, moments)),
    "after": bytes_here((small.variables, thin)),
    "kernel": small.variables["params"]["layers"]["up"]["kernel"].shape,
    "moment": thin[0].mu["layers"]["up"]["kernel"].shape,
    "loops": str(jax.make_jaxpr(small)(thin_host, x)).count("scan["),
    "outputs": found,
    "masked": MODEL.apply({"params": host, "masks": masks}, x),
  }


def main(process, count, port, kind, out):
  """One process: compacts for all ``WIDTHS``, and writes what it saw."""
  jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=process)
  assert jax.device_count() == count * jax.local_device_count() > jax.local_device_count()
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(KINDS[kind],))
  seen = {}
  for name, (widths, _) in WIDTHS.items():
    says = (
      pytest.warns(UserWarning, match="multiple_of=") if name == "indivisible" else contextlib.nullcontext()
    )
    with says, warnings.catch_warnings():
      if name != "indivisible":
        warnings.simplefilter("error")
      seen |= {f"{name} {key}": value for key, value in compacted(mesh, widths).items()}
  np.savez(out, **seen)
  jax.distributed.shutdown()


@pytest.fixture(scope="module", params=["automatic", "explicit"])
def seen(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  return [np.load(out) for out in run_two("tests.test_several_processes", folder, request.param, devices=4)]


@pytest.mark.parametrize("name", WIDTHS)
def test_outputs_are_those_of_the_masked_network(seen, name):
  for process in seen:
    np.testing.assert_allclose(process[f"{name} outputs"], process[f"{name} masked"], rtol=1e-5, atol=1e-5)
    assert process[f"{name} loops"] == (name != "unlike")


@pytest.mark.parametrize("name", WIDTHS)
def test_arrays_stay_split(seen, name):
  for process in seen:
    same, count = process[f"{name} split as before"]
    assert same == count if name != "indivisible" else 0 < same < count
    assert tuple(process[f"{name} kernel"]) == tuple(process[f"{name} moment"]) == WIDTHS[name][1]


@pytest.mark.parametrize("name", WIDTHS)
def test_every_device_of_every_process_holds_less(seen, name):
  before, after = (
    np.concatenate([process[f"{name} {when}"] for process in seen]) for when in ("before", "after")
  )
  assert len(before) == len(after) == 8
  assert np.all(after < 0.75 * before)


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
