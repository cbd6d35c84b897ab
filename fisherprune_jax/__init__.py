"""Fisher pruning for JAX: prune a network to a FLOPs target while it trains, and get back the smaller one."""

from fisherprune_jax import nnx as nnx
from fisherprune_jax.alias import inject_hyperparams as inject_hyperparams
from fisherprune_jax.alias import pruning_sgd as pruning_sgd
from fisherprune_jax.blockers import Blocker as Blocker
from fisherprune_jax.blockers import Held as Held
from fisherprune_jax.compaction import Compact as Compact
from fisherprune_jax.compaction import compact as compact
from fisherprune_jax.cost import CostModel as CostModel
from fisherprune_jax.cost import cost_model as cost_model
from fisherprune_jax.fisher import value_and_grads as value_and_grads
from fisherprune_jax.graph.spec import register_rule as register_rule
from fisherprune_jax.history import Pruned as Pruned
from fisherprune_jax.history import history as history
from fisherprune_jax.history import masks_at as masks_at
from fisherprune_jax.linen import Mask as Mask
from fisherprune_jax.masks import apply_mask as apply_mask
from fisherprune_jax.masks import per_example as per_example
from fisherprune_jax.plots import plot_history as plot_history
from fisherprune_jax.pruning_state import FisherPruneState as FisherPruneState
from fisherprune_jax.states import get_masks as get_masks
from fisherprune_jax.states import get_state as get_state
from fisherprune_jax.states import set_masks as set_masks
from fisherprune_jax.states import signals as signals
from fisherprune_jax.summary import scalars as scalars
from fisherprune_jax.summary import summary as summary
from fisherprune_jax.train_state import TrainState as TrainState
from fisherprune_jax.transform import fisher_prune as fisher_prune

__version__ = "0.1.0"
