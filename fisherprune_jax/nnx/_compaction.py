"""The cost of a module, and the module as a smaller one."""

from typing import Any

from flax import nnx

from fisherprune_jax._compaction import compact as compaction
from fisherprune_jax._cost import measures
from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._files import PathLike
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._types import PyTree
from fisherprune_jax.nnx._auto import AutoMasked
from fisherprune_jax.nnx._modules import Call, MaskVariable, functional, split


def cost_model(model: nnx.Module, *args: Any, call: Call | None = None, **options: Any) -> CostModel:
  """``fp.cost_model`` for a module.

  Args:
    model: the module; its masks are found by type. For the cost at inference, call ``model.eval()`` first.
    *args: example arguments; the first axis of each array is the example axis, unless ``batch_axes=`` is given.
    call: ``call(model, *args)`` instead of ``model(*args)``.
    **options: options of ``fp.cost_model``.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3))
  >>> fp.nnx.cost_model(model, jnp.ones((1, 2))).dense  # 3 (2*2 - 1) + 3 for the bias
  12.0
  """
  apply_fn, variables = functional(model, call=call)
  return measures.cost_model(apply_fn, variables, *args, **options)


def compact(
  model: nnx.Module, *args: Any, call: Call | None = None, mutable: bool = False, **options: Any
) -> compaction.Compact:
  """``fp.compact`` for a module; for further training as a module, see :func:`module`.

  Args:
    model: the pruned module; for inference, call ``model.eval()`` first.
    *args: example arguments, arrays or ``jax.ShapeDtypeStruct``.
    call: ``call(model, *args)`` instead of ``model(*args)``.
    mutable: return ``(output, {"state": ...})``, with the state that the call changes (batch statistics).
    **options: options of ``fp.compact``.

  Returns:
    The compact network: ``small(small.variables, *args)``. Its variables are nested dictionaries under ``"params"`` and
    ``"state"``.

  >>> import jax, jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
  >>> model.layers[1].mask[...] = jnp.array([1.0, 0.0, 1.0])
  >>> small = fp.nnx.compact(model, jnp.ones((4, 2)))
  >>> jax.tree.map(jnp.shape, small.variables["params"]["layers"][0])
  {'bias': (2,), 'kernel': (2, 2)}
  """
  apply_fn, variables = functional(model, call=call, mutable=mutable)
  if mutable:
    options.setdefault("state_from", lambda output: output[1])
  inner = model.model if isinstance(model, AutoMasked) else model
  if isinstance(inner, CompactModule):
    options.setdefault("parent", inner.small)
  return compaction.compact(apply_fn, variables, *args, **options)


class CompactModule(nnx.Module):
  """A compact network as a module; made by :func:`module`.

  It has the attributes of the original module, so optimizers and checkpoints find variables under the same paths. Its
  call runs the compact program.
  """

  def __init__(self, small: compaction.Compact, model: nnx.Module) -> None:
    for name, value in vars(model).items():
      if not name.startswith("_"):
        setattr(self, name, value)
    self._small = small

  @property
  def small(self) -> compaction.Compact:
    """The compact network; its ``variables`` are those before further training."""
    return self._small

  def __call__(self, *args: Any) -> Any:
    """The outputs of the original module."""
    output = self._small(self._own_variables(), *args)
    if self._small.state_from is None:
      return output
    output, changed = output
    nnx.update(self, changed["state"])
    return output

  def save(self, path: PathLike, *args: Any, **options: Any) -> None:
    """Write the network with the current variables; see ``fp.Compact.save``.

    Args:
      path: the file.
      *args: example arguments; by default those of :func:`compact`.
      **options: options of ``fp.Compact.save``.
    """
    self._small.save(path, *args, variables=self._own_variables(), **options)

  def _own_variables(self) -> dict[str, PyTree]:
    _, variables = functional(self)
    return {name: variables[name] for name in self._small.variables}


def module(small: compaction.Compact, model: nnx.Module) -> CompactModule:
  """A compact network as a module with smaller variables, for further training.

  Args:
    small: the compact network, from :func:`compact`, with ``mutable=True`` if the model has batch statistics.
    model: the module that it was made of.

  >>> import jax.numpy as jnp
  >>> import fisherprune_jax as fp
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), fp.nnx.Mask(3), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
  >>> model.layers[1].mask[...] = jnp.array([1.0, 0.0, 1.0])
  >>> thin = fp.nnx.module(fp.nnx.compact(model, jnp.ones((4, 2))), model)
  >>> thin.layers[0].kernel.shape, thin(jnp.ones((4, 2))).shape
  ((2, 2), (4, 1))
  """
  return CompactModule(small, rebuilt(small, model))


def rebuilt(small: compaction.Compact, model: nnx.Module) -> nnx.Module:
  """A module of the same classes with the compact variables; its call may fail or differ."""
  graph, masks, _, _ = split(model, nnx.Param)
  variables = {COLLECTION: masks, **small.variables}
  thin: nnx.Module = nnx.merge(graph, variables[COLLECTION], variables["params"], variables["state"])
  if COLLECTION not in small.variables:
    nnx.pop(thin, MaskVariable)
  return thin
