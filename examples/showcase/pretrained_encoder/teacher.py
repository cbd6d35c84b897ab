"""The embeddings of all sentences by the dense encoder, the teacher; computed once."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pretrained_encoder import text
from pretrained_encoder.network import tokenize
from rich.progress import Progress

LENGTH, BATCH = 32, 16  # tokens of a sentence, sentences of a batch
SHORT = LENGTH // 2
"""Half of the docstrings are shorter. Batches of these have twice as many sentences, and as many tokens."""
CODE_EVERY = 3
"""One in so many training functions gives its source as a sentence beside its docstring."""
VALIDATION, HELD_OUT = 192, 500  # sentences of an evaluation in training, functions of the final report


class Sentences(NamedTuple):
  """Tokens and their mask, int32, ``(n, LENGTH)``, and the teacher's embeddings, float32, ``(n, width)``."""

  ids: np.ndarray
  mask: np.ndarray
  embeddings: np.ndarray

  def rows(self) -> dict[int, np.ndarray]:
    """By the length that batches of them have: the sentences that fit."""
    short = self.mask.sum(axis=1) <= SHORT
    return {SHORT: np.flatnonzero(short), LENGTH: np.flatnonzero(~short)}


Encode = Callable[[np.ndarray, np.ndarray], Any]


def embed(encode: Encode, sentences: Sentences, advance: Callable[[int], Any] = lambda n: None) -> np.ndarray:
  """Embeddings of all sentences; in batches of two shapes, so that ``encode`` compiles twice."""
  found = np.empty_like(sentences.embeddings)
  for length, rows in sentences.rows().items():
    size = BATCH * LENGTH // length
    for start in range(0, len(rows), size):
      some = rows[start : start + size]
      full = np.resize(some, size)  # the last batch repeats itself
      found[full] = encode(sentences.ids[full, :length], sentences.mask[full, :length])
      advance(len(some))
  return found


def spread(found: list[Any], count: int) -> list[Any]:
  """So many of them at even distances, or all."""
  return [found[n] for n in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]


def sentences_of(share: float) -> dict[str, list[str]]:
  """What is read of all functions, by the name that it has in the cache."""
  found = text.load(share)
  train, held_out = found["train"], spread(found["held_out"], HELD_OUT)
  return {
    "train": [function.docstring for function in train] + [function.code for function in train[::CODE_EVERY]],
    "validation": [function.docstring for function in spread(found["validation"], VALIDATION)],
    "docstrings": [function.docstring for function in held_out],
    "codes": [function.code for function in held_out],
  }


def batch_at(
  sentences: Sentences, noise: float, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, mask and noisy targets of random sentences of like length, a function of seed and step alone."""
  rng, rows = np.random.default_rng((seed, step)), sentences.rows()
  tokens = np.array([len(those) * length for length, those in rows.items()])
  length = rng.choice(list(rows), p=tokens / tokens.sum())  # so that each sentence is seen as often
  chosen = rng.choice(rows[length], BATCH * LENGTH // length)
  ids, mask, embeddings = (x[chosen] for x in sentences)
  return (
    ids[:, :length],
    mask[:, :length],
    embeddings + noise * rng.standard_normal(embeddings.shape, np.float32),
  )


def teach(
  path: Path, folder: Path, share: float, encode: Encode, width: int, bars: Progress
) -> dict[str, Sentences]:
  """All sentences with the teacher's embeddings, from the cache if it is there."""
  if not path.exists():
    reading = bars.add_task("reading", total=None, now="")
    texts = sentences_of(share)
    bars.update(reading, total=1, completed=1)
    task = bars.add_task("teacher", total=sum(map(len, texts.values())), now="")
    found = {}
    for name, those in texts.items():
      ids, mask = tokenize(folder, those, LENGTH)
      blank = Sentences(ids, mask, np.zeros((len(those), width), np.float32))
      found[name] = blank._replace(embeddings=embed(encode, blank, partial(bars.advance, task)))
    arrays = {f"{name}.{field}": value for name, x in found.items() for field, value in x._asdict().items()}
    np.savez(path.with_suffix(".tmp.npz"), **arrays)
    os.replace(path.with_suffix(".tmp.npz"), path)  # all of it or nothing
  with np.load(path) as stored:
    names = dict.fromkeys(key.partition(".")[0] for key in stored)
    return {name: Sentences(*(stored[f"{name}.{field}"] for field in Sentences._fields)) for name in names}
