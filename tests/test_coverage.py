"""Which primitives the engine knows: a list of what models use, and a table (``python -m tests.test_coverage``)."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.interpreters import mlir
from jax._src.lax.windowed_reductions import _select_and_scatter

import fisherprune_jax as fp
from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import INLINED
from fisherprune_jax._graph.registry import known as with_rules
from fisherprune_jax._graph.registry import rule_for
from fisherprune_jax._graph.rules import elementwise, opaque
from fisherprune_jax._graph.structured import STRUCTURED
from tests.counting import count
from tests.models import CASES

X = jnp.ones((4, 6))
IMAGE = jnp.ones((2, 8, 8, 4))
INTEGERS = jnp.ones((4, 6), jnp.int32)
KEY = jax.random.key(0)

FUNCTIONS = """
  abs acos acosh asin asinh atan atanh cbrt ceil conj cos cosh digamma erf erf_inv erfc exp exp2 expm1 floor
  is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square tan tanh
""".split()
OF_TWO = (
  "add atan2 complex div eq ge gt igamma igammac le lt max min mul ne nextafter pow rem sub zeta".split()
)
OF_INTEGERS = (
  "bitwise_and bitwise_or bitwise_xor shift_left shift_right_arithmetic shift_right_logical".split()
)
REDUCTIONS = "all any argmax argmin max mean min prod sum var".split()
CUMULATIVE = "cumlogsumexp cummax cummin cumprod cumsum".split()
ACTIVATIONS = """
  celu elu gelu glu hard_sigmoid hard_silu hard_tanh leaky_relu log_sigmoid log_softmax logsumexp mish relu relu6
  selu sigmoid silu soft_sign softmax softplus squareplus standardize
