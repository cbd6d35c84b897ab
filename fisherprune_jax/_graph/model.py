"""A user's apply function, traced once: its program, its masks, and what is live in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import control as control
from fisherprune_jax._graph import sets
from fisherprune_jax._graph.facts import Box, Info, join, whole_box
from fisherprune_jax._graph.linking import analyse_linked
from fisherprune_jax._graph.liveness import Liveness, Rules
from fisherprune_jax._graph.program import Program, Value, trace
from fisherprune_jax._graph.rules import spec_of

Path = tuple[Any, ...]
MaskSelector = str | Callable[[Path], bool]
Key = tuple[int, int]
"""A mask vector: the position of its leaf among the mask leaves, and its row if the leaf is a stack."""


@dataclass(frozen=True)
class VariableTree:
  """A tree of variables, with the masks among them told apart."""

  variables: Any
  masks: MaskSelector

  def __post_init__(self) -> None:
    if not self.mask_leaves:
      chosen = f"collection {self.masks!r}" if isinstance(self.masks, str) else "paths chosen by `masks`"
      raise ValueError(
        f"The variables must hold masks, got none in the {chosen}. "
        "Put fp.Mask() after the layers to prune, and pass the variables that model.init returned."
      )
    for path, leaf in self.paths:
      if self.is_mask(path) and not len(leaf.shape):
        raise ValueError(f"A mask must have a feature axis, got a scalar at {keystr(path)}.")

  @property
  def paths(self) -> list[tuple[Path, Any]]:
    """All leaves with their paths."""
    return jax.tree_util.tree_leaves_with_path(self.variables)

  def is_mask(self, path: Path) -> bool:
    """Whether the leaf at ``path`` is a mask."""
    if callable(self.masks):
      return bool(self.masks(path))
    return bool(path) and getattr(path[0], "key", getattr(path[0], "name", None)) == self.masks

  @property
  def flags(self) -> list[bool]:
    """Per leaf, whether it is a mask."""
    return [self.is_mask(path) for path, _ in self.paths]

  @property
  def mask_leaves(self) -> list[Any]:
    """The masks, in tree order."""
    return [leaf for path, leaf in self.paths if self.is_mask(path)]

  @property
  def mask_tree(self) -> Any:
    """The masks as a tree: the collection itself, or all variables with None in place of the others."""
    if isinstance(self.masks, str):
      return self.variables[self.masks]
    return jax.tree_util.tree_map_with_path(lambda path, x: x if self.is_mask(path) else None, self.variables)

  def without_masks(self, tree: Any) -> Any:
    """A tree of this structure without its masks."""
    if isinstance(self.masks, str):
      return {name: part for name, part in tree.items() if name != self.masks}
    return jax.tree_util.tree_map_with_path(lambda path, x: None if self.is_mask(path) else x, tree)


@dataclass(frozen=True)
class Model:
  """An apply function traced at given shapes.

  Attributes:
    program: what it computes.
    live: what is live in it, as expressions over the masks.
    variables: the values of the variables' leaves; the inputs after them are the arguments.
    out_tree: the structure of its result, of shapes.
    replaced: which output replaces which variable, by position.
    shown: for such an output, the entries that it shows.
    infos: what is known of the inputs.
  """

  program: Program
  live: Liveness
  variables: list[Value]
  out_tree: Any
  replaced: dict[int, int]
  shown: dict[int, Box]
  infos: list[Info]

  def with_rules(self, rules: Rules, asked_of: Callable[[Value], Box]) -> Liveness:
    """What would be live in it by other rules, if its outputs asked for something else; of the same values."""
    options = self.live.drop_masks, asked_of, self.live.subs
    return analyse_linked(self.program, self.infos, self.replaced, rules, *options)[0]

  @property
  def arguments(self) -> list[Value]:
    """The values of the arguments' leaves."""
    return self.program.inputs[len(self.variables) :]


def trace_model(
  apply_fn: Callable[..., Any],
  tree: VariableTree,
  args: Sequence[Any],
  drop_masks: bool = True,
  updates: Callable[[Any], Any] | None = None,
  ranks: Sequence[int] | None = None,
) -> Model:
  """Traces ``apply_fn(variables, *args)`` and finds what is live for every possible mask.

  A mask of one axis more than ``ranks`` says has an example axis before its features.
  """
  program, out_tree = trace(apply_fn, abstract(tree.variables), *abstract(tuple(args)))
  count = len(tree.flags)
  values = program.inputs[:count]
  infos = _variable_infos(values, tree.flags, ranks or [len(mask.shape) for mask in tree.mask_leaves])
  infos += [Info(whole_box(value.shape), varies=True) for value in program.inputs[count:]]
  replaced = _replaced(updates, out_tree, tree) if updates else {}
  live, shown = analyse_linked(program, infos, replaced, spec_of, drop_masks)
  return Model(program, live, values, out_tree, replaced, shown, infos)


