"""Masks beside modules of ``flax.nnx`` that hold none: state, modes, training, compaction, the user's class again."""

import dataclasses
import functools
import io
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fisherprune_jax as fp
from tests.test_criteria import scores_of, share

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(16, 6, 6, 2)).astype(np.float32)
LABELS = np.arange(16) % 3
TOKENS = np.arange(12).reshape(2, 6) % 11


class Conv(nnx.Module):
  """Nothing here knows of pruning."""

  def __init__(self, rngs):
    self.conv1, self.norm = nnx.Conv(2, 6, (3, 3), rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
    self.conv2 = nnx.Conv(6, 5, (3, 3), strides=2, rngs=rngs)
    self.dense1, self.dense2 = nnx.Linear(45, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
    self.drop = nnx.Dropout(0.2, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv1(x)))
    x = nnx.relu(self.conv2(x))
    return self.dense2(self.drop(nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))))


class ByHand(Conv):
  """The same with masks in it, as the book says."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.mask1, self.mask2, self.mask3 = fp.nnx.Mask(6), fp.nnx.Mask(5), fp.nnx.Mask(7)

  def __call__(self, x):
    x = self.mask1(nnx.relu(self.norm(self.conv1(x))))
    x = self.mask2(nnx.relu(self.conv2(x)))
    return self.dense2(self.drop(self.mask3(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))))


BY_HAND = {"conv1": "mask1", "conv2": "mask2", "dense1": "mask3"}


def switch(masked, seed=0):
  """Random masks, none of which is empty."""
  random = np.random.default_rng(seed)
  for name in masked.masks:
    mask = random.integers(0, 2, masked.masks[name].shape).astype(np.float32)
    mask[..., 0] = 1
    masked.masks[name][...] = jnp.asarray(mask)


def masked_conv():
  model = Conv(nnx.Rngs(0))
  model.eval()
  return fp.nnx.auto_mask(model, X)


def test_groups_are_named_after_the_layers_that_make_them():
  masked = masked_conv()
  assert [(group.name, group.size) for group in masked.groups] == [("conv1", 6), ("conv2", 5), ("dense1", 7)]
  assert masked.groups[0].members == (
    ("params/conv1/bias", 0),
    ("params/conv1/kernel", 3),
    ("params/conv2/kernel", 2),
    ("params/norm/bias", 0),
    ("params/norm/scale", 0),
    ("state/norm/mean", 0),
    ("state/norm/var", 0),
  )
  assert {name: masked.masks[name].shape for name in masked.masks} == {
    "conv1": (6,),
    "conv2": (5,),
    "dense1": (7,),
  }
  assert all(isinstance(masked.masks[name], fp.nnx.MaskVariable) for name in masked.masks)
  assert ("params/dense2/bias", 0, 3, "it reaches an output") in masked.skipped
  assert "conv1" in str(masked)
  assert "it reaches an output" in str(masked)


def test_it_is_the_model_and_no_copy():
  model = Conv(nnx.Rngs(0))
  masked = fp.nnx.auto_mask(model, X)
  assert masked.model is model
  masked.eval()
  assert model.norm.use_running_average
  assert model.drop.deterministic
  masked.train()
  assert not model.norm.use_running_average


def test_state_changes_as_before():
  """With all-ones masks: outputs, batch statistics and random streams are those of the model itself."""
  model, masked = Conv(nnx.Rngs(0)), masked_conv()
  masked.train()
  for _ in range(3):
    np.testing.assert_allclose(masked(X), model(X), rtol=1e-5, atol=1e-6)
  before, after = (nnx.to_pure_dict(nnx.state(m)) for m in (model, masked.model))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(*map(_plain, (a, b)), rtol=1e-5), before, after)
  assert int(masked.model.drop.rngs.count[...]) == 3


def _plain(x):
  return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_masks_do_what_masks_by_hand_do():
  masked, other = masked_conv(), ByHand(nnx.Rngs(0))
  other.eval()
  switch(masked)
  for name, by_hand in BY_HAND.items():
    getattr(other, by_hand).mask[...] = masked.masks[name][...]
  np.testing.assert_allclose(masked(X), other(X), rtol=1e-5, atol=1e-6)
  ours, theirs = fp.nnx.cost_model(masked, X), fp.nnx.cost_model(other, X)
  assert ours.dense == theirs.dense
  differentiate = nnx.jit(fp.nnx.value_and_mask_grads(loss_of))
  (value, (grads, mask_grads)), (wanted, (by_hand_grads, by_hand_mask_grads)) = (
    differentiate(m, (X, LABELS)) for m in (masked, other)
  )
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  pairs = zip(*map(jax.tree.leaves, (grads["model"], by_hand_grads)), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  for name, by_hand in BY_HAND.items():
    found = mask_grads["masks"][name]
    assert found.shape == (16, masked.masks[name].shape[0])
    alive = masked.masks[name][...] > 0
    wanted = by_hand_mask_grads[by_hand]["mask"]
    np.testing.assert_allclose(found[:, alive], wanted[:, alive], rtol=1e-4, atol=1e-6)


def loss_of(model, batch):
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]))


TRACES = []


@nnx.jit
def step(model, optimizer):
  TRACES.append(1)
  loss, (grads, mask_grads) = fp.nnx.value_and_mask_grads(loss_of)(model, (X, LABELS))
  optimizer.update(model, grads, mask_grads=mask_grads)
  return loss


@functools.cache
def first_training():
  """To 30 % of the FLOPs, one feature a step."""
  masked = masked_conv()
  cost = fp.nnx.cost_model(masked, X)
  masked.train()
  tx = fp.pruning_sgd(0.1, cost, prune_every=1, flops_target=0.3 * cost.dense)
  optimizer = fp.nnx.Optimizer(masked, tx, wrt=nnx.Param)
  for _ in range(12):
    step(masked, optimizer)
  return masked, optimizer


def trained():
  """A module in training mode, and its optimizer."""
  return nnx.clone(first_training())


def test_training_prunes_to_the_target_and_traces_once():
  masked, optimizer = trained()
  assert len(TRACES) == 1
  cost = fp.nnx.cost_model(masked_conv(), X)
  state = fp.get_state(optimizer.opt_state)
  assert float(state.cost) <= 0.3 * cost.dense
  for name in masked.masks:
    np.testing.assert_array_equal(masked.masks[name][...], state.masks["masks"][name])
  assert "masks/conv1" in fp.summary(optimizer.opt_state)
  assert float(jnp.abs(masked.model.norm.mean[...]).max()) > 0


def test_criteria_find_the_parameters_in_a_module():
  """Norms by hand, and Fisher's importance in the order of both ranks, of norms as far as few examples have gradients."""
  found = {}
  for method in ("fisher", "magnitude", "fisher_magnitude"):
    masked = masked_conv()
    cost = fp.nnx.cost_model(masked, X)
    _, (_, mask_grads) = fp.nnx.value_and_mask_grads(loss_of)(masked, (X, LABELS))
    scores = scores_of(method, cost, nnx.state(masked, nnx.Param), cost.masks, mask_grads)
    found[method] = np.asarray(scores["masks"]["dense1"])
  model = masked_conv().model
  into, out = model.dense1, model.dense2
  squares = jnp.square(into.kernel[...]).sum(0) + into.bias[...] ** 2 + jnp.square(out.kernel[...]).sum(1)
  norms = np.sqrt(squares)
  np.testing.assert_allclose(found["magnitude"], norms / norms.mean(), rtol=1e-5)
  by_loss, by_norm = (np.argsort(np.argsort(x)) for x in (found["fisher"], norms))
  expected = np.empty_like(norms)
  few = 1 - share(mask_grads["masks"]["dense1"], np.ones(len(X)))
  expected[np.lexsort((by_loss, by_loss + few**2 * by_norm))] = np.sort(found["fisher"])
  np.testing.assert_allclose(found["fisher_magnitude"], expected, rtol=1e-6)


