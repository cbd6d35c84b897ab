"""Slices optimizer states for compact parameters."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._compaction.kept import Kept
from fisherprune_jax._compaction.parts import Part, find_part, shapes_by_path
from fisherprune_jax._errors import (
  Path,
  describe,
  is_known,
  path_name,
  require_same_tree,
  same_structure,
  warn,
)
from fisherprune_jax._graph.variables import dtype_of
from fisherprune_jax._training.state import FisherPruneState

Keys = tuple[str, ...]
"""A path in a tree, as names."""
Shapes = Mapping[Keys, tuple[int, ...]]


class Owner(NamedTuple):
  """The parameter of a state's leaf; ``axis`` if the leaf is a vector along that axis."""

  kept: Kept
  axis: int | None


def shrink_opt_state(
  tx: Any, opt_state: Any, variables: Any, kept: Any, of: Part | None, shrink_pruning: Callable[..., Any]
) -> Any:
  """Slice every leaf of an optimizer state that belongs to a parameter.

  A leaf belongs to the parameter whose path ends its own. If it has the parameter's shape, perhaps after axes of its
  own, it is sliced; so is a vector out of a list with one per axis. Other statistics (factored second moments,
  everything flattened to one vector) are reset, with a warning.

  Args:
    tx: the transformation.
    opt_state: its state for the full parameters; another is a ``ValueError``.
    variables: the compact variables.
    kept: a tree of ``Kept``, like the variables.
    of: picks the optimizer's part of the variables; None to infer it.
    shrink_pruning: ``shrink_pruning(state, path)``, for a pruning state.
  """
  full = jax.tree.map(lambda k, x: jax.ShapeDtypeStruct(k.shape, dtype_of(x)), kept, variables)
  statistics = _without_pruning(opt_state)
  of = of or find_part(full, statistics, functools.partial(_init, tx))
  params, before = of(variables), _shapes_before(tx, of(full))
  _check(shapes_by_path(statistics), before, statistics)
  after = _shapes(tx, params)
  owners = _owners(before, dict(_leaves_by_keys(of(kept))))
  restarted: set[Keys] = set()

  def shrink(path: Path, leaf: Any) -> Any:
    keys = _keys(path)
    if isinstance(leaf, FisherPruneState):
      return shrink_pruning(leaf, keys)
    smaller = _shrink_leaf(leaf, owners[keys], after.get(keys))
    if smaller is None:
      restarted.add(keys)
    return leaf if smaller is None else smaller

  own = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, opt_state)
  state = jax.tree_util.tree_map_with_path(shrink, own, is_leaf=_is_pruning)
  return _restart(state, tx, params, restarted) if restarted else state


def _init(tx: Any, params: Any) -> Any:
  return _without_pruning(jax.eval_shape(tx.init, params))


def _shapes(tx: Any, params: Any) -> Shapes:
  return shapes_by_path(_init(tx, params))


def _shapes_before(tx: Any, full: Any) -> Shapes:
  try:
    return _shapes(tx, full)
  except Exception as error:
    raise ValueError(
      f"tx must be the transformation that made opt_state, got one whose init fails for the full "
      f"parameters: {error}. If it is for another part of the variables, say which, as in "
      "of=lambda variables: variables['adapters']."
    ) from error


def _check(given: Shapes, before: Shapes, statistics: Any) -> None:
  """Raise unless the state belongs to the full parameters."""
  for keys in [*given, *before]:
    if given.get(keys) != before.get(keys):
      where = "/".join(keys) or "the root"
      have = f"{where} has shape {before[keys]}" if keys in before else f"there is no {where}"
      found = dict(_leaves_by_keys(statistics))
      raise ValueError(
        f"opt_state must belong to the full parameters, for which {have}; got "
        f"{describe(found[keys]) if keys in found else 'none'}. Pass the state from before compaction, and the "
        "transformation that made it; where that is for a part of the variables, say which, as in "
        "of=lambda variables: variables['adapters']."
      )


def _shrink_leaf(leaf: Any, owner: Owner | None, after: tuple[int, ...] | None) -> Any | None:
  """The kept entries of a leaf, or None if it cannot be sliced."""
  shape = jnp.shape(leaf)
  kept = owner and (owner.kept if owner.axis is None else owner.kept.along(owner.axis))
  if kept is None or kept.is_whole:
    return leaf if shape == after else None
  own = len(shape) - len(kept.shape)  # leading axes: L-BFGS stores several gradients
  if own >= 0 and shape[own:] == kept.shape:
    slicer = kept.slice
    for _ in range(own):
      slicer = jax.vmap(slicer)
    smaller = slicer(leaf)
    return smaller if smaller.shape == after else None
  # A scalar per parameter is kept; other leaves are factored.
  return leaf if shape == after and math.prod(shape) <= 1 else None


