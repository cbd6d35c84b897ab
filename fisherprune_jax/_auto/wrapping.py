"""Functions of variables that may hold masks: traced, matched with groups, and run with masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from fisherprune_jax._auto.forms import study
from fisherprune_jax._auto.groups import ROWS, Group, Place
from fisherprune_jax._auto.inserting import Masked, Masks, plan_of
from fisherprune_jax._auto.laying import Laid
from fisherprune_jax._auto.matching import Leaves, Tree, match
from fisherprune_jax._auto.numbering import Numbering
from fisherprune_jax._errors import is_traced, path_names, require, require_same_tree
from fisherprune_jax._graph.examples import example_axes
from fisherprune_jax._graph.variables import signature
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._types import BatchAxes, PyTree, Shape

NO_PATH = ("variables",)
"""The path of variables that are a single array."""
MOST_KEPT = 8
"""The number of shapes that a function is kept traced for, outside of ``jit``."""
CONTAINERS, PLAIN = (tuple, list, dict, type(None)), (bool, int, float, complex, str, bytes)
"""Immutable types, compared by value."""


@dataclass(frozen=True, eq=False)
class Model:
  """What all forms of a model share: variables by path, how their axes are cut, and groups."""

  has_params: bool
  paths: list[tuple[str, ...]]
  shapes: list[Shape]
  trees: list[list[Tree]]
  groups: list[Group]
  places: list[list[Place]]
  state: frozenset[tuple[str, ...]] = frozenset()

  def split(self, variables: PyTree) -> tuple[PyTree, dict[str, Any] | None]:
    """The model's variables, and the masks among them; variables without ``"params"`` may come under that key."""
    if not isinstance(variables, Mapping):
      return variables, None
    masks = variables.get(COLLECTION)
    if not self.has_params and set(variables) <= {"params", COLLECTION}:
      return variables.get("params", variables), masks
    return variables if masks is None else {
      name: x for name, x in variables.items() if name != COLLECTION
    }, masks

  def in_order(self, variables: PyTree, values: Sequence[Any]) -> "list[Any | None]":
    """``values`` of the leaves of ``variables``, in the model's order; None for missing variables."""
    found = {
      path_names(path) or NO_PATH: (leaf.shape, value)
      for (path, leaf), value in zip(jax.tree_util.tree_leaves_with_path(variables), values, strict=True)
    }
    used = {self.paths[at] for places in self.places for at, _, _ in places}
    for path, shape in zip(self.paths, self.shapes, strict=True):
      if path in used and (path not in found or tuple(found[path][0]) != tuple(shape)):
        there = ["/".join(names) for names in sorted(found)[:8]]
        got = f"of shape {tuple(found[path][0])}" if path in found else f"none there, but {there}"
        raise ValueError(
          f"The variables must be those of the function that auto_mask analysed, with {'/'.join(path)!r} of shape {tuple(shape)}, "
          f"got {got}. Pass a tree like auto.variables, or call fp.auto_mask for this function."
        )
    return [found[path][1] if path in found else None for path in self.paths]

  def state_among(self, variables: PyTree) -> frozenset[int]:
    """The positions of state, such as caches: it is declared, or the function of ``auto_mask`` did not have it."""
    known = set(self.paths) - self.state
    paths = (path_names(path) or NO_PATH for path, _ in jax.tree_util.tree_leaves_with_path(variables))
    return frozenset(at for at, path in enumerate(paths) if path not in known)

  def examples_of(self, masks: dict[str, Any]) -> int | None:
    """Check the masks; returns the number of examples if masks are per example."""
    expected = {group.name: 0 for group in self.groups}
    require_same_tree(
      masks, expected, "masks", "auto_mask", "Pass a tree like auto.masks, of the same model and `select`."
    )
    found = set()
    for group in self.groups:
      shape, rank = tuple(masks[group.name].shape), len(group.rows)
      examples = shape[rank:-1]
      if (shape[:rank], shape[-1:]) != (group.rows, (group.size,)) or len(examples) > 1:
        raise ValueError(
          f"The mask of group {group.name!r} must have shape {(*group.rows, group.size)}, or one more axis of examples "
          f"before the last, got {shape}. Pass masks like auto.masks, of the same model and `select`."
        )
      found.add(examples)
    require(len(found) == 1, "All masks must have an example axis of one length, or none", sorted(found))
    (examples,) = found
    return examples[0] if examples else None