@nnx.jit
def plain_step(model, optimizer):
  loss, grads = nnx.value_and_grad(loss_of)(model, (X, LABELS))
  optimizer.update(model, grads)
  return loss


def test_the_users_own_class_comes_back_and_trains_on():
  """Down to the target, then both go on: without dropout they take the same steps."""
  masked, optimizer = trained()
  masked.eval()
  small = fp.nnx.compact(masked, X)
  np.testing.assert_allclose(small(small.variables, X), masked(X), rtol=1e-4, atol=1e-5)
  thin = fp.nnx.shrink_module(small, masked, X)
  assert type(thin) is Conv
  assert thin.conv1.kernel.shape[-1] == int(masked.masks["conv1"][...].sum()) < 6
  np.testing.assert_allclose(thin(X[:3]), masked(X[:3]), rtol=1e-4, atol=1e-5)
  thinner = fp.nnx.shrink_optimizer(small, thin, optimizer)
  assert int(thinner.step[...]) == int(optimizer.step[...])
  for model in (thin, masked):
    model.train()
    model.set_attributes(nnx.Dropout, deterministic=True)
  for _ in range(5):
    np.testing.assert_allclose(plain_step(thin, thinner), step(masked, optimizer), rtol=1e-3)
  alive = np.flatnonzero(masked.masks["conv1"][...])
  np.testing.assert_allclose(masked.model.norm.mean[...][alive], thin.norm.mean[...], rtol=1e-3, atol=1e-5)