""".split()

# What newer versions of JAX wrap ``searchsorted`` in.
KEPT_WHOLE = {"call_hi_primitive"}

Traced = tuple[Callable[..., Any], tuple[Any, ...]]


def traced() -> Iterator[tuple[str, Traced]]:
  """What models are made of, by name."""
  families = (
    *(_elementwise, _contractions, _reductions, _windows, _movement),
    *(_indexing, _random, _control, _linear_algebra),
  )
  for family in families:
    yield from family()


def _elementwise() -> Iterator[tuple[str, Traced]]:
  yield from ((name, (getattr(lax, name), (X,))) for name in FUNCTIONS)
  yield from ((name, (getattr(lax, name), (X, X))) for name in OF_TWO)
  yield from ((name, (getattr(lax, name), (INTEGERS, INTEGERS))) for name in OF_INTEGERS)
  yield from ((name, (getattr(jax.nn, name), (X,))) for name in ACTIVATIONS)
  yield "gradients", (jax.grad(lambda x: sum(getattr(jax.nn, n)(x).sum() for n in ACTIVATIONS)), (X,))
  yield "complex", (lambda x: lax.real(lax.conj(x * 1j)) + lax.imag(x * 1j), (X,))
  yield "popcount", (lambda x: lax.population_count(lax.clz(~x)), (INTEGERS,))
  yield "powers", (lambda x: x**3 + x**0.5 + 2.0**x, (X,))
  yield "select", (lambda x: jnp.where(x > 0, lax.clamp(0.0, x, 1.0), 0), (X,))
  yield "casts", (lambda x: lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.int16), (X,))
  yield "precision", (lambda x: lax.reduce_precision(lax.stop_gradient(x), 8, 7), (X,))


def _contractions() -> Iterator[tuple[str, Traced]]:
  yield "einsum", (lambda x, w: jnp.einsum("bhwc,dch->dwb", x, w), (IMAGE, jnp.ones((3, 4, 8))))
  yield "matmul", (jnp.matmul, (IMAGE, jnp.ones((2, 8, 4, 3))))
  for name, options in {
    "plain": {},
    "strided": {"window_strides": (2, 2)},
    "dilated": {"rhs_dilation": (2, 1)},
    "transposed": {"lhs_dilation": (2, 2)},
    "channels_first": {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
  }.items():
    options = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1))} | options
    first = "dimension_numbers" in options
    x, w = (jnp.ones((2, 4, 8, 8)), jnp.ones((5, 4, 3, 3))) if first else (IMAGE, jnp.ones((3, 3, 4, 5)))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    conv = functools.partial(lax.conv_general_dilated, **options)
    yield f"conv_{name}", (conv, (x, w))
    yield f"conv_{name}_gradient", (jax.grad(lambda x, w, conv=conv: conv(x, w).sum(), (0, 1)), (x, w))
  for groups in (2, 4):  # of which the gradient has batch groups
    module = nn.Conv(8, (3, 3), feature_group_count=groups)
    weights = jax.eval_shape(module.init, KEY, IMAGE)
    yield f"conv_{groups}_groups", (jax.grad(lambda v, x, m=module: m.apply(v, x).sum()), (weights, IMAGE))
  attention = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  yield "attention", (attention, (IMAGE, IMAGE, IMAGE))
  ragged = lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 0, 3])).sum()
  yield "ragged_dot", (ragged, (X, jnp.ones((3, 6, 2))))


def _reductions() -> Iterator[tuple[str, Traced]]:
  for name in REDUCTIONS:
    yield name, (functools.partial(getattr(jnp, name), axis=1), (X,))
  for name in CUMULATIVE:
    one = getattr(lax, name)
    yield name, (one, (X,))
    yield f"{name}_gradient", (jax.grad(lambda x, one=one: one(x).sum()), (X,))
  yield "parity", (lambda x: lax.reduce(x, np.int32(0), lax.bitwise_xor, (1,)), (INTEGERS,))
  yield "reduce", (lambda x: lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (1,)), (X,))
  yield "sort", (lambda x: (jnp.sort(x), jnp.argsort(x), jnp.median(x)), (X,))
  yield "top_k", (lambda x: (lax.top_k(x, 2), lax.approx_max_k(x, 2)), (X,))
  yield "norm", (lambda x: (jnp.linalg.norm(x, axis=-1), x.std()), (X,))


def _windows() -> Iterator[tuple[str, Traced]]:
  sizes = {"window_shape": (2, 2), "strides": (2, 2)}
  for pool in (nn.max_pool, nn.avg_pool):
    yield pool.__name__, (functools.partial(pool, **sizes), (IMAGE,))
    yield f"{pool.__name__}_gradient", (jax.grad(lambda x, pool=pool: pool(x, **sizes).sum()), (IMAGE,))
    second = lambda x, pool=pool: jax.jvp(jax.grad(lambda x: (pool(x, **sizes) ** 2).sum()), (x,), (x,))
    yield f"{pool.__name__}_hessian", (second, (IMAGE,))
  window = lambda x: lax.reduce_window(x, 0.0, lambda a, b: a + 2 * b, (1, 2), (1, 2), "VALID")
  yield "window", (window, (X,))


def _movement() -> Iterator[tuple[str, Traced]]:
  yield "shapes", (lambda x: jnp.expand_dims(x.T.reshape(3, 2, 4).squeeze()[None], 2), (X,))
  yield "joined", (lambda x: jnp.split(jnp.concatenate([x, jnp.stack([x, x])[0]]), [3]), (X,))
  yield "tiled", (lambda x: (jnp.tile(x, (2, 3)), jnp.repeat(x, 2, 0), jnp.unstack(x)), (X,))
  yield "padded", (lambda x: [jnp.pad(x, 1, mode=m) for m in ("constant", "edge", "reflect", "wrap")], (X,))
  yield "sliced", (lambda x: (x[1:, ::2], x[::-1], jnp.flip(x, 1), jnp.roll(x, 2)), (X,))
  yield "counted", (lambda x: x + jnp.arange(6) + jnp.eye(4, 6) + jnp.linspace(0, 1, 6), (X,))
  yield "triangles", (lambda x: (jnp.tril(x), jnp.triu(x), jnp.diagonal(x)), (X,))
  for method in ("nearest", "bilinear", "bicubic"):
    resize = functools.partial(jax.image.resize, shape=(2, 16, 16, 4), method=method)
    yield f"resize_{method}", (lambda x, resize=resize: resize(x), (IMAGE,))
  yield "barrier", (lax.optimization_barrier, (X,))


def _indexing() -> Iterator[tuple[str, Traced]]:
  yield "gather", (lambda x, i: (x[i], jnp.take_along_axis(x, i, 1), x.at[i].get(mode="fill")), (X, INTEGERS))
  yield "gather_gradient", (jax.grad(lambda x, i: x[i].sum()), (X, INTEGERS))
  for name in ("set", "add", "subtract", "multiply", "divide", "min", "max", "power"):
    yield f"scatter_{name}", (lambda x, i, name=name: getattr(x.at[i], name)(2.0), (X, INTEGERS))
  yield "dynamic_slice", (lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6)), (X, 1))
  yield "dynamic_update", (lambda x, i: lax.dynamic_update_slice(x, x[:2], (i, 0)), (X, 1))
  yield "one_hot", (lambda i: jax.nn.one_hot(i, 5), (INTEGERS,))
  yield "segments", (lambda x: jax.ops.segment_sum(x, jnp.array([0, 1, 1, 2]), 3), (X,))
  yield "sorted_search", (lambda x: jnp.searchsorted(jnp.arange(6.0), x), (X,))


def _random() -> Iterator[tuple[str, Traced]]:
  for name in ("normal", "uniform", "bernoulli", "gumbel", "exponential", "truncated_normal", "laplace"):
    draw = getattr(jax.random, name)
    options = {"lower": -1.0, "upper": 1.0} if name == "truncated_normal" else {}
    yield name, (lambda key, draw=draw, o=options: draw(key, shape=(4, 6), **o), (KEY,))
  yield "integers", (lambda key: jax.random.randint(key, (4,), 0, 9), (KEY,))
  yield "categorical", (lambda key, x: jax.random.categorical(key, x), (KEY, X))
  yield "permutation", (lambda key: jax.random.permutation(key, 5), (KEY,))
  yield "keys", (lambda key: jax.random.key_data(jax.random.split(jax.random.fold_in(key, 3))[0]), (KEY,))
  yield "seeds", (lambda s: jax.random.normal(jax.random.key(s), (3,)), (3,))
  yield "old_keys", (lambda s: jax.random.normal(jax.random.PRNGKey(s), (3,)), (3,))
  yield "rbg", (lambda s: jax.random.normal(jax.random.key(s, impl="rbg"), (3,)), (3,))
  dropout = nn.Dropout(0.5, deterministic=False)
  yield "dropout", (lambda key, x: dropout.apply({}, x, rngs={"dropout": key}), (KEY, X))


@jax.custom_vjp
def _custom(x: jax.Array) -> jax.Array:
  return jnp.sin(x)


_custom.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def _control() -> Iterator[tuple[str, Traced]]:
  yield "jit", (jax.jit(jnp.sin), (X,))
  yield "remat", (jax.grad(lambda x: jax.checkpoint(jnp.sin)(x).sum()), (X,))
  yield "custom_jvp", (jax.nn.relu, (X,))
  yield "custom_vjp", (_custom, (X,))
  yield "scan", (lambda x: lax.scan(lambda c, y: (c + y, c * y), x[0], x), (X,))
  yield "map", (lambda x: lax.map(jnp.sin, x), (X,))
  yield "while", (lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), (X,))
  yield "fori_loop", (lambda x: lax.fori_loop(0, 3, lambda i, x: x * i, x), (X,))
  yield "cond", (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), (X,))
  yield "switch", (lambda x, i: lax.switch(i, [jnp.sin, jnp.cos, jnp.tan], x), (X, 1))
  yield "platforms", (lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos), (X,))
  yield "associative_scan", (lambda x: lax.associative_scan(jnp.multiply, x), (X,))
  yield "debug", (lambda x: jax.debug.print("{}", x.sum()), (X,))
  yield "collective", (jax.vmap(lambda x: lax.psum(x, "i") + lax.axis_index("i"), axis_name="i"), (X,))


def _linear_algebra() -> Iterator[tuple[str, Traced]]:
  square = X @ X.T + 9 * jnp.eye(4)
  for name in ("fft", "ifft", "rfft", "irfft", "fft2", "rfftn"):
    yield name, (getattr(jnp.fft, name), (X,))
  for name in ("cholesky", "det", "eigh", "eig", "inv", "pinv", "qr", "slogdet", "svd"):
    yield f"linalg_{name}", (getattr(jnp.linalg, name), (square,))
  yield "linalg_solve_gradient", (jax.grad(lambda a, b: jnp.linalg.solve(a, b).sum(), (0, 1)), (square, X))
  yield "linalg_lstsq", (lambda a, b: jnp.linalg.lstsq(a, b)[0], (X.T, jnp.ones((6, 2))))
  for name in ("expm", "hessenberg", "schur"):
    yield f"linalg_{name}", (getattr(jax.scipy.linalg, name), (square,))
  yield "linalg_triangular", (jax.scipy.linalg.solve_triangular, (square, X))
  yield "linalg_bands", (lax.linalg.tridiagonal_solve, (X, X + 3, X, jnp.ones((4, 6, 2))))
  yield "linalg_reflections", (lax.linalg.householder_product, (X.T, jnp.ones(4)))
  yield "linalg_update", (lax.linalg.cholesky_update, (square, jnp.ones(4)))
  yield "conjugate_gradients", (lambda a, b: jax.scipy.sparse.linalg.cg(lambda x: a @ x, b)[0], (square, X))
  yield "fftconvolve", (jax.scipy.signal.fftconvolve, (X, X))


def primitives_of(jaxpr: Any) -> set[str]:
  """The names of all primitives in a jaxpr, and in those that it runs."""
  found = set()
  for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
    found.add(eqn.primitive.name)
    if eqn.primitive.name in INLINED or eqn.primitive.name in STRUCTURED:
      found.update(*map(primitives_of, compat.sub_jaxprs(eqn.params)))
  return found


def how(name: str) -> str:
  """How the engine treats a primitive."""
  if name in INLINED or name in STRUCTURED:
    return "structured"
  rule = rule_for(name)
  if rule is None:
    return "whole (no rule)"
  if rule in (opaque.random, opaque.silent):
    return "whole"
  return "elementwise" if rule is elementwise.elementwise else "factors"


@pytest.mark.parametrize(("function", "args"), [pytest.param(*t, id=name) for name, t in traced()])
def test_what_models_use_has_a_rule(function, args):
  found = primitives_of(jax.make_jaxpr(function)(*args))
  assert {name for name in found if how(name) == "whole (no rule)"} <= KEPT_WHOLE


def lowerable() -> set[str]:
  """The names of all primitives that this JAX can compile for the CPU."""
  return {p.name for p in (*mlir._lowerings, *mlir._platform_specific_lowerings["cpu"])}


def test_the_names_are_those_of_jax():
  names = lowerable()
  for name in "add dot_general conv_general_dilated reduce_sum gather scatter-add select_n split".split():
    assert name in names
    assert rule_for(name)


def shapes(case: str, mask: Any, which: str = "kernel") -> list[tuple[int, ...]]:
  """The shapes of a case's parameters of one name, with its first masks given."""
  case_ = CASES[case]
  variables, x = case_.variables(), case_.inputs()
  leaves, tree = jax.tree.flatten(variables["masks"])
  leaves[0] = jnp.asarray(mask, jnp.float32).reshape(leaves[0].shape)
  masks = jax.tree.unflatten(tree, leaves)
  small = fp.compact(case_.module().apply, variables | {"masks": masks}, x)
  found = jax.tree_util.tree_leaves_with_path(small.variables["params"])
  return [leaf.shape for path, leaf in found if path[-1].key == which]


