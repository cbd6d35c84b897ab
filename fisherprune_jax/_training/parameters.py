"""Matches trained parameters with the variables of a network, by the ends of their paths.

The cost model knows variables by path. An optimizer sees one collection of them, a part of it, or the parameters of
several networks.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherprune_jax._cost.owned import Keys, keys_of
from fisherprune_jax._types import PyTree, Shape

Shapes = Mapping[Keys, Shape]
"""The shapes of the network's variables, by path."""
Leaves = Sequence[tuple[Keys, Any]]
"""Trained parameters by path; ``optax.MaskedNode`` marks those of another optimizer."""


def variables_among(params: PyTree, shapes: Shapes, method: str, name: str | None) -> dict[Keys, jax.Array]:
  """The trained parameters by their paths among a network's variables.

  One common prefix extends all paths: the one that fits most leaves. So a part of the network is found even if another
  part has leaves of the same names.

  Args:
    params: the trained tree.
    shapes: the shapes of the network's variables.
    method: the criterion, for errors.
    name: the name of the pruning; it selects one of several networks.

  Raises:
    ValueError: if no parameter is a variable of the network, or one is ambiguous or has another shape.
  """
  leaves: Leaves = [(keys_of(path), leaf) for path, leaf in _leaves_of(params)]
  ends = _by_end(shapes)
  if not any(_named(keys, ends) for keys, _ in leaves):
    leaves = _one_network(leaves, shapes, method, name)
  found = _placed(leaves, shapes, method)
  return {
    path: leaf
    for path, leaf in found.items()
    if not _is_masked(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  }


def _leaves_of(params: PyTree) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked)


def _is_masked(leaf: Any) -> bool:
  return isinstance(leaf, optax.MaskedNode)


def _placed(leaves: Leaves, shapes: Shapes, method: str) -> dict[Keys, Any]:
  """The leaves by variable, without those that are none."""
  ends = _by_end(shapes)
  fitting = _fitting(leaves, shapes, ends)
  votes = _votes(leaves, fitting)
  best = [prefix for prefix, n in votes.items() if n == max(votes.values())]
  best = [prefix for prefix in best if prefix[:1] == ("params",)] or best
  found: dict[Keys, Any] = {}
  for (keys, leaf), fits in zip(leaves, fitting, strict=True):
    here = [path for path in fits if len(best) == 1 and _prefix(path, keys) == best[0]] or fits
    if len(here) > 1 and not _is_masked(leaf):
      raise ValueError(
        f"method={method!r} needs to know which variables the parameters are, got {'/'.join(keys)}, which may be "
        f"{' or '.join('/'.join(path) for path in here)}. Pass the parameters of the whole network: tx.update(grads, state, "
        "params)."
      )
    if not fits and (paths := _named(keys, ends)):
      raise ValueError(
        f"method={method!r} needs the parameters of the network that the cost was built for, got {'/'.join(paths[0])} of "
        f"the shape {jnp.shape(leaf)}, which is {shapes[paths[0]]} there. Build the cost for this network; if shard_map "
        "splits this parameter, gather it before tx.update, or leave the splitting to jit."
      )
    found.update({path: leaf for path in here[:1] if not _is_masked(leaf)})
  return found


def _fitting(leaves: Leaves, shapes: Shapes, ends: Mapping[Keys, list[Keys]]) -> list[list[Keys]]:
  """The variables that each leaf may be, by path end and shape."""
  return [
    [path for path in _named(keys, ends) if _is_masked(leaf) or shapes[path] == jnp.shape(leaf)]
    for keys, leaf in leaves
  ]


def _votes(leaves: Leaves, fitting: Sequence[Sequence[Keys]]) -> Counter[Keys]:
  """The number of leaves that are variables under each prefix."""
  pairs = zip(leaves, fitting, strict=True)
  return Counter(_prefix(path, keys) for (keys, _), paths in pairs for path in paths)


def _by_end(shapes: Shapes) -> dict[Keys, list[Keys]]:
  """The variables by every end of their paths."""
  found: dict[Keys, list[Keys]] = {}
  for path in shapes:
    for at in range(len(path) + 1):
      found.setdefault(path[at:], []).append(path)
  return found


def _named(keys: Keys, ends: Mapping[Keys, list[Keys]]) -> list[Keys]:
  """The variables that a path may mean; NNX appends a key to a variable's path."""
  in_nnx = len(keys) > 1 and keys[-1] == "value"
  return ends.get(keys, []) or (ends.get(keys[:-1], []) if in_nnx else [])


def _prefix(path: Keys, keys: Keys) -> Keys:
  """The part of a variable's path before a leaf's path."""
  end = keys if path[len(path) - len(keys) :] == keys else keys[:-1]
  return path[: len(path) - len(end)]


def _one_network(leaves: Leaves, shapes: Shapes, method: str, name: str | None) -> Leaves:
  """The leaves of one of several networks: under the name of the pruning, or the only sub-tree that fits."""
  ends = _by_end(shapes)
  parts: dict[Keys, Leaves] = {}
  votes: dict[Keys, int] = {}
  for at in dict.fromkeys(keys[:n] for keys, _ in leaves for n in range(1, len(keys))):
    part = [(keys[len(at) :], leaf) for keys, leaf in leaves if keys[: len(at)] == at]
    fitting = _fitting(part, shapes, ends)
    trained = [fits for fits, (_, leaf) in zip(fitting, part, strict=True) if not _is_masked(leaf)]
    if trained and all(trained):
      parts[at], votes[at] = part, max(_votes(part, fitting).values())
  called = [at for at in parts if at[-1] == name] or [*parts]
  best = [at for at in called if votes[at] == max(map(votes.__getitem__, called))]
  if len(best) == 1:
    return parts[best[0]]
  needs = f"method={method!r} needs the parameters of the network that the cost was built for, got"
  if best:
    raise ValueError(
      f"{needs} several that it may be: {', '.join(map('/'.join, best))}. Name the pruning like its network, "
      f"fisher_prune(cost, name={best[0][-1]!r}), or build one cost model for all networks, as a function of all their "
      "parameters."
    )
  given = ", ".join("/".join(keys) for keys, _ in leaves[:3]) or "none"
  known = ", ".join("/".join(path) for path in list(shapes)[:3])
  raise ValueError(
    f"{needs} {given}: none of {known}, ... Pass them: tx.update(grads, state, params); or use "
    "method='fisher', which needs none."
  )