def test_a_compact_module_trains_on():
  masked, optimizer = trained()
  small = fp.nnx.compact(masked, X, mutable=True)
  thin = fp.nnx.module(small, masked)
  thinner = fp.nnx.shrink_optimizer(small, thin, optimizer)
  for _ in range(5):
    np.testing.assert_allclose(plain_step(thin, thinner), step(masked, optimizer), rtol=1e-3)
  assert type(thin.model) is Conv
  assert not jax.tree.leaves(nnx.state(thin, fp.nnx.MaskVariable))


def test_masks_that_are_kept_can_be_pruned_on():
  masked, _ = trained()
  masked.eval()
  thin = fp.nnx.module(fp.nnx.compact(masked, X, keep_masks=True), masked)
  cost = fp.nnx.cost_model(thin, X)
  assert cost.dense == fp.nnx.compact(masked, X).cost
  grads = fp.nnx.value_and_mask_grads(loss_of)(thin, (X, LABELS))[1][1]
  assert grads["masks"]["conv1"].shape == (16, int(masked.masks["conv1"][...].sum()))


def test_what_shrank_is_pruned_on_by_new_masks():
  masked, _ = trained()
  masked.eval()
  thin = fp.nnx.shrink_module(fp.nnx.compact(masked, X), masked, X)
  again = fp.nnx.auto_mask(thin, X)
  left = {name: int(masked.masks[name][...].sum()) for name in ("conv1", "conv2", "dense1")}
  assert {group.name: group.size for group in again.groups} == {name: n for name, n in left.items() if n > 1}
  np.testing.assert_allclose(again(X), masked(X), rtol=1e-4, atol=1e-5)


def test_masks_and_weights_come_back_from_a_checkpoint():
  """What is written is the state; it goes into another module that was masked alike."""
  masked, _ = trained()
  masked.eval()
  written = io.BytesIO()
  arrays = {jax.tree_util.keystr(p): np.asarray(_plain(x)) for p, x in leaves_of(masked)}
  np.savez(written, **arrays)
  other = masked_conv()
  written.seek(0)
  read = np.load(written)
  fresh = jax.tree_util.tree_map_with_path(
    lambda p, x: jnp.asarray(read[jax.tree_util.keystr(p)]) if x.dtype != jax.random.key(0).dtype else x,
    nnx.to_pure_dict(nnx.state(other)),
  )
  nnx.update(other, fresh)
  np.testing.assert_array_equal(other(X), masked(X))
  assert float(other.masks["conv1"][...].sum()) < 6


def leaves_of(model):
  return jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))


class Block(nnx.Module):
  def __init__(self, width, rngs):
    self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(4, width, dropout_rate=0.1, decode=False, rngs=rngs)
    self.up, self.down = nnx.Linear(width, 24, rngs=rngs), nnx.Linear(24, width, rngs=rngs)

  def __call__(self, x, mask=None):
    x = x + self.attention(self.norm1(x), mask=mask)
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
  def __init__(self, rngs):
    self.embed, self.head = nnx.Embed(11, 16, rngs=rngs), nnx.Linear(16, 11, rngs=rngs)
    self.blocks = nnx.List([Block(16, rngs)])

  def __call__(self, tokens, mask=None):
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x, mask)
    return self.head(x)


def test_heads_streams_and_keyword_arguments():
  model = Transformer(nnx.Rngs(0))
  model.eval()
  masked = fp.nnx.auto_mask(model, TOKENS)
  widths = {group.name: group.size for group in masked.groups}
  assert widths["embed"] == 16
  assert [
    widths[f"blocks/0/{name}"] for name in ("attention/query.heads", "attention/query.depth", "up")
  ] == [
    4,
    4,
    24,
  ]
  causal = nnx.make_causal_mask(TOKENS)
  np.testing.assert_allclose(masked(TOKENS, mask=causal), model(TOKENS, mask=causal), rtol=1e-5, atol=1e-6)
  switch(masked)
  small = fp.nnx.compact(masked, TOKENS)
  np.testing.assert_allclose(small(small.variables, TOKENS), masked(TOKENS), rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r"got Transformer: it (fails|gives|s outputs)"):
    fp.nnx.shrink_module(small, masked, TOKENS)  # the number of heads is an attribute
  masked.train()
  differentiate = nnx.jit(fp.nnx.value_and_mask_grads(lambda model, tokens: jnp.mean(model(tokens) ** 2)))
  mask_grads = differentiate(masked, TOKENS)[1][1]
  assert mask_grads["masks"]["blocks/0/attention/query.heads"].shape == (2, 4)


