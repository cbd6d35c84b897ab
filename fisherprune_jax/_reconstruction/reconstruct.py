"""Refits the parameters behind masks, so that the masked network does what the dense one did."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from fisherprune_jax._errors import describe, require, require_same_tree, require_shapes, warn
from fisherprune_jax._graph.variables import VariableTree
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._reconstruction.calibration import arguments, listed, parted
from fisherprune_jax._reconstruction.consumers import LeftAlone
from fisherprune_jax._reconstruction.fitting import Fit
from fisherprune_jax._types import ApplyFn, Progress, PyTree


def reconstruct(
  apply_fn: ApplyFn,
  variables: PyTree,
  batches: Iterable[PyTree],
  *,
  reference: PyTree = None,
  ridge: float | None = None,
  weights: Callable[..., jax.Array] | None = None,
  progress: Progress | None = None,
) -> PyTree:
  r"""Refit the parameters that read masked features, so that the masked network does what the dense one did.

  Products are refitted one after the other, in the order of the program. Each gets the parameters W with the least squared
  error on the batches. The error is that of the value after the next additions (bias, residual, the affine map of a norm),
  against the dense network. X is the product's operand in the masked network so far, T the result that it should have:

  .. math:: \min_{W'} \; \| X W' - T \|^2 + \lambda \| W' - W \|^2

  Dense layers, convolutions of any kind and ``einsum`` are refitted, in loops (``scan``), branches and calls too;
  parameters that are used several times get one regression. There is no training, and no labels are needed.

  Args:
    apply_fn: ``apply_fn(variables, *args)``: ``auto.apply``, or a model with :class:`Mask` layers.
    variables: its variables, with 0/1 masks.
    batches: an iterable of batches: the arguments of ``apply_fn`` as a tuple, or its only argument.
    reference: the variables of the network to come close to; None for the same without masks.
    ridge: :math:`\lambda` over the mean square of the columns of X. None tries 0.001, 0.01, 0.1 and 1 for each product on
      a quarter of the batches, and leaves it as it is where none helps there.
    weights: ``weights(*args)``, of shape ``(B,)`` or ``(B, T)``: how much each example, or each of its positions, counts; 0
      for padding. None counts all alike.
    progress: shows progress, as ``rich.progress.track`` or ``tqdm.tqdm``: it is given a sequence and hands on its items.

  Returns:
    Variables of the same tree, shapes and dtypes. On the batches, the error of the outputs is no larger than before.

  Raises:
    ValueError, TypeError: without masks or batches; for a ``reference`` of another network or a ``ridge`` that is not
      positive.

  Warns:
    UserWarning: if products were left as they are: those whose parameters are computed, shared with something that is no such
      product, or inside a ``while``.

  >>> import jax, jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> def mlp(params, x):
  ...   return jax.nn.relu(x @ params["w"]) @ params["v"]
  >>> keys = jax.random.split(jax.random.key(0), 3)
  >>> w = jax.random.normal(keys[0], (4, 8)).repeat(2, axis=1)  # every feature is there twice
  >>> params = {"w": w, "v": jax.random.normal(keys[1], (16, 2))}
  >>> x = jax.random.normal(keys[2], (64, 4))
  >>> auto = fp.auto_mask(mlp, params, x)
  >>> masked = {**params, "masks": {"w": jnp.tile(jnp.array([1.0, 0.0]), 8)}}
  >>> fitted = fp.reconstruct(auto.apply, masked, [x], ridge=1e-6)
  >>> bool(jnp.allclose(auto.apply(fitted, x), mlp(params, x), atol=1e-2))
  True

  References:
    He et al., `Channel pruning for accelerating very deep neural networks <https://arxiv.org/abs/1707.06168>`_, 2017

    Kwon et al., `A fast post-training pruning framework for transformers <https://arxiv.org/abs/2204.09656>`_, 2022
  """
  if not isinstance(variables, Mapping):
    raise TypeError(
      f"variables must be a mapping with a collection 'masks', got {describe(variables)}. Pass "
      "{'params': variables, 'masks': masks}."
    )
  tree = VariableTree(variables, COLLECTION)
  require(ridge is None or ridge > 0, "ridge must be positive", ridge, "None chooses it.")
  dense = _reference(variables, reference)
  given = parted(apply_fn, variables, [arguments(batch) for batch in listed(batches)])
  fit = Fit(apply_fn, tree, given, weights)
  found = fit.run(variables, dense, ridge, progress)
  warn_of(fit.left_alone)
  return found


def _reference(variables: Mapping[str, PyTree], reference: PyTree) -> PyTree:
  """The variables of the dense network, with masks of ones unless they have masks of their own."""
  found = {COLLECTION: jax.tree.map(jnp.ones_like, variables[COLLECTION]), **(reference or {})}
  if reference is None:
    found = {**variables, **found}
  how = "Pass the variables before they were pruned."
  require_same_tree(found, {**variables}, "reference", "variables", how)
  what = "reference must have the shapes of variables"
  require_shapes(found, {**variables}, lambda shape, path: f"{what}, {shape} at {path}", how)
  return {name: found[name] for name in variables}


def warn_of(left: Sequence[LeftAlone]) -> None:
  """Warns of products that are not refitted."""
  if left:
    lines = dict.fromkeys(f"  {source}: {reason}" for source, reason in left)
    warn("fp.reconstruct left these products as they are:\n" + "\n".join(lines))
