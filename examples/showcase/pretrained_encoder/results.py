"""How good the encoders are, and the picture."""

from pathlib import Path
from typing import Any

import common
import numpy as np
from pretrained_encoder.teacher import Encode, Sentences, embed
from scipy.stats import spearmanr

NAMES = {"dense": "dense", "pruned": "pruned", "not_distilled": "pruned, not distilled"}
ROWS = (
  ("FLOPs per sentence", "flops", ",.0f"),
  ("parameters", "params", ","),
  ("cosine with the teacher, docstrings", "cosine", ".3f"),
  ("cosine with the teacher, functions", "code_cosine", ".3f"),
  ("Spearman's correlation over pairs", "spearman", ".3f"),
  ("functions found, recall@1", "recall_at_1", ".1%"),
  ("functions found, recall@10", "recall_at_10", ".1%"),
)


def cosine(found: np.ndarray, sentences: Sentences) -> float:
  """The mean cosine between embeddings and the teacher's; all of them have length one."""
  return float(np.mean(np.sum(found * sentences.embeddings, axis=1)))


def spearman(found: np.ndarray, sentences: Sentences) -> float:
  """The rank correlation between the cosines of all pairs of sentences, and the teacher's."""
  pairs = np.triu_indices(len(found), 1)
  return float(spearmanr(*((x @ x.T)[pairs] for x in (found, sentences.embeddings))).statistic)


def recall(queries: np.ndarray, answers: np.ndarray, count: int) -> float:
  """The share of queries whose own answer is among the ``count`` nearest ones."""
  near = queries @ answers.T
  return float(np.mean(np.sum(near > np.diag(near)[:, None], axis=1) < count))


def quality(encode: Encode, docstrings: Sentences, codes: Sentences) -> dict[str, float]:
  """Agreement with the teacher on docstrings, and how well they find their functions, of held-out modules."""
  found, answers = embed(encode, docstrings), embed(encode, codes)
  return {
    "cosine": cosine(found, docstrings),
    "code_cosine": cosine(answers, codes),
    "spearman": spearman(found, docstrings),
    "recall_at_1": recall(found, answers, 1),
    "recall_at_10": recall(found, answers, 10),
  }


def plot(path: Path, report: dict[str, Any], curve: dict[str, np.ndarray]) -> None:
  """Agreement with the teacher and cost over the steps, and retrieval by each network, beside the widths."""
  with common.picture(path, report, panels=3) as (agreement, flops, found):
    agreement.plot(curve["step"], curve["cosine"], "C0.-", label=f"validation: {curve['cosine'][-1]:.3f}")
    label = "initial weights under the final masks, held out"
    agreement.axhline(report["not_distilled_cosine"], color="C1", ls="--", lw=1, label=label)
    agreement.set(ylabel="cosine with the teacher", ylim=(None, 1))
    flops.plot(curve["step"], curve["flops"] / 1e6, "C0.-", label="pruned network")
    target = report["flops_target"] * report["dense_flops"] / 1e6
    flops.axhline(target, color="C3", ls="--", lw=1, label="target")
    flops.set(ylabel="MFLOPs per sentence", ylim=(0, None), xlabel="training step")
    for ax in (agreement, flops):
      ax.axvline(report["compacted_at"], color="0.3", ls=":", lw=1, label="compacted")
      ax.set_xlim(0, report["steps"])
    scores = {"recall@1": "recall_at_1", "recall@10": "recall_at_10"}
    for n, ((key, title), color) in enumerate(zip(NAMES.items(), ("0.5", "C0", "C1"), strict=True)):
      shares = [100 * report[f"{key}_{score}"] for score in scores.values()]
      drawn = found.bar(np.arange(len(scores)) + (n - 1) * 0.27, shares, 0.25, color=color, label=title)
      found.bar_label(drawn, fmt="%.1f")
    found.set_xticks(range(len(scores)), scores)
    found.set(ylabel="held-out functions\nfound by docstring [%]", ylim=(0, 110), xlim=(-0.5, 2.9))
    found.legend(loc="center right")
