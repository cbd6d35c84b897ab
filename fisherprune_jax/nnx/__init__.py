"""The library for ``flax.nnx``: masks are variables of the model, beside its parameters."""

from fisherprune_jax.nnx._auto import AutoMasked as AutoMasked
from fisherprune_jax.nnx._auto import auto_mask as auto_mask
from fisherprune_jax.nnx._compaction import CompactModule as CompactModule
from fisherprune_jax.nnx._compaction import compact as compact
from fisherprune_jax.nnx._compaction import cost_model as cost_model
from fisherprune_jax.nnx._compaction import module as module
from fisherprune_jax.nnx._modules import Mask as Mask
from fisherprune_jax.nnx._modules import MaskVariable as MaskVariable
from fisherprune_jax.nnx._modules import functional as functional
from fisherprune_jax.nnx._pruner import Pruner as Pruner
from fisherprune_jax.nnx._shrinking import shrink_module as shrink_module
from fisherprune_jax.nnx._shrinking import shrink_optimizer as shrink_optimizer
from fisherprune_jax.nnx._training import Optimizer as Optimizer
from fisherprune_jax.nnx._training import value_and_mask_grads as value_and_mask_grads
