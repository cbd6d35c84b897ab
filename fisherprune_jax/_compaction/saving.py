"""Saves a compact network to a file: variables, program and facts about it."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from fisherprune_jax._compaction import exporting, files, report
from fisherprune_jax._compaction.originals import Original
from fisherprune_jax._compaction.plain import plain, to_json
from fisherprune_jax._compaction.plan import Plan
from fisherprune_jax._errors import describe, is_traced, path_name, require_same_tree, warn
from fisherprune_jax._files import PathLike, check_place
from fisherprune_jax._graph.blockers import Stays
from fisherprune_jax._graph.variables import VariableTree, abstract
from fisherprune_jax._masks import named_rows
from fisherprune_jax._tables import aligned
from fisherprune_jax._training.finding import get_state
from fisherprune_jax._training.history import Pruned
from fisherprune_jax._training.history import history as history_of
from fisherprune_jax._types import PyTree

Arrays = dict[str, np.ndarray]
PROGRAM, HISTORY = "program", "history"
"""Names of arrays: the serialized program as bytes; rows ``(step, mask, feature)``."""
DERIVATIVES = ALL, VARIABLES, NONE = "all", "variables", "none"
"""The inputs by which the program can be differentiated."""


class Known(NamedTuple):
  """Facts about a compact network beside its variables and its program.

  Attributes:
    originals: a tree of ``Original`` like the variables.
    are_masks: a tree of flags like the variables.
    header: costs, widths and the lines of the report, for the file's header.
  """

  originals: PyTree
  are_masks: PyTree
  header: dict[str, Any]


def known_of(
  plan: Plan, originals: PyTree, cost: float, dense: float, dense_here: float, stays: Stays
) -> Known:
  """The facts about a plan; ``dense`` is the cost of the first network, ``dense_here`` of the one before the plan."""
  flags = jax.tree.unflatten(jax.tree.structure(plan.tree.variables), plan.tree.flags)
  first = VariableTree(originals, plan.tree.masks).mask_leaves
  counts = [math.prod(leaf.shape[:-1]) for leaf in plan.tree.mask_leaves]
  sizes = [leaf.shape[-1] for leaf, rows in zip(first, counts, strict=True) for _ in range(rows)]
  rows = zip(named_rows(plan.tree.mask_tree), sizes, strict=True)
  header = {
    "cost": cost,
    "dense": dense,
    "widths": [[name, size, int(np.sum(row))] for (name, row), size in rows],
    "report": aligned(report.widths(plan, cost, dense_here)),
    "stays": report.what_stays(stays),
  }
  return Known(plan.present(originals), plan.present(flags), header)


def save(
  path: PathLike,
  function: Callable[..., PyTree],
  variables: PyTree,
  shapes: Sequence[PyTree],
  fixed: Sequence[PyTree],
  known: Known,
  opt_state: optax.OptState,
  platforms: Sequence[str] | None,
) -> None:
  """Write ``function(variables, *args)`` for arguments of these shapes; ``fixed`` are the same without symbols."""
  files.check_installed()
  check_place(path, "save")
  variables = as_arrays(variables)
  arrays, leaves = _variable_arrays(variables, known)
  past, went = _history(opt_state)
  program, facts = _program(function, variables, shapes, fixed, platforms)
  header = {"jax": jax.__version__, "leaves": leaves, "history_masks": past, **facts, **known.header}
  files.write(path, files.Content(header, {**arrays, **went, PROGRAM: program}))


def as_arrays(tree: PyTree) -> PyTree:
  """A tree with JAX arrays in place of NumPy arrays and numbers, in JAX's precision."""
  return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), tree)


def stored(name: str, leaf: Any) -> tuple[np.ndarray, str | None]:
  """A variable to write: its values, and for a random key its implementation."""
  if is_traced(leaf):
    raise ValueError(f"save needs concrete variables, got {describe(leaf)} at {name}. Call it outside jit.")
  return files.on_host(name, leaf), str(jax.random.key_impl(leaf)) if files.is_key(leaf) else None


def _variable_arrays(variables: PyTree, known: Known) -> tuple[Arrays, list[dict[str, Any]]]:
  """Arrays by name, and an entry of the header for each variable."""
  how = "Pass small.variables as training has made them, in compact shapes."
  require_same_tree(variables, known.originals, "variables", "small.variables", how)
  arrays: Arrays = {}
  lines = []
  facts = (jax.tree.leaves(plain(tree)) for tree in (known.originals, known.are_masks))
  pairs = zip(_named(plain(variables)), *facts, strict=True)
  for (name, leaf), original, is_mask in pairs:
    if np.shape(leaf) != original.compact_shape:
      raise ValueError(
        f"variables must have the shapes of small.variables, {original.compact_shape} at {name}, got {describe(leaf)}. {how}"
      )
    array = _unused(f"variables/{name}", arrays)
    arrays[array], key = stored(name, leaf)
    kept = _kept(array.replace("variables", "kept", 1), original)
    arrays |= kept
    lines.append(
      {"array": array, "original": list(original.shape), "kept": _by_axis(kept), "mask": is_mask, "key": key}
    )
  return arrays, lines


