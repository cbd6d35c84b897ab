"""Finds the part of the variables that an optimizer trains: parameters, a collection of adapters, or a sub-tree."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fisherprune_jax._errors import path_name, same_structure

Part = Callable[[Any], Any]
"""Picks the part from a tree like the variables."""
Keys = tuple[str, ...]


def find_part(full: Any, opt_state: Any, init: Callable[[Any], Any]) -> Part:
  """The part of the variables whose optimizer state has the given shapes; if none fits, the parameters, for errors.

  Candidates in order: the parameters; collections, and leaves that the state names; sub-trees.

  Args:
    full: shapes of the full variables.
    opt_state: the state, without pruning states.
    init: makes such a state, of shapes, for a part.

  Raises:
    ValueError: if several parts fit equally well.
  """
  for candidates in _tiers(full, shapes_by_path(opt_state)):
    fitting = {}
    for name, part in candidates:
      if fit := _fit(part(full), opt_state, init):
        fitting[tuple(map(id, jax.tree.leaves(part(full))))] = (fit, name, part)
    best = max((fit for fit, _, _ in fitting.values()), default=0)
    found = [(name, part) for fit, name, part in fitting.values() if fit == best]
    if len(found) > 1:
      raise ValueError(
        "opt_state must belong to one part of the variables, got one that fits several: "
        f"{', '.join(repr(name) for name, _ in found)}. Say which, as in of=lambda variables: variables['adapters']."
      )
    if found:
      return found[0][1]
  return next(_tiers(full, {}))[0][1]


def shapes_by_path(tree: Any) -> dict[Keys, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {tuple(path_name((key,)) for key in path): jnp.shape(leaf) for path, leaf in leaves}


def _fit(part: Any, opt_state: Any, init: Callable[[Any], Any]) -> int:
  """How well the state for a part fits: 1 for the same leaves, 2 for the same structure too, else 0."""
  try:
    state = init(part)
  except Exception:  # any ``init`` may raise anything, for labels of other parameters for example
    return 0
  same = shapes_by_path(state) == shapes_by_path(opt_state)
  return same + (same and same_structure(state, opt_state))


def _tiers(full: Any, given: Mapping[Keys, Any]) -> Iterator[list[tuple[str, Part]]]:
  """Named candidates; later lists count only if no earlier one fits."""
  everything = ("all variables", lambda tree: tree)
  collections = list(_subtrees(full, deep=False))
  params = [candidate for candidate in collections if candidate[0] == "params"] or [everything]
  yield params
  named = {path[at:end] for path in given for at in range(len(path)) for end in (len(path), len(path) - 1)}
  filtered = [(f"what of {name} the state names", _compose(part, _filter(named))) for name, part in params]
  yield [*filtered, ("what the state names", _filter(named)), everything, *collections]
  yield list(_subtrees(full, deep=True))


def _subtrees(tree: Any, deep: bool, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Part]]:
  """The entries of a mapping, and nested mappings."""
  for key, child in tree.items() if isinstance(tree, Mapping) else ():
    if not path or isinstance(child, Mapping):
      yield "/".join(map(str, (*path, key))), _at((*path, key))
      if deep:
        yield from _subtrees(child, deep, (*path, key))


def _at(path: tuple[Any, ...]) -> Part:
  def part(tree: Any) -> Any:
    for key in path:
      tree = tree[key]
    return tree

  return part


def _compose(first: Part, second: Part) -> Part:
  return lambda tree: second(first(tree))


def at_paths(paths: Sequence[tuple[Any, ...]]) -> Part:
  """Picks leaves of a module by path, from any collection of its variables."""

  def part(variables: Any) -> Any:
    leaves = {path: leaf for tree in variables.values() for path, leaf in _flat(tree)}
    found: dict[Any, Any] = {}
    for path in paths:
      node = found
      for key in path[:-1]:
        node = node.setdefault(key, {})
      node[path[-1]] = leaves[path]
    return found

  return part


def _flat(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
  for key, child in tree.items():
    if isinstance(child, Mapping):
      yield from _flat(child, (*path, key))
    else:
      yield (*path, key), child


def _filter(named: set[Keys]) -> Part:
  """Picks the leaves of nested mappings with the given paths."""

  def part(tree: Any, path: Keys = ()) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    found = {}
    for key, child in tree.items():
      here = (*path, path_name((jax.tree_util.DictKey(key),)))
      rest = part(child, here) if isinstance(child, Mapping) else child
      if rest if isinstance(child, Mapping) else here in named:
        found[key] = rest
    return found

  return part
