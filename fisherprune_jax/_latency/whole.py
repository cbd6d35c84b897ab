"""Times of whole networks: the dense one, and networks with all masks cut alike."""

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._compaction.compact import compact
from fisherprune_jax._graph.program import Program
from fisherprune_jax._graph.variables import VariableTree
from fisherprune_jax._latency.clock import Memory, medians
from fisherprune_jax._latency.grids import some
from fisherprune_jax._types import ApplyFn, BatchAxes, Masks, PyTree

CUTS = (1.0, 0.5, 0.35, 0.25)
"""The share of each mask that is kept in each network."""
MOST = 0.95
"""The largest share of a call in the time of the fastest network; timed alone, calls may seem slower."""
LONG_VISIT = 50e-3
"""Seconds per visit: short visits of fast programs measure noise, and the cache of the previous program."""


class Wholes(NamedTuple):
  """Networks that were timed.

  Attributes:
    masks: the masks of each.
    seconds: the time of each, without that of a call.
    calling: the time of a call.
  """

  masks: list[Masks]
  seconds: list[float]
  calling: float


def cut(leaf: Any, share: float, multiple_of: int) -> np.ndarray:
  """A mask that keeps the first features of each row: a multiple of a number, at least one and at most all.

  >>> import numpy as np
  >>> cut(np.ones(6), 0.5, 1), cut(np.ones(6), 0.5, 4)
  (array([1., 1., 1., 0., 0., 0.], dtype=float32), array([1., 1., 1., 1., 0., 0.], dtype=float32))
  """
  size = leaf.shape[-1]
  width = size if share == 1 else min(size, max(1, round(share * size / multiple_of)) * multiple_of)
  return np.broadcast_to(np.arange(size) < width, leaf.shape).astype(np.float32)


def wholes(
  apply_fn: ApplyFn,
  tree: VariableTree,
  args: tuple[PyTree, ...],
  batch_axes: BatchAxes,
  program: Program,
  multiple_of: int,
  repeats: int,
  memory: Memory,
) -> Wholes:
  """The times of compact networks of some widths, which alternate."""
  leaves = [[cut(leaf, share, multiple_of) for leaf in tree.mask_leaves] for share in CUTS]
  alike = [jax.tree.unflatten(jax.tree.structure(tree.mask_tree), each) for each in leaves]
  program_name = _name(program, tree)
  names = [f"program {program_name}, {share:g} of widths in multiples of {multiple_of}" for share in CUTS]
  names.append(f"program {program_name}, calling it")
  if not memory.times.keys() >= set(names):
    memory.check_place()
    memory.add(dict(zip(names, _seconds(apply_fn, tree, args, batch_axes, leaves, repeats), strict=True)))
  *seconds, calling = (memory.times[name] for name in names)
  return Wholes(alike, seconds, calling)


def _name(program: Program, tree: VariableTree) -> str:
  """A name of a program that is the same in other processes: a hash of computation, inputs and which are masks."""
  numbers = {value: at for at, value in enumerate((*program.inputs, *(value for value, _ in program.consts)))}
  said = [str(tree.flags)]
  for node in program.nodes:
    ins = [(numbers.setdefault(v, len(numbers)), v.aval) for v in node.ins]
    numbers |= {v: len(numbers) + at for at, v in enumerate(node.outs)}
    said.append(f"{node.name} {node.params} {ins} {[v.aval for v in node.outs]}")
  said.append(f"{[numbers.get(value) for value in program.outputs]}")
  # Addresses of functions differ between processes.
  text = re.sub(r" at 0x[0-9a-f]+", "", "".join(said))
  return hashlib.sha256(text.encode()).hexdigest()


def _seconds(
  apply_fn: ApplyFn,
  tree: VariableTree,
  args: tuple[PyTree, ...],
  batch_axes: BatchAxes,
  masks: Sequence[Sequence[np.ndarray]],
  repeats: int,
) -> list[float]:
  """The times of networks without that of a call, and the latter."""
  variables, args = jax.tree.map(_concrete, (tree.variables, args))
  full = VariableTree(variables, tree.masks)
  runs = []
  for leaves in masks:
    small = compact(apply_fn, full.with_masks(leaves), *args, masks=tree.masks, batch_axes=batch_axes)
    runs.append(partial(jax.jit(small), small.variables, *args))
  nothing = partial(jax.jit(lambda *given: jnp.zeros(())), full.without_masks(variables), *args)
  found = medians(runs, repeats, LONG_VISIT).tolist()
  (calling,) = medians([nothing], repeats, LONG_VISIT).tolist()
  calling = min(calling, MOST * min(found))
  return [*(seconds - calling for seconds in found), calling]


def _concrete(x: Any) -> Any:
  return some(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
