"""Pruning of a trained network without training: ``Pruner.one_shot``."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherprune_jax._cost.cost import CostModel
from fisherprune_jax._errors import describe, require
from fisherprune_jax._graph.variables import VariableTree
from fisherprune_jax._masks import COLLECTION
from fisherprune_jax._pruner.blocks import with_blocks
from fisherprune_jax._reconstruction.balancing import balanced
from fisherprune_jax._reconstruction.calibration import Arguments, arguments, is_held_out, listed, parted
from fisherprune_jax._reconstruction.fitting import Fit
from fisherprune_jax._reconstruction.importance import refitted_importance, stride
from fisherprune_jax._reconstruction.reconstruct import warn_of
from fisherprune_jax._reconstruction.regression import squared_error
from fisherprune_jax._training.criterion import Criterion
from fisherprune_jax._training.estimation import OUTPUTS, estimate_importance, floating
from fisherprune_jax._training.once import ALLOWED, select_masks
from fisherprune_jax._types import ApplyFn, Masks, Progress, PyTree

POWERS = (1.5, 0.75)
"""Candidates rank by powers of the importance over the cost too: above 1, costs count less."""
MOST_CANDIDATES = 2 * (1 + len(POWERS))


class Network(NamedTuple):
  """What is pruned.

  Attributes:
    apply_fn: ``apply_fn(variables, *args)``, with masks among the variables.
    variables: the dense network's, with masks of ones.
    arguments: how many arguments there are besides the variables.
    cost: the cost model.
    targets: the costs to come down to.
    method: the criterion of a loss.
    options: of :func:`fisher_prune`.
  """

  apply_fn: ApplyFn
  variables: dict[str, PyTree]
  arguments: int
  cost: CostModel
  targets: Sequence[float]
  method: str | Criterion
  options: Mapping[str, Any]


class Result(NamedTuple):
  """A pruned network: all its variables, and its masks."""

  variables: dict[str, PyTree]
  masks: Masks


def one_shot(
  network: Network,
  batches: Iterable[PyTree],
  masked_loss: Callable[..., Any] | None,
  refits: bool,
  candidates: int,
  score: Callable[[Result], float] | None,
  progress: Progress | None,
) -> list[Result]:
  """The pruned network for each target.

  Args:
    network: what is pruned.
    batches: arguments, or tuples that begin with them.
    masked_loss: ``loss(variables, masks, batch)``, or None for the importance of the outputs.
    refits: whether the parameters that read masked features are refitted.
    candidates: how many ways of choosing features are tried.
    score: how good a result is; None for the error of the outputs on batches that are held out.
    progress: as of :func:`reconstruct`.
  """
  require(1 <= candidates <= MOST_CANDIDATES, f"candidates must be from 1 to {MOST_CANDIDATES}", candidates)
  raw = listed(batches)
  calls = [_call(arguments(batch), network.arguments) for batch in raw]
  fitted = calls
  if candidates > 1 and score is None:
    fitted = [args for number, args in enumerate(calls) if not is_held_out(number, len(calls))]
    held = [args for number, args in enumerate(calls) if is_held_out(number, len(calls))]
    score = _closeness(network, held or calls)
  fit, some = None, fitted
  if refits:
    parts = parted(network.apply_fn, network.variables, fitted)
    fit = Fit(network.apply_fn, VariableTree(network.variables, COLLECTION), parts)
    warn_of(fit.left_alone)
    network = network._replace(variables=balanced(fit.traced[0], network.variables, fit.compiled))
    some = fitted[:: stride(fit.traced[0])]
  alone = _alone(network, raw if masked_loss else some, masked_loss)
  found: list[list[tuple[float, Result]]] = [[] for _ in network.targets]
  harm = functools.partial(_harm, network, raw[0], fitted[0], masked_loss)
  blocks = with_blocks(network.cost.masks, network.options.get("tie", ()), harm)
  for way in itertools.islice(_ways(network, fit, alone, blocks), candidates):
    for at, masks in enumerate(_masks(network, way)):
      variables = {**network.variables, COLLECTION: masks}
      if fit is not None:
        variables = fit.run(variables, network.variables, progress=progress)
      result = Result(variables, masks)
      found[at].append((score(result) if score else 0.0, result))
  return [max(results, key=lambda pair: pair[0])[1] for results in found]


def _call(batch: tuple[Any, ...], count: int) -> Arguments:
  """The arguments of the network in a batch, which may hold more behind them, such as labels."""
  require(
    len(batch) >= count,
    f"batches must hold the {count} arguments of apply_fn as tuples, or its only argument",
    describe(batch),
  )
  return batch[:count]


def _alone(network: Network, batches: Iterable[PyTree], loss: Callable[..., Any] | None) -> Masks:
  """The importance of every feature as long as nothing is refitted."""
  own = {name: tree for name, tree in network.variables.items() if name != COLLECTION}
  masks = network.variables[COLLECTION]
  if loss is not None:
    return estimate_importance(loss, own, masks, batches, method=network.method, cost=network.cost)

  def outputs(variables: PyTree, masks: Masks, args: Arguments) -> PyTree:
    return network.apply_fn({**variables, COLLECTION: masks}, *args)

  return estimate_importance(outputs, own, masks, batches, method=OUTPUTS)


def _harm(
  network: Network, batch: PyTree, args: Arguments, loss: Callable[..., Any] | None
) -> Callable[[Masks], float]:
  """What masks do to a batch: half the squared change of the outputs per example, or the increase of a loss."""
  if loss is None:
    closeness, examples = _closeness(network, [args]), jax.tree.leaves(args)[0].shape[0]
    return lambda masks: -0.5 * closeness(Result({**network.variables, COLLECTION: masks}, masks)) / examples
  own = {name: tree for name, tree in network.variables.items() if name != COLLECTION}
  run = jax.jit(lambda masks: loss(own, masks, batch))
  dense = float(run(network.variables[COLLECTION]))
  return lambda masks: float(run(masks)) - dense


def _ways(
  network: Network, fit: Fit | None, alone: Masks, blocks: Callable[[Masks], Masks]
) -> Iterator[Masks]:
  """Importance to choose features by, the most promising first; ``blocks`` replaces that of residual blocks."""
  kinds = [alone]
  if fit is not None:
    kinds.insert(0, refitted_importance(fit.traced[0], network.variables, alone, jax.random.key(1)))
  for kind in map(blocks, kinds):
    # Powers of shares: those of a small importance itself would be too small for a float32.
    most = max(float(jnp.max(x)) for x in jax.tree.leaves(kind)) or 1.0
    yield kind
    for power in POWERS:
      yield jax.tree.map(lambda x, power=power, most=most: (x / most) ** power * most, kind)


def _masks(network: Network, importance: Masks) -> list[Masks]:
  options = {name: value for name, value in network.options.items() if name in (*ALLOWED, "widths")}
  return select_masks(network.cost, importance, list(network.targets), **options)


def _closeness(network: Network, batches: Sequence[Arguments]) -> Callable[[Result], float]:
  """Minus the squared error of the outputs on some batches."""
  run = jax.jit(lambda variables, args: floating(network.apply_fn(variables, *args)))
  dense = [run(network.variables, args) for args in batches]

  def score(result: Result) -> float:
    pairs = zip(batches, dense, strict=True)
    return -sum(float(squared_error(run(result.variables, args), said, None)) for args, said in pairs)

  return score
