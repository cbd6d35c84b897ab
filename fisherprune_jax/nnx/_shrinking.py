"""The user's module with smaller arrays, and its optimizer."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx.traversals import flatten_mapping

from fisherprune_jax._compaction.agreement import disagreement
from fisherprune_jax._compaction.compact import Compact
from fisherprune_jax._compaction.parts import at_paths
from fisherprune_jax._types import PyTree
from fisherprune_jax.nnx._auto import AutoMasked
from fisherprune_jax.nnx._compaction import rebuilt
from fisherprune_jax.nnx._modules import functional

INSIDE = "model"
"""The attribute of ``AutoMasked`` for the user's module."""


def shrink_module(small: Compact, model: nnx.Module, *args: Any) -> nnx.Module:
  """The user's own module with smaller arrays, if it computes the same as the compact network.

  Linear layers, convolutions, embeddings and batch norm compute by the shapes of their arrays. Others store sizes: the
  heads of attention, the groups of a depthwise convolution, the width of a layer norm. So both networks are compared,
  with these variables and with similar random ones. Attributes such as ``in_features`` keep their old values.

  Args:
    small: the compact network, from :func:`compact` after ``model.eval()``.
    model: the module that it was made of: from :func:`auto_mask`, or with mask layers and ``keep_masks=True``.
    *args: arguments of the comparison.

  Returns:
    A new module of the class of ``model``, or of the module inside of :func:`auto_mask`.

  Raises:
    ValueError: if it cannot be called, or computes something else. Then use :func:`module`.

  >>> import jax, jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> rngs, x = nnx.Rngs(0), jax.random.normal(jax.random.key(0), (4, 2))
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 1, rngs=rngs))
  >>> masked = fp.nnx.auto_mask(model, x)
  >>> masked.masks["layers/0"][...] = jnp.array([1.0, 0.0, 1.0])
  >>> thin = fp.nnx.shrink_module(fp.nnx.compact(masked, x), masked, x)
  >>> type(thin).__name__, thin.layers[0].kernel.shape
  ('Sequential', (2, 2))
  """
  whole = rebuilt(small, model)
  own, call = (whole.model, whole.call) if isinstance(whole, AutoMasked) else (whole, None)
  alone, _ = functional(own, call=call)

  def compact(variables: Mapping[str, PyTree], *args: Any) -> PyTree:
    output = small(variables, *args)
    return output if small.state_from is None else output[0]

  def directly(variables: Mapping[str, PyTree], *args: Any) -> PyTree:
    inner = (
      {name: tree.get(INSIDE, {}) for name, tree in variables.items()} if own is not whole else variables
    )
    return alone({"masks": {}, **inner}, *args)

  why = disagreement(compact, directly, small.variables, *args)
  if why:
    raise ValueError(
      f"shrink_module needs a module that computes by the shapes of its arrays, got {type(own).__name__}: {why}. "
      "Take fp.nnx.module(small, model), which runs the compact program. (Compact after model.eval(): dropout draws "
      "other numbers for other shapes. A module that holds masks needs keep_masks=True.)"
    )
  return own


def shrink_optimizer(small: Compact, thin: nnx.Module, optimizer: nnx.Optimizer) -> nnx.Optimizer:
  """An optimizer for ``thin`` that continues from ``optimizer``; see ``Compact.shrink_opt_state``.

  Args:
    small: the compact network.
    thin: the compact module, from :func:`module` or :func:`shrink_module`.
    optimizer: the optimizer of the original module, for all its parameters or some (``wrt=nnx.LoRAParam``).
  """
  known = {path for tree in small.variables.values() for path in flatten_mapping(tree)}
  paths = [path for path, _ in nnx.to_flat_state(nnx.state(thin, optimizer.wrt))]
  taken_out = not known.issuperset(paths)
  trained = at_paths([(INSIDE, *path) for path in paths] if taken_out else paths)
  tx, state = optimizer.tx, small.shrink_opt_state(optimizer.tx, nnx.as_pure(optimizer.opt_state), trained)
  state = _taken_out(state) if taken_out else state
  thinner = type(optimizer)(thin, tx._replace(init=lambda params: state), wrt=optimizer.wrt)
  thinner.tx = tx
  thinner.step[...] = optimizer.step[...]
  return thinner


def _taken_out(state: PyTree) -> PyTree:
  """An optimizer state with ``{"model": parameters}`` replaced by the parameters."""

  def holds_model(node: PyTree) -> bool:
    return isinstance(node, Mapping) and set(node) == {INSIDE}

  return jax.tree.map(lambda node: node[INSIDE] if holds_model(node) else node, state, is_leaf=holds_model)
