"""A Hugging Face Flax model, pruned and made again with a smaller config; ``docs/exact-sizes.md`` shows it.

It needs ``pip install 'transformers<5'``. ``tests/test_exact_sizes.py`` runs it, if that is there.
"""

# The example starts here.
import tempfile

import jax
import jax.numpy as jnp
from transformers import BertConfig, FlaxBertModel

import fisherprune_jax as fp

config = BertConfig(
  vocab_size=50,
  max_position_embeddings=12,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=64,
)
model = FlaxBertModel(config, input_shape=(1, 12))  # or FlaxBertModel.from_pretrained
tokens = jax.random.randint(jax.random.key(0), (64, 12), 0, config.vocab_size)
types = jnp.zeros_like(tokens)


def apply_fn(variables, tokens, types):
  outputs = model(tokens, token_type_ids=types, params=variables["params"])
  return outputs.to_tuple()


variables = {"params": model.params}
pruner = fp.Pruner(
  apply_fn,
  variables,
  tokens,
  types,
  keep=0.6,
  select=lambda group: group.name.endswith("intermediate/dense"),
  tie=["encoder/layer/*/intermediate/dense"],
  multiple_of=8,
)
batches = list(zip(jnp.split(tokens, 4), jnp.split(types, 4), strict=True))
params, masks = pruner.one_shot(variables["params"], batches)
small = pruner.compact(params, masks)

(width,) = set(pruner.config(masks).values())  # equal in all layers
smaller_config = BertConfig(**{**config.to_dict(), "intermediate_size": width})
smaller = FlaxBertModel(smaller_config, input_shape=(1, 12))
smaller.params = small.variables["params"]
folder = tempfile.mkdtemp()
smaller.save_pretrained(folder)

again = FlaxBertModel.from_pretrained(folder)
outputs = again(tokens, token_type_ids=types).to_tuple()
for found, expected in zip(outputs, small(small.variables, tokens, types), strict=True):
  assert jnp.allclose(found, expected, atol=1e-5)
print("equal outputs")
