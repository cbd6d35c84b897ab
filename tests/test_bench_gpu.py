"""What ``make bench-gpu`` runs on a GPU runs here, on small networks."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks/gpu.py"


def run(out, *options):
  command = [sys.executable, SCRIPT, "--tiny", "--out", out, *options]
  subprocess.run(command, check=True, timeout=300, capture_output=True)
  return json.loads(out.read_text())


def test_all_parts_run(tmp_path):
  found = run(tmp_path / "gpu.json")
  assert [len(found[part]) for part in ("compact", "overhead", "predicted", "reconstruct")] == [4, 1, 1, 1]
  assert all(row["compact_ms"] > 0 and row["flops_ratio"] > 1.5 for row in found["compact"])
  assert not found["left_out"]


def test_parts_behind_the_limit_are_said(tmp_path):
  found = run(tmp_path / "gpu.json", "--limit", "0")
  assert found["left_out"] == ["compact", "overhead", "predicted", "reconstruct"]
