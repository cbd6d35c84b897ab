"""Random networks, and everything that must hold of any network: ``python -m tests.fuzz --count 1000``."""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.flags import QUICK

os.environ.setdefault("XLA_FLAGS", QUICK)

import jax
import jax.numpy as jnp
import numpy as np

import fisherprune_jax as fp
from tests import fuzz_exactness as fuzz_exactness
from tests.counting import count
from tests.fuzz_limits import gradients_tell, sums_to_zero
from tests.fuzz_ops import OPS, CannotError, need

UNCOUNTED = {"fuzz_twice", "dynamic_update_slice", "scatter", "scatter-add", "scatter_add"}
"""Primitives without a rule: the cost model counts nothing for them."""
RTOL, ATOL, LARGEST = 1e-9, 1e-12, 1e4
SECONDS = 60.0
"""Processor time for one network; such small ones take one or two."""


@dataclass(frozen=True)
class Step:
  """``fn(params, masks, *values) -> values``, of the values at ``ins``."""

  name: str
  fn: Callable[..., Any]
  ins: tuple[int, ...]
  outs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Network:
  """A random graph of steps, with its variables; value 0 is the input."""

  steps: tuple[Step, ...]
  outputs: tuple[int, ...]
  params: dict[str, Any]
  masks: dict[str, Any]
  shape: tuple[int, ...]
  seed: int

  def __call__(self, variables: Any, x: Any) -> Any:
    values = {0: x}
    for step in self.steps:
      found = step.fn(variables["params"], variables["masks"], *(values[i] for i in step.ins))
      values.update(zip(step.outs, found if isinstance(found, tuple) else (found,), strict=True))
    return tuple(values[i] for i in self.outputs)

  @property
  def variables(self) -> Any:
    """Parameters and masks, as arrays."""
    return {
      "params": {name: jnp.asarray(p) for name, p in self.params.items()},
      "masks": {name: jnp.asarray(m, jnp.float32) for name, m in self.masks.items()},
    }

  def batch(self, examples: int) -> Any:
    """A random batch."""
    return jnp.asarray(np.random.default_rng(self.seed).normal(size=(examples, *self.shape[1:])))

  def describe(self) -> str:
    """The steps and masks, for people."""
    masks = {name: "".join(str(int(k)) for k in np.ravel(m)) for name, m in self.masks.items()}
    lines = [f"  {s.outs} = {s.name} {s.ins}" for s in self.steps]
    return "\n".join([f"input {self.shape}, outputs {self.outputs}, masks {masks}", *lines])

  def trimmed(self) -> "Network":
    """Without the steps, parameters and masks that the outputs do not hang on."""
    wanted, steps = set(self.outputs), []
    for step in reversed(self.steps):
      if wanted & {*step.outs}:
        wanted |= {*step.ins}
        steps.append(step)
    net = dataclasses.replace(self, steps=tuple(reversed(steps)))
    masks, params = _Used(self.masks), _Used(self.params)
    x = jax.ShapeDtypeStruct(self.shape, float)
    jax.eval_shape(lambda x: net({"params": params, "masks": masks}, x), x)
    return dataclasses.replace(
      net,
      masks={name: m for name, m in self.masks.items() if name in masks.used},
      params={name: p for name, p in self.params.items() if name in params.used},
    )


class _Used(dict):
  """A dictionary that remembers what was read."""

  def __init__(self, items: Any) -> None:
    super().__init__(items)
    self.used: set[str] = set()

  def __getitem__(self, key: str) -> Any:
    self.used.add(key)
    return jnp.asarray(super().__getitem__(key))


