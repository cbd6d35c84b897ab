"""A user's apply function: traced once, and analysed when needed."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import jax

from fisherprune_jax._errors import Path, path_name, path_names
from fisherprune_jax._graph import control as control
from fisherprune_jax._graph import sets
from fisherprune_jax._graph.boxes import Box, Entries, Where, whole_box
from fisherprune_jax._graph.facts import Info, stack_of
from fisherprune_jax._graph.liveness import Liveness, Rules
from fisherprune_jax._graph.program import Program, Value, trace
from fisherprune_jax._graph.rules import spec_of
from fisherprune_jax._graph.updates import analyse
from fisherprune_jax._graph.variables import VariableTree, abstract
from fisherprune_jax._types import ApplyFn, Array, Picker, PyTree

_networks = itertools.count()
"""Numbers the traced functions."""


@dataclass(frozen=True, eq=False)
class Traced:
  """An apply function traced at given shapes.

  Attributes:
    program: what it computes.
    variables: inputs that are leaves of the variables; arguments follow.
    infos: what is known of inputs.
    out_tree: the tree of result shapes.
    updates: which output replaces which variable, by position.
  """

  program: Program
  variables: list[Value]
  infos: list[Info]
  out_tree: PyTree
  updates: dict[int, int]
  _analyses: dict[bool, "Analysis"] = field(default_factory=dict)

  def analyse(self, keep_masks: bool = False) -> "Analysis":
    """What is live for all masks, with masks multiplied or without."""
    if keep_masks not in self._analyses:
      others = [found.live.subs for found in self._analyses.values()]
      found = analyse(
        self.program, self.infos, self.updates, spec_of, keep_masks, subs=next(iter(others), None)
      )
      # Without its analyses: a reference cycle would delay freeing them.
      self._analyses[keep_masks] = Analysis(replace(self, _analyses={}), *found)
    return self._analyses[keep_masks]


@dataclass(frozen=True, eq=False)
class Analysis:
  """What is live in a traced function, as expressions over masks.

  ``returned`` has the entries that outputs return if they replace variables.
  """

  traced: Traced
  live: Liveness
  returned: dict[int, Entries]

  @property
  def program(self) -> Program:
    return self.traced.program

  @property
  def new_values(self) -> dict[int, Entries]:
    """The entries of new values of variables, by the position of the variable."""
    return {self.traced.updates[at]: where for at, where in self.returned.items()}

  @property
  def variables(self) -> list[Value]:
    return self.traced.variables

  def by_rules(
    self,
    rules: Rules,
    demanded_of: Callable[[Value], Where],
    known: Mapping[Value, Box] = MappingProxyType({}),
  ) -> Liveness:
    """What would be live by other rules and demands, for the same values.

    ``known`` has boxes where inputs may be non-zero.
    """
    live, traced = self.live, self.traced
    infos = [
      info._replace(possible=known[value]) if value in known else info
      for value, info in zip(traced.program.inputs, traced.infos, strict=True)
    ]
    how = rules, live.keep_masks, demanded_of, live.subs
    return analyse(traced.program, infos, traced.updates, *how, is_diagnosis=True)[0]


def trace_apply(
  apply_fn: ApplyFn,
  tree: VariableTree,
  args: Sequence[PyTree],
  state_from: Picker | None = None,
  ranks: Sequence[int] | None = None,
) -> Traced:
  """Traces ``apply_fn(variables, *args)``.

  A mask with one axis more than in ``ranks`` has an example axis before its features. ``state_from`` picks from the
  output what replaces variables.
  """
  program, out_tree = trace(apply_fn, abstract(tree.variables), *abstract(tuple(args)))
  count = len(tree.flags)
  values = program.inputs[:count]
  infos = _variable_infos(values, tree.flags, ranks or [len(mask.shape) for mask in tree.mask_leaves])
  infos += [Info(whole_box(value.shape), varies=True) for value in program.inputs[count:]]
  updates = replaced_by(state_from, out_tree, tree.paths) if state_from else {}
  for at in updates.values():  # state is another one at each call
    infos[at] = infos[at]._replace(varies=True)
  return Traced(program, values, infos, out_tree, updates)


def replaced_by(state_from: Picker, out_tree: PyTree, paths: Sequence[tuple[Path, Array]]) -> dict[int, int]:
  """Which leaf of the output replaces which variable, of ``paths`` with leaves."""
  shapes = [leaf.shape for leaf in jax.tree.leaves(out_tree)]
  picked = state_from(jax.tree.unflatten(jax.tree.structure(out_tree), range(len(shapes))))
  places = {path_names(path): (at, leaf.shape) for at, (path, leaf) in enumerate(paths)}
  found = {}
  for path, out in jax.tree_util.tree_leaves_with_path(picked):
    at, shape = places.get(path_names(path), (None, None))
    if at is None or shapes[out] != shape:
      raise ValueError(
        f"state_from must pick from the output what replaces entries of `variables`, got {path_name(path)} of shape "
        f"{shapes[out]}, where the variables have {shape or 'no such entry'}. With mutable=['batch_stats'], "
        "say state_from=lambda out: out[1]."
      )
    found[out] = at
  return found


def _variable_infos(values: Sequence[Value], flags: Sequence[bool], ranks: Sequence[int]) -> list[Info]:
  infos, position, network = [], 0, next(_networks)
  for value, is_mask in zip(values, flags, strict=True):
    infos.append(
      _mask_info(network, position, value.shape, ranks[position]) if is_mask else Info(whole_box(value.shape))
    )
    position += is_mask
  return infos


def _mask_info(network: int, position: int, shape: tuple[int, ...], rank: int) -> Info:
  if len(shape) > rank:
    inner = _mask_info(network, position, (*shape[:-2], shape[-1]), rank)
    return _with_examples(inner, shape[-2])
  leaves = [
    Info((sets.leaf((position, layer), shape[-1], network),), mask=True)
    for layer in range(math.prod(shape[:-1]))
  ]
  for size in reversed(shape[:-1]):
    leaves = [stack_of(leaves[start : start + size]) for start in range(0, len(leaves), size)]
  (info,) = leaves
  return info


def _with_examples(info: Info, size: int) -> Info:
  layers = info.layers and tuple(_with_examples(layer, size) for layer in info.layers)
  return info._replace(possible=(*info.possible[:-1], *whole_box((size,)), info.possible[-1]), layers=layers)