@dataclass(eq=False)
class Wrapped:
  """A function of a model's variables, with their masks; ``batch_axes`` are the example axes of its arguments."""

  fn: Callable[..., PyTree]
  model: Model
  batch_axes: BatchAxes = 0
  _kept: dict[Any, tuple[Masked, Leaves]] = field(default_factory=dict)

  @property
  def __wrapped__(self) -> Callable[..., PyTree]:
    """The function, where Python looks for it."""
    return self.fn

  def __call__(self, variables: PyTree, *args: PyTree, **kwargs: Any) -> PyTree:
    own, masks = self.model.split(variables)
    if masks is None:
      return self.fn(own, *args, **kwargs)
    count = self.model.examples_of(masks)
    given = _Arguments(args, kwargs)
    masked, leaves = self._masked(own, given, count)
    if count == 1:  # a single example needs no numbering
      masks = {name: mask.reshape((*mask.shape[:-2], mask.shape[-1])) for name, mask in masks.items()}
    labels = (masked.numbering.label,) if masked.numbering else ()
    laid = {
      leaf: Laid(masks[group.name], (*iterations, *labels)) for leaf, (group, iterations) in leaves.items()
    }
    return masked([*jax.tree.leaves(own), *given.arrays], Masks(laid))

  def _masked(self, own: PyTree, given: "_Arguments", count: int | None) -> tuple[Masked, Leaves]:
    """The traced function, cached if nothing is traced and the arguments are immutable."""
    key = given.key(own)
    if key is None or any(map(is_traced, (*jax.tree.leaves(own), *given.arrays))):
      return self._traced(own, given, count)
    if (key, count) not in self._kept:
      made = self._traced(own, given, count)
      if made[0].form.captured:
        return made
      if len(self._kept) == MOST_KEPT:
        self._kept.pop(next(iter(self._kept)))
      self._kept[key, count] = made
    return self._kept[key, count]

  def _traced(self, own: PyTree, given: "_Arguments", count: int | None) -> tuple[Masked, Leaves]:
    """The traced function, with a plan of its masks."""

    def function(variables: PyTree, *arrays: Any) -> PyTree:
      args, kwargs = given.filled(arrays)
      return self.fn(variables, *args, **kwargs)

    axes = given.example_axes(self.batch_axes, count)
    tables = any(group.kind == ROWS for group in self.model.groups)
    form = study(function, own, given.arrays, axes, tables, self.model.state_among(own))
    found = match(
      form, self.model.in_order(own, form.variables), self.model.trees, self.model.groups, self.model.places
    )
    if count in (None, 1):
      return Masked(form, plan_of(form, found, None)), found.leaves
    numbering = Numbering(form, axes, count)
    plan = plan_of(form, found, numbering)
    numbering.settle(plan, {leaf: group.name for leaf, (group, _) in found.leaves.items()})
    return Masked(form, plan, numbering), found.leaves


class _Arguments:
  """The arguments of a call: arrays and other leaves."""

  def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    self._args = args
    leaves, self._tree = jax.tree.flatten((args, kwargs))
    self._at = [at for at, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    self.arrays = [leaves[at] for at in self._at]
    taken = set(self._at)
    self._rest = {at: leaf for at, leaf in enumerate(leaves) if at not in taken}

  def key(self, own: PyTree) -> Any:
    """What a trace with variables ``own`` depends on; None if that includes mutable objects."""
    if not (_is_plain(self._tree) and _is_plain(jax.tree.structure(own))):
      return None
    if any(type(x) not in PLAIN for x in self._rest.values()):
      return None
    # By type and text: 1, True and 1.0 are equal, and so are 0.0 and -0.0.
    rest = tuple((at, type(x), repr(x)) for at, x in self._rest.items())
    return signature(own), signature(self.arrays), self._tree, rest

  def filled(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves = dict(zip(self._at, arrays, strict=True)) | self._rest
    return jax.tree.unflatten(self._tree, [leaves[at] for at in range(len(leaves))])

  def example_axes(self, batch_axes: BatchAxes, count: int | None) -> list[int | None]:
    """The example axis of each array that has ``count`` entries there."""
    if count is None:
      return [None] * len(self.arrays)
    found = example_axes(self._args, batch_axes)
    axes = dict(enumerate([*found, *[0] * (len(self._at) + len(self._rest) - len(found))]))
    return [
      axis if axis is not None and len(x.shape) > axis and x.shape[axis] == count else None
      for x, axis in ((x, axes[at]) for at, x in zip(self._at, self.arrays, strict=True))
    ]


def _is_plain(tree: Any) -> bool:
  """Whether a tree consists of tuples, lists and dictionaries with string keys."""
  data = tree.node_data()
  if data is None:
    return True  # a leaf
  kind, more = data
  named = kind is not dict or all(type(name) is str for name in more)
  return kind in CONTAINERS and named and all(map(_is_plain, tree.children()))
