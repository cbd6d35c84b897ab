"""The quickstarts, as a user runs them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.py"
ONE_SHOT = EXAMPLE.with_name("quickstart_one_shot.py")
FRAMEWORKS = {
  name: EXAMPLE.with_name(f"quickstart_{name}.py") for name in ("nnx", "equinox", "haiku", "keras")
}


def run(example, folder):
  environment = os.environ | {"XLA_FLAGS": "", "MPLBACKEND": "agg"}  # it runs longer than it compiles
  found = subprocess.run(
    [sys.executable, str(example)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
  )
  assert found.returncode == 0, found.stderr
  return found.stdout, [float(share) for share in re.findall(r"([\d.]+)% of unseen digits", found.stdout)]


def test_it_prunes_digits_to_a_tenth_and_draws_a_picture(tmp_path):
  printed, correct = run(EXAMPLE, tmp_path)
  dense, small = re.search(r"FLOPs per example +([\d,]+) +([\d,]+)", printed).groups()
  assert int(small.replace(",", "")) <= 0.1 * int(dense.replace(",", ""))
  assert correct[-1] == correct[-2]  # the small network is the masked one
  assert correct[-1] > 96
  assert (tmp_path / "quickstart.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_it_prunes_a_model_of_each_framework(name, tmp_path):
  pytest.importorskip({"nnx": "flax"}.get(name, name))
  printed, correct = run(FRAMEWORKS[name], tmp_path)
  dense, small = re.search(r"FLOPs per example +([\d,]+) +([\d,]+)", printed).groups()
  assert int(small.replace(",", "")) <= 0.1 * int(dense.replace(",", ""))
  assert correct[-1] == correct[-2]
  assert correct[-1] > 96


def test_one_shot_pruning_keeps_accuracy_without_training(tmp_path):
  printed, correct = run(ONE_SHOT, tmp_path)
  shares = [float(share) for share in re.findall(r"([\d.]+)% of the FLOPs", printed)]
  assert all(share <= keep for share, keep in zip(shares, (50, 25, 10), strict=True))
  assert correct[0] > 96
  assert all(share > correct[0] - most for share, most in zip(correct[1:], (1, 1.5, 3), strict=True))


@pytest.mark.parametrize("example", [EXAMPLE, ONE_SHOT, *FRAMEWORKS.values()], ids=lambda path: path.stem)
def test_it_is_short_and_needs_little(example):
  text = example.read_text()
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
    *FRAMEWORKS,
  }