def _restart(state: Any, tx: Any, params: Any, restarted: Collection[Keys]) -> Any:
  """Reset the leaves that could not be sliced, with a warning."""
  warn(
    "Optimizer statistics that are not shaped like their parameters cannot be sliced, so these restart from zero: "
    f"{', '.join(sorted(map('/'.join, restarted)))}. Others go on where they were."
  )
  fresh = dict(_leaves_by_keys(_without_pruning(tx.init(params))))

  def choose(path: Path, leaf: Any) -> Any:
    return fresh[_keys(path)] if not _is_pruning(leaf) and _keys(path) in restarted else leaf

  return jax.tree_util.tree_map_with_path(choose, state, is_leaf=_is_pruning)


def _is_pruning(x: Any) -> bool:
  return isinstance(x, FisherPruneState)


def _without_pruning(state: Any) -> Any:
  return jax.tree.map(lambda x: None if _is_pruning(x) else x, state, is_leaf=_is_pruning)


def _leaves_by_keys(tree: Any) -> Iterator[tuple[Keys, Any]]:
  return ((_keys(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def _keys(path: Path) -> Keys:
  return tuple(path_name((key,)) for key in path)


def _owners(paths: Collection[Keys], by_path: Mapping[Keys, Kept]) -> dict[Keys, Owner | None]:
  """For each path of the state, the parameter whose path ends it, perhaps before the number of an axis.

  Several fit if a parameter is named like a part of the state (``mu``). Then the one with the most fellow parameters
  at the same place counts, or else the one of the longest path.
  """

  @functools.cache
  def fellows(start: Keys, by_axis: bool) -> int:
    found = 0
    for path, kept in by_path.items():
      ends = [(str(axis),) for axis in range(len(kept.shape))] if by_axis else [()]
      found += bool(ends) and all(start + path + end in paths for end in ends)
    return found

  def owner(path: Keys) -> Owner | None:
    whole = [(fellows(path[:at], False), Owner(by_path[path[at:]], None)) for at in _starts(path, by_path)]
    parts = [
      (fellows(path[:at], True), Owner(by_path[path[at:-1]], int(path[-1])))
      for at in _starts(path[:-1], by_path)
      if path[-1].isdigit() and int(path[-1]) < len(by_path[path[at:-1]].shape)
    ]
    return max(whole + parts, key=lambda found: found[0])[1] if whole or parts else None

  return {path: owner(path) for path in paths}


def _starts(path: Keys, by_path: Mapping[Keys, Kept]) -> list[int]:
  """Where paths of parameters that end this one begin; the longest first."""
  return [at for at in range(len(path)) if path[at:] in by_path]


def shrink_pruning(state: FisherPruneState, path: Keys, kept: Any, given: Any) -> FisherPruneState:
  """The pruning state, at ``path`` in the optimizer state, of a network with kept masks: of all its masks, or a part.

  Args:
    state: the pruning state.
    path: its path.
    kept: a tree of ``Kept``, like the masks.
    given: the masks of the compaction; others are a ``ValueError``.
  """
  how = "Pass the optimizer state whose masks the network was compacted with."
  parts = [("", kept, given), *_mappings(kept, given)]
  fitting = [part for part in parts if same_structure(part[2], state.masks)]
  if not fitting:
    require_same_tree(state.masks, given, "the masks of opt_state", "the compact network's masks", how)
  # Among equal structures choose the part with these masks, or the one that the state is named after.
  _, kept, given = max(fitting, key=lambda part: (_are(part[2], state.masks), part[0] in path))
  slices = {
    name: jax.tree.map(lambda k, leaf: k.slice(leaf), kept, getattr(state, name))
    for name in ("scores", "masks", "pruned_at")
  }
  if not _are(given, state.masks):
    raise ValueError(f"The masks of opt_state must be those of the compact network, got others. {how}")
  return state._replace(**slices)


def _mappings(kept: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
  """The nested mappings of a tree of masks, with their keys."""
  for key in kept if isinstance(kept, Mapping) else ():
    if isinstance(kept[key], Mapping):
      yield str(key), kept[key], given[key]
      yield from _mappings(kept[key], given[key])


def _are(given: Any, masks: Any) -> bool:
  """Whether masks equal the given ones, as far as they are known."""
  pairs = zip(jax.tree.leaves(given), jax.tree.leaves(masks), strict=True)
  return all(not is_known(mask) or np.array_equal(ours, mask) for ours, mask in pairs)