def _replaced(updates: Callable[[Any], Any], out_tree: Any, tree: VariableTree) -> dict[int, int]:
  """Which leaf of the output replaces which leaf of the variables."""
  structure = jax.tree.structure(out_tree)
  shapes = [leaf.shape for leaf in jax.tree.leaves(out_tree)]
  picked = updates(jax.tree.unflatten(structure, range(structure.num_leaves)))
  places = {keystr(path): (at, leaf.shape) for at, (path, leaf) in enumerate(tree.paths)}
  found = {}
  for path, out in jax.tree_util.tree_leaves_with_path(picked):
    at, shape = places.get(keystr(path), (None, None))
    if at is None or shapes[out] != shape:
      raise ValueError(
        f"updates must pick from the output what replaces entries of `variables`, got {keystr(path)} of shape "
        f"{shapes[out]}, where the variables have {shape or 'no such entry'}. With mutable=['batch_stats'], "
        "say updates=lambda out: out[1]."
      )
    found[out] = at
  return found


def _variable_infos(values: Sequence[Value], flags: Sequence[bool], ranks: Sequence[int]) -> list[Info]:
  infos, position = [], 0
  for value, is_mask in zip(values, flags, strict=True):
    infos.append(
      _mask_info(position, value.shape, ranks[position]) if is_mask else Info(whole_box(value.shape))
    )
    position += is_mask
  return infos


def _mask_info(position: int, shape: tuple[int, ...], rank: int) -> Info:
  if len(shape) > rank:
    return _with_examples(_mask_info(position, (*shape[:-2], shape[-1]), rank), shape[-2])
  leaves = [Info((sets.leaf((position, row), shape[-1]),), mask=True) for row in range(math.prod(shape[:-1]))]
  for size in reversed(shape[:-1]):
    leaves = [_stack_of(leaves[start : start + size]) for start in range(0, len(leaves), size)]
  (info,) = leaves
  return info


def _with_examples(info: Info, size: int) -> Info:
  """The same mask for each of several examples."""
  rows = info.rows and tuple(_with_examples(row, size) for row in info.rows)
  return info._replace(box=(*info.box[:-1], *whole_box((size,)), info.box[-1]), rows=rows)


def _stack_of(rows: list[Info]) -> Info:
  return Info((*whole_box((len(rows),)), *join(*(row.box for row in rows))), rows=tuple(rows))


def rows_of(leaves: Sequence[Any], xp: Any) -> dict[Key, Any]:
  """Mask leaves as vectors by key, on the host or under ``jit``."""
  return {
    (position, row): vector
    for position, leaf in enumerate(leaves)
    for row, vector in enumerate(xp.reshape(xp.asarray(leaf), (math.prod(leaf.shape[:-1]), leaf.shape[-1])))
  }


def sizes_of(leaves: Sequence[Any]) -> dict[Key, int]:
  """How many features each mask vector has."""
  shapes = [leaf.shape for leaf in leaves]
  return {(at, row): shape[-1] for at, shape in enumerate(shapes) for row in range(math.prod(shape[:-1]))}


def leaves_of(rows: dict[Key, Any], leaves: Sequence[Any]) -> list[Any]:
  """The inverse of ``rows_of``: vectors by key as mask leaves, on the host."""
  count = [math.prod(leaf.shape[:-1]) for leaf in leaves]
  return [
    np.reshape([rows[position, row] for row in range(n)], leaf.shape)
    for position, (n, leaf) in enumerate(zip(count, leaves, strict=True))
  ]


def abstract(tree: Any) -> Any:
  """Arrays as shapes and dtypes."""
  return jax.tree.map(_abstract_leaf, tree)


def _abstract_leaf(x: Any) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  x = x if hasattr(x, "shape") and hasattr(x, "dtype") else jnp.asarray(x)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))


def signature(tree: Any) -> Any:
  """What a trace depends on: structure, shapes and dtypes."""
  shapes = abstract(tree)
  return jax.tree.structure(shapes), tuple((x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(shapes))


def keystr(path: Path) -> str:
  """A tree path for people, as ``params/Dense_0/kernel``."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
