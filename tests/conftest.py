"""Shared settings: float64 on request, and no warnings from the fallback where a test asks for it."""

import os

from tests.flags import QUICK, compiled_programs, keras_home

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} {QUICK} --xla_force_host_platform_device_count=8"
)
os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = keras_home()
os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled_programs()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

# What takes most of the time: whole tables of networks, trainings, processes of their own. ``make test-fast`` leaves it out.
SLOW = """
  balancing bench_gpu decoding depth exact_sizes quantisation report_html rows one_shot reconstruct auto_blocks auto_examples auto_models batches budget choices compaction conformance cost criteria criterion devices docs edits emptied
  freezing exactness example_axes example_code_transformer example_pretrained_encoder example_quickstart example_ranking_mlp example_ranking_tables export frameworks
  fuzz growth joint_axes kept latency linen linen_training many_masks measures nnx nnx_auto onnx opt_states parity placing plan
  precision prices pruner pruner_frameworks pruner_training regressions report restarts saving seeing sets several several_processes threads
  training training_edges uniform vmapped_loops
""".split()


# Most of it are squares, of properties by networks. ``make test-all`` takes the whole squares; ``make test`` takes one case
# in so many of each property, from property to property another, so that it meets every property and every network.
EVERY = 7
WHOLE = ("docs", "parity")


def pytest_collection_modifyitems(items):
  squares = {}
  for item in items:
    stem = item.path.stem.removeprefix("test_")
    if stem in SLOW:
      item.add_marker("slow")
      if stem not in WHOLE:
        squares.setdefault(stem, {}).setdefault(item.name.split("[")[0], []).append(item)
  for square in squares.values():
    for row, cases in enumerate(square.values()):
      for column, item in enumerate(cases):
        if (row + column) % min(EVERY, len(cases)):
          item.add_marker("thorough")


@pytest.fixture
def x64():
  """Runs a test in double precision."""
  with jax.enable_x64(True):
    yield
