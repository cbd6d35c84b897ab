"""Random networks without masks, which ``fp.auto_mask`` puts in: ``python -m tests.fuzz_auto --count 1000``."""

import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisherprune_jax as fp
from tests.fuzz import Network, WildError, _close, check, main


@dataclass(frozen=True, eq=False)
class Unmasked:
  """A random network whose masks are scales, or ones that are written into it, and whose outputs are read along an axis.

  ``read`` says of each output along which; None of one that stays as it is.
  """

  net: Network
  learned: bool
  read: tuple[int | None, ...]

  @property
  def params(self) -> dict[str, Any]:
    rng = np.random.default_rng(self.net.seed)
    scales = {name: rng.uniform(0.5, 1.5, np.shape(m)) for name, m in self.net.masks.items()}
    x = jax.ShapeDtypeStruct(self.net.shape, float)
    outs = jax.eval_shape(self.net, self.net.variables, x)
    heads = {
      f"head{at}": rng.normal(size=(y.shape[axis], 2))
      for at, (y, axis) in enumerate(zip(outs, self.read, strict=True))
      if axis is not None
    }
    return {**self.net.params, **heads, **(scales if self.learned else {})}

  def __call__(self, variables: Any, x: Any) -> Any:
    params = variables["params"]
    masks = params if self.learned else jax.tree.map(np.ones_like, self.net.masks)
    outs = self.net({"params": params, "masks": masks}, x)
    return tuple(
      y if axis is None else jnp.tensordot(jnp.tanh(y), params[f"head{at}"], ((axis,), (0,)))
      for at, (y, axis) in enumerate(zip(outs, self.read, strict=True))
    )

  def batch(self, examples: int) -> Any:
    return self.net.batch(examples)


@dataclass(frozen=True, eq=False)
class AutoMasked:
  """A network with automatic masks; for the checks of the fuzzer it is like one with masks of its own."""

  inner: Unmasked
  auto: Any
  masks: dict[str, Any]

  @property
  def net(self) -> Network:
    return self.inner.net

  params = property(lambda self: self.inner.params)
  steps = property(lambda self: self.net.steps)
  shape = property(lambda self: self.net.shape)
  seed = property(lambda self: self.net.seed)

  def __call__(self, variables: Any, x: Any) -> Any:
    return self.auto.apply(variables, x)

  @property
  def variables(self) -> Any:
    masks = {name: jnp.asarray(m, jnp.float32) for name, m in self.masks.items()}
    return {"params": {name: jnp.asarray(p) for name, p in self.params.items()}, "masks": masks}

  def batch(self, examples: int) -> Any:
    return self.net.batch(examples)


def reading(net: Network, other: int) -> tuple[int | None, ...]:
  """An axis of each output that does not hang on the batch size, if there is one; mostly."""
  rng = np.random.default_rng([net.seed, 2])
  shapes = [
    jax.eval_shape(net, net.variables, jax.ShapeDtypeStruct((n, *net.shape[1:]), float))
    for n in (net.shape[0], other)
  ]
  found = [
    [at for at, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n == m]
    for a, b in zip(*shapes, strict=True)
  ]
  return tuple(int(rng.choice(free)) if free and rng.random() < 0.8 else None for free in found)


def find(net: Network, other: int) -> AutoMasked:
  """The network with masks that are drawn for the groups that are found; none of them is emptied."""
  inner = Unmasked(net, net.seed % 2 == 0, reading(net, other))
  params = {name: jnp.asarray(p) for name, p in inner.params.items()}
  try:
    auto = fp.auto_mask(inner, {"params": params}, net.batch(net.shape[0])) if params else None
  except ValueError as error:
    if "no group at all" not in str(error):
      raise
    raise WildError("nothing to prune") from error
  if auto is None:
    raise WildError("no variables")
  rng = np.random.default_rng([net.seed, 1])

  def draw(mask: Any) -> Any:
    values = (rng.random(mask.shape) < 0.6).astype(np.float32)
    values[..., rng.integers(mask.shape[-1])] = 1
    return values

  return AutoMasked(inner, auto, {name: draw(mask) for name, mask in auto.masks.items()})


def check_auto(net: Network, other: int) -> None:
  """Everything that must hold of a network and the masks that were found for it."""
  try:
    jax.eval_shape(net, net.variables, jax.ShapeDtypeStruct((7, *net.shape[1:]), float))
  except (TypeError, ValueError) as error:
    raise WildError("one example was broadcast over features: only some batch sizes fit") from error
  found = find(net, other)
  variables = {"params": found.variables["params"]}
  again = fp.auto_mask(found.inner, variables, net.batch(other))
  assert again.groups == found.auto.groups, (
    f"groups: {again.groups} at batch size {other}, {found.auto.groups}"
  )
  hidden = any(step.name.startswith("unknown") for step in net.steps)  # it hides where examples are
  if net.seed % 4 == 0 and not hidden:  # half of the time would go there
    try:
      check_masks(found, variables)
    except ValueError as error:
      # Examples were added up or mixed: of single ones nothing can be said.
      if not any(text in str(error) for text in ("one row per example", "A row of a mask")):
        raise
  if net.seed % 3 == 1:
    check_members(found)
  check(found, other)


def check_members(found: AutoMasked) -> None:
  """Each member of a group that lost features is shorter than it was, or the report says why not."""
  small = fp.compact(found, found.variables, found.batch(found.shape[0]))
  said = {(held.path, held.axis) for blocker in small.blockers for held in blocker.holds}
  for group in found.auto.groups:
    mask = found.masks[group.name]
    gone = not mask.reshape(-1, group.size).any(0).all()  # in all layers of a stack
    for path, axis in group.members if gone else ():
      name = path.removeprefix("params/")
      shorter = small.variables["params"][name].shape[axis] < found.params[name].shape[axis]
      assert shorter or (path, axis) in said, f"member {path}, axis {axis}, of {group.name} stays, unsaid"


def check_masks(found: AutoMasked, variables: Any) -> None:
  """Masks of ones and no masks change nothing; gradients of one mask for each example add up to that of one for all."""
  masks = {name: jnp.asarray(m, jnp.float64) for name, m in found.masks.items()}

  def loss(masks: Any, variables: Any, x: Any) -> Any:
    return sum(jnp.sum(jnp.sin(y + 1.0)) for y in found.auto.apply({**variables, "masks": masks}, x))

  @jax.jit
  def run(masks: Any, variables: Any, x: Any) -> Any:
    ones = jax.tree.map(jnp.ones_like, masks)
    outs = [
      found.inner(variables, x),
      found.auto.apply({**variables, "masks": ones}, x),
      found.auto.apply(variables, x),
    ]
    each = jax.grad(loss)(fp.per_example(masks, found.shape[0]), variables, x)
    return outs, jax.grad(loss)(masks, variables, x), jax.tree.map(lambda g: g.sum(-2), each)

  (expected, ones, none), at_once, each = run(masks, variables, found.batch(found.shape[0]))
  _close(expected, ones, "masks of ones")
  _close(expected, none, "no masks")
  _close(at_once, each, "mask gradients of examples")


if __name__ == "__main__":
  sys.exit(min(main(check=check_auto), 1))