@dataclass
class Builder:
  """A network that grows; shapes are known at two batch sizes, so that axes of the batch can be told."""

  rng: np.random.Generator
  shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]
  steps: list[Step] = field(default_factory=list)
  params: dict[str, Any] = field(default_factory=dict)
  masks: dict[str, Any] = field(default_factory=dict)

  def shape(self, value: int) -> tuple[int, ...]:
    return self.shapes[value][0]

  def free(self, value: int) -> list[int]:
    """The axes that do not hang on the batch size."""
    return [at for at, (a, b) in enumerate(zip(*self.shapes[value], strict=True)) if a == b]

  def axis(self, value: int, least: int = 1) -> int:
    found = [at for at in self.free(value) if self.shape(value)[at] >= least]
    need(found)
    return self.choice(found)

  def pick(self, fits: Callable[[tuple[int, ...]], bool] = lambda s: True, other: int | None = None) -> int:
    """A value, late ones more often, and rather not ``other``."""
    found = [at for at in range(len(self.shapes)) if fits(self.shape(at))]
    found = [at for at in found if at != other] or found
    need(found)
    return found[-1 - min(int(self.rng.geometric(0.35)) - 1, len(found) - 1)]

  def choice(self, items: Sequence[Any]) -> Any:
    return items[int(self.rng.integers(len(items)))]

  def chance(self, probability: float) -> bool:
    return bool(self.rng.random() < probability)

  def size(self) -> int:
    return int(self.rng.integers(1, 7))

  def param(self, shape: Sequence[int], kind: str = "p") -> str:
    """A new parameter; its name. Kernels that have taps are of the kind ``k``, stacks of layers of the kind ``s``."""
    name = f"{kind}{len(self.params)}"
    values = self.rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1)
    self.params[name] = np.asarray(values)
    return name

  def mask(self, size: int) -> str:
    """A mask of this size, new or not; its name."""
    found = [name for name, mask in self.masks.items() if mask.shape == (size,)]
    if found and self.chance(0.4):
      return self.choice(found)
    name = f"m{len(self.masks)}"
    kind = self.rng.random()
    alive = 1.1 if kind < 0.1 else 0.0 if kind < 0.17 else 0.6
    self.masks[name] = (self.rng.random(size) < alive).astype(np.float32)
    return name

  def mask_of_layers(self, layers: int, size: int) -> str:
    """A new mask with a row for each layer; its name."""
    name = f"m{len(self.masks)}"
    self.masks[name] = (self.rng.random((layers, size)) < 0.6).astype(np.float32)
    return name

  def add(self, name: str, fn: Callable[..., Any], *ins: int) -> list[int]:
    """A step; returns its values."""
    found = [self._shapes(fn, [self.shapes[i][0] for i in ins])]
    try:
      found.append(self._shapes(fn, [self.shapes[i][1] for i in ins]))
    except (TypeError, ValueError, AssertionError) as error:
      raise CannotError from error  # it fits one batch size alone
    need(all(len(s) <= 5 and np.prod(s) <= 700 for s in found[0]))
    outs = tuple(range(len(self.shapes), len(self.shapes) + len(found[0])))
    self.shapes += zip(*found, strict=True)
    self.steps.append(Step(name, fn, ins, outs))
    return list(outs)

  def _shapes(self, fn: Any, shapes: Any) -> list[tuple[int, ...]]:
    structs = [jax.ShapeDtypeStruct(s, float) for s in shapes]
    masks = {name: jnp.asarray(m) for name, m in self.masks.items()}
    params = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in self.params.items()}
    return [s.shape for s in jax.tree.leaves(jax.eval_shape(fn, params, masks, *structs))]


def draw(seed: int, attempt: int = 0) -> tuple[Network, int]:
  """A random network and another batch size that it can run at."""
  rng = np.random.default_rng([seed, attempt])
  examples = int(rng.choice([1, 2, 2, 3]))
  other = examples + int(rng.integers(1, 4))
  rest = tuple(int(n) for n in rng.integers(1, 7, int(rng.integers(1, 4))))
  b = Builder(rng, [((examples, *rest), (other, *rest))])
  weights = np.array([weight for weight, _ in OPS])
  for _ in range(int(rng.integers(3, 13))):
    op = OPS[int(rng.choice(len(OPS), p=weights / weights.sum()))][1]
    kept = dict(b.params), dict(b.masks)
    try:
      op(b)
    except CannotError:
      b.params, b.masks = kept
  if not b.masks:
    return draw(seed, attempt + 100)
  last = len(b.shapes) - 1
  outputs = (last,) if b.chance(0.6) else (last, b.pick())
  net = Network(tuple(b.steps), outputs, b.params, b.masks, (examples, *rest), seed).trimmed()
  return (net, other) if net.masks else draw(seed, attempt + 100)