def test_heads_go_from_queries_keys_values_and_outputs():
  # key, out, query, value
  gone = [(5, 2, 2), (2, 2, 5), (5, 2, 2), (5, 2, 2)]
  assert shapes("attention_with_masked_heads", [1, 0, 0, 1]) == gone
  assert shapes("attention_by_jax", [0, 0, 1, 0]) == [(5, 1, 3)] * 3 + [(1, 3, 3)]


@pytest.mark.parametrize(
  ("mask", "queries", "groups"), [([1, 0, 0, 1], 2, 2), ([0, 0, 1, 0], 1, 1), ([1, 1, 0, 0], 2, 1)]
)
def test_a_group_of_keys_goes_with_the_last_of_its_queries(mask, queries, groups):
  expected = [(5, queries, 3), (5, groups, 3), (5, groups, 3), (queries, 3, 3)]
  assert shapes("attention_grouped", mask) == expected


def test_grouped_heads_inside_one_axis_stay_a_rectangle():
  # jax.nn.dot_product_attention splits queries into (group, member): what is left must be a product again.
  assert shapes("attention_grouped_by_jax", [0, 0, 1, 0]) == [(5, 1, 3)] * 3 + [(1, 3, 3)]
  assert shapes("attention_grouped_by_jax", [0, 0, 1, 1]) == [(5, 2, 3), (5, 1, 3), (5, 1, 3), (2, 3, 3)]
  assert shapes("attention_grouped_by_jax", [0, 1, 0, 1]) == [(5, 2, 3)] * 3 + [(2, 3, 3)]


