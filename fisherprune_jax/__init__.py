"""Fisher pruning for JAX: prune a network to a FLOPs target while it trains, and get back the smaller one."""

import importlib as _importlib
import typing as _typing

from fisherprune_jax import rules as rules
from fisherprune_jax._auto.auto import AutoMask as AutoMask
from fisherprune_jax._auto.auto import auto_mask as auto_mask
from fisherprune_jax._auto.groups import Group as Group
from fisherprune_jax._auto.skipping import Skipped as Skipped
from fisherprune_jax._compaction.compact import Compact as Compact
from fisherprune_jax._compaction.compact import compact as compact
from fisherprune_jax._compaction.loading import Loaded as Loaded
from fisherprune_jax._compaction.loading import load as load
from fisherprune_jax._cost.cost import CostModel as CostModel
from fisherprune_jax._cost.counted import Row as Row
from fisherprune_jax._cost.counters import Roofline as Roofline
from fisherprune_jax._cost.measures import cost_model as cost_model
from fisherprune_jax._graph.blockers import Blocker as Blocker
from fisherprune_jax._graph.blockers import Held as Held
from fisherprune_jax._graph.registry import register_rule as register_rule
from fisherprune_jax._latency.measuring import measure_latency as measure_latency
from fisherprune_jax._masks import apply_mask as apply_mask
from fisherprune_jax._masks import per_example as per_example
from fisherprune_jax._pruner.gradients import Gradients as Gradients
from fisherprune_jax._reconstruction.reconstruct import reconstruct as reconstruct
from fisherprune_jax._training.classic import pruning_sgd as pruning_sgd
from fisherprune_jax._training.criterion import Criterion as Criterion
from fisherprune_jax._training.estimation import estimate_importance as estimate_importance
from fisherprune_jax._training.finding import get_importance as get_importance
from fisherprune_jax._training.finding import get_masks as get_masks
from fisherprune_jax._training.finding import get_state as get_state
from fisherprune_jax._training.finding import set_masks as set_masks
from fisherprune_jax._training.gradients import value_and_mask_grads as value_and_mask_grads
from fisherprune_jax._training.history import Pruned as Pruned
from fisherprune_jax._training.history import history as history
from fisherprune_jax._training.history import masks_at as masks_at
from fisherprune_jax._training.injection import inject_hyperparams as inject_hyperparams
from fisherprune_jax._training.once import select_masks as select_masks
from fisherprune_jax._training.plots import plot_history as plot_history
from fisherprune_jax._training.state import FisherPruneState as FisherPruneState
from fisherprune_jax._training.summary import metrics as metrics
from fisherprune_jax._training.summary import summary as summary
from fisherprune_jax._training.transform import fisher_prune as fisher_prune

if _typing.TYPE_CHECKING:
  from fisherprune_jax import linen as linen
  from fisherprune_jax import nnx as nnx
  from fisherprune_jax._pruner.pruner import Pruner as Pruner
  from fisherprune_jax._training.train_state import TrainState as TrainState
  from fisherprune_jax.linen import Mask as Mask

__version__ = "0.1.0"

_OF_FLAX = ("linen", "nnx", "Mask", "Pruner", "TrainState")


def __getattr__(name: str) -> _typing.Any:
  """Import what needs Flax at first use: a process that serves a saved network needs no Flax."""
  if name not in _OF_FLAX:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  # Import all: ``nnx`` registers the collection "masks" with Flax, before ``nnx.bridge`` meets masks of a ``Mask``.
  linen, nnx = (_importlib.import_module(f"{__name__}.{face}") for face in ("linen", "nnx"))
  train_state = _importlib.import_module(f"{__name__}._training.train_state")
  pruner = _importlib.import_module(f"{__name__}._pruner.pruner")
  globals().update(
    linen=linen, nnx=nnx, Mask=linen.Mask, Pruner=pruner.Pruner, TrainState=train_state.TrainState
  )
  return globals()[name]


def __dir__() -> list[str]:
  return sorted({*globals(), *_OF_FLAX})
