"""What the networks of the fuzzer are made of: each operation adds a step or two to a network being built."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

Op = Callable[[Any], Any]
OPS: list[tuple[float, Op]] = []


def op(weight: float = 1.0) -> Callable[[Op], Op]:
  """Adds an operation to the table; it is drawn in proportion to ``weight``."""

  def add(function: Op) -> Op:
    OPS.append((weight, function))
    return function

  return add


class CannotError(Exception):
  """An operation finds no operands that it fits."""


def need(condition: Any) -> None:
  if not condition:
    raise CannotError


def along(vector: Any, axis: int, rank: int) -> Any:
  """A vector laid along one axis, the others of size 1."""
  return jnp.reshape(vector, [-1 if at == axis else 1 for at in range(rank)])


twice = Primitive("fuzz_twice")
twice.def_abstract_eval(lambda x: x)
twice.def_impl(lambda x: 2 * x + 1)
mlir.register_lowering(twice, mlir.lower_fun(lambda x: 2 * x + 1, multiple_results=False))
ad.deflinear2(twice, lambda ct, x: [2 * ct])
# Not linear as it stands: the tangent goes through the same primitive, less what it adds to zeros.
ad.primitive_jvps[twice] = lambda primals, tangents: (
  twice.bind(*primals),
  2 * tangents[0] if type(tangents[0]) is not ad.Zero else ad.Zero.from_primal_value(primals[0]),
)


@jax.custom_jvp
def softplus_like(x: Any) -> Any:
  return jnp.tanh(x) * x


@softplus_like.defjvp
def _softplus_like_jvp(primals: Any, tangents: Any) -> Any:
  (x,), (t,) = primals, tangents
  return softplus_like(x), t * jnp.cos(x)


@jax.custom_vjp
def bent(x: Any) -> Any:
  return jnp.sin(x)


bent.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (jnp.clip(ct, -0.5, 0.5) * x,))


@jax.custom_vjp
def bent_pair(x: Any, y: Any) -> Any:
  return x * jnp.cos(y), jnp.sin(x)


def _bent_pair_back(saved: Any, cts: Any) -> Any:
  x, y = saved
  return cts[0] * y + cts[1], cts[0] * 0.5 * x


bent_pair.defvjp(lambda x, y: (bent_pair(x, y), (x, y)), _bent_pair_back)

UNARY: dict[str, Callable[[Any], Any]] = {
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
  "gelu": jax.nn.gelu,
  "exact_gelu": functools.partial(jax.nn.gelu, approximate=False),
  "silu": jax.nn.silu,
  "sigmoid": jax.nn.sigmoid,
  "relu6": jax.nn.relu6,
  "elu": jax.nn.elu,
  "leaky_relu": jax.nn.leaky_relu,
  "softplus": jax.nn.softplus,
  "bell": lambda x: jnp.exp(-(x**2)),
  "clip": lambda x: jnp.clip(x, -0.7, 0.9),
  "clip_above_zero": lambda x: jnp.clip(x, 0.1, 0.9),
  "rational": lambda x: x / (1 + x**2),
  "cube": lambda x: jnp.tanh(x) ** 3,
  "inverse": lambda x: 1 / (1.5 + jnp.tanh(x)),
  "plus_one": lambda x: x + 1,
  "one_minus": lambda x: 1 - x,
  "half": lambda x: 0.5 * x,
  "negative": lambda x: -x,
  "abs": jnp.abs,
  "sin": jnp.sin,
  "root": lambda x: jnp.sqrt(1 + x * x),
  "sign": jnp.sign,
  "above_zero": lambda x: (x > 0).astype(x.dtype),
  "equals_zero": lambda x: (x == 0).astype(x.dtype),
  "stop_gradient": lax.stop_gradient,
  "to_float32_and_back": lambda x: jnp.round(2 * x).astype(jnp.int32).astype(x.dtype),
  "optimization_barrier": lax.optimization_barrier,
  "custom_jvp": softplus_like,
  "custom_vjp": bent,
  "checkpoint": jax.checkpoint(lambda x: jnp.sin(x) * x),
  "unknown_primitive": twice.bind,
  "nothing": lambda x: 0 * x,
}
AXIS: dict[str, Callable[[Any, int], Any]] = {
  "softmax": lambda x, a: jax.nn.softmax(x, axis=a),
  "log_softmax": lambda x, a: jax.nn.log_softmax(x, axis=a),
  "cumsum": lambda x, a: lax.cumsum(x, a),
  "cumsum_reverse": lambda x, a: lax.cumsum(x, a, reverse=True),
  "cummax": lambda x, a: lax.cummax(x, a),
  "cumprod": lambda x, a: lax.cumprod(jnp.tanh(x), a),
  "sort": lambda x, a: jnp.sort(x, axis=a),
  "reverse": lambda x, a: jnp.flip(x, a),
  "roll": lambda x, a: jnp.roll(x, 1, a),
  "center": lambda x, a: x - jnp.mean(x, a, keepdims=True),
  "rms": lambda x, a: x * lax.rsqrt(jnp.mean(x * x, a, keepdims=True) + 0.1),
  "gate_by_mean": lambda x, a: x * jax.nn.sigmoid(jnp.mean(x, a, keepdims=True)),
  "argsorted": lambda x, a: jnp.take_along_axis(x, jnp.argsort(x, axis=a), axis=a),
  "best_one_hot": lambda x, a: jax.nn.one_hot(jnp.argmax(x, a), x.shape[a], axis=a, dtype=x.dtype) * x,
}
REDUCE: dict[str, Callable[..., Any]] = {
  "mean": jnp.mean,
  "sum": jnp.sum,
  "max": jnp.max,
  "min": jnp.min,
  "prod": lambda x, a, **options: jnp.prod(jnp.tanh(x), a, **options),
  "logsumexp": jax.nn.logsumexp,
  "any": lambda x, a, **options: jnp.any(x > 0, a, **options).astype(x.dtype),
  "all": lambda x, a, **options: jnp.all(x > 0, a, **options).astype(x.dtype),
  "argmax": lambda x, a, **options: jnp.argmax(x, a, **options).astype(x.dtype),
}
PAIRS: dict[str, Callable[[Any, Any], Any]] = {
  "add": lambda x, y: x + y,
  "sub": lambda x, y: x - y,
  "mul": lambda x, y: jnp.tanh(x) * y,
  "gate": lambda x, y: x * jax.nn.sigmoid(y),
  "max": jnp.maximum,
  "min": jnp.minimum,
  "where": lambda x, y: jnp.where(x > 0, x, y),
  "where_less": lambda x, y: jnp.where(x < y, jnp.sin(x), y),
  "select_zero": lambda x, y: jnp.where(y > 0, x, 0.0),
  "select_one": lambda x, y: jnp.where(y > 0, x, 1.0),
  "div": lambda x, y: x / (1 + y * y),
  "atan2": lambda x, y: jnp.arctan2(x, 2 + jnp.tanh(y)),
  "clamp": lambda x, y: lax.clamp(-jnp.abs(y), x, jnp.abs(y)),
  "custom_vjp_pair": lambda x, y: sum(bent_pair(x, y)),
  "add_any": lambda x, y: ad.add_jaxvals(x, y),
}


@op(3)
def dense(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  shape = b.shape(v)
  out, bias = b.size(), b.chance(0.5)
  w = b.param((shape[axis], out))
  c = b.param((out,)) if bias else None

  def run(p: Any, m: Any, x: Any) -> Any:
    y = jnp.moveaxis(jnp.tensordot(x, p[w], ((axis,), (0,))), -1, axis)
    return y if c is None else y + along(p[c], axis, y.ndim)

  b.add("dense", run, v)


@op(3)
def conv(b: Any) -> None:
  v = b.pick(lambda s: 3 <= len(s) <= 4)
  shape = b.shape(v)
  need(b.free(v) == list(range(1, len(shape))))
  rank, channels = len(shape) - 2, shape[-1]
  groups = b.choice([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
  out = groups * b.rng.integers(1, 4)
  kernel = [int(min(b.rng.integers(1, 4), n)) for n in shape[1:-1]]
  options: dict[str, Any] = {
    "window_strides": [int(b.rng.integers(1, 3)) for _ in range(rank)],
    "padding": b.choice(["SAME", "VALID", [(1, 0)] * rank, [(0, 2)] * rank]),
    "feature_group_count": int(groups),
  }
  if b.chance(0.2):
    options |= {"rhs_dilation": [2] * rank, "padding": [(2, 2)] * rank}
  if b.chance(0.2):
    options |= {"lhs_dilation": [2] * rank, "padding": [(1, 1)] * rank}
  w = b.param((*kernel, channels // groups, out), "k")
  c = b.param((out,)) if b.chance(0.5) else None
  space = "HW"[:rank]
  layout = (f"N{space}C", f"{space}IO", f"N{space}C")

  def run(p: Any, m: Any, x: Any) -> Any:
    y = lax.conv_general_dilated(x, p[w], dimension_numbers=layout, **options)
    return y if c is None else y + p[c]

  b.add("conv", run, v)


@op(1.5)
def conv_transposed(b: Any) -> None:
  """Kernels smaller and larger than their strides, dilated on both sides, in groups, with any padding."""
  v = b.pick(lambda s: 3 <= len(s) <= 4)
  shape = b.shape(v)
  need(b.free(v) == list(range(1, len(shape))))
  rank, channels = len(shape) - 2, shape[-1]
  draw = lambda low, high: [int(b.rng.integers(low, high)) for _ in range(rank)]
  kernel, strides, dilation = draw(1, 4), draw(1, 4), draw(1, 3) if b.chance(0.3) else [1] * rank
  groups = b.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
  space = "HW"[:rank]
  layout = (f"N{space}C", f"{space}IO", f"N{space}C")
  w = b.param((*kernel, channels // groups, groups * int(b.rng.integers(1, 4))), "k")
  if groups == 1 and b.chance(0.7):
    padding = b.choice(["SAME", "VALID"])
    run = lambda p, m, x: lax.conv_transpose(x, p[w], strides, padding, dilation, layout)
  else:
    padding = list(zip(draw(0, 3), draw(0, 3), strict=True))
    window = draw(1, 3)
    sides = zip(shape[1:-1], strides, kernel, dilation, padding, strict=True)
    need(all((n - 1) * s + sum(pads) >= (k - 1) * d for n, s, k, d, pads in sides))
    run = lambda p, m, x: lax.conv_general_dilated(
      x, p[w], window, padding, strides, dilation, layout, feature_group_count=groups
    )
  b.add(f"conv_transposed {kernel} {strides} {dilation} {padding} {groups}", run, v)


def _spectrum(x: Any, axis: int) -> Any:
  z = jnp.fft.rfft(x, axis=axis)
  return jnp.concatenate([z.real, z.imag], axis)


FOURIER: dict[str, Callable[[Any, int], Any]] = {
  "spectrum": _spectrum,
  "filtered": lambda x, a: jnp.fft.irfft(jnp.fft.rfft(x, axis=a) * (1 - 0.5j), n=x.shape[a], axis=a),
  "turned": lambda x, a: jnp.imag(jnp.fft.ifft(jnp.fft.fft(x, axis=a) * jnp.exp(1j * x), axis=a)),
  "modulus": lambda x, a: jnp.abs(lax.complex(x, 1 + jnp.flip(x, a))) / jnp.sqrt(2.0),
  "complex_sum": lambda x, a: jnp.real(jnp.cumsum(x * (0.6 + 0.8j), a) / (1 + 2j)),
}


@op(1)
def fourier(b: Any) -> None:
  v = b.pick()
  name, axis = b.choice(list(FOURIER)), b.axis(v)
  b.add(f"{name} {axis}", lambda p, m, x: FOURIER[name](x, axis), v)


@op(1)
def matrices(b: Any) -> None:
  """Factorisations and solves, over a matrix for each example."""
  v = b.pick(lambda s: len(s) >= 3)
  need(0 not in b.free(v) and b.free(v)[-2:] == [len(b.shape(v)) - 2, len(b.shape(v)) - 1])
  kind = b.choice(["cholesky", "triangular", "solve", "qr", "determinant"])

  def run(p: Any, m: Any, x: Any) -> Any:
    x = jnp.tanh(x)
    n = x.shape[-2]
    gram = x @ jnp.swapaxes(x, -1, -2) / x.shape[-1] + jnp.eye(n)
    if kind == "cholesky":
      return jnp.linalg.cholesky(gram) @ x
    if kind == "triangular":
      return lax.linalg.triangular_solve(gram, x, left_side=True, lower=True)
    if kind == "solve":
      return jnp.linalg.solve(gram, x)
    if kind == "qr":
      return jnp.linalg.qr(gram)[1] @ x
    return jnp.linalg.slogdet(gram)[1][..., None, None] * x

  b.add(f"matrices {kind}", run, v)


@op(7)
def mask(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  name = b.mask(b.shape(v)[axis])
  rank = len(b.shape(v))
  kind = b.choice(["mul", "mul", "mul", "left", "flat", "relu", "broadcast"])

  def run(p: Any, m: Any, x: Any) -> Any:
    laid = along(m[name], axis, rank)
    if kind == "left":
      return laid * x
    if kind == "flat" and axis == rank - 1:
      return x * m[name]
    if kind == "broadcast":
      return x * lax.broadcast_in_dim(m[name], x.shape, (axis,))
    return (jax.nn.relu(x) if kind == "relu" else x) * laid

  b.add(f"mask {name} {kind}", run, v)


@op(0.6)
def mask_otherwise(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  rank = len(b.shape(v))
  name = b.mask(b.shape(v)[axis])
  kind = b.choice(["complement", "sum", "where", "where_not", "square", "add", "flip", "cumsum", "two"])
  other = b.mask(b.shape(v)[axis])

  def run(p: Any, m: Any, x: Any) -> Any:
    laid = along(m[name], axis, rank)
    return {
      "complement": lambda: x * (1 - laid),
      "sum": lambda: x * jnp.sum(m[name]) / (1 + jnp.sum(laid)),
      "where": lambda: jnp.where(laid > 0, x, 0.0),
      "where_not": lambda: jnp.where(laid == 0, x, 0.5),
      "square": lambda: x * laid**2,
      "add": lambda: x + laid,
      "flip": lambda: x * jnp.flip(laid, axis),
      "cumsum": lambda: x * jnp.cumsum(laid, axis),
      "two": lambda: x * (laid * along(m[other], axis, rank)),
    }[kind]()

  b.add(f"mask {name} {kind} {other}", run, v)


@op(0.4)
def mask_grid(b: Any) -> None:
  """An outer product of two masks, multiplied or merged into one axis first."""
  v = b.pick(lambda s: len(s) >= 3)
  free = b.free(v)
  need(len(free) >= 2 and free[-2:] == [len(b.shape(v)) - 2, len(b.shape(v)) - 1])
  one, two = b.mask(b.shape(v)[-2]), b.mask(b.shape(v)[-1])

  def run(p: Any, m: Any, x: Any) -> Any:
    grid = m[one][:, None] * m[two]
    flat = x.reshape(*x.shape[:-2], -1) * grid.reshape(-1)
    return flat.reshape(x.shape)

  b.add(f"mask {one} {two} grid", run, v)


@op(6)
def unary(b: Any) -> None:
  v = b.pick()
  name = b.choice(list(UNARY))
  b.add(name, lambda p, m, x: UNARY[name](x), v)


@op(3)
def along_axis(b: Any) -> None:
  v = b.pick()
  name, axis = b.choice(list(AXIS)), b.axis(v)
  b.add(f"{name} {axis}", lambda p, m, x: AXIS[name](x, axis), v)


@op(1)
def norm(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v, least=2)
  n, rank = b.shape(v)[axis], len(b.shape(v))
  scale, bias = b.param((n,)), b.param((n,))
  mean, var = b.param((n,)), b.param((n,))
  kind = b.choice(["layer", "rms", "batch", "batch"])

  def run(p: Any, m: Any, x: Any) -> Any:
    lay = lambda name: along(p[name], axis, rank)
    if kind == "layer":
      x = x - jnp.mean(x, axis, keepdims=True)
    if kind == "batch":
      return (x - lay(mean)) * (lax.rsqrt(lay(var) ** 2 + 0.2) * lay(scale)) + lay(bias)
    y = x * lax.rsqrt(jnp.mean(x * x, axis, keepdims=True) + 0.1) * lay(scale)
    return y + lay(bias) if kind == "layer" else y

  b.add(f"{kind}_norm {axis}", run, v)


@op(2.5)
def reduce(b: Any) -> None:
  v = b.pick(lambda s: len(s) >= 2)
  name, axis, keep = b.choice(list(REDUCE)), b.axis(v), b.chance(0.5)
  b.add(f"{name} {axis} {keep}", lambda p, m, x: REDUCE[name](x, axis, keepdims=keep), v)


@op(5)
def pair(b: Any) -> None:
  v = b.pick()
  w = b.pick(lambda s: s == b.shape(v), other=v)
  name = b.choice(list(PAIRS))
  b.add(name, lambda p, m, x, y: PAIRS[name](x, y), v, w)


@op(2)
def broadcast_pair(b: Any) -> None:
  """Operands of one rank, of which either may have axes of size 1; or of another rank."""
  v = b.pick()

  def fits(s: tuple[int, ...]) -> bool:
    try:
      return s != b.shape(v) and np.broadcast_shapes(s, b.shape(v)) is not None
    except ValueError:
      return False

  w = b.pick(fits)
  name = b.choice(["add", "mul", "gate", "max", "where", "div", "sub"])
  b.add(f"broadcast {name}", lambda p, m, x, y: PAIRS[name](x, y), v, w)


@op(1)
def with_param(b: Any) -> None:
  v = b.pick()
  shape = b.shape(v)
  free = b.free(v)
  kept = [n if at in free and b.chance(0.5) else 1 for at, n in enumerate(shape)]
  w = b.param(kept if b.chance(0.8) else ())
  name = b.choice(["add", "mul", "max", "gate", "where"])
  b.add(f"param {name} {kept}", lambda p, m, x: PAIRS[name](x, p[w]), v)


@op(2)
def concat(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  rest = lambda s: (*s[:axis], *s[axis + 1 :])
  w = b.pick(lambda s: len(s) == len(b.shape(v)) and rest(s) == rest(b.shape(v)))
  b.add(f"concat {axis}", lambda p, m, *xs: jnp.concatenate(xs, axis), v, w)


@op(1)
def split(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v, least=2)
  n = b.shape(v)[axis]
  first = int(b.rng.integers(1, n))
  if b.chance(0.5) and n % 2 == 0:
    parts = b.add(f"split {axis}", lambda p, m, x: tuple(jnp.split(x, 2, axis)), v)
    b.add("swiglu", lambda p, m, x, y: jax.nn.silu(x) * y, *parts)
  else:
    b.add(f"split {axis} {first}", lambda p, m, x: tuple(lax.split(x, (first, n - first), axis)), v)


@op(1.5)
def slices(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  n = b.shape(v)[axis]
  start, step = int(b.rng.integers(0, n)), int(b.choice([1, 1, 2, 3]))
  stop = int(b.rng.integers(start, n)) + 1
  b.add(
    f"slice {axis} {start}:{stop}:{step}", lambda p, m, x: lax.slice_in_dim(x, start, stop, step, axis), v
  )


@op(1.5)
def pad(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  need(b.shape(v)[axis] <= 4)
  value = b.choice([0.0, 0.0, 0.7])
  config = tuple(int(b.choice(list(c))) for c in ((-1, 0, 1, 2), (-1, 0, 1), (0, 0, 1)))
  need(b.shape(v)[axis] >= 3 or min(config) >= 0)
  full = [config if at == axis else (0, 0, 0) for at in range(len(b.shape(v)))]
  b.add(f"pad {full} {value}", lambda p, m, x: lax.pad(x, jnp.asarray(value, x.dtype), full), v)


@op(1.5)
def transpose(b: Any) -> None:
  v = b.pick(lambda s: len(s) >= 2)
  order = [int(i) for i in b.rng.permutation(len(b.shape(v)))]
  b.add(f"transpose {order}", lambda p, m, x: jnp.transpose(x, order), v)


@op(1.5)
def merge(b: Any) -> None:
  v = b.pick(lambda s: len(s) >= 2)
  at = int(b.rng.integers(0, len(b.shape(v)) - 1))
  need(np.prod(b.shape(v)[at : at + 2]) <= 40)
  b.add(f"merge {at}", lambda p, m, x: x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :]), v)  # fmt: skip


@op(1.5)
def unmerge(b: Any) -> None:
  v = b.pick(lambda s: len(s) <= 4)
  axis = b.axis(v, least=2)
  n = b.shape(v)[axis]
  part = b.choice([d for d in range(1, n + 1) if n % d == 0])
  b.add(f"unmerge {axis} {part}", lambda p, m, x: x.reshape(*x.shape[:axis], part, n // part, *x.shape[axis + 1 :]), v)  # fmt: skip


@op(1)
def regroup(b: Any) -> None:
  """Axes that do not hang on the batch, into any other factors."""
  v = b.pick(lambda s: len(s) >= 3)
  free, shape = b.free(v), b.shape(v)
  first = next((at for at in free if all(k in free for k in range(at, len(shape)))), None)
  need(first is not None and first < len(shape))
  rest, sizes = int(np.prod(shape[first:])), []
  while rest > 1 and len(sizes) < 3:
    sizes.append(int(b.choice([d for d in range(1, rest + 1) if rest % d == 0])))
    rest //= sizes[-1]
  sizes = [*sizes, rest] if rest > 1 or not sizes else sizes
  b.add(f"regroup {first} {sizes}", lambda p, m, x: x.reshape(*x.shape[:first], *sizes), v)


@op(0.4)
def merge_with_batch(b: Any) -> None:
  """``(B, T, C)`` through ``(B T, C)``, as dense layers written by hand do."""
  v = b.pick(lambda s: len(s) >= 3)
  need(b.free(v) == list(range(1, len(b.shape(v)))))
  n, out = b.shape(v)[-1], b.size()
  w = b.param((n, out))
  b.add("flat dense", lambda p, m, x: (x.reshape(-1, n) @ p[w]).reshape(*x.shape[:-1], out), v)


@op(1)
def one_axes(b: Any) -> None:
  v = b.pick(lambda s: len(s) <= 4)
  ones = [at for at, n in enumerate(b.shape(v)) if n == 1]
  at = int(b.rng.integers(0, len(b.shape(v)) + 1))
  if ones and b.chance(0.5):
    b.add("squeeze", lambda p, m, x: jnp.squeeze(x, ones[0]), v)
  else:
    b.add(f"expand {at}", lambda p, m, x: jnp.expand_dims(x, at), v)


@op(0.8)
def broadcast_to(b: Any) -> None:
  v = b.pick(lambda s: 1 in s)
  at, n = b.shape(v).index(1), b.size()
  b.add(f"broadcast {at} {n}", lambda p, m, x: jnp.broadcast_to(x, (*x.shape[:at], n, *x.shape[at + 1 :])), v)


@op(1)
def pool(b: Any) -> None:
  v = b.pick()
  rank = len(b.shape(v))
  window = [int(min(b.rng.integers(1, 3), n)) if at in b.free(v) else 1 for at, n in enumerate(b.shape(v))]
  strides = [int(b.rng.integers(1, 3)) if w > 1 else 1 for w in window]
  padding = b.choice(["VALID", "SAME", [(1, 0) if w > 1 else (0, 0) for w in window]])
  top = b.chance(0.5)
  init, combine = (-np.inf, lax.max) if top else (0.0, lax.add)
  need(max(window) > 1 and rank > 1)
  b.add(f"pool {window} {strides} {padding} {combine.__name__}",
        lambda p, m, x: lax.reduce_window(x, init, combine, window, strides, padding), v)  # fmt: skip


@op(1.5)
def take(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  n = b.shape(v)[axis]
  index = b.rng.integers(0, n, b.size())
  kind = b.choice(["take", "take", "fancy", "clip", "negative", "one", "table"])
  where: Any = (slice(None),) * axis

  def run(p: Any, m: Any, x: Any) -> Any:
    if kind == "fancy":
      return x[(*where, index)]
    if kind == "negative":
      return x[(*where, index - n)]
    if kind == "one":
      return x[(*where, int(index[0]))]
    if kind == "table":
      return jnp.take(x, np.stack([index, index[::-1]]), axis=axis)
    return jnp.take(x, index, axis=axis, mode="clip" if kind == "clip" else None)

  b.add(f"{kind} {axis} {index}", run, v)


@op(1)
def dynamic(b: Any) -> None:
  """Indices that are known, or that hang on the data."""
  v = b.pick()
  axis = b.axis(v)
  n = b.shape(v)[axis]
  start, length = int(b.rng.integers(0, n + 1)), int(b.rng.integers(1, n + 1))
  kind = b.choice(["known", "data", "gather", "update", "set", "add"])

  def run(p: Any, m: Any, x: Any) -> Any:
    at = start if kind == "known" else jnp.argmax(jnp.cos(x).sum()) + jnp.where(x.sum() > 0, start, 0)
    if kind == "gather":
      return jnp.take(x, jnp.stack([at, at + 1]) % n, axis=axis)
    piece = lax.dynamic_slice_in_dim(x, at, length, axis)
    if kind == "update":
      return lax.dynamic_update_slice_in_dim(x, jnp.tanh(piece), start, axis)
    where = (*(slice(None),) * axis, slice(0, length))
    if kind == "set":
      return x.at[where].set(jnp.sin(piece))
    return x.at[where].add(piece) if kind == "add" else piece

  b.add(f"dynamic {kind} {axis} {start} {length}", run, v)


@op(2)
def attention(b: Any) -> None:
  """Heads over one axis, masked in one of several places."""
  v = b.pick(lambda s: len(s) == 3)
  need(b.free(v) == [1, 2])
  n, heads, size = b.shape(v)[2], b.size(), b.size()
  q, k, w = (b.param((n, heads, size)) for _ in range(3))
  o = b.param((heads, size, n))
  h, d, g = b.mask(heads), b.mask(size), b.mask(size)
  kind = b.choice(["heads", "sizes", "values", "all"])

  def run(p: Any, m: Any, x: Any) -> Any:
    query, key, value = (jnp.einsum("btc,chd->bthd", x, p[a]) for a in (q, k, w))
    if kind in ("sizes", "all"):
      query, key = query * m[d], jnp.tanh(key) * m[d]
    if kind in ("values", "all"):
      value = value * m[g]
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key), -1)
    y = jnp.einsum("bhts,bshd->bthd", weights, value)
    y = y * m[h][:, None] if kind in ("heads", "all") else y
    return jnp.einsum("bthd,hdc->btc", y, p[o]) + x

  b.add(f"attention {kind}", run, v)


@op(1.5)
def contract(b: Any) -> None:
  """A product of two values: one axis contracted, axes of the batch shared."""
  v = b.pick(lambda s: 2 <= len(s) <= 3)
  i = b.axis(v)
  batch = [at for at in range(len(b.shape(v))) if at not in b.free(v)]
  need(batch == [0])
  w = b.pick(lambda s: 2 <= len(s) <= 3 and s[0] == b.shape(v)[0] and b.shape(v)[i] in s[1:])
  need([at for at in range(len(b.shape(w))) if at not in b.free(w)] == [0])
  j = 1 + b.shape(w)[1:].index(b.shape(v)[i])
  numbers = (((i,), (j,)), ((0,), (0,)))
  b.add(f"dot {numbers}", lambda p, m, x, y: 0.3 * lax.dot_general(jnp.tanh(x), y, numbers), v, w)


@op(1)
def shared_constant(b: Any) -> None:
  """A table that is read on both sides of a layer."""
  v = b.pick()
  axis, rank = b.axis(v), len(b.shape(v))
  n = b.shape(v)[axis]
  w, name = b.param((n, n)), b.mask(n)

  def run(p: Any, m: Any, x: Any) -> Any:
    table = along(1.5 + jnp.cos(0.7 * jnp.arange(n)), axis, rank)
    y = jnp.moveaxis(jnp.tensordot(x * table, p[w], ((axis,), (0,))), -1, axis)
    return jnp.tanh(y) * table * along(m[name], axis, rank)

  b.add(f"shared constant {axis} {name}", run, v)


@op(1)
def vmapped_slice(b: Any) -> None:
  """A window of every example, which JAX makes a gather of, and mostly put back by a scatter."""
  v = b.pick(lambda s: len(s) >= 3)
  need(0 not in b.free(v))
  axis = b.axis(v, 2)
  need(axis)
  length, back = int(b.rng.integers(1, b.shape(v)[axis])), b.chance(0.6)
  start = int(b.rng.integers(0, b.shape(v)[axis]))
  moves = b.chance(0.5)

  def one(x: Any) -> Any:
    at = start * (jnp.sum(x) > 0).astype(jnp.int32) if moves else start
    piece = lax.dynamic_slice_in_dim(x, at, length, axis - 1)
    return lax.dynamic_update_slice_in_dim(x, jnp.tanh(piece), at, axis - 1) if back else piece

  b.add(f"vmapped slice {axis}", lambda p, m, x: jax.vmap(one)(x), v)


@op(1)
def where_constant(b: Any) -> None:
  v = b.pick()
  w = b.pick(lambda s: s == b.shape(v))
  axis = b.axis(v)
  bits = along(b.rng.random(b.shape(v)[axis]) < 0.5, axis, len(b.shape(v)))
  zero = b.chance(0.4)
  b.add(f"where {axis}", lambda p, m, x, y: jnp.where(bits, x, 0.0 if zero else y), v, w)


@op(1)
def repeat(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  need(b.shape(v)[axis] <= 4)
  if b.chance(0.5):
    b.add(f"repeat {axis}", lambda p, m, x: jnp.repeat(x, 2, axis), v)
  else:
    b.add(f"tile {axis}", lambda p, m, x: jnp.tile(x, [2 if at == axis else 1 for at in range(x.ndim)]), v)


@op(1.5)
def scan(b: Any) -> None:
  """A recurrence over one axis, with a mask inside, starting at zero, at a parameter or at a value."""
  v = b.pick(lambda s: len(s) == 3)
  need(b.free(v) == [1, 2])
  n, hidden = b.shape(v)[2], b.size()
  wx, wh, c = b.param((n, hidden)), b.param((hidden, hidden)), b.param((hidden,))
  name = b.mask(hidden)
  inner, gated, start, back = (
    b.chance(0.7),
    b.chance(0.5),
    b.choice(["zero", "param", "value"]),
    b.chance(0.3),
  )

  def run(p: Any, m: Any, x: Any) -> Any:
    first = {
      "zero": jnp.zeros((x.shape[0], hidden), x.dtype),
      "param": jnp.broadcast_to(p[c], (x.shape[0], hidden)),
      "value": x[:, 0] @ p[wx],
    }[start]

    def turn(carry: Any, one: Any) -> Any:
      h, i = carry
      new = jnp.tanh(one @ p[wx] + h @ p[wh])
      h = (h + new if gated else new) * (m[name] if inner else 1)
      return (h, i + 1), (h, jnp.sum(one))

    (last, turns), (ys, sums) = lax.scan(turn, (first, 0), jnp.moveaxis(x, 1, 0), reverse=back)
    return jnp.moveaxis(ys, 0, 1) * m[name], 0.1 * last + turns, sums

  short = "short " if start == "zero" and b.shape(v)[1] < 3 else ""
  b.add(f"{short}scan {start} {inner} {gated} {back}", run, v)


@op(1)
def branches(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  name, rank = b.mask(b.shape(v)[axis]), len(b.shape(v))
  switch = b.chance(0.4)

  def run(p: Any, m: Any, x: Any) -> Any:
    laid = along(m[name], axis, rank)
    choices = [lambda x: jnp.sin(x) * laid, lambda x: jnp.flip(x, axis) * 2, lambda x: 0.5 * x * laid]
    if switch:
      return lax.switch(jnp.sum(x > 0) % 3, choices, x)
    return lax.cond(jnp.sum(x) > 0, choices[0], choices[1], x)

  b.add(f"branches {axis} {name} {switch}", run, v)


@op(1)
def loop(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  n, rank = b.shape(v)[axis], len(b.shape(v))
  name, w = b.mask(n), b.param((n, n))
  kind = b.choice(["mask", "dense", "roll", "swap"])

  def run(p: Any, m: Any, x: Any) -> Any:
    def turn(i: Any, carry: Any) -> Any:
      x, y = carry
      if kind == "mask":
        return jnp.sin(x) * along(m[name], axis, rank), y + x
      if kind == "dense":
        return jnp.tanh(jnp.moveaxis(jnp.tensordot(x, p[w], ((axis,), (0,))), -1, axis)), y
      if kind == "roll":
        return jnp.roll(x, 1, axis), y + 0.5 * x
      return y, jnp.sin(x)

    return sum(lax.fori_loop(0, 3, turn, (x, jnp.zeros_like(x))))

  b.add(f"loop {kind} {axis} {name}", run, v)


@op(1)
def helper_twice(b: Any) -> None:
  """A jitted function called twice on one shape: JAX shares the inner jaxpr."""
  v = b.pick()
  w = b.pick(lambda s: s == b.shape(v))
  axis = b.axis(v)
  laid = lambda m: along(m[name], axis, len(b.shape(v)))
  name = b.mask(b.shape(v)[axis])
  helper = jax.jit(lambda x: jax.nn.relu(x) + 0.1 * x)
  b.add(f"helper {axis} {name}", lambda p, m, x, y: helper(x) * laid(m) + helper(y), v, w)


@op(1)
def remat_block(b: Any) -> None:
  v = b.pick()
  axis = b.axis(v)
  n, hidden, rank = b.shape(v)[axis], b.size(), len(b.shape(v))
  one, two, name = b.param((n, hidden)), b.param((hidden, n)), b.mask(hidden)
  wrap = b.choice([jax.checkpoint, jax.jit, lambda f: f])

  def run(p: Any, m: Any, x: Any) -> Any:
    def block(x: Any, w1: Any, w2: Any, k: Any) -> Any:
      h = jax.nn.relu(jnp.moveaxis(x, axis, -1) @ w1) * k
      return jnp.moveaxis(h @ w2, -1, axis)

    return x + wrap(block)(x, p[one], p[two], m[name])

  b.add(f"block {axis} {name} {rank}", run, v)


@op(0.7)
def vmapped(b: Any) -> None:
  v = b.pick(lambda s: len(s) >= 3)
  need(len(b.free(v)) >= 2 and b.free(v)[-1] == len(b.shape(v)) - 1)
  axis = b.choice(b.free(v)[:-1])
  n, k, out = b.shape(v)[-1], b.shape(v)[axis], b.size()
  w, name = b.param((k, n, out)), b.mask(out)
  apply = jax.vmap(lambda x, w, mask: jnp.tanh(x @ w) * mask, (axis, 0, None), axis)
  b.add(f"vmap {axis} {name}", lambda p, m, x: apply(x, p[w], m[name]), v)


@op(0.3)
def over_the_batch(b: Any) -> None:
  v = b.pick(lambda s: len(s) >= 2)
  need(0 not in b.free(v))
  b.add("batch_mean", lambda p, m, x: x - 0.5 * jnp.mean(x, 0, keepdims=True), v)


def flat_cut(shape: tuple[int, ...], rng: Any) -> tuple[int, int]:
  """Two sizes that the entries of one example fall into, whether they fit its axes or not."""
  total = int(np.prod(shape[1:]))
  return (cut := int(rng.choice([n for n in range(1, total + 1) if total % n == 0]))), total // cut


@op(0.7)
def reshape_that_does_not_divide(b: Any) -> None:
  """A masked axis is merged with others, and what comes of it is cut up elsewhere."""
  v = b.pick(lambda s: len(s) >= 3)
  need(b.free(v) == list(range(1, len(b.shape(v)))))
  axis = b.axis(v)
  name, rank = b.mask(b.shape(v)[axis]), len(b.shape(v))
  cut = flat_cut(b.shape(v), b.rng)
  at = int(b.rng.integers(1, 3))
  weights = b.param(cut)

  def run(p: Any, m: Any, x: Any) -> Any:
    flat = (x * along(m[name], axis, rank)).reshape(x.shape[0], -1)
    y = flat.reshape(-1, *cut)
    return jnp.sum(y * p[weights], at) if cut[0] != 1 else y * p[weights]

  b.add(f"cut {axis} {cut} {name}", run, v)


@op(0.7)
def shuffle_unit(b: Any) -> None:
  """Half of the channels through a branch under masks of its own, laid together, and shuffled."""
  v = b.pick(lambda s: len(s) >= 2 and s[-1] % 2 == 0)
  need(b.free(v) and b.free(v)[-1] == len(b.shape(v)) - 1)
  half = b.shape(v)[-1] // 2
  kernels = [b.param((half, half)) for _ in range(2)]
  names = [b.mask(half) for _ in range(2)]
  units = int(b.rng.integers(1, 4))

  def run(p: Any, m: Any, x: Any) -> Any:
    for _ in range(units):
      left, right = jnp.split(x, 2, axis=-1)
      for kernel, name in zip(kernels, names, strict=True):
        right = jnp.tanh(right @ p[kernel]) * m[name]
      x = jnp.concatenate([left, right], -1)
      x = x.reshape(*x.shape[:-1], 2, half).swapaxes(-1, -2).reshape(x.shape)
    return x

  b.add(f"shuffle {half} {units} {names}", run, v)


@op(0.8)
def many_writes(b: Any) -> None:
  """A residual stream of many writes, each under its own mask, with or without one for the stream."""
  v = b.pick(lambda s: len(s) >= 2)
  need(b.free(v) and b.free(v)[-1] == len(b.shape(v)) - 1)
  n, count = b.shape(v)[-1], int(b.rng.integers(2, 6))
  kernels = [b.param((n, n)) for _ in range(count)]
  names = [(b.mask(n), b.mask(n)) for _ in range(count)]
  first, kind, after = b.mask(n), b.choice(["dense", "scaled", "rolled"]), b.chance(0.5)

  def write(p: Any, kernel: str, x: Any) -> Any:
    if kind == "dense":
      return x @ p[kernel]
    return jnp.tanh(jnp.roll(x, 1, -1) if kind == "rolled" else x) * p[kernel][0]

  def run(p: Any, m: Any, x: Any) -> Any:
    x = x * m[first]
    for kernel, (own, stream) in zip(kernels, names, strict=True):
      x = x + write(p, kernel, x) * m[own]
      x = jnp.tanh(x * m[stream]) if after else x
    return x

  b.add(f"writes {kind} {after} {first} {names}", run, v)


@op(0.7)
def merged_mask(b: Any) -> None:
  """A mask on a merged axis, seen as heads and depth, and merged again."""
  v = b.pick(lambda s: len(s) >= 2)
  need(b.free(v) and b.free(v)[-1] == len(b.shape(v)) - 1)
  heads, depth = int(b.rng.integers(1, 4)), int(b.rng.integers(1, 5))
  kernel, name, scale = (
    b.param((b.shape(v)[-1], heads * depth)),
    b.mask(heads * depth),
    b.param((heads, depth)),
  )
  attend, late = b.chance(0.5), b.chance(0.3)
  way = b.choice(["plain", "plain", "loop", "rows", "branches"])

  def run(p: Any, m: Any, x: Any) -> Any:
    y = (x @ p[kernel]) * (1 if late else m[name])
    y = y.reshape(*x.shape[:-1], heads, depth)
    if way == "loop":
      y, _ = lax.scan(lambda y, _: (jnp.tanh(y), None), y, None, length=2)
    elif way == "rows":
      _, y = lax.scan(lambda turn, row: (turn + 1, jnp.sin(row)), 0, y)
    elif way == "branches":
      y = lax.cond(jnp.sum(p[scale]) > 0, jnp.tanh, jnp.sin, y)
    y = y * jnp.sum(y * p[scale], -1, keepdims=True) if attend else y * p[scale]
    return y.reshape(*x.shape[:-1], heads * depth) * (m[name] if late else 1)

  b.add(f"merged {way} {heads} {depth} {attend} {late} {name}", run, v)


@op(0.4)
def dense_layers(b: Any) -> None:
  """Each layer reads what all before it wrote."""
  v = b.pick(lambda s: len(s) >= 2)
  need(b.free(v) and b.free(v)[-1] == len(b.shape(v)) - 1)
  width, growth = b.shape(v)[-1], int(b.rng.integers(1, 4))
  layers = [(b.param((width + at * growth, growth)), b.mask(growth)) for at in range(3)]

  def run(p: Any, m: Any, x: Any) -> Any:
    found = [x]
    for kernel, name in layers:
      found.append(jnp.tanh(jnp.concatenate(found, -1) @ p[kernel]) * m[name])
    return jnp.concatenate(found, -1)

  b.add(f"dense layers {growth} {[name for _, name in layers]}", run, v)
