"""Decoding with caches of keys and values, which shrink by the masks that an ordinary forward pass has."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherprune_jax as fp
from benchmarks import decoding
from benchmarks.decoding import Sizes, empty_cache, forward, init, step

SIZES = Sizes(layers=3, width=16, heads=6, shared=3, depth=4, hidden=24, vocabulary=32)
BATCH, TIME = 3, 8
TOKENS = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, SIZES.vocabulary)
STATE = lambda output: {"cache": output[1]}
SHARED, DEPTH = "layers.heads.0", "layers/v.depth"


def decoded(small, tokens):
  """The logits of all tokens, one by one."""
  variables, found, run = dict(small.variables), [], jax.jit(small)
  shapes = jax.tree.map(jnp.shape, variables)
  for at in range(tokens.shape[1]):
    logits, new = run(variables, tokens[:, at : at + 1])
    variables |= new if set(new) <= set(variables) else {"cache": new}
    assert jax.tree.map(jnp.shape, variables) == shapes
    found.append(logits)
  return jnp.concatenate(found, 1)


def stacked(masks):
  variables = init(SIZES)
  auto = fp.auto_mask(forward, variables, TOKENS)
  given = {**variables, "masks": {**auto.masks, **masks}}
  small = fp.compact(
    auto.wrap(step),
    {**given, "cache": empty_cache(SIZES, BATCH, TIME)},
    TOKENS[:, :1],
    state_from=STATE,
  )
  return small, auto.apply(given, TOKENS)


@pytest.mark.parametrize(
  ("shared", "depth", "is_loop"),
  [
    ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]], True),
    ([[1, 0, 1], [0, 1, 0], [0, 0, 1]], [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]], False),
    ([[1, 0, 1], [0, 0, 0], [0, 0, 1]], [[1, 0, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]], False),
    ([[1, 1, 1]] * 3, [[0, 1, 0, 0]] * 3, True),
  ],
)
def test_each_layer_of_a_stack_has_its_own_heads_in_the_cache(shared, depth, is_loop):
  small, expected = stacked({SHARED: jnp.asarray(shared, float), DEPTH: jnp.asarray(depth, float)})
  heads, width = (int(np.sum(mask, 1).max()) for mask in (shared, depth))
  if not np.sum(shared, 1).all():
    width = int(np.sum(depth, 1)[np.sum(shared, 1) > 0].max())  # a layer without heads holds nothing
  assert small.variables["cache"]["k"].shape == (3, BATCH, TIME, heads, 4)
  assert small.variables["cache"]["v"].shape == (3, BATCH, TIME, heads, width)
  assert small.variables["params"]["layers"]["v"].shape == (3, 16, heads, width)
  assert not small.blockers
  np.testing.assert_allclose(decoded(small, TOKENS), expected, rtol=1e-4, atol=1e-5)
  assert ("scan[" in str(jax.make_jaxpr(small)(small.variables, TOKENS[:, :1]))) == is_loop


def test_a_compact_decoder_is_saved_with_its_cache(tmp_path):
  small, expected = stacked({SHARED: jnp.asarray([[1.0, 0, 0], [0, 1, 0], [0, 1, 1]])})
  small.save(tmp_path / "decoder.safetensors", batch=None)  # the cache is for a number of sequences
  loaded = fp.load(tmp_path / "decoder.safetensors")
  np.testing.assert_allclose(decoded(loaded, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_bytes_of_the_cache_are_counted():
  variables = init(SIZES)
  auto = fp.auto_mask(forward, variables, TOKENS)
  cache = empty_cache(SIZES, BATCH, TIME)
  given = {**variables, "masks": auto.masks, "cache": cache}
  memory = fp.cost_model(auto.wrap(step), given, TOKENS[:, :1], measure="memory", state_from=STATE)
  assert memory.exact(auto.masks) == sum(
    leaf.nbytes for leaf in jax.tree.leaves({**variables, "cache": cache})
  )
  masks = {**auto.masks, SHARED: jnp.asarray([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])}
  small, _ = stacked(masks)
  assert memory.exact(masks) == sum(leaf.nbytes for leaf in jax.tree.leaves(small.variables))


class Decoder(nn.Module):
  """A language model of Flax's own attention, with its own cache."""

  decode: bool = False

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(SIZES.vocabulary, 16)(tokens)
    mask = None if self.decode else nn.make_causal_mask(tokens)
    for _ in range(2):
      y = nn.RMSNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(num_heads=4, decode=self.decode)(y, mask=mask)
      x = x + nn.Dense(16)(nn.gelu(nn.Dense(24)(nn.RMSNorm()(x))))
    return nn.Dense(SIZES.vocabulary)(x)


def test_the_cache_of_flax_s_own_attention():
  decoder = Decoder(decode=True)
  variables = Decoder().init(jax.random.key(1), TOKENS)
  cache = decoder.init(jax.random.key(1), TOKENS)["cache"]
  auto = fp.auto_mask(Decoder().apply, variables, TOKENS)
  masks = {name: jnp.arange(mask.size) % 2.0 for name, mask in auto.masks.items()}
  given = {**variables, "masks": masks}
  one = functools.partial(decoder.apply, mutable=["cache"])
  small = fp.compact(auto.wrap(one), {**given, "cache": cache}, TOKENS[:, :1], state_from=lambda out: out[1])
  sizes = {leaf.shape for leaf in jax.tree.leaves(small.variables["cache"]) if leaf.ndim}
  assert sizes == {(BATCH, TIME, 2, 2)}
  np.testing.assert_allclose(decoded(small, TOKENS), auto.apply(given, TOKENS), rtol=1e-4, atol=1e-5)
  assert "cache" in str(small)  # the report ends, though what is returned keeps growing in it
  assert small.blockers == []


