"""How XLA compiles in the tests: they run small programs once, so their time goes into compiling. Where files go meanwhile."""

import atexit
import os
import platform
import tempfile
from importlib.metadata import version

# Later versions of XLA know no other way to emit fused loops than the slow one, and end the process at a flag that they
# do not know: this is the one fact of the tests that hangs on a version. The quick way computes a value anew in each
# loop that reads it, with other roundings in each where products and sums are one instruction: a maximum is then equal
# to none of the values that it was taken of. So it must do without that instruction.
_QUICK_LOOPS = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_max_isa=AVX"]
_HAS_THEM = version("jaxlib").startswith("0.10.") and platform.machine() == "x86_64"

QUICK = " ".join(["--xla_backend_optimization_level=0", *(_QUICK_LOOPS if _HAS_THEM else [])])


def folder() -> str:
  """One that is there for as long as this process."""
  made = tempfile.TemporaryDirectory()
  atexit.register(made.cleanup)
  return made.name


def keras_home() -> str:
  """Where Keras keeps its settings while tests run: it writes them when it is imported, by default among the user's."""
  return folder()


def compiled_programs() -> str:
  """Where what is compiled once is kept from being compiled again, by another worker or by a process of a test.

  All of them inherit the folder; the first process makes it, unless one is given that stays from run to run.
  """
  return os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder()