def test_experts_and_gates_go_with_their_weights():
  experts = shapes("experts", [1, 0, 1, 0], "w")
  assert [shape[0] for shape in experts] == [2, 2]
  assert shapes("gate_masked_alone", [1, 0, 0, 1, 1, 0]) == [(3, 3), (5, 3), (5, 3)]


def scattered(x: jax.Array) -> jax.Array:
  """Halves of ``x`` put where its pairs have their larger entry, by functions that JAX does not know."""
  halves, pairs = x[:, ::2], (1, 2, 1)
  padding = ((0, 0),) * 3
  put = lambda a, b: a + b + a * b
  return _select_and_scatter(x, lambda a, b: a >= b, pairs, pairs, padding, halves, 0.5, put)


def windows(x: jax.Array) -> jax.Array:
  return lax.reduce_window(x, 1.0, lambda a, b: a + 2 * b, (1, 2, 1), (1, 2, 1), "VALID")


def reordered(x: jax.Array) -> jax.Array:
  return lax.reshape(x, (12, 4), (1, 0, 2)).reshape(4, 3, 4).swapaxes(0, 1)


ON_CHANNELS = {
  "reshape_in_another_order": reordered,
  "positions_along_another_axis": lambda x: x + jnp.argmax(x, 1)[:, None] + jnp.argmin(x, 1)[:, None],
  "gradient_of_pooling": jax.grad(lambda x: (nn.max_pool(x, (2,), (2,)) ** 2).sum()),
  "incomplete_gamma": lambda x: x * jax.grad(lambda a: jax.scipy.special.gammainc(a, 1.0).sum())(x * x + 1),
  "draws": lambda x: x * jax.random.normal(jax.random.key(3), x.shape),
  "collectives": jax.vmap(lambda x: x / (1 + lax.pmax(x * x, "i")) + lax.psum(x, "i"), axis_name="i"),
  "platforms": lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.tanh),
}
WHOLE = {
  "reduction_by_a_function": lambda x: lax.reduce(x, 1.0, lambda a, b: a + 2 * b, (1,)),
  "window_by_a_function": windows,
  "scatter_by_a_function": scattered,
  "approximate_choice": lambda x: lax.approx_max_k(x, 2, reduction_dimension=1)[0],
}


