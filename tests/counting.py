"""An independent count of FLOPs over a jaxpr, for comparison: plain recursion, no liveness."""

import itertools
import math
from typing import Any

import numpy as np
from jax.extend.core import Literal

from fisherprune_jax._graph.compat import scan_counts

FREE = """
  bitcast_convert_type optimization_barrier device_put broadcast_in_dim concatenate convert_element_type copy dynamic_slice dynamic_update_slice gather iota
  name pad reshape rev scatter select_n slice split squeeze stack stop_gradient tile transpose unstack
""".split()
PER_INPUT = """
  approx_top_k argmax argmin cumsum pmax pmin psum reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum sort top_k
""".split()
MATRICES = {
  "triangular_solve": None,
  "lu_pivots_to_permutation": lambda *shape: 0,
  "cholesky": lambda m, n: n**3 / 3,
  "lu": lambda m, n: 2 * n**3 / 3,
  "qr": lambda m, n: 2 * m * n**2 - 2 * n**3 / 3,
}
"""Of square matrices; a QR of tall ones."""


def count(closed: Any, depends: list[bool], constants: bool = False) -> int:
  """FLOPs of a jaxpr, leaving out what depends on no input that ``depends`` marks, unless ``constants`` count too."""
  return _count(closed, depends, constants)[0]


def _count(closed: Any, depends: list[bool], constants: bool) -> tuple[int, list[bool]]:
  jaxpr = getattr(closed, "jaxpr", closed)
  marked = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}
  total = 0
  for eqn in jaxpr.eqns:
    flags = [not isinstance(v, Literal) and v in marked for v in eqn.invars]
    counts = constants or any(flags)
    name = eqn.primitive.name
    parts = () if name.startswith(("scatter", "reduce", "select_and")) else eqn.params.values()
    inner = next((p for p in parts if hasattr(p, "eqns")), None)
    if name == "cond":
      found = [_count(branch, flags[1:], constants) for branch in eqn.params["branches"]]
      flops, outs = max(f for f, _ in found), [True] * len(eqn.outvars)
    elif name == "while":
      first, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
      body, outs = _turn(eqn.params["body_jaxpr"], flags[first:], consts, len(eqn.outvars), constants)
      flops = body + _count(eqn.params["cond_jaxpr"], [*flags[:first], *outs], constants)[0]
    elif name == "scan":
      consts, carry = scan_counts(eqn.params)
      turn, outs = _turn(inner, flags, consts, carry, constants)
      flops = eqn.params["length"] * turn
    elif name == "custom_linear_solve":
      solve, lengths = eqn.params["jaxprs"].solve, eqn.params["const_lengths"]
      first = lengths.matvec + lengths.vecmat
      flops, outs = _count(solve, [*flags[first : first + lengths.solve], *flags[sum(lengths) :]], constants)
    elif inner is not None:
      flops, outs = _count(inner, flags, constants)
    else:
      flops, outs = _flops(eqn), [any(flags)] * len(eqn.outvars)
    total += flops if counts else 0
    marked |= {v for v, d in zip(eqn.outvars, outs, strict=True) if d}
  return total, [not isinstance(v, Literal) and v in marked for v in jaxpr.outvars]


def _turn(body: Any, flags: list[bool], consts: int, carry: int, constants: bool) -> tuple[int, list[bool]]:
  """One turn of a loop; carried values depend on the arguments if they do at first or after any turn."""
  flags = list(flags)
  while True:
    flops, outs = _count(body, flags, constants)
    joined = [a or b for a, b in zip(flags[consts : consts + carry], outs, strict=False)]
    if joined == flags[consts : consts + carry]:
      return flops, [*joined, *outs[carry:]]
    flags[consts : consts + carry] = joined


def _flops(eqn: Any) -> int:
  name = eqn.primitive.name
  out = math.prod(eqn.outvars[0].aval.shape)
  if name in FREE:
    return 0
  left = eqn.invars[0].aval.shape if eqn.invars else ()
  numbers = [
    np.issubdtype(v.aval.dtype, np.complexfloating) for v in (*eqn.invars, *eqn.outvars) if _numeric(v)
  ]
  if name in MATRICES or name == "fft":
    return _matrices(eqn, left)
  if any(numbers):
    return _complex(eqn, out, left)
  return _real(eqn, out, left)


