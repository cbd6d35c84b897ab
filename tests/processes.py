"""One of several processes that train together: ``python -m tests.processes ID COUNT PORT OUT``."""

import functools
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisherprune_jax as fp
from tests import job


def main(process: int, count: int, port: int, out: str) -> None:
  """Data parallel over all devices of all processes; writes the masks after every step."""
  jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=process)
  assert jax.device_count() == count * jax.local_device_count() > jax.local_device_count()
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, P("data"))
  tx, seen, mine = (
    job.transformation(),
    [],
    slice(process * job.BATCH // count, (process + 1) * job.BATCH // count),
  )
  whole = jax.tree.map(np.asarray, job.start(tx))
  params, opt_state = jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, P()), x), whole
  )
  step = jax.jit(functools.partial(job.train_step, tx))
  for n in range(job.STEPS):
    local = [x[mine] for x in job.batch(n)]  # this process loads its own rows alone
    batch = tuple(jax.make_array_from_process_local_data(rows, x) for x in local)
    params, opt_state, _ = step(params, opt_state, batch)
    seen.append(job.flat_masks(opt_state))
  masks = fp.get_masks(opt_state)
  pruning = job.collectives(functools.partial(job.train_step, tx), params, opt_state, batch)
  pruning.subtract(job.collectives(job.plain_step, params, opt_state[0], masks, batch))
  bias = np.asarray(params["Dense_1"]["bias"])
  np.savez(out, masks=np.stack(seen), bias=bias, collectives=np.array(dict(pruning)))
  jax.distributed.shutdown()


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