def pruned(function: Callable[[jax.Array], jax.Array]) -> tuple[Any, Any, jax.Array]:
  """``function`` of four masked channels of which two are left, and what it is applied to."""
  rng = np.random.default_rng(0)
  w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 4), (3, 4, 5)))
  variables = {"params": {"w": w}, "masks": {"m": jnp.array([1.0, 0.0, 0.0, 1.0])}}
  return lambda v, x: function(x @ v["params"]["w"] * v["masks"]["m"]), variables, x


@pytest.mark.parametrize("name", [*ON_CHANNELS, *WHOLE])
def test_channels_of_what_no_case_has(name):
  function = (ON_CHANNELS | WHOLE)[name]
  apply, variables, x = pruned(lambda x: function(x) * jnp.arange(1.0, 5.0))
  small = fp.compact(apply, variables, x, strict=name in ON_CHANNELS)
  np.testing.assert_allclose(small(small.variables, x), apply(variables, x), rtol=1e-5, atol=1e-5)
  if name in ON_CHANNELS:
    assert small.variables["params"]["w"].shape == (5, 2)
  jaxpr = jax.make_jaxpr(small)(small.variables, x)
  assert count(jaxpr, [False, True]) == small.cost * x.shape[0]


def test_no_channels_at_all():
  for name, function in (ON_CHANNELS | WHOLE).items():
    apply, variables, x = pruned(function)
    none = variables | {"masks": {"m": jnp.zeros(4)}}
    small = fp.compact(apply, none, x)
    np.testing.assert_allclose(small(small.variables, x), apply(none, x), rtol=1e-5, atol=1e-5, err_msg=name)


def table() -> str:
  """``primitive | how`` for all that the engine knows, and what falls back to whole."""
  names = lowerable()
  known = sorted((names | {*STRUCTURED, *INLINED, *with_rules()}) - {n for n in names if "no rule" in how(n)})
  rows = [f"{name:<32} | {how(name)}{'' if name in names else '  (not in this JAX)'}" for name in known]
  rest = sorted(name for name in names if "no rule" in how(name))
  head = f"JAX {jax.__version__}: {len(known)} known, {len(rest)} kept whole by the fallback"
  return "\n".join([head, "", f"{'primitive':<32} | how", *rows, "", "fallback: " + " ".join(rest)])


if __name__ == "__main__":
  print(table())
