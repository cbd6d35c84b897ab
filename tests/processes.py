"""One of several processes that train together: ``python -m tests.processes ID COUNT PORT OUT``."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisherprune_jax as fp
from tests import job
from tests.flags import QUICK


def run_two(module: str, folder: Path, *args: str, devices: int) -> list[Path]:
  """Runs ``python -m module ID COUNT PORT ARGS... OUT`` as two processes, which meet on the loopback interface.

  Each has so many devices. Returns the files that they wrote.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
  outs = [folder / f"{process}.npz" for process in range(2)]
  running = [
    subprocess.Popen(
      [sys.executable, "-m", module, str(process), "2", str(port), *args, out],
      cwd=Path(__file__).parent.parent,
      env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      stderr=subprocess.PIPE,
      text=True,
    )
    for process, out in enumerate(outs)
  ]
  errors = [process.communicate(timeout=240)[1] for process in running]
  for process, said in zip(running, errors, strict=True):
    assert process.returncode == 0, said[-3000:]
  return outs


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