CELLS = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell, "simple": nn.SimpleCell}


class Recurrent(nn.Module):
  """A recurrent network of all steps, or of one that starts from a given carry."""

  kind: str

  @nn.compact
  def __call__(self, x, carry=None):
    cell = CELLS[self.kind](features=8, name="cell")
    if carry is None:
      return nn.Dense(3, name="head")(nn.RNN(cell)(x))
    carry, h = cell(carry, x)
    return nn.Dense(3, name="head")(h), carry


@pytest.mark.parametrize("kind", CELLS)
def test_the_carry_of_a_recurrent_step(kind):
  model, x = Recurrent(kind), jax.random.normal(jax.random.key(0), (4, 6, 5))
  variables = model.init(jax.random.key(1), x)
  auto = fp.auto_mask(model.apply, variables, x)
  (group,) = auto.groups
  given = {**variables, "masks": {group.name: jnp.arange(8) % 2.0}}
  carry = CELLS[kind](features=8).initialize_carry(jax.random.key(0), (4, 5))

  def step(variables, x):
    return model.apply({"params": variables["params"]}, x, variables["carry"])

  small = fp.compact(
    auto.wrap(step), {**given, "carry": carry}, x[:, 0], state_from=lambda out: {"carry": out[1]}
  )
  assert {leaf.shape for leaf in jax.tree.leaves(small.variables["carry"])} == {(4, 4)}
  assert not small.blockers
  expected, state = auto.apply(given, x), dict(small.variables)
  for at in range(x.shape[1]):
    y, state["carry"] = small(state, x[:, at])
    np.testing.assert_allclose(y, expected[:, at], rtol=1e-5, atol=1e-6)
  whole = fp.compact(auto.wrap(step), {**given, "carry": carry, "masks": auto.masks}, x[:, 0],
    state_from=lambda out: {"carry": out[1]})  # fmt: skip
  dense = fp.cost_model(auto.apply, {**variables, "masks": auto.masks}, x).dense
  assert whole.cost == pytest.approx(dense / 6, rel=0.02)  # a step reads its carry, which is no constant


@pytest.mark.parametrize("kind", [*CELLS, "attention", "stack"])
def test_the_groups_of_a_step_alone(kind):
  """They are those of the network that reads a whole sequence, and the state shrinks with them."""
  if kind == "stack":
    variables, state, first = init(SIZES), {"cache": empty_cache(SIZES, BATCH, TIME)}, TOKENS[:, :1]
    whole, one, rest = forward, step, TOKENS
  elif kind == "attention":
    decoder, variables = Decoder(decode=True), Decoder().init(jax.random.key(1), TOKENS)
    state = {"cache": decoder.init(jax.random.key(1), TOKENS)["cache"]}
    one = functools.partial(decoder.apply, mutable=["cache"])
    whole, first, rest = Decoder().apply, TOKENS[:, :1], TOKENS
  else:
    model, rest = Recurrent(kind), jax.random.normal(jax.random.key(0), (4, 6, 5))
    variables, whole, first = model.init(jax.random.key(1), rest), model.apply, rest[:, 0]
    state = {"cache": CELLS[kind](features=8).initialize_carry(jax.random.key(0), (4, 5))}
    one = lambda v, x: model.apply({"params": v["params"]}, x, v["cache"])
  state_from = (lambda out: out[1]) if kind == "attention" else STATE
  known = fp.auto_mask(whole, variables, rest)
  auto = fp.auto_mask(one, {**variables, **state}, first, state_from=state_from)
  assert [(g.name, g.size, g.rows) for g in auto.groups] == [(g.name, g.size, g.rows) for g in known.groups]
  assert {path.split("/")[0] for g in auto.groups for path, _ in g.members} == {"params", "cache"}
  masks = {g.name: jnp.broadcast_to(jnp.arange(g.size) % 2.0, (*g.rows, g.size)) for g in auto.groups}
  small = auto.compact({**variables, **state, "masks": masks})
  assert small.cost < 0.5 * auto.cost().dense
  assert not small.blockers
  if kind in ("attention", "stack"):
    found = decoded(small, TOKENS)
    np.testing.assert_allclose(
      found, known.apply({**variables, "masks": masks}, TOKENS), rtol=1e-4, atol=1e-5
    )


class Norms(nn.Module):
  """Layers in a loop, with batch statistics."""

  train: bool = False

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):
      train: bool

      @nn.compact
      def __call__(self, x):
        y = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(nn.Dense(6)(x))
        return x + nn.Dense(4)(fp.Mask()(nn.relu(y))), None

    axes = {"params": 0, "batch_stats": 0, "masks": 0}
    layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
    return layers(self.train)(x)[0]


def test_batch_statistics_of_layers_in_a_loop():
  x = jax.random.normal(jax.random.key(0), (5, 4))
  given = Norms().init(jax.random.key(1), x)
  rows = jnp.asarray([[1.0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
  given = {**given, "masks": jax.tree.map(lambda _: rows, given["masks"])}
  train = functools.partial(Norms(train=True).apply, mutable=["batch_stats"])
  small = fp.compact(train, given, x, state_from=lambda out: out[1])
  assert {leaf.shape for leaf in jax.tree.leaves(small.variables["batch_stats"])} == {(3, 2)}
  (y, new), (expected, stats) = small(small.variables, x), train(given, x)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    new["batch_stats"],
    small.shrink(stats["batch_stats"]),
  )


def test_the_benchmark_runs(capsys):
  (dense, *others) = decoding.measured(decoding.TINY, 2, 16, {"flops": 0.6, "bytes": 0.9}, repeats=1)
  assert all(row["tokens_per_second"] > 0 for row in (dense, *others))
  assert all(row["weights_mb"] < dense["weights_mb"] for row in others)