class Normed(nnx.Module):
  """A layer norm divides by the width that it sees: with fewer features it is called without complaint, and is wrong."""

  def __init__(self, rngs):
    self.first, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
    self.norm = nnx.LayerNorm(6, rngs=rngs)

  def __call__(self, x):
    return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_class_that_computes_something_else_is_refused(hidden):
  """Also where a last layer of zeros hides it."""
  model, x = Normed(nnx.Rngs(0)), X[:, 0, :2, :].reshape(16, 4)
  if hidden:
    model.last.kernel[...] = jnp.zeros((6, 3))
  masked = fp.nnx.auto_mask(model, x)
  masked.masks["first"][...] = jnp.array([1.0, 0, 1, 1, 0, 1])
  small = fp.nnx.compact(masked, x)
  with pytest.raises(ValueError, match="got Normed: its outputs differ by"):
    fp.nnx.shrink_module(small, masked, x)
  np.testing.assert_allclose(fp.nnx.module(small, masked)(x), masked(x), rtol=1e-5, atol=1e-6)


def test_a_module_with_masks_of_its_own_shrinks_too():
  model = ByHand(nnx.Rngs(0))
  model.eval()
  model.mask1.mask[...] = jnp.array([1.0, 0, 1, 0, 1, 1])
  thin = fp.nnx.shrink_module(fp.nnx.compact(model, X, keep_masks=True), model, X)
  assert thin.conv1.kernel.shape == (3, 3, 2, 4)
  np.testing.assert_allclose(thin(X), model(X), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="needs keep_masks=True"):
    fp.nnx.shrink_module(fp.nnx.compact(model, X), model, X)


class Decoder(nnx.Module):
  def __init__(self, rngs):
    self.embed, self.head = nnx.Embed(11, 16, rngs=rngs), nnx.Linear(16, 11, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(4, 16, decode=True, rngs=rngs)

  def __call__(self, tokens):
    return self.head(self.attention(self.embed(tokens)))


def test_caches_are_written_and_shrink():
  model = Decoder(nnx.Rngs(0))
  model.attention.init_cache((2, 6, 16))
  other = nnx.clone(model)
  masked = fp.nnx.auto_mask(model, TOKENS[:, :1])
  group = next(group for group in masked.groups if group.name == "attention/query.heads")
  assert ("state/attention/cached_key", 2) in group.members
  for at in range(3):
    token = TOKENS[:, at : at + 1]
    np.testing.assert_allclose(masked(token), other(token), rtol=1e-5, atol=1e-6)
  assert int(model.attention.cache_index[...]) == 3
  np.testing.assert_allclose(
    model.attention.cached_value[...], other.attention.cached_value[...], rtol=1e-5, atol=1e-6
  )
  model.attention.init_cache((2, 6, 16))
  switch(masked)
  small = fp.nnx.compact(masked, TOKENS[:, :1], mutable=True)
  thin = fp.nnx.module(small, masked)
  heads = int(masked.masks["attention/query.heads"][...].sum())
  assert thin.model.attention.cached_key.shape[:3] == (2, 6, heads)
  for at in range(3):
    token = TOKENS[:, at : at + 1]
    np.testing.assert_allclose(thin(token), masked(token), rtol=1e-5, atol=1e-6)


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.relu(self.up(x)))


