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
  """A random network whose masks are scales, or ones that are written into it, and the masks that were found for it."""

  net: Network
  learned: bool

  @property
  def params(self) -> dict[str, Any]:
    rng = np.random.default_rng(self.net.seed)
    scales = {name: rng.uniform(0.5, 1.5, np.shape(m)) for name, m in self.net.masks.items()}
    return {**self.net.params, **scales} if self.learned else self.net.params

  def __call__(self, variables: Any, x: Any) -> Any:
    params = variables["params"]
    if self.learned:
      return self.net({"params": params, "masks": params}, x)
    return self.net({"params": params, "masks": jax.tree.map(np.ones_like, self.net.masks)}, x)

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


def find(net: Network, learned: bool) -> AutoMasked:
  """The network with masks that are drawn for the groups that are found; none of them is emptied."""
  inner = Unmasked(net, learned)
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
  found = find(net, net.seed % 2 == 0)
  variables, x = {"params": found.variables["params"]}, net.batch(net.shape[0])
  expected = found.inner(variables, x)
  _close(expected, found.auto.apply({**variables, "masks": found.auto.masks}, x), "masks of ones")
  _close(expected, found.auto.apply(variables, x), "no masks")
  again = fp.auto_mask(found.inner, variables, net.batch(other))
  assert again.groups == found.auto.groups, (
    f"groups: {again.groups} at batch size {other}, {found.auto.groups}"
  )
  check_examples(found, variables, x)
  check(found, other)


def check_examples(found: AutoMasked, variables: Any, x: Any) -> None:
  """Gradients of one mask for each example add up to that of one for all."""
  masks = {name: jnp.asarray(m, jnp.float64) for name, m in found.masks.items()}

  def loss(masks: Any) -> Any:
    return sum(jnp.sum(jnp.sin(y + 1.0)) for y in found.auto.apply({**variables, "masks": masks}, x))

  each = jax.grad(loss)(fp.per_example(masks, found.shape[0]))
  _close(jax.grad(loss)(masks), jax.tree.map(lambda g: g.sum(-2), each), "mask gradients of examples")


if __name__ == "__main__":
  sys.exit(min(main(check=check_auto), 1))
