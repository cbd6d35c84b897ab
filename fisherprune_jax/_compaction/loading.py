"""Loads a compact network from a file, without the model's code."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fisherprune_jax._compaction import files
from fisherprune_jax._compaction.files import Content
from fisherprune_jax._compaction.originals import Original
from fisherprune_jax._compaction.plain import from_json, plain
from fisherprune_jax._compaction.saving import ALL, HISTORY, NONE, PROGRAM, VARIABLES, as_arrays, stored
from fisherprune_jax._compaction.schema import contradictions, count_leaves, misfits
from fisherprune_jax._errors import describe, path_name, require_same_tree
from fisherprune_jax._files import PathLike, check_place
from fisherprune_jax._training.history import Pruned
from fisherprune_jax._types import PyTree


class Loaded:
  """A compact network from a file; made by :func:`load`.

  Attributes:
    variables: the variables, in dictionaries, lists and tuples.
    kept: the kept entries of the first network, like ``Compact.kept``.
    cost: FLOPs per example.
    dense: FLOPs per example of the first network, before any compaction.
    widths: for each mask, the number of features before and after.
    history: when each feature was pruned, if that was saved.
    derivative: the inputs by which the network can be differentiated: ``"all"``, ``"variables"`` or ``"none"``.
    exported: the program, a function of all leaves of variables and arguments.
  """

  def __init__(self, path: PathLike) -> None:
    files.check_installed()
    content = read(path)
    header = content.header
    self.exported = _program(path, content)
    self._content = _without_variables(content)
    self._trees = {name: from_json(header[name]) for name in ("variables", "arguments", "outputs")}
    _check_precision(path, content)
    leaves = [_leaf(path, line, content) for line in header["leaves"]]
    files.refuse(path, _misfits(self.exported, header, leaves))
    self.variables = self._tree("variables", leaves)
    self.kept = self._tree("variables", [original.index for original in originals_of(content)])
    self.cost: float = header["cost"]
    self.dense: float = header["dense"]
    self.widths = {name: (before, after) for name, before, after in header["widths"]}
    self.history = history_of(content)
    self.derivative: str = header.get("derivative", ALL)
    self._call = jax.jit(self._run)

  def __call__(self, variables: PyTree, *args: PyTree) -> PyTree:
    """The outputs for compact ``variables``; under ``jit`` and ``grad`` too.

    Args:
      variables: a tree like ``self.variables``.
      *args: the other arguments, at any batch size if the network was saved so.

    Raises:
      ValueError: for another tree, shape or type than the network was saved for.
    """
    variables, args = plain(variables), plain(args)
    how = "Pass a tree like loaded.variables."
    require_same_tree(variables, self._trees["variables"], "variables", "loaded.variables", how)
    how = "Pass what the network was called with before it was saved."
    require_same_tree(args, self._trees["arguments"], "The arguments", "those that it was saved for", how)
    return self._tree("outputs", self._call(variables, args))

  def report(self) -> str:
    """The text of ``Compact.report``, from when the network was saved."""
    header = self._content.header
    return "\n".join([*header["report"], *([""] if header["stays"] else []), *header["stays"]])

  def save(self, path: PathLike, variables: PyTree = None) -> None:
    """Write the network again; see ``Compact.save``.

    Args:
      path: the file; it may be the one that was loaded.
      variables: other values of ``self.variables``, such as trained ones.
    """
    check_place(path, "save")
    given = as_arrays(plain(self.variables if variables is None else variables))
    how = "Pass a tree like loaded.variables."
    require_same_tree(given, self._trees["variables"], "variables", "loaded.variables", how)
    named = _named("variables", given)
    _fitting_all(named, self.exported.in_avals[: len(named)])
    leaves = zip(self._content.header["leaves"], jax.tree.leaves(given), strict=True)
    arrays = {line["array"]: stored(line["array"], leaf)[0] for line, leaf in leaves}
    files.write(path, self._content._replace(arrays={**self._content.arrays, **arrays}))

  def _run(self, variables: PyTree, args: PyTree) -> list[jax.Array]:
    # Checked here, where all arguments are JAX arrays.
    named = [*_named("variables", variables), *_named("argument", args)]
    given = _fitting_all(named, self.exported.in_avals)
    first = {ALL: len(given), VARIABLES: len(given) - len(jax.tree.leaves(args)), NONE: 0}[self.derivative]
    return self.exported.call(*given[:first], *map(partial(_constant, self.derivative), given[first:]))

  def _tree(self, name: str, leaves: Sequence[Any]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(self._trees[name]), leaves)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _constant(derivative: str, x: jax.Array) -> jax.Array:
  """An input by which the program cannot be differentiated."""
  return x


def _refuse(derivative: str, x: jax.Array) -> Any:
  by = "by its variables, not by its arguments" if derivative == VARIABLES else "by nothing"
  raise ValueError(
    f"A network from a file can be differentiated {by}, where JAX had no other derivative when it was saved, got a "
    f"derivative by {describe(x)}. Differentiate by something else (jax.lax.stop_gradient), or change the model and save it "
    "again."
  )


_constant.defvjp(_refuse, lambda derivative, _, g: (g,))


def load(path: PathLike) -> Loaded:
  """Load a compact network that ``Compact.save`` wrote; this needs neither the model's code nor Flax.

  Args:
    path: the file.

  Returns:
    The network: ``loaded(loaded.variables, *args)``. It can be differentiated once, in reverse mode, and trained, as
    far as the model could be; see ``loaded.derivative``.

  Raises:
    ImportError: without ``safetensors`` and ``flatbuffers``, which the extra ``save`` installs.
    ValueError: if the file is of another kind, damaged, or of a newer version; or if it holds 64-bit numbers and JAX
      has them disabled.
    OSError: if it cannot be read.

  >>> import os, tempfile, jax, jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> variables = {"w": jnp.ones((3, 4)), "masks": jnp.array([1.0, 0.0, 1.0, 0.0])}
  >>> small = fp.compact(lambda v, x: jnp.sum(x @ v["w"] * v["masks"], 1), variables, jnp.ones((1, 3)))
  >>> path = os.path.join(tempfile.mkdtemp(), "small.safetensors")
  >>> small.save(path)
  >>> loaded = fp.load(path)
  >>> loaded(loaded.variables, jnp.ones((5, 3)))  # five examples, where it was saved with one
  Array([6., 6., 6., 6., 6.], dtype=float32)
  >>> jax.grad(lambda v: jnp.sum(loaded(v, jnp.ones((1, 3)))))(loaded.variables)["w"].shape
  (3, 2)
  >>> loaded.kept["w"]
  (array([0, 1, 2]), array([0, 2]))
  """
  return Loaded(path)


def read(path: PathLike) -> Content:
  """Read a file; raises ``ValueError`` for one that ``save`` cannot have written."""
  content = files.read(path)
  files.refuse(path, misfits(content.header))
  files.refuse(path, contradictions(content.header, content.arrays))
  return content


def originals_of(content: Content) -> list[Original]:
  """The original shape and positions of each variable."""
  return [_original(line, content) for line in content.header["leaves"]]


def history_of(content: Content) -> list[Pruned]:
  masks = content.header["history_masks"]
  rows = content.arrays.get(HISTORY, np.zeros((0, 3), np.int32)).tolist()
  return [Pruned(step, masks[at], feature) for step, at, feature in rows]


def _original(line: dict[str, Any], content: Content) -> Original:
  index = [
    content.arrays[line["kept"][str(axis)]].astype(int) if str(axis) in line["kept"] else np.arange(size)
    for axis, size in enumerate(line["original"])
  ]
  return Original(tuple(line["original"]), tuple(index))


def _leaf(path: PathLike, line: dict[str, Any], content: Content) -> jax.Array:
  array = jnp.asarray(content.arrays[line["array"]])
  if line["key"] is None:
    return array
  try:
    return jax.random.wrap_key_data(array, impl=line["key"])
  except Exception as error:
    files.refuse(path, iter([f"{line['array']!r} is no random key of {line['key']!r}: {error}"]))
    raise


def _misfits(exported: export.Exported, header: dict[str, Any], leaves: Sequence[jax.Array]) -> Iterator[str]:
  """Where a program does not match the header."""
  taken, given = (count_leaves(header[name]) for name in ("arguments", "outputs"))
  takes, gives = len(exported.in_avals), len(exported.out_avals)
  if (takes, gives) != (len(leaves) + taken, given):
    yield f"a program of {takes} arrays that gives {gives} has {len(leaves) + taken} that give {given}"
    return
  for line, leaf, aval in zip(header["leaves"], leaves, exported.in_avals, strict=False):
    if (leaf.shape, leaf.dtype) != (aval.shape, aval.dtype):
      yield f"{line['array']!r} must be {aval}, as the program takes it, and is {describe(leaf)}"


def _without_variables(content: Content) -> Content:
  """The content without the variables, which are on the device."""
  ours = {line["array"] for line in content.header["leaves"]}
  return content._replace(arrays={name: x for name, x in content.arrays.items() if name not in ours})


def _program(path: PathLike, content: Content) -> export.Exported:
  """The program; raises now if this JAX cannot read it, rather than at the first call."""
  saved_by = content.header["jax"]
  try:
    exported = export.deserialize(bytearray(content.arrays[PROGRAM].tobytes()))
    if saved_by != jax.__version__:
      exported.mlir_module()
  except Exception as error:  # JAX does not document what it raises for unknown formats
    raise ValueError(
      f"The program of a file must be one that the JAX here reads, got one of JAX {saved_by} in {os.fspath(path)!r}, with "
      f"JAX {jax.__version__} here: {error}. Install a JAX that is as new, or save the network again with an older one. "
      "(Its variables can be read with safetensors.)"
    ) from error
  return exported


def _check_precision(path: PathLike, content: Content) -> None:
  """Raise if JAX would silently convert 64-bit numbers."""
  wide = [
    line["array"] for line in content.header["leaves"] if _is_halved(content.arrays[line["array"]].dtype)
  ]
  if wide:
    raise ValueError(
      f"A file with 64-bit numbers needs them turned on, got {wide[0]} of {content.arrays[wide[0]].dtype} in {os.fspath(path)!r}. "
      'Say jax.config.update("jax_enable_x64", True) first.'
    )


def _is_halved(dtype: np.dtype) -> bool:
  return bool(jax.dtypes.canonicalize_dtype(dtype) != dtype)


def _named(what: str, tree: PyTree) -> list[tuple[str, Any]]:
  return [(f"{what}/{path_name(path)}", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _fitting_all(named: Sequence[tuple[str, Any]], expected: Sequence[Any]) -> list[Any]:
  """The leaves as the program takes them; raises for others."""
  return [_fitting(name, leaf, aval) for (name, leaf), aval in zip(named, expected, strict=True)]


def _fitting(name: str, leaf: Any, aval: Any) -> Any:
  """A leaf as the program takes it; Python numbers take the required type."""
  leaf = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else jnp.asarray(leaf, aval.dtype)
  if getattr(leaf, "weak_type", False) and not leaf.shape:
    leaf = leaf.astype(aval.dtype)
  symbolic = [export.is_symbolic_dim(size) for size in aval.shape]
  same = len(symbolic) == len(leaf.shape) and all(
    is_free or have == want for have, want, is_free in zip(leaf.shape, aval.shape, symbolic, strict=True)
  )
  if not same or leaf.dtype != aval.dtype:
    raise ValueError(
      f"A network from a file takes arrays of the shapes and types that it was saved for, {aval} at {name}, got "
      f"{describe(leaf)}. Convert it, or save the network again with such arguments: small.save(path, *args)."
    )
  return leaf
