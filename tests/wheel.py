"""Build the sdist and the wheel, and run the README's example with the wheel alone: ``make wheel``.

Two fresh virtual environments get the wheel without extras. One has the newest versions of all dependencies, the other the
lowest that ``pyproject.toml`` allows. The NNX guide runs there too, since it uses most of Flax.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = "scikit-learn"
"""The example takes its images from it; the library does not need it."""

IMPORTS = """
import importlib, importlib.metadata, pkgutil, sys
import fisherprune_jax
assert fisherprune_jax.__file__.startswith(sys.prefix), fisherprune_jax.__file__
assert fisherprune_jax.__version__ == importlib.metadata.version("fisherprune-jax")
for module in pkgutil.walk_packages(fisherprune_jax.__path__, "fisherprune_jax."):
  importlib.import_module(module.name)
for name in ("jax", "jaxlib", "flax", "numpy", "optax", "fisherprune-jax"):
  print(name, importlib.metadata.version(name))
"""
"""Every module can be imported without extras, from the wheel and not from the repository."""

STEP = "\ntrain_step(params, opt_state, x[:64], y[:64])\n"


def run(*command: object, cwd: Path = ROOT) -> str:
  """Run a command and return its output; print the output too."""
  print("$", *command, flush=True)
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
  process = subprocess.Popen([*map(str, command)], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)
  lines = []
  for line in process.stdout:
    print(line, end="", flush=True)
    lines.append(line)
  if process.wait():
    sys.exit(f"{command[0]} failed with exit code {process.returncode}.")
  return "".join(lines)


def environment(folder: Path, *packages: object) -> Path:
  """Make a virtual environment with some packages and return its Python."""
  venv.create(folder, with_pip=True, clear=True)
  python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
  run(python, "-m", "pip", "install", "--quiet", *packages)
  return python


def build(folder: Path) -> Path:
  """Build the sdist and, from that, the wheel into ``dist/``; check both and return the wheel."""
  shutil.rmtree(ROOT / "dist", ignore_errors=True)
  python = environment(folder, "build", "twine")
  run(python, "-m", "build", "--outdir", ROOT / "dist", ROOT)
  run(python, "-m", "twine", "check", "--strict", *(ROOT / "dist").iterdir())
  (wheel,) = (ROOT / "dist").glob("*.whl")
  return wheel


def check(python: Path, folder: Path) -> None:
  """Run the README's example and the NNX guide outside of the repository, with only what is installed."""
  blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
  (folder / "imports.py").write_text(IMPORTS)
  (folder / "example.py").write_text("".join(blocks) + STEP)
  run(python, "-I", "imports.py", cwd=folder)
  options = ("-o", "ELLIPSIS", "-o", "NORMALIZE_WHITESPACE")
  run(python, "-I", "-m", "doctest", *options, ROOT / "docs" / "nnx.md", cwd=folder)
  accuracy = float(run(python, "-I", "example.py", cwd=folder))
  if accuracy < 0.95:
    sys.exit(f"The README's example should print an accuracy above 0.95, printed {accuracy}.")


def main() -> None:
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  lowest = [bound.replace(">=", "==") for bound in project["dependencies"]]
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    wheel = build(folder / "build")
    check(environment(folder / "newest", wheel, DATA), folder)
    check(environment(folder / "lowest", wheel, DATA, *lowest), folder)
  print(f"{wheel.name} runs the README's example, with the newest dependencies and with the lowest.")


if __name__ == "__main__":
  main()
