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
  auto_models
  batches budget choices compaction conformance cost devices docs edits example_axes example_code_transformer
  example_pretrained_encoder example_ranking_mlp exactness export frameworks fuzz growth linen linen_training nnx nnx_auto
  emptied measures opt_states precision report restarts
  kept rounding saving seeing several threads training
""".split()


def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.stem.removeprefix("test_") in SLOW:
      item.add_marker("slow")


@pytest.fixture
def x64():
  """Runs a test in double precision."""
  with jax.enable_x64(True):
    yield