class Stack(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.vmap(Layer)(rngs.split(3))

  def __call__(self, x):
    return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_stacked_layers_have_a_row_each():
  model, x = Stack(nnx.Rngs(0)), X[:, 0, :2, :].reshape(16, 4)
  masked = fp.nnx.auto_mask(model, x)
  assert masked.masks["layers/up"].shape == (3, 6)
  np.testing.assert_allclose(masked(x), model(x), rtol=1e-6, atol=1e-6)
  grads = nnx.jit(fp.nnx.value_and_mask_grads(lambda m, x: jnp.mean(m(x))))(masked, x)[1][1]
  assert grads["masks"]["layers/up"].shape == (3, 16, 6)
  switch(masked)
  small = fp.nnx.compact(masked, x)
  widths = masked.masks["layers/up"][...].sum(axis=1)
  assert small.cost == sum(w * 7 + w + w + 4 * (2 * w - 1) + 4 + 4 for w in map(int, widths))
  np.testing.assert_allclose(small(small.variables, x), masked(x), rtol=1e-5, atol=1e-6)


class Encoder(nnx.Module):
  def __init__(self, rngs):
    self.first, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

  def encode(self, x, scale=1.0):
    return scale * self.last(jnp.tanh(self.first(x)))


def test_another_method_can_be_called():
  model, x = Encoder(nnx.Rngs(0)), X[:, 0, :2, :].reshape(16, 4)
  masked = fp.nnx.auto_mask(model, x, call=Encoder.encode)
  np.testing.assert_allclose(masked(x, scale=2.0), model.encode(x, 2.0), rtol=1e-6)
  switch(masked)
  thin = fp.nnx.shrink_module(fp.nnx.compact(masked, x), masked, x)
  np.testing.assert_allclose(thin.encode(x), masked(x), rtol=1e-5)


def test_examples_along_another_axis():
  model = Encoder(nnx.Rngs(0))
  x = RANDOM.normal(size=(5, 16, 4)).astype(np.float32)
  masked = fp.nnx.auto_mask(model, x, call=Encoder.encode, batch_axes=1)
  loss = lambda m, batch: jnp.sum(m(jnp.swapaxes(batch, 0, 1)))
  mask_grads = fp.nnx.value_and_mask_grads(loss, reduction="sum")(masked, jnp.swapaxes(x, 0, 1))[1][1]
  assert mask_grads["masks"]["first"].shape == (16, 6)
  one = fp.nnx.value_and_mask_grads(loss, reduction="sum")(masked, jnp.swapaxes(x, 0, 1)[3:4])[1][1]
  np.testing.assert_allclose(mask_grads["masks"]["first"][3], one["masks"]["first"][0], rtol=1e-5)


def test_chosen_groups_and_blocks():
  model = Conv(nnx.Rngs(0))
  masked = fp.nnx.auto_mask(model, X, select=["conv1"])
  assert list(masked.masks) == ["conv1"]
  assert [group.name for group in masked.groups] == ["conv1"]


class Sown(nnx.Module):
  def __init__(self, rngs):
    self.first, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.first(x))
    self.sow(nnx.Intermediate, "hidden", x)
    return self.last(x)


def test_variables_that_a_call_makes_are_there_afterwards():
  model, x = Sown(nnx.Rngs(0)), X[:, 0, :2, :].reshape(16, 4)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of ``sow`` outside of ``nnx.capture``
    masked = fp.nnx.auto_mask(model, x)
    masked(x)
    masked(x)
  assert [h.shape for h in model.hidden.get_value()] == [(16, 6), (16, 6)]


@pytest.mark.parametrize(
  ("function", "error", "match"),
  [
    (lambda: fp.nnx.auto_mask(lambda x: x, X), TypeError, "must be an nnx.Module"),
    (
      lambda: fp.nnx.auto_mask(ByHand(nnx.Rngs(0)), X),
      ValueError,
      r"holds no masks, got one with some at \['mask1'",
    ),
    (lambda: fp.nnx.auto_mask(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), X), ValueError, "something to prune"),
    (lambda: fp.nnx.auto_mask(Conv(nnx.Rngs(0)), X, select=["conv9"]), ValueError, "names of groups"),
  ],
)
def test_errors_say_what_is_required(function, error, match):
  with pytest.raises(error, match=match):
    function()


@dataclasses.dataclass  # with __eq__, so without __hash__
class Config:
  width: int = 6
  scale: float = 1.0


class Configured(nnx.Module):
  """It holds what cannot be hashed."""

  def __init__(self, rngs):
    self.config, self.names, self.table = Config(), ["first", "last"], {"scale": 1.0}
    self.first = nnx.Linear(4, self.config.width, rngs=rngs)
    self.last = nnx.Linear(self.config.width, 2, rngs=rngs)

  def __call__(self, x):
    return self.last(nnx.relu(self.first(x))) * self.config.scale


def test_a_module_may_hold_what_cannot_be_hashed_and_may_change():
  model, x = Configured(nnx.Rngs(0)), jnp.ones((3, 4))
  masked = fp.nnx.auto_mask(model, x)
  for scale in (1.0, 3.0):
    model.config.scale = scale
    np.testing.assert_allclose(masked(x), model(x), rtol=1e-5)
  loss = lambda masked, x: jnp.mean(masked(x) ** 2)
  grads = fp.nnx.value_and_mask_grads(loss)(masked, x)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
  assert fp.nnx.cost_model(masked, x).dense > 0
  masked.masks["first"][...] = jnp.array([1.0, 0, 1, 0, 1, 1])
  small = fp.nnx.compact(masked, x)
  np.testing.assert_allclose(small(small.variables, x), masked(x), rtol=1e-5)