class WildError(Exception):
  """The masked network's own values are not finite, or too large to compare."""


def _close(expected: Any, found: Any, what: str) -> None:
  for at, (a, b) in enumerate(zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, f"{what} {at}: shape {b.shape}, expected {a.shape}"
    if not np.isfinite(a).all() or np.abs(a).max(initial=0) > LARGEST:
      raise WildError(what)
    error, norm = np.linalg.norm(a - b), np.linalg.norm(a)
    assert error <= RTOL * norm + ATOL, f"{what} {at}: off by {error:.3g} of {norm:.3g}"


def _with_gradients(fn: Callable[..., Any], rest: Any, x: Any) -> Any:
  def loss(rest: Any, x: Any) -> Any:
    outs = fn(rest, x)
    return sum(jnp.sum(jnp.sin(y + 1.0)) for y in outs), outs

  return jax.grad(loss, argnums=(0, 1), has_aux=True)(rest, x)


def check_values(net: Network, other: int) -> Any:
  """Outputs and gradients of the compact network, and one of some other properties."""
  variables, x = net.variables, net.batch(net.shape[0])
  masks, rest = variables["masks"], {"params": variables["params"]}
  small = fp.compact(net, variables, x)
  # Everything is an argument: XLA folds constants, and is wrong about the bits of one that was gathered from.
  what, pairs, given = OTHERS[net.seed % len(OTHERS)](net, small, variables, x, other)
  masked = lambda v, x: net({**v, "masks": masks}, x)

  @jax.jit
  def run(rest: Any, thin: Any, given: Any, x: Any) -> Any:
    return _with_gradients(masked, rest, x), _with_gradients(small, thin, x), pairs(given, x)

  ((d_rest, d_x), outs), ((f_rest, f_x), f_outs), extra = run(rest, small.variables, given, x)
  _close(outs, f_outs, "output")
  _close(small.shrink(d_rest["params"]), f_rest["params"], "gradient by parameter")
  _close(d_x, f_x, "gradient by input")
  for expected, found in extra:
    _close(outs if expected is None else expected, found, what)
  return small


def _twice(net: Network, small: Any, variables: Any, x: Any, other: int) -> Any:
  kept = fp.compact(net, variables, x, keep_masks=True)
  again = fp.compact(kept, kept.variables, x)
  both = lambda given, x: [(None, kept(given[0], x)), (None, again(given[1], x))]
  return "output when compacted twice", both, (kept.variables, again.variables)


def _unpruned(net: Network, small: Any, variables: Any, x: Any, other: int) -> Any:
  ones = {**variables, "masks": jax.tree.map(jnp.ones_like, variables["masks"])}
  whole = fp.compact(net, ones, x)
  return "output with masks of ones", lambda given, x: [(net(ones, x), whole(given, x))], whole.variables


def _another_batch(net: Network, small: Any, variables: Any, x: Any, other: int) -> Any:
  y = net.batch(other)
  pairs = lambda given, x: [(net(variables, given[1]), small(*given))]
  return "output at another batch size", pairs, (small.variables, y)


def _frozen(net: Network, small: Any, variables: Any, x: Any, other: int) -> Any:
  serving, y = fp.compact(net, variables, x, freeze=True), net.batch(other)
  pairs = lambda given, x: [(None, serving(given[0], x)), (net(variables, given[1]), serving(*given))]
  return "output of the serving form", pairs, (serving.variables, y)


OTHERS = (_twice, _unpruned, _another_batch, _frozen)


def check_costs(net: Network, small: Any) -> None:
  """Costs against brute force, and against a count of the compact program."""
  variables, x = net.variables, net.batch(net.shape[0])
  masks = variables["masks"]
  cost = fp.cost_model(net, variables, x)
  exact = cost.exact(masks)
  assert abs(small.cost * net.shape[0] - exact) <= 1e-6 * exact, "small.cost is not the cost model's"
  priced, batch = (cost, net.shape[0]) if net.seed % 2 else (all_measures(net, variables, x), 1)
  before = priced.exact(masks)
  drops = jax.tree.map(np.asarray, priced.per_feature(masks) if exact else masks)
  live = [(name, k) for name, m in net.masks.items() for k in zip(*np.nonzero(m), strict=True)]
  for at in np.random.default_rng(net.seed).permutation(len(live))[:6] if exact else ():
    name, k = live[at]
    expected = before - priced.exact({**masks, name: masks[name].at[k].set(0)})
    got = float(drops[name][k]) * batch
    assert abs(got - expected) <= 1e-6 * abs(expected) + 1e-9, f"drop of {name}[{k}]: {got}, not {expected}"
  jaxpr = jax.make_jaxpr(small)(small.variables, x)
  if not _names(jaxpr) & UNCOUNTED:
    depends = [False] * len(jax.tree.leaves(small.variables)) + [True]
    counted, most = count(jaxpr, depends), count(jaxpr, depends, constants=True)
    # What follows from an array of which nothing is left is a constant, though not for the cost model.
    right = counted <= exact <= most if _has_nothing(jaxpr) else counted == exact
    assert right, f"the compact program has {counted} FLOPs, the cost model says {exact}"


def all_measures(net: Network, variables: Any, x: Any) -> fp.CostModel:
  """One cost that has all measures in it, per example."""
  machine = fp.Roofline(flops_per_second=1.0, bytes_per_second=4.0)
  parts = [fp.cost_model(net, variables, x, measure=m) for m in ("flops", "macs", "bytes", "params", machine)]
  return parts[0] + 2 * parts[1] + 0.5 * parts[2] + 3 * parts[3] + 7 * parts[4]


def _jaxprs(jaxpr: Any) -> Any:
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  yield jaxpr
  for eqn in jaxpr.eqns:
    for value in eqn.params.values():
      for item in value if isinstance(value, tuple | list) else (value,):
        if hasattr(item, "eqns"):
          yield from _jaxprs(item)


def _names(jaxpr: Any) -> set[str]:
  return {eqn.primitive.name for inner in _jaxprs(jaxpr) for eqn in inner.eqns}


def _has_nothing(jaxpr: Any) -> bool:
  """Whether some array has no entries, or is made of zeros, as one that is not there is shown."""
  eqns = [eqn for inner in _jaxprs(jaxpr) for eqn in inner.eqns]
  zeros = any(eqn.primitive.name == "broadcast_in_dim" and _is_zero(eqn.invars[0]) for eqn in eqns)
  return zeros or any(0 in getattr(v.aval, "shape", ()) for eqn in eqns for v in (*eqn.invars, *eqn.outvars))


def _is_zero(atom: Any) -> bool:
  return hasattr(atom, "val") and not np.any(atom.val)


def check_refusal(net: Network, error: ValueError) -> None:
  """Masks that are refused because nothing reads them are without any effect; then the network is drawn anew."""
  if "nothing reads" not in str(error):
    raise error
  variables, x = net.variables, net.batch(net.shape[0])
  names = re.findall(r"masks/(m\d+)", str(error))
  flipped = {name: 1 - m if name in names else m for name, m in variables["masks"].items()}
  _close(net(variables, x), net({**variables, "masks": flipped}, x), "a mask that nothing reads")
  raise WildError("a mask without effect, which is refused")


def _alive(gradients: Any, axis: int, is_stack: bool) -> int:
  """How many entries along an axis have a gradient; in a stack, at most in one layer."""
  layers, axis = (gradients, axis) if is_stack else (gradients[None], axis + 1)
  return int(
    np.moveaxis(layers, axis, 1).reshape(*layers.shape[:1], layers.shape[axis], -1).any(2).sum(1).max()
  )


def check_report(net: Network, small: Any, draws: int = 10) -> None:
  """What is kept of the parameters has a gradient under the masks, or the report says why it stays.

  The truth is numerical: which slices have a gradient, of any of some random parameters and inputs. Slices that have
  none though nothing is masked are nobody's concern.
  """
  masks = net.variables["masks"]

  @jax.jit
  def gradients(params: Any, masks: Any, x: Any) -> Any:
    loss = lambda p: sum(jnp.sum(jnp.sin(y + 1.0)) for y in net({"params": p, "masks": masks}, x))
    return jax.tree.map(lambda g: g != 0, jax.grad(loss)(params))

  found: list[Any] = [None, None]
  for draw in range(draws):
    rng = np.random.default_rng([net.seed, draw])
    params = {name: jnp.asarray(rng.permutation(p.ravel()).reshape(p.shape) * rng.choice([-1, 1], p.shape)) for name, p in net.params.items()}  # fmt: skip
    x = jnp.asarray(rng.normal(size=net.shape))
    for at, given in enumerate((masks, jax.tree.map(jnp.ones_like, masks))):
      grads = jax.tree.map(np.asarray, gradients(params, given, x))
      found[at] = grads if found[at] is None else jax.tree.map(np.logical_or, found[at], grads)
  said = {(held.path, held.axis) for blocker in small.blockers for held in blocker.holds}
  for name, leaf in small.variables["params"].items():
    # No mask is of taps, though some may meet dead rows alone; a stack keeps its layers.
    taps = {"k": leaf.ndim - 2, "s": 1}.get(name[0], 0)
    for axis, kept in list(enumerate(leaf.shape))[taps:]:
      alive, ever = (_alive(f[name], axis, name.startswith("s")) for f in found)
      never = net.params[name].shape[axis] - ever
      silent = (f"params/{name}", axis) not in said
      # Where nothing at all matters some set is empty, of one mask or of several together: as of emptied masks.
      assert not alive or kept <= alive + never or not silent, (
        f"report: {kept} of {name} stay along {axis}, {alive} of them matter"
      )


def is_refused_by_xla(net: Network) -> bool:
  """Whether XLA fails at the masked network, without the library: of a Fourier transform before a triangular solve, say."""
  variables = net.variables
  masked = lambda rest, x: net({**rest, "masks": variables["masks"]}, x)
  run = jax.jit(lambda rest, x: _with_gradients(masked, rest, x))
  try:
    jax.block_until_ready(run({"params": variables["params"]}, net.batch(net.shape[0])))
  except jax.errors.JaxRuntimeError:
    return True
  return False


def check(net: Network, other: int) -> None:
  """Everything that must hold."""
  try:
    small = check_values(net, other)
  except ValueError as error:
    check_refusal(net, error)
  except AssertionError:
    signs = any(step.name.startswith("sign") for step in net.steps)
    if signs and sums_to_zero(net, net.variables, net.batch(net.shape[0])):
      raise WildError("the sign of a sum that is exactly zero") from None
    raise
  except jax.errors.JaxRuntimeError:
    if is_refused_by_xla(net):
      raise WildError("XLA does not compile the masked network itself") from None
    raise
  check_costs(net, small)
  if net.seed % 3 == 0 and gradients_tell([step.name for step in net.steps]):
    check_report(net, small)


Check = Callable[[Network, int], None]


class TimeLimitError(Exception):
  """A network takes too long."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
  """Raises where a block takes more processor time: also in the middle of a loop that never ends."""

  def late(signum: int, frame: Any) -> None:
    raise TimeLimitError(f"more than {seconds:g} s of processor time")

  before = signal.signal(signal.SIGPROF, late)
  signal.setitimer(signal.ITIMER_PROF, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def run_seed(seed: int, check: Check = check) -> int:
  """Draws a network and checks it; returns how many were thrown away because their own values are wild."""
  with jax.enable_x64(True), warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="fisherprune_jax has no rule")
    for attempt in range(100):
      net, other = draw(seed, attempt)
      try:
        with time_limit(SECONDS):
          check(net, other)
        return attempt
      except WildError:
        continue
      except Exception as error:
        error.add_note(f"seed {seed}, attempt {attempt}, other batch size {other}\n{net.describe()}")
        raise
  raise RuntimeError(f"no tame network for seed {seed}")


def _candidates(net: Network) -> Any:
  """Smaller networks: fewer outputs, an earlier output, a step left out, a mask of ones."""
  if len(net.outputs) > 1:
    yield from (dataclasses.replace(net, outputs=(out,)) for out in net.outputs)
  if len(net.outputs) == 1:
    earlier = sorted({i for s in net.steps for i in (*s.ins, *s.outs)})
    yield from (dataclasses.replace(net, outputs=(i,)) for i in earlier if i < net.outputs[0])
  for at, step in enumerate(net.steps):
    for i in range(step.outs[0]):
      swap = dict.fromkeys(step.outs, i)
      rest = [dataclasses.replace(s, ins=tuple(swap.get(k, k) for k in s.ins)) for s in net.steps]
      del rest[at]
      outputs = tuple(swap.get(k, k) for k in net.outputs)
      yield dataclasses.replace(net, steps=tuple(rest), outputs=outputs)
  for name, mask in net.masks.items():
    if not mask.all():
      yield dataclasses.replace(net, masks={**net.masks, name: np.ones_like(mask)})


def failure(net: Network, other: int, check: Check = check) -> str:
  """The kind of failure; empty if there is none."""
  try:
    with time_limit(SECONDS):
      check(net, other)
  except AssertionError as error:
    return str(error).split(":")[0].rstrip(" 0123456789")[:30]
  except WildError:
    return ""
  except Exception as error:
    return type(error).__name__ + str(error)[:20]
  return ""


def shrunk(net: Network, other: int, check: Check = check) -> Network:
  """A smaller network that fails in the same way."""
  kind, smaller = failure(net, other, check), True
  while smaller:
    smaller = False
    for candidate in _candidates(net):
      try:
        candidate = candidate.trimmed()
        for examples in (net.shape[0], other):
          jax.eval_shape(candidate, candidate.variables, candidate.batch(examples))
      except Exception:
        continue
      if failure(candidate, other, check) == kind:
        net, smaller = candidate, True
        break
  return net


def first_failing(seed: int, check: Check = check) -> tuple[Network, int]:
  """The network of a seed that fails, and its other batch size."""
  drawn = (draw(seed, attempt) for attempt in range(20))
  return next(pair for pair in drawn if failure(*pair, check))


def _report(seed: int, shrink: bool, check: Check) -> None:
  traceback.print_exc()
  if shrink:
    with jax.enable_x64(True), warnings.catch_warnings():
      warnings.simplefilter("ignore")
      net, other = first_failing(seed, check)
      small = shrunk(net, other, check)
      print(f"shrunk (other batch size {other}): {failure(small, other, check)}\n{small.describe()}")


def main(argv: Sequence[str] | None = None, check: Check = check) -> int:
  """Checks many networks; returns how many failed."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=1000, help="how many networks")
  parser.add_argument("--start", type=int, default=0, help="the first seed")
  parser.add_argument("--shrink", action="store_true", help="look for a smaller network that fails too")
  options = parser.parse_args(argv)
  failed: list[int] = []
  thrown, began = 0, time.time()
  for done, seed in enumerate(range(options.start, options.start + options.count), 1):
    try:
      thrown += run_seed(seed, check)
    except Exception:
      failed.append(seed)
      _report(seed, options.shrink, check)
    if done % 500 == 0:
      jax.clear_caches()
    if done % 50 == 0:
      print(f"{done} networks, {len(failed)} failed, {time.time() - began:.0f} s", flush=True)
  print(f"{options.count} networks, {thrown} thrown away as not tame; failed: {failed}")
  return len(failed)


if __name__ == "__main__":
  sys.exit(min(main(), 1))
