"""What pruning adds to a training step, against plain momentum SGD on the same network without masks.

  python benchmarks/overhead.py --out benchmarks/results.json

Times one CPU thread: the variants take turns step by step in one process, and medians are reported, of wall-clock
time and of the process's CPU time (which a busy machine disturbs less).
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

import fisherprune_jax as fp

VARIANTS = {
  "plain": "plain network, momentum SGD",
  "masked": "with masks, momentum SGD",
  "automatic": "with automatic masks, momentum SGD",
  "pruning": "with masks and fisher_prune",
  "prunes": "the same, a step that prunes",
  "pruner": "with fp.Pruner, before start",
  "pruner_prunes": "with fp.Pruner, between start and stop",
}


class MLP(nn.Module):
  """784-512-512-10."""

  masked: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(2):
      x = nn.relu(nn.Dense(512)(x))
      x = fp.Mask()(x) if self.masked else x
    return nn.Dense(10)(x)


class CNN(nn.Module):
  """Three 3x3 convolutions of 32, 64 and 128 channels, global average pooling, a dense layer."""

  masked: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for channels, stride in ((32, 1), (64, 2), (128, 2)):
      x = nn.relu(nn.Conv(channels, (3, 3), strides=stride)(x))
      x = fp.Mask()(x) if self.masked else x
    return nn.Dense(10)(x.mean((1, 2)))


class Case(NamedTuple):
  model: type[nn.Module]
  shape: tuple[int, ...]
  steps: int


CASES = {"MLP": Case(MLP, (128, 784), 300), "CNN": Case(CNN, (64, 32, 32, 3), 60)}


class Timer:
  """Wall-clock and CPU milliseconds, call by call."""

  def __init__(self) -> None:
    self.times: list[tuple[float, float]] = []

  def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function(*args))
    self.times.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return result

  def median(self, skip: int = 3) -> dict[str, float]:
    wall, cpu = np.median(self.times[skip:], axis=0)
    return {"wall_ms": float(wall), "cpu_ms": float(cpu)}


def pin() -> None:
  """Keeps this process on one processor and XLA on one thread; call it before JAX starts its backend."""
  os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
  os.environ["JAX_PLATFORMS"] = "cpu"
  jax.config.update("jax_platforms", "cpu")
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def cross_entropy(apply: Callable[..., Any], variables: Any, batch: Any) -> jax.Array:
  x, labels = batch
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(variables, x), labels))


def plain_step(apply: Callable[..., Any], masks: Any) -> tuple[Callable, Callable]:
  """Momentum SGD; ``masks`` are constants, or None for a network without."""
  tx = optax.sgd(1e-2, momentum=0.9)

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, masks: Any, batch: Any) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      variables = {"params": params} if masks is None else {"params": params, "masks": masks}
      return cross_entropy(apply, variables, batch)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return tx.init, lambda params, opt_state, batch: step(params, opt_state, masks, batch)


def pruning_step(
  apply: Callable[..., Any], cost: fp.CostModel, prune_every: int
) -> tuple[Callable, Callable]:
  """Momentum SGD and pruning, as a user writes it."""
  tx = optax.chain(optax.sgd(1e-2, momentum=0.9), fp.fisher_prune(cost, prune_every=prune_every))

  def loss_fn(params: Any, masks: Any, batch: Any) -> jax.Array:
    return cross_entropy(apply, {"params": params, "masks": masks}, batch)

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, batch: Any) -> Any:
    masks = fp.get_masks(opt_state)
    loss, (grads, mask_grads) = fp.value_and_mask_grads(loss_fn)(params, masks, batch)
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, loss

  return tx.init, step


def pruner_step(
  apply: Callable[..., Any], params: Any, x: jax.Array, start: int
) -> tuple[Callable, Callable]:
  """Momentum SGD in ``fp.Pruner``, with the loss function of the plain step."""
  pruner = fp.Pruner(apply, {"params": params}, x, keep=0.5, start=start, stop=start + 10**6)
  tx = pruner.wrap(optax.sgd(1e-2, momentum=0.9))

  def loss_fn(params: Any, batch: Any) -> jax.Array:
    return cross_entropy(apply, {"params": params}, batch)

  @partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, opt_state: Any, batch: Any) -> Any:
    loss, grads = pruner.value_and_grad(loss_fn)(params, opt_state, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return tx.init, step


def time_steps(name: str, case: Case, cost: fp.CostModel, params: Any, batch: Any) -> dict[str, Any]:
  """Medians per step of every variant."""
  masked, plain = case.model().apply, case.model(masked=False).apply
  auto = fp.auto_mask(plain, {"params": params}, batch[0])
  made = {
    "plain": plain_step(plain, None),
    "masked": plain_step(masked, cost.masks),
    "automatic": plain_step(auto.apply, auto.masks),
    "pruning": pruning_step(masked, cost, 100),
    "prunes": pruning_step(masked, cost, 1),
    "pruner": pruner_step(plain, params, batch[0], 10**6),
    "pruner_prunes": pruner_step(plain, params, batch[0], 0),
  }
  states, timers = {}, {variant: Timer() for variant in made}
  for variant, (init, _) in made.items():
    own = jax.tree.map(jnp.copy, params)
    states[variant] = (own, init(own))
  for turn in track(range(1, case.steps + 1), description=f"{name} steps"):
    for variant, (_, step) in made.items():
      run = jax.block_until_ready if variant == "pruning" and turn % 100 == 0 else None
      *state, _ = (
        run(step(*states[variant], batch)) if run else timers[variant](step, *states[variant], batch)
      )
      states[variant] = tuple(state)
  return {variant: timer.median() for variant, timer in timers.items()}


def time_analysis(
  case: Case, variables: Any, x: jax.Array, repeats: int = 50
) -> tuple[fp.CostModel, dict[str, Any]]:
  """The cost model, and what it takes to build it and to call it."""
  model, build, total, each = case.model(), Timer(), Timer(), Timer()
  for _ in range(3):
    cost = build(partial(fp.cost_model, model.apply, variables), x)
  jitted = jax.jit(cost), jax.jit(cost.per_feature)
  for _ in range(repeats):
    total(jitted[0], cost.masks)
    each(jitted[1], cost.masks)
  timers = {"cost_model": build.median(skip=0), "cost": total.median(), "per_feature": each.median()}
  return cost, timers | {"cost_model_first": dict(zip(("wall_ms", "cpu_ms"), build.times[0], strict=True))}


def time_applies(case: Case, variables: Any, x: jax.Array, repeats: int) -> dict[str, Any]:
  """Medians of the network without masks, with those of its author, and with automatic ones."""
  plain = case.model(masked=False).apply
  bare = {"params": variables["params"]}
  auto = fp.auto_mask(plain, bare, x)
  calls = {
    "apply_plain": (jax.jit(plain), bare),
    "apply_masked": (jax.jit(case.model().apply), variables),
    "apply_automatic": (jax.jit(auto.apply), auto.variables),
  }
  timers = {title: Timer() for title in calls}
  for _ in range(repeats):
    for title, (apply, given) in calls.items():
      timers[title](apply, given, x)
  return {title: timer.median() for title, timer in timers.items()}


def measure(name: str, case: Case) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  batch = (
    jnp.asarray(rng.normal(size=case.shape), jnp.float32),
    jnp.asarray(rng.integers(10, size=case.shape[0])),
  )
  variables = case.model().init(jax.random.key(0), batch[0])
  cost, analysis = time_analysis(case, variables, batch[0])
  steps = time_steps(name, case, cost, variables["params"], batch)
  analysis |= time_applies(case, variables, batch[0], 2 * case.steps)
  ratios = {
    variant: {unit: steps[variant][unit] / steps["plain"][unit] for unit in ("wall_ms", "cpu_ms")}
    for variant in steps
  }
  return {
    "batch": list(case.shape),
    "flops": cost.dense,
    "steps": steps,
    "ratios": ratios,
    "analysis": analysis,
  }


def machine() -> dict[str, Any]:
  return {
    "platform": platform.platform(),
    "processor": processor(),
    "cpu_count": os.cpu_count(),
    "device": jax.devices()[0].device_kind,
    "python": platform.python_version(),
    "jax": jax.__version__,
    "threads": 1,
  }


def processor() -> str:
  info = Path("/proc/cpuinfo")
  names = (
    [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    if info.exists()
    else []
  )
  return names[0] if names else platform.processor()


def step_table(name: str, found: dict[str, Any]) -> Table:
  columns = [Column(title, justify="right") for title in ("wall", "CPU", "ratio, wall", "ratio, CPU")]
  table = Table("per step", *columns, title=f"{name}, batch {found['batch']}")
  for variant, title in VARIANTS.items():
    times, ratios = found["steps"][variant], found["ratios"][variant]
    table.add_row(title, *(f"{t:.2f} ms" for t in times.values()), *(f"{r:.3f}" for r in ratios.values()))
  table.add_section()
  for title, times in found["analysis"].items():
    table.add_row(title, *(f"{t:.2f} ms" for t in times.values()), "", "")
  return table


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, default=Path("benchmarks/results.json"), help="JSON file to write")
  out = parser.parse_args().out
  pin()
  results = {"machine": machine(), "networks": {name: measure(name, case) for name, case in CASES.items()}}
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(results, indent=2) + "\n")
  Console().print(*(step_table(name, found) for name, found in results["networks"].items()))


if __name__ == "__main__":
  main()
