"""Restarts: a job that is stopped or killed at any step goes on as if it had not been."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import fisherprune_jax as fp
from tests import job, saving

ROOT = Path(__file__).parent.parent
STEPS = 14


def command(*args):
  return [sys.executable, "-m", "tests.saving", *map(str, args)]


def kill_while_saving(folder, at):
  """Runs until the save of a step has begun, and kills there; whether the save was left half done."""
  with subprocess.Popen(command(folder, STEPS), cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
    for line in running.stdout:
      if line == f"saving {at}\n":
        running.send_signal(signal.SIGKILL)
  assert running.returncode == -signal.SIGKILL
  return not (folder / str(at)).exists()


def assert_bit_identical(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).dtype == np.asarray(y).dtype
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  return saving.train(tmp_path_factory.mktemp("uninterrupted"), STEPS)


def test_stopped_at_any_step_and_restored_in_a_new_process(tmp_path, uninterrupted):
  for stop in (3, 4, 9):  # before, at and between prunes
    subprocess.run(command(tmp_path, stop), cwd=ROOT, check=True)
  state = saving.train(tmp_path, STEPS)
  assert_bit_identical(state, uninterrupted)
  assert fp.history(state["opt_state"]) == fp.history(uninterrupted["opt_state"]) != []


def test_killed_in_the_middle_of_saves(tmp_path, uninterrupted):
  half_done = [kill_while_saving(tmp_path, at) for at in (2, 6, 11)]
  assert any(half_done), "no kill came before the end of its save"
  state = saving.train(tmp_path, STEPS)
  assert_bit_identical(state, uninterrupted)


def test_a_compact_network_is_restored_in_its_own_shapes(tmp_path, uninterrupted):
  tx, masks = job.transformation(), fp.get_masks(uninterrupted["opt_state"])
  small = fp.compact(job.MODEL.apply, {"params": uninterrupted["params"], "masks": masks}, job.batch(0)[0])
  state = {
    "variables": small.variables,
    "opt_state": small.shrink_opt_state(tx, uninterrupted["opt_state"]),
  }
  with ocp.StandardCheckpointer() as checkpoints:
    checkpoints.save(tmp_path / "masks", masks)
    checkpoints.save(tmp_path / "compact", state)
  sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (uninterrupted["params"], small.variables)]
  assert sizes[1] < sizes[0]
  program = (
    "import sys, pathlib, numpy as np; from tests import saving; folder = pathlib.Path(sys.argv[1]); "
    "np.save(folder / 'outputs.npy', saving.evaluate_compact(folder))"
  )
  subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, check=True, env=os.environ)
  expected = saving.one_more_step(small, tx, state)
  np.testing.assert_array_equal(np.load(tmp_path / "outputs.npy"), expected)
