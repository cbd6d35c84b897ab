"""The serving form of a network as a function of the arrays that are computed once."""

from collections.abc import Sequence
from typing import Any

import jax

from fisherprune_jax._errors import describe, path_names, require
from fisherprune_jax._freezing.known import Known
from fisherprune_jax._freezing.part import Part
from fisherprune_jax._graph import compat
from fisherprune_jax._graph.examples import map_with_axes
from fisherprune_jax._graph.program import CALLS, INLINED, build
from fisherprune_jax._graph.variables import VariableTree, abstract, signature
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._types import ApplyFn, BatchAxes, PyTree

Names = tuple[str, ...]
BIAS, TABLE = "bias", ("constants", "table")


class Serving:
  """``serving(variables, *args)``, the outputs of ``apply_fn``; its variables are computed once.

  Args:
    apply_fn: the network.
    tree: its variables, with masks.
    args: its other arguments.
    batch_axes: their example axes.

  Attributes:
    variables: what is computed of the variables, in nested dictionaries, and the masks.
  """

  def __init__(
    self, apply_fn: ApplyFn, tree: VariableTree, args: Sequence[PyTree], batch_axes: BatchAxes
  ) -> None:
    for path, leaf in tree.paths:
      is_array = not isinstance(leaf, jax.ShapeDtypeStruct)
      require(
        is_array, "freeze=True needs arrays as variables", leaf, f"That is {'/'.join(path_names(path))}."
      )
    self._apply_fn, self._shapes, self._flags = apply_fn, abstract(tree.variables), tree.flags
    self._parts: dict[Any, tuple[Part, PyTree]] = {}
    self._cautious = False
    if not self._is_free(args, batch_axes):
      self._cautious, self._parts = True, {}
    part, _ = self._part(args)
    self._stored = _shapes_of(part)
    arrays = jax.jit(lambda leaves: self._compute(part, leaves))(jax.tree.leaves(tree.variables))
    self._names = _names([path_names(path) for path, _ in tree.paths], part)
    self.variables = {**_nested(self._names, arrays), COLLECTION: tree.mask_tree}

  def __call__(self, variables: PyTree, *args: PyTree) -> PyTree:
    part, out_tree = self._part(args)
    if _shapes_of(part) != self._stored:
      raise ValueError(
        "A frozen network must be called with the shapes that it was frozen with, but for the batch size, got "
        f"{', '.join(map(describe, jax.tree.leaves(args)))}. It has tables for these shapes: freeze another one."
      )
    inputs, count = part.program.inputs, len(self._flags)
    masks = [value for value, is_mask in zip(inputs[:count], self._flags, strict=True) if is_mask]
    env = dict(zip(masks, jax.tree.leaves(variables[COLLECTION]), strict=True))
    env.update(zip(inputs[count:], jax.tree.leaves(args), strict=True))
    outs = part.run(env, [_at(variables, names) for names in self._names])
    return jax.tree.unflatten(jax.tree.structure(out_tree), outs)

  def _part(self, args: Sequence[PyTree]) -> tuple[Part, PyTree]:
    """The network in two parts, for arguments of these shapes, and the tree of its outputs."""
    key = signature(args)
    if key not in self._parts:
      closed, out_tree = compat.trace(self._apply_fn, self._shapes, *abstract(tuple(args)))
      program = build(closed, (), INLINED | CALLS)
      inputs: list[Known | None] = [None] * len(program.inputs)
      for at, (value, is_mask) in enumerate(zip(program.inputs, self._flags, strict=False)):
        if not is_mask:
          inputs[at] = Known(frozenset({value}), tuple(n != 1 for n in value.shape))
      self._parts[key] = Part(program, inputs, self._cautious), out_tree
    return self._parts[key]

  def _is_free(self, args: Sequence[PyTree], batch_axes: BatchAxes) -> bool:
    """Whether the stored arrays have the same shapes at another batch size."""

    def longer(x: Any, axis: int | None) -> Any:
      if axis is None or axis >= len(x.shape):
        return x
      return jax.ShapeDtypeStruct((*x.shape[:axis], 2 * x.shape[axis] + 1, *x.shape[axis + 1 :]), x.dtype)

    here, _ = self._part(args)
    try:
      there, _ = self._part(map_with_axes(longer, abstract(tuple(args)), batch_axes))
    except (TypeError, ValueError):  # a model with its batch size inside
      return False
    return _shapes_of(here) == _shapes_of(there)

  def _compute(self, part: Part, leaves: Sequence[Any]) -> list[Any]:
    known = zip(part.program.inputs, leaves, self._flags, strict=False)
    return part.compute({value: leaf for value, leaf, is_mask in known if not is_mask})


def _shapes_of(part: Part) -> list[Any]:
  return [slot.stored for slot in part.slots]


def _names(paths: Sequence[Names], part: Part) -> list[Names]:
  """A path for every array: that of the largest variable that it is computed of, or of the bias beside it."""
  path_of = dict(zip(part.program.inputs, paths, strict=False))
  sizes = {path: value.aval.size for value, path in path_of.items()}
  found: list[Names] = []
  for slot in part.slots:
    leaves = sorted(
      (path_of[leaf] for leaf in slot.known.leaves), key=lambda path: (path[0] != "params", path)
    )
    path = max(leaves, key=lambda path: sizes[path], default=TABLE)  # the first of equals
    found.append(_free((*path[:-1], BIAS) if slot.is_shift else path, found))
  return found


def _free(path: Names, taken: Sequence[Names]) -> Names:
  """A path that is not taken, nor inside of one that is, nor around one."""
  at, tried = 1, path
  while any(tried[: len(other)] == other or other[: len(tried)] == tried for other in taken):
    at += 1
    tried = (*path[:-1], f"{path[-1]}_{at}")
  return tried


def _nested(names: Sequence[Names], arrays: Sequence[Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, array in zip(names, arrays, strict=True):
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = array
  return tree


def _at(tree: Any, path: Names) -> Any:
  for key in path:
    tree = tree[key]
  return tree
