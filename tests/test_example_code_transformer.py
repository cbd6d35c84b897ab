"""The transformer example: a few steps, everything written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

OPTIMIZED = os.environ | {"XLA_FLAGS": ""}  # it runs longer than it compiles
EXAMPLE = Path(__file__).parent.parent / "examples" / "showcase" / "code_transformer" / "main.py"


@pytest.mark.thorough
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
  assert len(list((tmp_path / "events").glob("*/events.out.tfevents*"))) == 4


@pytest.mark.parametrize(
  ("option", "value", "message"),
  [
    ("--flops-target", "1.5", "--flops-target must be above 0 and at most 1, got 1.5."),
    ("--teaching", "-0.5", "--teaching must be from 0 to 1, got -0.5."),
  ],
)
def test_bad_options_are_refused(tmp_path, option, value, message):
  command = [sys.executable, EXAMPLE, option, value, "--out", tmp_path]
  done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=OPTIMIZED)
  assert done.returncode == 1
  assert message in done.stderr


def test_what_is_learnt_from_a_teacher(monkeypatch):
  """Part of it is written, part of it is what the teacher thinks likely: a loop over bytes."""
  monkeypatch.syspath_prepend(EXAMPLE.parents[1])
  from code_transformer.network import Lesson, loss_of

  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 5, 256))
  windows = rng.integers(256, size=(2, 6))
  taught = np.exp(rng.normal(size=(2, 5, 256)))
  taught /= taught.sum(-1, keepdims=True)
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = np.zeros(2)
  for n in range(2):
    for at in range(5):
      expected[n] -= 0.7 * logs[n, at, windows[n, at + 1]] + 0.3 * (taught[n, at] * logs[n, at]).sum()
  np.testing.assert_allclose(loss_of(logits, Lesson(windows, taught), 0.3), expected, rtol=1e-5)
  np.testing.assert_allclose(
    loss_of(logits, Lesson(windows), 0.3), loss_of(logits, Lesson(windows, taught), 0.0), rtol=1e-5
  )
