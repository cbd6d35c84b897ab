"""How the encoder is trained: the dense network with masks, which is pruned, then the compact one."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import optax
from pretrained_encoder.network import Encoder
from pretrained_encoder.results import cosine
from pretrained_encoder.teacher import BATCH, LENGTH, Sentences, batch_at, embed

import fisherprune_jax as fp

RATE, WEIGHT_DECAY = 5e-4, 0.01
NOISE = 0.015  # in every coordinate of the targets while pruning, see ``loss_fn``
PRUNED_BY, COMPACT_AT = 0.25, 0.28
"""Of the steps: when the cost is at the target, and when masked features are removed."""
EVERY = 10  # steps from one pruning step to the next


class Pruned(NamedTuple):
  """The masks, the compact network as it was trained, and the way there.

  Attributes:
    difference: the largest difference between masked and compact outputs.
  """

  masks: Any
  small: fp.Compact
  run: common.Run
  difference: float


def encoder_of(model: Encoder) -> Callable[..., jax.Array]:
  """The network as a function of two collections, ``params`` and ``frozen``.

  The table of words is frozen: a batch sees few of its rows.
  """

  def encode(variables: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model.apply({"params": {**variables["params"], **variables["frozen"]}}, ids, mask)

  return encode


def pruner_of(encode: Callable[..., jax.Array], variables: Any, keep: float, steps: int) -> fp.Pruner:
  start = steps // 50
  return fp.Pruner(
    encode,
    variables,
    *[jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)] * 2,
    keep=keep,
    start=start,
    stop=max(start + 1, int(PRUNED_BY * steps)),
    every=min(EVERY, max(1, steps // 50)),
  )


def loss_fn(encode: Callable[..., jax.Array], params: Any, frozen: Any, batch: Any) -> jax.Array:
  """Nats of the teacher's embeddings, normally distributed around the student's with deviation NOISE.

  At first the student equals the teacher: the loss has no gradients, and Fisher importance is zero. With noise in the
  targets, the mean squared gradient is Fisher information. So targets are noisy while features are pruned.
  """
  *tokens, targets = batch
  errors = encode({"params": params, "frozen": frozen}, *tokens) - targets
  return jnp.mean(jnp.sum(errors**2, axis=-1)) / (2 * NOISE**2)


def prune(
  encode: Callable[..., jax.Array],
  pruner: fp.Pruner,
  variables: Any,
  sentences: dict[str, Sentences],
  seed: int,
  job: common.Job,
) -> Pruned:
  """Trains while pruning, compacts, and continues with the optimizer state."""
  rate = optax.warmup_cosine_decay_schedule(0.0, RATE, max(1, job.steps // 20), job.steps)
  tx = pruner.wrap(optax.adamw(rate, b2=0.98, weight_decay=WEIGHT_DECAY))
  frozen, middle, validation = variables["frozen"], int(COMPACT_AT * job.steps), sentences["validation"]

  def agreement(network: Callable[..., jax.Array]) -> Callable[..., float]:
    compiled = jax.jit(network)
    return lambda *given: cosine(embed(partial(compiled, *given), validation), validation)

  def batches(noise: float) -> Callable[[int], Any]:
    return lambda n: (frozen, batch_at(sentences["train"], noise, seed, n))

  def masked(params: Any, opt_state: Any, *tokens: jax.Array) -> jax.Array:
    return pruner.apply({"params": params, "frozen": frozen}, opt_state, *tokens)

  score = agreement(masked)
  run = job.begin(jax.tree.map(jnp.array, variables["params"]), tx, ("cosine", "flops"))
  run = job.fit(
    "pruning",
    run,
    common.train_step(pruner.value_and_grad(partial(loss_fn, encode)), tx),
    batches(NOISE),
    lambda params, state: {"cosine": score(params, state), "flops": fp.get_state(state).cost},
    pruner.metrics,
    last=middle,
  )
  masks, tokens = pruner.masks(run.opt_state), [x[:BATCH] for x in validation[:2]]
  small = pruner.compact({"params": run.params, "frozen": frozen}, run.opt_state)
  difference = common.largest_difference(
    masked(run.params, run.opt_state, *tokens), small(small.variables, *tokens)
  )

  frozen, score = small.variables["frozen"], agreement(small)
  run = run._replace(params=small.variables["params"], opt_state=small.shrink_opt_state(tx, run.opt_state))
  run = job.fit(
    "distilling",
    run,
    common.train_step(common.without_masks(partial(loss_fn, small)), tx),
    batches(0.0),
    lambda params, state: {"cosine": score({"params": params, "frozen": frozen}), "flops": small.cost},
    first=middle,
  )
  small.variables = {"params": run.params, "frozen": frozen}  # what is exported
  return Pruned(masks, small, run, difference)
