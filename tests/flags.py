"""How XLA compiles in the tests: they run small programs once, so their time goes into compiling."""

from importlib.metadata import version

# Later versions of XLA know no other way to emit fused loops than the slow one, and end the process at a flag that they
# do not know: this is the one fact of the tests that hangs on a version.
_EMITTERS = ["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []

QUICK = " ".join(["--xla_backend_optimization_level=0", *_EMITTERS])
