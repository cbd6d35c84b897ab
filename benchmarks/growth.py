"""How the library's own work grows with the network: every family at N and at 2 N.

  python benchmarks/growth.py --out benchmarks/growth.json

Each size runs in a process of its own, on one core, under a time limit: tracing and analysis, the first
``cost(masks)``, the first ``per_feature(masks)``, ``compact``, its ``report``, and ``auto_mask`` of the same network with its masks
left out (ones), compilation included, in seconds of that core's time. The bar: twice the network takes at most 2.5 times as long (half a second of start-up aside),
and the larger under 20 seconds.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisherprune_jax as fp

Apply = Callable[[Any, jax.Array], jax.Array]
STAGES = ("trace", "cost", "per_feature", "compact", "report", "auto")
RATIO, SECONDS, STARTUP = 2.5, 20.0, 0.5


@dataclass
class Variables:
  """Variables that come into being as a network asks for them."""

  params: dict[str, Any] = field(default_factory=dict)
  masks: dict[str, Any] = field(default_factory=dict)
  rng: Any = field(default_factory=lambda: np.random.default_rng(0))

  def param(self, *shape: int) -> str:
    name = f"p{len(self.params)}"
    self.params[name] = (self.rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
    return name

  def mask(self, size: int) -> str:
    name = f"m{len(self.masks)}"
    self.masks[name] = np.ones(size, np.float32)
    return name


Layer = Callable[[Any, Any, jax.Array], jax.Array]
"""``layer(params, masks, x) -> y``."""


def dense(v: Variables, n: int, m: int) -> Layer:
  kernel, bias = v.param(n, m), v.param(m)
  return lambda p, k, x: jnp.tanh(x @ p[kernel] + p[bias])


def masked(v: Variables, n: int) -> Layer:
  mask = v.mask(n)
  return lambda p, k, x: x * k[mask]


def chain(layers: Iterable[Layer]) -> Layer:
  layers = list(layers)

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    for layer in layers:
      x = layer(p, k, x)
    return x

  return run


def plain(v: Variables, n: int) -> Layer:
  """Dense layers of width 8, each under its mask."""
  return chain([*(layer for _ in range(n) for layer in (dense(v, 8, 8), masked(v, 8))), dense(v, 8, 2)])


def residual_writes(v: Variables, n: int) -> Layer:
  """``x = x + Mask()(f(x))``."""

  def block() -> Layer:
    write = chain([dense(v, 8, 8), masked(v, 8)])
    return lambda p, k, x: x + write(p, k, x)

  return chain([masked(v, 8), *(block() for _ in range(n)), dense(v, 8, 2)])


def residual_streams(v: Variables, n: int) -> Layer:
  """``x = Mask()(x + Mask()(f(x)))``."""

  def block() -> Layer:
    write, after = chain([dense(v, 8, 8), masked(v, 8)]), masked(v, 8)
    return lambda p, k, x: after(p, k, x + write(p, k, x))

  return chain([masked(v, 8), *(block() for _ in range(n)), dense(v, 8, 2)])


def elementwise(v: Variables, n: int) -> Layer:
  """``x = (x + tanh(x * w) * m) * n``."""

  def block() -> Layer:
    scale, write, after = v.param(8), masked(v, 8), masked(v, 8)
    return lambda p, k, x: after(p, k, x + write(p, k, jnp.tanh(x * p[scale])))

  return chain([masked(v, 8), *(block() for _ in range(n)), dense(v, 8, 2)])


def shuffles(v: Variables, n: int) -> Layer:
  """ShuffleNet units of width 4: split, own branch, concatenate, shuffle the channels."""

  def unit() -> Layer:
    branch = chain([dense(v, 4, 4), masked(v, 4), dense(v, 4, 4), masked(v, 4)])

    def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
      left, right = jnp.split(x, 2, axis=-1)
      x = jnp.concatenate([left, branch(p, k, right)], axis=-1)
      return x.reshape(-1, 2, 4).swapaxes(1, 2).reshape(-1, 8)

    return run

  return chain([masked(v, 8), *(unit() for _ in range(n)), dense(v, 8, 2)])


def dense_net(v: Variables, n: int) -> Layer:
  """Each layer reads what all before it wrote."""
  layers = [chain([dense(v, 8 + 4 * at, 4), masked(v, 4)]) for at in range(n)]
  last = dense(v, 8 + 4 * n, 2)

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    found = [x]
    for layer in layers:
      found.append(layer(p, k, jnp.concatenate(found, axis=-1)))
    return last(p, k, jnp.concatenate(found, axis=-1))

  return run


def merged_heads(v: Variables, n: int) -> Layer:
  """Attention of 4 heads of depth ``n`` over 8 positions, its masks on the merged axis."""
  width = 4 * n
  read = [chain([dense(v, 8, width), masked(v, width)]) for _ in range(3)]
  write = dense(v, width, 2)

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    x = jnp.broadcast_to(x[:, None], (x.shape[0], 8, x.shape[-1]))
    q, key, value = (f(p, k, x).reshape(-1, 8, 4, n) for f in read)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, key))
    return write(p, k, jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(-1, 8, width))

  return run


def flattened(v: Variables, n: int) -> Layer:
  """``n`` channels under a mask, flattened with 7 x 7 positions and cut up where they do not divide."""
  write, mask = v.param(8, 49 * n), v.mask(n)

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    y = (x @ p[write]).reshape(-1, n, 7, 7) * k[mask][:, None, None]
    return y.reshape(x.shape[0], -1).reshape(-1, 49, n).sum(2)

  return run


def wide(v: Variables, n: int) -> Layer:
  """One layer of ``n`` features."""
  return chain([dense(v, 8, n), masked(v, n), dense(v, n, 2)])


def many_wide(v: Variables, n: int) -> Layer:
  """``n`` layers of 1,000 features."""
  before, after = dense(v, 8, 1000), dense(v, 1000, 8)
  return chain([layer for _ in range(n) for layer in (before, masked(v, 1000), after)])


def lookups(v: Variables, n: int) -> Layer:
  """``n`` known rows of a table of ``10 n``, all the same."""
  table, mask, last = v.param(10 * n, 8), v.mask(8), dense(v, 8, 2)

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    rows = jnp.take(p[table], jnp.zeros(n, int), axis=0) * k[mask]
    return last(p, k, x * rows.sum(0))

  return run


def grouped_norms(v: Variables, n: int) -> Layer:
  """Residual writes of width 16, each after a norm over groups of 4."""

  def block() -> Layer:
    write = chain([dense(v, 16, 16), masked(v, 16)])

    def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
      groups = x.reshape(-1, 4, 4)
      y = groups / (1 + jnp.mean(groups**2, -1, keepdims=True))
      return x + write(p, k, y.reshape(-1, 16))

    return run

  return chain([dense(v, 8, 16), masked(v, 16), *(block() for _ in range(n)), dense(v, 16, 2)])


def stacked(v: Variables, n: int) -> Layer:
  """A scan over ``n`` layers, each under its row of one mask."""
  kernel, mask = v.param(n, 8, 8), "stack"
  v.masks[mask] = np.ones((n, 8), np.float32)

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    def turn(x: jax.Array, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
      return x + jnp.tanh(x @ layer[0]) * layer[1], None

    return jax.lax.scan(turn, x, (p[kernel], k[mask]))[0]

  return run


def bottlenecks(v: Variables, n: int) -> Layer:
  """Inverted bottlenecks with squeeze-and-excitation, as in EfficientNet, each of a width of its own."""

  def conv(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )

  def block(inner: int) -> Layer:
    expand, depthwise, project = v.param(1, 1, 16, inner), v.param(3, 3, 1, inner), v.param(1, 1, inner, 16)
    scale, shift, mask = v.param(inner), v.param(inner), v.mask(inner)
    squeeze, excite = dense(v, inner, 4), dense(v, 4, inner)

    def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
      y = jax.nn.silu(conv(x, p[expand]) * p[scale] + p[shift])
      y = jax.nn.silu(conv(y, p[depthwise], inner))
      gate = excite(p, k, squeeze(p, k, y.mean((1, 2))))
      return x + conv(y * gate[:, None, None] * k[mask], p[project])

    return run

  blocks, last = [block(48 + 2 * at) for at in range(n)], dense(v, 16, 2)

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    x = jnp.broadcast_to(x[:, None, None], (x.shape[0], 4, 4, 8))
    return last(p, k, chain(blocks)(p, k, jnp.concatenate([x, x], -1)).mean((1, 2)))

  return run


def heads(v: Variables, n: int) -> tuple[list[str], Callable[[Any, Any, jax.Array], list[jax.Array]]]:
  """N dense layers of width 3 on one input, each under its mask, and the names of their masks."""
  kernels, masks = [v.param(8, 3) for _ in range(n)], [v.mask(3) for _ in range(n)]
  return masks, lambda p, k, x: [x @ p[w] * k[m] for w, m in zip(kernels, masks, strict=True)]


def concatenated(v: Variables, n: int) -> Layer:
  """N arrays laid end to end, and cut up again."""
  (_, first), last = heads(v, n), [v.param(3, 2) for _ in range(n)]

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    cut = jnp.split(jnp.tanh(jnp.concatenate(first(p, k, x), -1)), n, -1)
    return sum((h @ p[w] for h, w in zip(cut, last, strict=True)), jnp.zeros(()))

  return run


def looped(v: Variables, n: int, loop: Callable[..., list[jax.Array]]) -> Layer:
  """N layers, then N more with the same masks, as a loop does them, then N dense ones that are added up."""
  (masks, first), inner, last = heads(v, n), v.param(n, 3, 3), [v.param(3, 2) for _ in range(n)]

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    def turn(xs: list[jax.Array]) -> list[jax.Array]:
      return [jnp.tanh(h @ w) * k[m] for h, w, m in zip(xs, p[inner], masks, strict=True)]

    return sum((h @ p[w] for h, w in zip(loop(turn, first(p, k, x)), last, strict=True)), jnp.zeros(()))

  return run


def carried(v: Variables, n: int) -> Layer:
  """A scan that carries N arrays."""
  return looped(v, n, lambda turn, xs: jax.lax.scan(lambda c, _: (turn(c), None), xs, None, length=3)[0])


def carried_while(v: Variables, n: int) -> Layer:
  """A while loop that carries N arrays."""

  def loop(turn: Callable[..., Any], xs: list[jax.Array]) -> list[jax.Array]:
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, turn(c[1])), (0, xs))[1]

  return looped(v, n, loop)


def read_and_written(v: Variables, n: int) -> Layer:
  """A scan that reads N arrays and writes N others, entry by entry."""

  def loop(turn: Callable[..., Any], xs: list[jax.Array]) -> list[jax.Array]:
    ys = jax.lax.scan(lambda c, x: (c, turn(x)), 0.0, [jnp.stack([x, x]) for x in xs])[1]
    return [y.sum(0) for y in ys]

  return looped(v, n, loop)


def experts(v: Variables, n: int) -> Layer:
  """A mixture of N experts: each reads the input, and its result times a gate is added."""
  (_, first), last, gate = heads(v, n), [v.param(3, 2) for _ in range(n)], v.param(8, n)

  def run(p: Any, k: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.softmax(x @ p[gate])
    outs = (jnp.tanh(h) @ p[w] for h, w in zip(first(p, k, x), last, strict=True))
    return sum((gates[:, i : i + 1] * out for i, out in enumerate(outs)), jnp.zeros(()))

  return run


def switched(v: Variables, n: int) -> Layer:
  """N branches, of which one is chosen."""
  layers = [chain([dense(v, 8, 3), masked(v, 3), dense(v, 3, 2)]) for _ in range(n)]
  return lambda p, k, x: jax.lax.switch(
    jnp.int32(x.sum()), [lambda x, layer=layer: layer(p, k, x) for layer in layers], x
  )


FAMILIES: dict[str, tuple[Callable[[Variables, int], Layer], int]] = {
  "plain": (plain, 500),
  "residual_writes": (residual_writes, 20),
  "residual_streams": (residual_streams, 20),
  "elementwise": (elementwise, 150),
  "shuffles": (shuffles, 6),
  "dense_net": (dense_net, 24),
  "merged_heads": (merged_heads, 64),
  "flattened": (flattened, 32),
  "wide": (wide, 50_000),
  "many_wide": (many_wide, 50),
  "lookups": (lookups, 1500),
  "grouped_norms": (grouped_norms, 20),
  "stacked": (stacked, 24),
  "bottlenecks": (bottlenecks, 16),
  "concatenated": (concatenated, 200),
  "carried": (carried, 100),
  "carried_while": (carried_while, 100),
  "read_and_written": (read_and_written, 100),
  "experts": (experts, 100),
  "switched": (switched, 50),
}
"""Each with N; the bar is for N and 2 N."""


def network(family: str, n: int) -> tuple[Apply, Any, Any]:
  """``apply``, its variables and a batch."""
  v = Variables()
  layer = FAMILIES[family][0](v, n)

  def apply(variables: Any, x: jax.Array) -> jax.Array:
    return layer(variables["params"], variables["masks"], x)

  return apply, {"params": v.params, "masks": v.masks}, np.ones((2, 8), np.float32)


def measure(family: str, n: int) -> dict[str, float]:
  """Seconds of CPU time by stage, and the peak of memory in MB beyond what was used before, in this process."""
  apply, variables, x = network(family, n)
  jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))  # JAX itself starts up
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  found: dict[str, float] = {}

  def timed(stage: str, run: Callable[[], Any]) -> Any:
    start = time.process_time()
    out = run()
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)])
    found[stage] = round(time.process_time() - start, 3)
    return out

  rng = np.random.default_rng(1)
  masks = jax.tree.map(lambda m: (rng.random(m.shape) < 0.7).astype(np.float32), variables["masks"])
  cost = timed("trace", lambda: fp.cost_model(apply, variables, x))
  timed("cost", lambda: cost(masks))
  timed("per_feature", lambda: cost.per_feature(masks))
  compact = timed("compact", lambda: fp.compact(apply, {**variables, "masks": masks}, x))
  timed("report", compact.report)
  ones = jax.tree.map(np.ones_like, variables["masks"])
  timed(
    "auto", lambda: groups_of(lambda p, x: apply({"params": p, "masks": ones}, x), variables["params"], x)
  )
  found["total"] = round(sum(found.values()), 3)
  found["memory"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)
  return found


def groups_of(apply: Apply, params: Any, x: Any) -> int:
  """How many there are: streams that begin as an argument have none, which takes as long to find."""
  try:
    return len(fp.auto_mask(apply, params, x).groups)
  except ValueError as error:
    if "got no group at all" not in str(error):
      raise
    return 0


def in_process(family: str, n: int, limit: float) -> dict[str, Any]:
  """``measure`` in a process of its own, on one core."""
  command = [sys.executable, __file__, "--measure", family, str(n)]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
  except subprocess.TimeoutExpired:
    return {"total": float("inf"), "failed": f"more than {limit:.0f} s"}
  if done.returncode:
    return {"total": float("inf"), "failed": done.stderr.strip().splitlines()[-1][:100]}
  return json.loads(done.stdout.splitlines()[-1])


def compare(family: str, limit: float) -> dict[str, Any]:
  """One family at N and at 2 N."""
  n = FAMILIES[family][1]
  small, large = in_process(family, n, limit), in_process(family, 2 * n, limit)
  ratio = (large["total"] + STARTUP) / (small["total"] + STARTUP)
  kept = large["total"] <= SECONDS and ratio <= RATIO
  return {"family": family, "n": n, "small": small, "large": large, "ratio": round(ratio, 2), "kept": kept}


def show(row: dict[str, Any]) -> None:
  """Two lines of the table."""
  for times, n in ((row["small"], row["n"]), (row["large"], 2 * row["n"])):
    last = f"{row['ratio']:6.2f} {'ok' if row['kept'] else 'NOT KEPT'}" if times is row["large"] else ""
    cells = times.get("failed") or " ".join(f"{times[k]:11.2f}" for k in (*STAGES, "total", "memory"))
    print(f"{row['family']:18}{n:8} {cells} {last}", flush=True)


def main() -> int:
  """Prints a table, writes it if asked to; how many families miss the bar."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
  parser.add_argument("--limit", type=float, default=120.0, help="seconds for one size of one family")
  parser.add_argument("--out", type=Path)
  parser.add_argument("--measure", nargs=2, metavar=("FAMILY", "N"), help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.measure:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
    return 0
  print(f"{'family':18}{'N':>8} " + " ".join(f"{head:>11}" for head in (*STAGES, "total", "memory MB")))
  rows = []
  for family in options.families:
    rows.append(compare(family, options.limit))
    show(rows[-1])
  if options.out:
    options.out.write_text(json.dumps({"backend": jax.default_backend(), "rows": rows}, indent=2) + "\n")
  return sum(not row["kept"] for row in rows)


if __name__ == "__main__":
  sys.exit(main())
