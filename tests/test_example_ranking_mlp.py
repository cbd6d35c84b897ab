"""The ranking example: killed, stopped and resumed, it ends with the numbers of the run that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OPTIMIZED = os.environ | {"XLA_FLAGS": ""}  # it runs longer than it compiles
EXAMPLE = Path(__file__).parent.parent / "examples" / "showcase" / "ranking_mlp" / "main.py"
OPTIONS = (
  "--steps 400 --save-every 40 --pruning.iter 1 --pruning.burn_in 30 --pruning.flops_target 1e5".split()
)
TIMES = ("seconds", "timings", "dense_ms", "compact_ms", "speedup", "out", "resume", "resumed_at")


def start(out, *options):
  command = [sys.executable, str(EXAMPLE), "--out", str(out), *OPTIONS, *options]
  return subprocess.Popen(command, env=OPTIMIZED, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(out, *options):
  process = start(out, *options)
  output, errors = process.communicate(timeout=240)
  return process.returncode, output + errors


def interrupt(out, network, number, *options):
  """Sends a signal once the network has a checkpoint."""
  process = start(out, *options)
  while process.poll() is None and not [*(out / "checkpoints" / network).glob("[0-9]*0")]:
    time.sleep(0.01)
  process.send_signal(number)
  _, errors = process.communicate(timeout=240)
  return process.returncode, errors


def report_of(out):
  report = json.loads((out / "report.json").read_text())
  return {key: value for key, value in report.items() if key not in TIMES}, report["resumed_at"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  out = tmp_path_factory.mktemp("alone")
  code, output = finish(out)
  assert code == 0, output
  return out


def test_it_reaches_the_budget_and_writes_everything(alone):
  report, _ = report_of(alone)
  assert report["pruned_flops"] <= report["flops_target"] == 100_000 < report["dense_flops"]
  assert report["max_abs_difference"] < 1e-4
  assert min(report["dense_auc"], report["pruned_auc"]) > 0.65
  assert 0 < min(report["dense_rce"], report["pruned_rce"]) < report["teacher_rce"] < 40
  assert (alone / "curve.png").stat().st_size > 10_000
  assert len(list((alone / "events").glob("*/events.out.tfevents*"))) == 2


@pytest.mark.thorough
def test_killed_stopped_and_resumed_it_ends_the_same(alone, tmp_path):
  assert interrupt(tmp_path, "dense", signal.SIGKILL)[0] == -signal.SIGKILL
  code, errors = interrupt(tmp_path, "pruned", signal.SIGTERM, "--resume")
  assert code == 1
  assert "Stopped after step" in errors
  code, output = finish(tmp_path, "--resume")
  assert code == 0, output
  report, resumed_at = report_of(tmp_path)
  assert report == report_of(alone)[0]
  assert resumed_at["dense"] == 400
  assert 0 < resumed_at["pruned"] < 400


def test_a_folder_in_use_is_refused_without_resume_and_with_other_options(alone):
  code, output = finish(alone)
  assert (code, "go on with --resume, or take another --out" in output) == (1, True)
  code, output = finish(alone, "--resume", "--pruning.decay", "0.5")
  assert (code, "decay 0.98, not 0.5" in output) == (1, True)
