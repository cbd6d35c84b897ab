"""Plain trees for files: dictionaries, lists and tuples, readable without any other class."""

from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from fisherprune_jax._errors import describe, path_name
from fisherprune_jax._types import PyTree

LEAF = "*"


def plain(tree: PyTree) -> PyTree:
  """A tree with the same leaves in dictionaries, lists and tuples.

  Other mappings (a ``FrozenDict``) and nodes with named children (named tuples, dataclasses, modules) become
  dictionaries; other nodes become lists.

  >>> import collections
  >>> Point = collections.namedtuple("Point", "x y")
  >>> plain([Point(1, (2, None))])
  [{'x': 1, 'y': (2, None)}]
  """
  if tree is None or jax.tree_util.all_leaves([tree]):
    return tree
  pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
  children = [(path[0], plain(child)) for path, child in pairs]
  if type(tree) in (list, tuple):
    return type(tree)(child for _, child in children)
  if children and all(isinstance(key, SequenceKey | FlattenedIndexKey) for key, _ in children):
    return [child for _, child in children]
  return {_name(key, tree): child for key, child in children}


def _name(key: Any, node: PyTree) -> str | int:
  name = (
    key.key if isinstance(key, DictKey) else key.name if isinstance(key, GetAttrKey) else path_name((key,))
  )
  if isinstance(name, bool) or not isinstance(name, str | int):
    raise ValueError(
      f"A tree to save must have strings or integers as keys, got {name!r} in a {describe(node)}. Rename it before "
      "fp.compact."
    )
  return name


def to_json(tree: PyTree) -> Any:
  """The structure of a plain tree, for JSON."""
  if isinstance(tree, dict):
    return {"dict": [[key, to_json(child)] for key, child in tree.items()]}
  if isinstance(tree, list | tuple):
    return {type(tree).__name__: [to_json(child) for child in tree]}
  return None if tree is None else LEAF


def from_json(spec: Any) -> PyTree:
  """The inverse of ``to_json``, with ``LEAF`` for each leaf.

  >>> from_json(to_json({"a": [1, None], 0: (2.0,)}))
  {'a': ['*', None], 0: ('*',)}
  """
  if not isinstance(spec, dict):
    return spec
  ((kind, children),) = spec.items()
  if kind == "dict":
    return {key: from_json(child) for key, child in children}
  return (list if kind == "list" else tuple)(from_json(child) for child in children)
