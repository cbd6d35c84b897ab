"""Shared settings: float64 on request, and no warnings from the fallback where a test asks for it."""

import os

# Tests run small programs once: time goes into compiling them.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_force_host_platform_device_count=8",
  ]
)

import jax
import pytest


@pytest.fixture
def x64():
  """Runs a test in double precision."""
  with jax.enable_x64(True):
    yield
