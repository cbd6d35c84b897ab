"""Training with Linen's lifted transformations: written as a loop, scanned, rematerialised or mapped, it is one network."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherprune_jax as fp

LAYERS, WIDTH, BATCH, STEPS = 3, 8, 6, 10
AXES = {"params": 0, "masks": 0, "batch_stats": 0}


class Block(nn.Module):
  """A residual layer with batch statistics, a mask and dropout."""

  train: bool
  rate: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
    y = nn.BatchNorm(use_running_average=not self.train, name="norm")(nn.Dense(WIDTH, name="inner")(x))
    y = nn.Dropout(self.rate, deterministic=not self.train)(nn.relu(y))
    return x + nn.Dense(WIDTH, name="outer")(fp.Mask(name="mask")(y)), None


class Network(nn.Module):
  """Three blocks, stacked in one of several ways."""

  kind: str
  train: bool = True
  rate: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Dense(WIDTH, name="in")(x)
    rngs = {"params": True, "dropout": True}
    if self.kind == "loop":
      for n in range(LAYERS):
        x, _ = Block(self.train, self.rate, name=f"block{n}")(x)
    elif self.kind == "vmap":  # members of an ensemble, side by side
      mapped = nn.vmap(Block, variable_axes=AXES, split_rngs=rngs, in_axes=(None, None), axis_size=LAYERS)
      x = jnp.mean(mapped(self.train, self.rate, name="blocks")(x, None)[0], axis=0)
    else:
      block = nn.remat(Block) if self.kind == "scan of remat" else Block
      scanned = nn.scan(block, variable_axes=AXES, split_rngs=rngs, length=LAYERS)
      x, _ = scanned(self.train, self.rate, name="blocks")(x, None)
    return nn.Dense(1, name="out")(x)


def stacked(tree):
  """A tree of ``block0``, ``block1``, ... as one of ``blocks`` with a leading axis."""
  blocks = [tree[f"block{n}"] for n in range(LAYERS)]
  rest = {name: leaf for name, leaf in tree.items() if not name.startswith("block")}
  return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def batch(n):
  rng = np.random.default_rng(n)
  return rng.normal(size=(BATCH, 4)).astype(np.float32), rng.normal(size=(BATCH, 1)).astype(np.float32)


def create(model, variables):
  served = model.copy(train=False)
  cost = fp.cost_model(served.apply, variables, jnp.ones((2, 4)))
  tx = optax.chain(optax.adam(1e-2), fp.fisher_prune(cost, prune_every=2))
  fields = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
  return fp.TrainState.create(apply_fn=model.apply, tx=tx, **fields)


def train_step(state, batch):
  def loss_fn(params, masks, batch, rng):
    variables = {"params": params, "masks": masks, "batch_stats": state.batch_stats}
    y, new = state.apply_fn(variables, batch[0], mutable=["batch_stats"], rngs={"dropout": rng})
    return jnp.mean((y - batch[1]) ** 2), new["batch_stats"]

  rng = jax.random.fold_in(jax.random.key(7), state.step)
  grads_of = fp.value_and_mask_grads(loss_fn, has_aux=True)
  (loss, stats), (grads, mask_grads) = grads_of(state.params, state.masks, batch, rng)
  return state.apply_gradients(grads=grads, mask_grads=mask_grads, batch_stats=stats), loss


def trained(kind, variables, **options):
  state, traces = create(Network(kind, **options), variables), []

  @jax.jit
  def step(*args):
    traces.append(1)
    return train_step(*args)

  for n in range(STEPS):
    state, _ = step(state, batch(n))
  assert len(traces) == 1
  return state


def close(a, b):
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def loop():
  variables = Network("loop").init(jax.random.key(0), jnp.ones((2, 4)))
  return variables, trained("loop", variables)


@pytest.mark.parametrize("kind", ["scan", "scan of remat"])
def test_stacked_layers_train_and_prune_as_a_loop_of_layers(kind, loop):
  variables, expected = loop
  state = trained(kind, {name: stacked(tree) for name, tree in variables.items()})
  masks = stacked(expected.masks)
  close(state.masks, masks)
  close(state.params, stacked(expected.params))
  close(state.batch_stats, stacked(expected.batch_stats))
  assert float(sum(map(jnp.sum, jax.tree.leaves(masks)))) == LAYERS * WIDTH - STEPS // 2
  pairs = zip(fp.history(state.opt_state), fp.history(expected.opt_state), strict=True)
  assert all((a.step, a.feature) == (b.step, b.feature) for a, b in pairs)


@pytest.mark.parametrize("kind", ["loop", "scan", "scan of remat", "vmap"])
def test_with_dropout_it_trains_prunes_and_compacts(kind):
  model = Network(kind, rate=0.3)
  variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, jnp.ones((2, 4)))
  state = trained(kind, variables, rate=0.3)
  again = trained(kind, variables, rate=0.3)
  jax.tree.map(np.testing.assert_array_equal, state.variables, again.variables)
  assert len(fp.history(state.opt_state)) == STEPS // 2
  assert not np.allclose(*(jax.tree.leaves(s)[0] for s in (state.batch_stats, variables["batch_stats"])))

  served, x = model.copy(train=False), jnp.asarray(batch(0)[0])
  small = fp.compact(served.apply, state.variables, x)
  np.testing.assert_allclose(
    small(small.variables, x), served.apply(state.variables, x), rtol=1e-5, atol=1e-6
  )
  assert small.cost == float(fp.get_state(state.opt_state).cost)
  if kind == "loop":  # stacks are padded to the widest of their layers
    sizes = [sum(p.size for p in jax.tree.leaves(v["params"])) for v in (small.variables, state.variables)]
    assert sizes[0] < sizes[1]
