"""What single operations cost, against numbers worked out by hand, and what is said of those that nobody counts."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend import core
from jax.interpreters import mlir

import fisherprune_jax as fp
from fisherprune_jax._graph import blockers
from tests.counting import count

unknown_p = core.Primitive("made_up_and_uncounted")
unknown_p.def_impl(jnp.tanh)
unknown_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(unknown_p, mlir.lower_fun(jnp.tanh, multiple_results=False))


def flops(function, *shapes, dtype=jnp.float32, **options):
  """The cost of a function of arrays, for one traced call; beside a mask that costs nothing."""
  args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  apply = lambda v, *xs: (function(*xs), v["masks"] * jnp.ones(1))
  return fp.cost_model(apply, {"masks": jnp.ones(1)}, *args, batch_axes=None, **options)


def flops_of(function, *shapes, **options):
  return flops(function, *shapes, **options).dense


def test_a_transposed_convolution_costs_its_products():
  layer = nn.ConvTranspose(1, (2, 2), strides=(2, 2), use_bias=False)
  kernel = {"params": {"kernel": jnp.ones((2, 2, 3, 1))}}
  assert flops_of(lambda x: layer.apply(kernel, x), (1, 2, 2, 3)) == 80  # 16 outputs of 3 products each
  # Every entry reaches three places; between two entries is one that both reach, with an addition.
  overlapping = lambda x, w: lax.conv_transpose(x, w, (2,), "VALID")
  assert [flops_of(overlapping, (1, n, 1), (3, 1, 1)) for n in (1, 2, 3)] == [3, 6 + 1, 9 + 2]


CONVOLUTIONS = [
  (kernel, stride, padding, dilation)
  for kernel in (1, 2, 3, 5)
  for stride in (1, 2, 3)
  for padding in ("SAME", "VALID", ((2, 3),), ((-1, 4),))
  for dilation in (1, 2)
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_a_dilated_input_costs_what_it_adds_up(kernel, stride, padding, dilation):
  """Counted from the other side: each entry of the input is multiplied with each tap that lands in the result."""
  entries, channels, features = 4, 3, 2
  layer = functools.partial(lax.conv_transpose, strides=(stride,), padding=padding, rhs_dilation=(dilation,))
  x, w = (1, entries, channels), (kernel, channels, features)
  jaxpr = jax.make_jaxpr(layer)(jnp.ones(x), jnp.ones(w))
  found = flops_of(layer, x, w)
  assert found == count(jaxpr, [True, True])
  (eqn,) = jaxpr.eqns
  low, places = eqn.params["padding"][0][0], eqn.outvars[0].aval.shape[1]
  assert eqn.params["lhs_dilation"] == (stride,)
  if stride == 1:  # an ordinary convolution, of which borders count too
    assert found == places * features * (2 * kernel * channels - 1)
    return
  landed = [e * stride + low - t * dilation for e in range(entries) for t in range(kernel)]
  products = [at for at in landed if 0 <= at < places]
  reached = len(set(products))  # places with a product at all: one addition less than products
  assert found == features * (2 * channels * len(products) - reached)


def test_both_axes_of_a_transposed_convolution_and_its_groups():
  for groups in (1, 2, 4):
    layer = functools.partial(
      lax.conv_general_dilated, window_strides=(1, 2), padding=((1, 2), (2, 0)), lhs_dilation=(2, 3),
      rhs_dilation=(1, 2), feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    shapes = (2, 3, 4, 4), (3, 2, 4 // groups, 8)
    assert flops_of(layer, *shapes) == count(jax.make_jaxpr(layer)(*map(jnp.ones, shapes)), [True, True])


def test_the_gradient_of_a_strided_convolution_costs_what_the_convolution_does():
  """By its input: each product forward is one backward. Without padding, so that no tap meets it."""
  layer = functools.partial(lax.conv, window_strides=(2, 3), padding="VALID")
  x, w = (2, 3, 9, 11), (5, 3, 3, 3)
  y = jax.eval_shape(layer, jnp.ones(x), jnp.ones(w)).shape
  backward = lambda w, g: jax.linear_transpose(lambda x: layer(x, w), jnp.ones(x))(g)[0]
  products = math.prod(y) * 3 * 9
  reached = sum(len({p * s + t for p in range(n) for t in range(3)}) for s, n in ((2, y[2]),)) * len(
    {p * 3 + t for p in range(y[3]) for t in range(3)}
  )
  assert flops_of(backward, w, y) == 2 * products - 2 * 3 * reached


def test_windows_and_borders_of_ordinary_convolutions_count_as_ever():
  layer = functools.partial(lax.conv, window_strides=(1, 1), padding="SAME")
  assert flops_of(layer, (1, 2, 4, 4), (3, 2, 3, 3)) == 3 * 16 * (2 * 18 - 1)


cholesky = functools.partial(lax.linalg.cholesky, symmetrize_input=False)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (1, 3)), ((-1, 2), (0, -1))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_taps_on_the_border_count(padding, stride, dilation):
  layer = functools.partial(
    lax.conv_general_dilated, window_strides=(stride, 1), padding=padding, rhs_dilation=(1, dilation)
  )
  x, w = (2, 3, 6, 7), (5, 3, 3, 2)
  places = jax.eval_shape(layer, jnp.ones(x), jnp.ones(w)).size
  assert flops_of(layer, x, w) == places * (2 * 18 - 1)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 0), (2, 1), (0, 0))])
def test_every_output_of_a_window_costs_the_size_of_the_window(padding):
  pool = lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 1), (1, 2, 1), padding)
  assert flops_of(pool, (2, 7, 4)) == pool(jnp.ones((2, 7, 4))).size * 3


A, RHS, TALL = (2, 6, 6), (2, 6, 3), (2, 9, 4)
TEXTBOOK = {
  "fft": (jnp.fft.fft, [(3, 8)], jnp.complex64, 3 * 5 * 8 * 3),
  "ifft": (jnp.fft.ifft, [(3, 8)], jnp.complex64, 3 * 5 * 8 * 3),
  "fft of no power of two": (jnp.fft.fft, [(3, 6)], jnp.complex64, 3 * round(30 * math.log2(6))),
  "rfft": (jnp.fft.rfft, [(3, 8)], jnp.float32, 3 * 5 * 8 * 3 / 2),
  "irfft": (jnp.fft.irfft, [(3, 5)], jnp.complex64, 3 * 5 * 8 * 3 / 2),
  "fft of two axes": (jnp.fft.fft2, [(3, 8, 4)], jnp.complex64, 3 * 5 * 32 * 5),
  "fft of one number": (jnp.fft.fft, [(3, 1)], jnp.complex64, 0),
  "cholesky": (cholesky, [A], jnp.float32, 2 * 6**3 / 3),
  "complex cholesky": (cholesky, [A], jnp.complex64, 4 * 2 * 6**3 / 3),
  "lu": (lax.linalg.lu, [A], jnp.float32, 2 * 2 * 6**3 / 3),
  "lu of a tall one": (lax.linalg.lu, [(9, 3)], jnp.float32, 9 * 9 - 9),
  "qr": (jnp.linalg.qr, [TALL], jnp.float32, 2 * round(2 * 9 * 16 - 2 * 64 / 3)),
  "eigh": (lambda x: lax.linalg.eigh(x, symmetrize_input=False), [A], jnp.float32, 2 * 9 * 6**3),
  "singular values": (
    lambda x: jnp.linalg.svd(x, compute_uv=False),
    [TALL],
    jnp.float32,
    2 * round(4 * 9 * 16 - 4 * 64 / 3),
  ),
  "svd": (lambda x: jnp.linalg.svd(x, full_matrices=False), [TALL], jnp.float32, 2 * (14 * 9 * 16 + 8 * 64)),
  "triangular solve": (
    lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True),
    [A, RHS],
    jnp.float32,
    2 * 36 * 3,
  ),
  "triangular solve from the right": (
    lax.linalg.triangular_solve,
    [A, (2, 3, 6)],
    jnp.float32,
    2 * 36 * 3,
  ),
  "tridiagonal solve": (
    lax.linalg.tridiagonal_solve,
    [(2, 6), (2, 6), (2, 6), RHS],
    jnp.float32,
    2 * 8 * 6 * 3,
  ),
  "solve": (jnp.linalg.solve, [A, RHS], jnp.float32, 2 * (2 * 6**3 / 3 + 2 * 36 * 3)),
  "complex product": (lax.mul, [(5,), (5,)], jnp.complex64, 6 * 5),
  "complex sum": (lax.add, [(5,), (5,)], jnp.complex64, 2 * 5),
  "complex quotient": (lax.div, [(5,), (5,)], jnp.complex64, 11 * 5),
  "complex sum over an axis": (lambda x: jnp.sum(x, 1), [(5, 4)], jnp.complex64, 2 * 20),
  "complex dot": (jnp.matmul, [(5, 4), (4, 3)], jnp.complex64, 15 * (8 * 4 - 2)),
  "complex dot of nothing": (jnp.matmul, [(5, 0), (0, 3)], jnp.complex64, 0),
  "complex convolution": (
    functools.partial(lax.conv, window_strides=(1,), padding="VALID"),
    [(1, 2, 5), (3, 2, 3)],
    jnp.complex64,
    9 * (8 * 6 - 2),
  ),
  "sort": (jnp.sort, [(5, 4)], jnp.float32, 20),
}
# The order of rows that comes along with a solve is worked out in integers.
ALONE = {"solve": ("lu", "triangular_solve")}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_textbook_counts(name):
  function, shapes, dtype, expected = TEXTBOOK[name]
  cost = flops(function, *shapes, dtype=dtype, primitives=ALONE.get(name))
  assert sum(row.dense for row in cost.breakdown(cost.masks)) == cost.dense == expected


def test_a_product_of_a_real_and_a_complex_number_costs_two():
  real_by_complex = lambda x: lax.dot_general(x, x * (1 + 0j), (((1,), (1,)), ((), ())))
  cost = flops(real_by_complex, (5, 4), primitives=("dot_general",))
  assert cost.dense in (25 * (8 * 4 - 2), 25 * (4 * 4 - 2))  # JAX may convert the first operand


def test_batches_of_matrices_shrink_and_costs_with_them():
  """The third factor of the cost, by brute force: as many as are alive."""

  def apply(v, x):
    y = jnp.moveaxis(x @ v["w"], -1, 1) * v["masks"][:, None]
    return jnp.abs(jnp.fft.fft(y, axis=-1))

  variables = {"w": jnp.ones((5, 6)), "masks": jnp.array([1.0, 0, 0, 1, 0, 0])}
  x = jax.ShapeDtypeStruct((2, 8, 5), jnp.float32)
  cost = fp.cost_model(apply, variables, x, primitives=("fft",))
  assert float(cost(variables["masks"])) == 2 * 120
  assert fp.compact(apply, variables, x).variables["w"].shape == (5, 2)


# What nobody counts.

X = jnp.ones((2, 5))


def uncounted(use):
  apply = lambda v, x: use(x @ v["w"]) * v["masks"]
  return fp.cost_model(apply, {"w": jnp.ones((5, 4)), "masks": jnp.ones(4)}, X)


PLACES = {
  "alone": unknown_p.bind,
  "in a scan": lambda x: lax.scan(lambda c, _: (unknown_p.bind(c), None), x, length=3)[0],
  "in a branch": lambda x: lax.cond(x.sum() > 0, unknown_p.bind, jnp.sin, x),
  "in a loop": lambda x: lax.fori_loop(0, x[0, 0].astype(int), lambda i, c: unknown_p.bind(c), x),
  "under a checkpoint": jax.checkpoint(unknown_p.bind),
  "in a helper": jax.jit(unknown_p.bind),
  "twice": lambda x: unknown_p.bind(unknown_p.bind(x)),
}


@pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
@pytest.mark.parametrize("place", PLACES)
def test_what_no_rule_counts_is_listed_as_not_counted(place):
  cost = uncounted(PLACES[place])
  rows = cost.breakdown(cost.masks)
  (row,) = [row for row in rows if "made_up_and_uncounted" in row.primitive]
  assert row.primitive.endswith("(not counted)")
  assert f"{row.dense}" == f"{row.now:>12,.1f}" == str(row.now) == repr(row.now) == "not counted"
  assert "test_counting.py" in row.where
  assert sum(row.dense for row in rows) == pytest.approx(cost.dense)
  assert cost.dense >= 4 * 9


@pytest.mark.filterwarnings("ignore:fisherprune_jax has no rule")
def test_only_what_is_asked_for_is_listed():
  apply = lambda v, x: unknown_p.bind(x @ v["w"]) * v["masks"] + 0 * unknown_p.bind(v["w"]).sum()
  variables = {"w": jnp.ones((5, 4)), "masks": jnp.ones(4)}
  named = lambda **options: [
    row.primitive
    for row in fp.cost_model(apply, variables, X, **options).breakdown(variables["masks"])
    if "not counted" in row.primitive
  ]
  assert named() == ["made_up_and_uncounted (not counted)"]  # the other hangs on variables alone
  assert named(primitives=("dot_general",)) == []
  assert named(primitives=("made_up_and_uncounted",)) == ["made_up_and_uncounted (not counted)"]


def test_what_a_user_counts_as_nothing_is_counted():
  assert not any("not counted" in row.primitive for row in uncounted(jnp.sin).breakdown(jnp.ones(4)))
  assert not any(
    "not counted" in row.primitive for row in uncounted(lambda x: x.T.reshape(x.shape)).breakdown(jnp.ones(4))
  )


def test_the_warning_says_that_it_is_not_counted(monkeypatch):
  monkeypatch.setattr(blockers, "_announced", set())
  masked = lambda v, x: unknown_p.bind((x @ v["w"]) * v["masks"])
  with pytest.warns(UserWarning, match=r"made_up_and_uncounted.*is not counted\. fp\.register_rule"):
    fp.cost_model(masked, {"w": jnp.ones((5, 4)), "masks": jnp.ones(4)}, X)


def test_it_is_said_too_where_no_mask_has_anything_to_do_with_it(monkeypatch):
  monkeypatch.setattr(blockers, "_announced", set())
  apart = lambda v, x: (x @ v["w"] * v["masks"]).sum(1) + unknown_p.bind(x).sum(1)
  with pytest.warns(UserWarning, match=r"made_up_and_uncounted.*up to 0 FLOPs per example.*is not counted"):
    fp.cost_model(apart, {"w": jnp.ones((5, 4)), "masks": jnp.ones(4)}, X)
  of_variables = lambda v, x: x @ (v["w"] * v["masks"]) + unknown_p.bind(v["w"]).sum()
  monkeypatch.setattr(blockers, "_announced", set())
  fp.cost_model(of_variables, {"w": jnp.ones((5, 4)), "masks": jnp.ones(4)}, X)  # a warning would be an error
