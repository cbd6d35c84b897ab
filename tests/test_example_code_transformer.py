"""The transformer example: a few steps, everything written."""

import json
import os
import subprocess
import sys
from pathlib import Path

OPTIMIZED = os.environ | {"XLA_FLAGS": ""}  # it runs longer than it compiles
EXAMPLE = Path(__file__).parent.parent / "examples" / "code_transformer.py"


def test_a_few_steps(tmp_path):
  command = [sys.executable, EXAMPLE, "--steps", "4", "--flops-target", "0.7", "--out", tmp_path]
  done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=OPTIMIZED)
  assert done.returncode == 0, done.stderr[-3000:]
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["flops_fraction"] <= 0.7
  assert report["small_flops"] <= report["pruned_flops"] < report["dense_flops"]
  assert report["max_abs_difference"] < 1e-4
  around = report["bits_per_byte_around_compaction"]
  assert abs(around[0] - around[1]) < 1e-4
  assert all(0 < report[f"{name}_bits_per_byte"] < 8.5 for name in ("dense", "pruned", "small"))
  assert report["sample"].startswith("def ")
  assert (tmp_path / "curve.png").stat().st_size > 10_000
  assert len(list((tmp_path / "events").glob("*/events.out.tfevents*"))) == 3


def test_bad_options_are_refused(tmp_path):
  command = [sys.executable, EXAMPLE, "--flops-target", "1.5", "--out", tmp_path]
  done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=OPTIMIZED)
  assert done.returncode == 1
  assert "--flops-target must be above 0 and at most 1, got 1.5." in done.stderr
