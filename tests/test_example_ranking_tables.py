"""The ranking example with tables: within its budget of bytes, and saved with the original numbers of rows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fisherprune_jax as fp

EXAMPLE = Path(__file__).parent.parent / "examples" / "showcase" / "ranking_tables" / "main.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tables")
  command = [sys.executable, EXAMPLE, "--out", folder, "--steps", "1500", "--keep", "0.4"]
  subprocess.run(command, check=True, timeout=300, capture_output=True)
  return folder


def test_it_meets_the_budget_of_bytes_and_keeps_items_that_matter(out):
  report = json.loads((out / "report.json").read_text())
  assert report["pruned_megabytes"] <= report["target_megabytes"] < 0.41 * report["dense_megabytes"]
  assert report["tables"]["items"][0] < 2000
  assert report["items_without"] < 0.5 * report["items_with_taste"]
  assert report["max_abs_difference"] < 1e-4
  assert min(report["dense_auc"], report["pruned_auc"]) > 0.55


def test_the_file_takes_the_original_numbers(out):
  loaded = fp.load(out / "ranking.safetensors")
  history, item, user = np.full((4, 6), 1999), np.asarray([0, 1, 1000, 1999]), np.asarray([0, 1, 2, 199])
  logits = loaded(loaded.variables, *(x.astype(np.int32) for x in (history, item, user)))
  assert logits.shape == (4,)
  assert np.isfinite(logits).all()