def _numeric(v: Any) -> bool:
  return isinstance(v.aval.dtype, np.dtype)


def _real(eqn: Any, out: int, left: Any) -> int:
  name = eqn.primitive.name
  if name == "reduce":
    return math.prod(left) * len(eqn.outvars)
  if name in PER_INPUT:
    return math.prod(left) * (len(eqn.invars) if name == "sort" else 1)
  if name.startswith("reduce_window"):
    return out * math.prod(eqn.params["window_dimensions"]) * len(eqn.outvars)
  if name.startswith("select_and"):
    return min(out, *(math.prod(v.aval.shape) for v in eqn.invars[:2])) * math.prod(
      eqn.params["window_dimensions"]
    )
  if name.startswith("scatter-"):
    return math.prod(eqn.invars[2].aval.shape)
  if name in ("dot_general", "ragged_dot_general"):
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    numbers = ragged.dot_dimension_numbers if ragged else eqn.params["dimension_numbers"]
    terms = math.prod(left[i] for i in numbers[0][0])
    return out * max(2 * terms - 1, 0)
  if name == "conv_general_dilated":
    return _convolution(eqn, left, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape)
  return out


def _complex(eqn: Any, out: int, left: Any) -> int:
  """Of complex numbers: by how often real ones are multiplied, divided, added or looked at."""
  name = eqn.primitive.name
  if name == "dot_general":
    terms = math.prod(left[i] for i in eqn.params["dimension_numbers"][0][0])
    return out * (6 * terms + 2 * (terms - 1)) if terms else 0
  per = {"mul": 6, "square": 6, "integer_pow": 6, "reduce_prod": 6, "cumprod": 6, "div": 11, "abs": 4}
  per |= dict.fromkeys(("real", "imag", "conj", "complex", "sort"), 1)
  assert name != "conv_general_dilated", "not needed so far"
  return _real(eqn, out, left) * per.get(name, 2)


def _matrices(eqn: Any, left: Any) -> int:
  """Linear algebra, matrix by matrix (transform by transform); see the table in the documentation."""
  name, params = eqn.primitive.name, eqn.params
  kinds = [np.issubdtype(v.aval.dtype, np.complexfloating) for v in (*eqn.invars, *eqn.outvars)]
  if name == "fft":
    numbers = math.prod(params["fft_lengths"])
    batch = left[: len(left) - len(params["fft_lengths"])]
    return math.prod(batch) * round((5 if all(kinds) else 2.5) * numbers * math.log2(numbers))
  if name == "triangular_solve":
    return left[-1] * math.prod(eqn.invars[1].aval.shape) * (4 if kinds[0] else 1)
  return math.prod(left[:-2]) * round(MATRICES[name](*left[-2:]) * (4 if kinds[0] else 1))


def _convolution(eqn: Any, left: Any, kernel: Any, out: Any) -> int:
  """Place by place and tap by tap: which of them are products."""
  numbers, params = eqn.params["dimension_numbers"], eqn.params
  space, taps, places = (
    [shape[i] for i in spec[2:]]
    for shape, spec in ((left, numbers.lhs_spec), (kernel, numbers.rhs_spec), (out, numbers.out_spec))
  )
  dilated = any(d > 1 for d in params["lhs_dilation"])
  per_place = []
  for place in itertools.product(*map(range, places)):
    met = 0
    for tap in itertools.product(*map(range, taps)):
      hits = True
      for axis, (p, t) in enumerate(zip(place, tap, strict=True)):
        at = (
          p * params["window_strides"][axis] + t * params["rhs_dilation"][axis] - params["padding"][axis][0]
        )
        real = {n * params["lhs_dilation"][axis] for n in range(space[axis])}
        hits = hits and (at in real or not dilated)
      met += hits
    per_place.append(met)
  channels = kernel[numbers.rhs_spec[1]]
  others = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
  return others * sum(max(2 * met * channels - 1, 0) for met in per_place)
