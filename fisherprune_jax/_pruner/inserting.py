"""Masks inside of functions of the user's, which know nothing of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fisherprune_jax._auto.auto import AutoMask
from fisherprune_jax._errors import describe, path_names, require_same_tree, require_shapes
from fisherprune_jax._graph.variables import abstract
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._types import Masks, PyTree

PARAMS = "params"


class Masked:
  """A model's variables, and its masks.

  Args:
    variables: the variables that the pruner was built with, masks among them or not.
    auto: the automatic masks; None where the variables hold masks.
  """

  def __init__(self, variables: PyTree, auto: AutoMask | None) -> None:
    self._auto = auto
    own = variables
    if isinstance(variables, Mapping):
      own = {name: tree for name, tree in variables.items() if name != COLLECTION}
    self._whole: PyTree = abstract(own)
    named = isinstance(own, Mapping) and PARAMS in own
    self._collections: dict[str, PyTree] = {**self._whole} if named else {}

  def is_params(self, tree: PyTree) -> bool:
    """Whether a tree is the parameters alone, not all variables.

    Raises:
      ValueError: if it is neither.
    """
    alone = PARAMS in self._collections and _alike(tree, self._collections[PARAMS])
    if not alone and not _alike(tree, self._whole):
      self._refuse(tree)
    return alone

  def _refuse(self, tree: PyTree) -> None:
    """Says where a tree differs from the variables."""
    whole = PARAMS not in self._collections or (isinstance(tree, Mapping) and PARAMS in tree)
    wanted = self._whole if whole else self._collections[PARAMS]
    ways = "variables['params'] or all of variables" if self._collections else "variables"
    like, remedy = f"the {ways} that fp.Pruner was built with", "Build a new fp.Pruner for another network."
    require_same_tree(tree, wanted, "params", like, remedy)
    what = f"params must have the shapes of {like}"
    require_shapes(tree, wanted, lambda shape, path: f"{what}, {shape} at {path}", remedy)

  def complete(self, tree: PyTree, masks: Masks) -> PyTree:
    """All variables with masks, from the parameters alone or from all variables."""
    if not self.is_params(tree):
      return {**tree, COLLECTION: masks} if isinstance(tree, Mapping) else {PARAMS: tree, COLLECTION: masks}
    if missing := sorted({*self._collections} - {PARAMS}):
      raise ValueError(
        f"The model has variables besides its parameters ({', '.join(missing)}), got the parameters alone. Pass all: "
        f"{{'params': params, {', '.join(f'{name!r}: {name}' for name in missing)}}}."
      )
    return {PARAMS: tree, COLLECTION: masks}

  def like(self, tree: PyTree, variables: Mapping[str, PyTree]) -> PyTree:
    """All variables as the parameters alone or as all of them, as ``tree`` is; without masks."""
    if self.is_params(tree) or not isinstance(tree, Mapping):
      return variables[PARAMS]
    return {name: x for name, x in variables.items() if name != COLLECTION}

  def loss(
    self, loss_fn: Callable[..., Any], params: PyTree, places: Mapping[int, str]
  ) -> Callable[..., Any]:
    """``loss_fn(params, *rest)`` with masks inside, as a function of ``(params, masks, *rest)``.

    Args:
      loss_fn: the user's loss.
      params: the parameters that it is called with.
      places: which of the other arguments are collections of the variables.
    """
    alone = self.is_params(params)

    def with_auto(params: PyTree, masks: Masks, *rest: Any) -> Any:
      assert self._auto is not None
      variables = {name: rest[at] for at, name in places.items()}
      variables |= {PARAMS: params} if alone or not isinstance(params, Mapping) else params
      others = [x for at, x in enumerate(rest) if at not in places]

      def own(variables: PyTree, *others: Any) -> Any:
        free = iter(others)
        filled = [variables[places[at]] if at in places else next(free) for at in range(len(rest))]
        return loss_fn(variables[PARAMS] if alone else variables, *filled)

      return self._auto.wrap(own, tuple(map(_example_axis, others)))(
        {**variables, COLLECTION: masks}, *others
      )

    def with_layers(params: PyTree, masks: Masks, *rest: Any) -> Any:
      if not alone and isinstance(params, Mapping):
        return loss_fn({**params, COLLECTION: masks}, *rest)
      with nn.intercept_methods(_giving(masks)):
        return loss_fn(params, *rest)

    return with_auto if self._auto else with_layers

  def collections(self, rest: Sequence[Any]) -> dict[int, str]:
    """Which arguments are which collections of the variables, such as ``batch_stats``."""
    left = [name for name, tree in self._collections.items() if name != PARAMS and jax.tree.leaves(tree)]
    found = {}
    for at, x in enumerate(rest):
      if name := next((name for name in left if _alike(x, self._collections[name])), None):
        found[at] = name
        left.remove(name)
    return found

  def batch_of(self, rest: Sequence[Any], places: Mapping[int, str]) -> int:
    """Which argument is the batch: the first that is no collection, no random key and no number."""
    for at, x in enumerate(rest):
      if at not in places and _example_axis(x) is not None:
        return at
    raise ValueError(
      "The loss function of pruner.value_and_grad must get a batch after the parameters, whose arrays lead with the example "
      f"axis, got {', '.join(map(describe, rest)) or 'nothing'}. Call "
      "pruner.value_and_grad(loss_fn)(params, opt_state, batch, ...)."
    )


def _giving(masks: Masks) -> Callable[..., Any]:
  """An interceptor that gives masks to every Linen model that is applied without any."""

  def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    scope = context.module.scope
    root = None if scope is None else scope.root
    if root is not None and COLLECTION not in root.variables() and not context.module.is_initializing():
      # The first method that runs is the outermost one, so everything below it, lifted transformations too, sees the masks.
      mutable, root.mutable = root.mutable, COLLECTION
      for name, mask in masks.items():
        root.put_variable(COLLECTION, name, mask)
      root.mutable = mutable
    return next_fun(*args, **kwargs)

  return intercept


def _example_axis(x: PyTree) -> int | None:
  """0 for what holds examples; None for random keys, numbers and what holds no arrays."""
  leaves = [leaf for leaf in jax.tree.leaves(x) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
  if not leaves or any(leaf.ndim == 0 for leaf in leaves):
    return None
  is_key = any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves)
  is_raw_key = len(leaves) == 1 and leaves[0].dtype == jnp.uint32 and leaves[0].shape in ((2,), (4,))
  return None if is_key or is_raw_key else 0


def _shapes(tree: PyTree) -> dict[tuple[str, ...], tuple[int, ...]]:
  pairs = jax.tree_util.tree_leaves_with_path(tree)
  return {path_names(path): tuple(jnp.shape(leaf)) for path, leaf in pairs}


def _alike(tree: PyTree, reference: PyTree) -> bool:
  return _shapes(tree) == _shapes(reference)
