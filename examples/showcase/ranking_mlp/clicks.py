"""Synthetic clicks: rows of discretized features, and labels with the probabilities that a teacher gives."""

from statistics import NormalDist

import numpy as np

FEATURES, BINS = 30, 10  # ten quantile bins of each feature
EDGES = [NormalDist().inv_cdf(k / BINS) for k in range(1, BINS)]
Data = tuple[np.ndarray, np.ndarray]  # rows (n, 300) of zeros and ones, and their labels

_RNG = np.random.default_rng(0)
FIRST, LAST, PRODUCTS = (_RNG.normal(size=size) for size in ((FEATURES, 16), 16, (FEATURES, 4)))


def log_odds_of(features: np.ndarray) -> np.ndarray:
  """The log odds of a click by the teacher: products of features, and a layer that saturates."""
  return 0.35 * (np.tanh(features @ FIRST / 3) @ LAST + np.square(features @ PRODUCTS).sum(1) / 15) - 3.8


def rows_of(rng: np.random.Generator, count: int) -> tuple[Data, np.ndarray]:
  """Normal features in bins, with labels, and the teacher's log odds. A quarter of the rows is clicked."""
  features = rng.normal(size=(count, FEATURES))
  log_odds = log_odds_of(features)
  clicked = np.float32(rng.uniform(size=count) < 1 / (1 + np.exp(-log_odds)))
  bins = np.searchsorted(EDGES, features)[..., None] == np.arange(BINS)
  return (np.float32(bins).reshape(count, -1), clicked), log_odds


def relative_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
  """By how many percent the cross entropy is below that of the share of clicks."""
  base = np.log(labels.mean() / (1 - labels.mean()))
  entropy, base_entropy = (np.mean(np.logaddexp(0, z) - labels * z) for z in (np.float64(logits), base))
  return float(100 * (1 - entropy / base_entropy))
