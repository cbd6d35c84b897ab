"""Batches of arguments: what is given, and how it is cut so that a part can be held out."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._errors import require
from fisherprune_jax._graph.variables import abstract
from fisherprune_jax._training.estimation import iterated
from fisherprune_jax._types import ApplyFn, PyTree

HELD_OUT = 4
"""One batch in so many is held out."""

Arguments = tuple[PyTree, ...]


def is_held_out(number: int, count: int) -> bool:
  """Whether a batch, of so many, is one of those that choose instead of being fitted; none is of a few."""
  return count >= HELD_OUT and number % HELD_OUT == HELD_OUT - 1


def listed(batches: Iterable[PyTree]) -> list[PyTree]:
  """The batches, if they are seen not to be a single one."""
  found = list(iterated(batches))
  require(bool(found), "batches must hold at least one batch", 0, "Iterators may be used up.")
  return found


def arguments(batch: PyTree) -> Arguments:
  """The arguments that a batch is: a tuple of them, or the only one."""
  return batch if type(batch) is tuple else (batch,)


def parted(apply_fn: ApplyFn, variables: PyTree, batches: list[Arguments]) -> list[Arguments]:
  """The batches; a few large ones are cut along their examples, so that some can be held out.

  Those of a network that works at one batch size alone stay as they are.
  """
  if len(batches) >= HELD_OUT:
    return batches
  parts = [part for batch in batches for part in _cut(batch)]
  try:
    for part in parts:
      jax.eval_shape(apply_fn, abstract(variables), *abstract(part))
  except Exception:  # whatever a user's function raises at another batch size
    return batches
  return parts


def _cut(batch: Arguments) -> list[Arguments]:
  leaves, tree = jax.tree.flatten(batch)
  sizes = {jnp.shape(x)[:1] for x in leaves}
  if len(sizes) != 1 or () in sizes:
    return [batch]
  ((size,),) = sizes
  edges = np.linspace(0, size, min(size, HELD_OUT) + 1).astype(int)
  return [
    jax.tree.unflatten(tree, [x[start:end] for x in leaves]) for start, end in itertools.pairwise(edges)
  ]


def signature(batch: Arguments) -> Any:
  """What batches of one program have in common."""
  return jax.tree.structure(batch), tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(abstract(batch)))