def _kept(name: str, original: Original) -> Arrays:
  """The original positions along the axes that were cut."""
  axes = enumerate(zip(original.shape, original.index, strict=True))
  return {f"{name}/{axis}": index.astype(np.int32) for axis, (n, index) in axes if not _is_whole(index, n)}


def _is_whole(index: np.ndarray, size: int) -> bool:
  return index.ndim == 1 and np.array_equal(index, np.arange(size))


def _by_axis(kept: Arrays) -> dict[str, str]:
  return {name.rpartition("/")[2]: name for name in kept}


def _named(tree: PyTree) -> list[tuple[str, Any]]:
  return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _unused(name: str, names: Mapping[str, Any]) -> str:
  """An unused name of an array: keys may hold slashes."""
  count, found = 1, name
  while found in names:
    count += 1
    found = f"{name}#{count}"
  return found


def _program(
  function: Callable[..., PyTree],
  variables: PyTree,
  shapes: Sequence[PyTree],
  fixed: Sequence[PyTree],
  platforms: Sequence[str] | None,
) -> tuple[np.ndarray, dict[str, Any]]:
  """The function of the leaves of plain trees, serialized with its derivative; and its entries of the header."""
  leaves, order = jax.tree.flatten((abstract(variables), tuple(shapes)))
  # A plain tree may order its leaves differently.
  places: list[int] = jax.tree.leaves(plain(jax.tree.unflatten(order, range(len(leaves)))))

  def flat(fixed_args: bool, *given: Any) -> list[Any]:
    in_order = dict(zip(places, given, strict=True))
    variables, args = jax.tree.unflatten(order, [in_order[at] for at in range(len(leaves))])
    args = jax.lax.stop_gradient(args) if fixed_args else args
    return jax.tree.leaves(plain(function(variables, *args)))

  def exported_with(derivative: str) -> export.Exported:
    by_place = jax.tree.leaves((abstract(variables), tuple(fixed)))
    xs, others = ([them[at] for at in places] for them in (leaves, by_place))
    on = platforms or sorted({"cpu", export.default_export_platform()})
    return exporting.export(partial(flat, derivative == VARIABLES), xs, on, others)

  exported, program, derivative = _serialized(exported_with)
  outputs = jax.eval_shape(function, abstract(variables), *shapes)
  trees = {"variables": variables, "arguments": tuple(shapes), "outputs": outputs}
  return np.frombuffer(program, np.uint8), {
    "platforms": list(exported.platforms),
    "takes": [str(aval) for aval in exported.in_avals],
    "derivative": derivative,
    **{name: to_json(plain(tree)) for name, tree in trees.items()},
  }


def _serialized(exported_with: Callable[[str], export.Exported]) -> tuple[export.Exported, bytearray, str]:
  """A program as bytes, with as much of its derivative as possible."""
  reason = ""
  for derivative in DERIVATIVES:
    exported = exported_with(derivative)
    try:
      program = exported.serialize(vjp_order=int(derivative != NONE))
    except Exception as error:  # derivative rules may raise anything
      reason = reason or f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
      continue
    if derivative != ALL:
      kept = "its derivative by the variables alone" if derivative == VARIABLES else "no derivative"
      warn(f"The network is saved with {kept}. JAX cannot differentiate it otherwise: {reason}")
    return exported, program, derivative
  raise ValueError(
    f"A network to save must be one that JAX can write to a file, got {reason}. Take out what jax.export cannot write, "
    "such as callbacks into Python and variables of int2, before fp.compact."
  )


def _history(opt_state: optax.OptState) -> tuple[list[str], Arrays]:
  """The names of masks, and the steps at which their features were pruned."""
  if opt_state is None:
    return [], {}
  if not jax.tree.leaves(get_state(opt_state).pruned_at):
    raise ValueError(
      "history must be an optimizer state with a pruning history, got that of a compact network. Pass the "
      "one from before fp.compact."
    )
  past: list[Pruned] = history_of(opt_state)
  masks = sorted({went.mask for went in past})
  rows = [(went.step, masks.index(went.mask), went.feature) for went in past]
  return masks, {HISTORY: np.asarray(rows, np.int32).reshape(-1, 3)}
