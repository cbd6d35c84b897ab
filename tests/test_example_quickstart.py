"""The quickstart, as a user runs it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.py"


def test_it_prunes_digits_to_a_tenth_and_draws_a_picture(tmp_path):
  environment = os.environ | {"XLA_FLAGS": "", "MPLBACKEND": "agg"}  # it runs longer than it compiles
  found = subprocess.run(
    [sys.executable, str(EXAMPLE)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
  )
  assert found.returncode == 0, found.stderr
  dense, small = re.search(r"FLOPs per example +([\d,]+) +([\d,]+)", found.stdout).groups()
  assert int(small.replace(",", "")) <= 0.1 * int(dense.replace(",", ""))
  correct = [float(share) for share in re.findall(r"([\d.]+)% of unseen digits", found.stdout)]
  assert correct[-1] == correct[-2]  # the small network is the masked one
  assert correct[-1] > 96
  assert (tmp_path / "quickstart.png").stat().st_size > 10_000


def test_it_is_short_and_needs_little():
  text = EXAMPLE.read_text()
  assert len(text.splitlines()) <= 60
  imported = {
    (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
    for node in ast.walk(ast.parse(text))
    if isinstance(node, ast.Import | ast.ImportFrom)
  }
  assert imported <= {
    *sys.stdlib_module_names,
    "jax",
    "flax",
    "optax",
    "numpy",
    "matplotlib",
    "fisherprune_jax",
  }
