"""Masks for a function without masks."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fisherprune_jax._auto.forms import study
from fisherprune_jax._auto.groups import Group, find, find_blocks
from fisherprune_jax._auto.matching import tree_of
from fisherprune_jax._auto.skipping import Skipped, folded
from fisherprune_jax._auto.table import tables
from fisherprune_jax._auto.wrapping import NO_PATH, Model, Wrapped
from fisherprune_jax._compaction.compact import Compact, compact
from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._cost.measures import cost_model
from fisherprune_jax._errors import Path, describe, path_name, path_names, require
from fisherprune_jax._graph.examples import batch_size, example_axes
from fisherprune_jax._graph.variables import abstract
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._tables import Shown, Table
from fisherprune_jax._types import ApplyFn, BatchAxes, Picker, PyTree, Shape

Select = Callable[[Group], bool] | Collection[str] | None


@dataclass(frozen=True, eq=False, repr=False)
class AutoMask(Shown):
  """The groups that :func:`auto_mask` found, and the function with masks; ``print`` shows a table.

  Attributes:
    groups: what can be pruned.
    skipped: other axes of variables, each with the reason.
    masks: ``{group.name: ones(size)}``, float32; ``(L, size)`` for a group inside of L stacked layers.
    variables: the variables with these masks as collection ``"masks"``; a tree that is no mapping becomes ``"params"``.
  """

  groups: tuple[Group, ...]
  skipped: tuple[Skipped, ...]
  masks: dict[str, jax.Array]
  variables: dict[str, PyTree]
  _apply: Wrapped
  _args: tuple[PyTree, ...]
  _state_from: Picker | None = None

  @property
  def apply(self) -> Callable[..., PyTree]:
    """The function with masks, ``apply(variables, *args)``; without ``"masks"`` in the variables, the original."""
    return self._apply

  def wrap(self, fn: Callable[..., PyTree], batch_axes: BatchAxes = 0) -> Callable[..., PyTree]:
    """Insert the same masks into another function of the same variables, such as the training form or a loss.

    Args:
      fn: ``fn(variables, *args, **kwargs)``, a pure function that runs the whole model. Arrays among its arguments may
        be traced; other values are static.
      batch_axes: the example axes of ``args``, like ``jax.vmap``'s ``in_axes``, for per-example masks.

    Returns:
      A function of the same arguments; without ``"masks"`` in the variables it is ``fn``.

    Raises:
      ValueError: when called, if ``fn`` splits, ties or does not read a group, or gets masks or variables of another
        model.

    >>> import jax.numpy as jnp
    >>> import fisherprune_jax as fp
    >>> params = [jnp.ones((3, 4)), jnp.ones((4, 2))]
    >>> auto = fp.auto_mask(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], params, jnp.ones((1, 3)))
    >>> loss = auto.wrap(lambda p, x, y: jnp.mean((jnp.tanh(x @ p[0]) @ p[1] - y) ** 2))
    >>> float(loss({"params": params, "masks": {"0": jnp.zeros(4)}}, jnp.ones((1, 3)), jnp.ones((1, 2))))
    1.0
    """
    return Wrapped(fn, self._apply.model, batch_axes)

  def cost(self, measure: Any = "flops", **options: Any) -> CostModel:
    """The cost as a function of the masks, at the arguments of :func:`auto_mask`.

    Args:
      measure: what is counted, as in :func:`cost_model`.
      **options: other options of :func:`cost_model`.
    """
    return cost_model(self.apply, self.variables, *self._args, measure=measure, **{**self._how, **options})

  def compact(self, variables: PyTree, **options: Any) -> Compact:
    """The network without its masked features, at the arguments of :func:`auto_mask`.

    Args:
      variables: the variables, with masks.
      **options: options of :func:`compact`.
    """
    return compact(self.apply, variables, *self._args, **{**self._how, **options})

  @property
  def _how(self) -> dict[str, Any]:
    return {"batch_axes": self._apply.batch_axes, "state_from": self._state_from}

  def tables(self) -> list[Table | str]:
    """Groups with the share of the FLOPs that depends on each, and skipped axes."""
    cost = self.cost()
    dense = cost.exact(self.masks)
    without = (cost.exact({**self.masks, g.name: jnp.zeros_like(self.masks[g.name])}) for g in self.groups)
    return tables(self.groups, self.skipped, [1 - left / dense if dense else 0.0 for left in without])

  def __repr__(self) -> str:
    return f"AutoMask({len(self.groups)} groups, {len(self.skipped)} axes skipped)"


def auto_mask(
  apply_fn: ApplyFn,
  variables: PyTree,
  *args: PyTree,
  select: Select = None,
  blocks: bool = False,
  rows: bool = False,
  batch_axes: BatchAxes = 0,
  state_from: Picker | None = None,
) -> AutoMask:
  r"""Find what can be pruned in a function without masks, and insert masks.

  A *group* is a set of axes of variables that shrink together: the output axis of a layer, its bias, and the input axes
  of all readers; and layers that a residual sum ties. A variable makes a group, something sums over it, and it reaches
  neither an argument nor an output. Its mask is inserted before every sum over it,

  .. math:: \sum_k x_{nk} w_{km} \;\to\; \sum_k mask_k \, x_{nk} w_{km}

  so intermediate values of masked features do not matter, and ``fp.compact`` can remove each.

  Args:
    apply_fn: ``apply_fn(variables, *args)``, any JAX function: Linen's ``model.apply``, a Haiku ``apply``, a function
      of an Equinox module's arrays.
    variables: a tree of arrays.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    select: the groups to use: a predicate on :class:`Group`, or names; None for all.
    blocks: whether every residual branch ``x + f(x)`` gets a mask of one entry too.
    rows: whether rows of tables that are read by number get masks too (embeddings). A masked row reads as zeros; the compact
      network renumbers the index. Measure the cost in ``"params"`` or ``"memory"``: rows take no FLOPs.
    batch_axes: the example axes of ``args``, like ``jax.vmap``'s ``in_axes``.
    state_from: as in :func:`compact`: picks new values of variables from the output, such as a cache or a carry. They may
      shrink, too.

  Returns:
    An :class:`AutoMask`.

  Raises:
    ValueError: if there is no group, ``select`` chooses none, or ``variables`` already hold masks.
    TypeError: if ``variables`` hold anything but arrays.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> def mlp(params, x):  # a function without a thought of pruning
  ...   return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]
  >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "v": jnp.ones((4, 2))}
  >>> auto = fp.auto_mask(mlp, params, jnp.ones((1, 3)))
  >>> auto.groups[0].name, auto.groups[0].size, auto.groups[0].members
  ('w', 4, (('b', 0), ('v', 0), ('w', 1)))
  >>> small = fp.compact(auto.apply, {**params, "masks": {"w": jnp.array([1.0, 0.0, 1.0, 0.0])}}, jnp.ones((1, 3)))
  >>> small.variables["w"].shape
  (3, 2)

  References:
    Fang et al., `DepGraph: Towards any structural pruning <https://arxiv.org/abs/2301.12900>`_, 2023, which finds
    groups by layer type.
  """
  paths = _paths(variables)
  batch_size(args, batch_axes)
  form = study(apply_fn, variables, args, example_axes(args, batch_axes), rows, state_from=state_from)
  found = find(form, paths)
  if blocks:
    more, places = find_blocks(form, paths)
    found = found._replace(groups=[*found.groups, *more], places=[*found.places, *places])
  chosen = _chosen(found.groups, select, found.skipped)
  kept = [at for at, group in enumerate(found.groups) if group in chosen]
  trees = [[tree_of(atom) for atom in form.axes.of(value)] for value in form.variables]
  shapes: list[Shape] = [value.shape for value in form.variables]
  model = Model(
    isinstance(variables, Mapping) and "params" in variables,
    paths,
    shapes,
    trees,
    [found.groups[at] for at in kept],
    [found.places[at] for at in kept],
    frozenset(paths[at] for at in form.state),
  )
  masks = {group.name: jnp.ones((*group.rows, group.size), jnp.float32) for group in model.groups}
  holder = {**variables} if isinstance(variables, Mapping) else {"params": variables}
  skipped = [*_unselected(found.groups, chosen), *found.skipped]
  return AutoMask(
    tuple(model.groups),
    tuple(skipped),
    masks,
    {**holder, COLLECTION: masks},
    Wrapped(apply_fn, model, batch_axes),
    abstract(args),
    state_from,
  )


def _paths(variables: PyTree) -> list[tuple[str, ...]]:
  leaves: list[tuple[Path, Any]] = jax.tree_util.tree_leaves_with_path(variables)
  for path, leaf in leaves:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
      raise TypeError(
        f"variables must be a tree of arrays, got {describe(leaf)} at {path_name(path)}. Take its arrays alone, and put "
        "the rest back inside of apply_fn: eqx.partition(model, eqx.is_array), nnx.split(model)."
      )
  require(bool(leaves), "variables must hold arrays", variables)
  if isinstance(variables, Mapping) and COLLECTION in variables:
    raise ValueError(
      "auto_mask takes a function that holds no masks, got variables with a collection 'masks'. Leave it out of them, "
      "or prune with the masks that are there: fp.cost_model(apply_fn, variables, ...)."
    )
  return [path_names(path) or NO_PATH for path, _ in leaves]


def _chosen(groups: list[Group], select: Select, skipped: list[Skipped]) -> list[Group]:
  if not groups:
    reasons = "\n".join(f"  {where} ({size}): {why}" for where, size, why in folded(skipped))
    raise ValueError(f"There must be something to prune, got no group at all. What was skipped:\n{reasons}")
  if select is None:
    return groups
  names = [group.name for group in groups]
  if callable(select):
    chosen = [group for group in groups if select(group)]
  else:
    wanted = [select] if isinstance(select, str) else list(select)
    unknown = [name for name in wanted if name not in names]
    require(not unknown, f"select must hold names of groups ({', '.join(names)})", unknown)
    chosen = [group for group in groups if group.name in wanted]
  require(bool(chosen), f"select must choose a group, of {', '.join(names)}", select, "It chose none.")
  return chosen


def _unselected(groups: list[Group], chosen: list[Group]) -> list[Skipped]:
  return [
    Skipped(path, axis, group.size, f"group {group.name!r} is not selected")
    for group in groups
    if group not in chosen
    for path, axis in group.members
  ]
