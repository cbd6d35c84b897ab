"""Compact networks as ONNX files: onnxruntime gives the masked network's outputs at any batch size."""

import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import fisherprune_jax as fp
from tests.models import random_masks

if jax.__version_info__ >= (0, 12):
  pytest.skip("jax2onnx 0.17 works with JAX 0.10 and 0.11", allow_module_level=True)
jax2onnx = pytest.importorskip("jax2onnx")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent / "examples" / "showcase" / "digits_cnn" / "main.py"


class Transformer(nn.Module):
  """Two causal blocks with masks over heads and hidden features."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(64, 64)(tokens)
    causal = nn.make_causal_mask(tokens)
    for _ in range(2):
      attend = nn.MultiHeadDotProductAttention(4, attention_fn=self.masked_heads)
      x = x + attend(nn.LayerNorm()(x), mask=causal)
      x = x + nn.Dense(64)(fp.Mask()(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))))
    return nn.Dense(64)(nn.LayerNorm()(x))

  def masked_heads(self, *args, **kwargs):
    return fp.Mask(axis=-2)(nn.dot_product_attention(*args, **kwargs))


def digits_cnn():
  images = 10 * np.random.default_rng(0).normal(size=(5, 8, 8, 1))
  model, x = runpy.run_path(str(EXAMPLE))["CNN"](), jnp.asarray(images, jnp.float32)
  auto = fp.auto_mask(model.apply, model.init(jax.random.key(0), x), x)
  return model.apply, auto.apply, auto.variables, x


def transformer():
  model, x = Transformer(), jnp.asarray(np.random.default_rng(0).integers(64, size=(5, 12)))
  return model.apply, model.apply, model.init(jax.random.key(0), x), x


def convert(function, x, path):
  """Writes a file with a free batch; a session that runs it."""
  (batch,) = export.symbolic_shape("batch")
  spec = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
  jax.eval_shape(function, spec)  # traced here, not in the converter
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      jnp, "cumsum", jnp.cumsum
    )  # it is put back: jax2onnx leaves one that takes no axis by position
    onnx.save(jax2onnx.to_onnx(function, [spec], input_names=["x"]), path)
  return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=[digits_cnn, transformer], ids=lambda make: make.__name__)
def converted(request, tmp_path_factory):
  """The masked network, its input, sessions of the compact and of the dense one, and the sizes of their files."""
  apply, masked_apply, variables, x = request.param()
  dense = {"params": variables["params"]}
  variables = {**variables, "masks": random_masks(variables["masks"], 0, alive=0.4)}
  small = fp.compact(masked_apply, variables, x)
  assert not small.blockers
  folder = tmp_path_factory.mktemp("onnx")
  paths = [folder / "compact.onnx", folder / "dense.onnx"]
  sessions = [
    convert(lambda x: small(small.variables, x), x, paths[0]),
    convert(lambda x: apply(dense, x), x, paths[1]),
  ]
  masked = lambda x: masked_apply(variables, x)
  return masked, x, small, dense, sessions, [path.stat().st_size for path in paths]


@pytest.mark.parametrize("batch", [1, 5])
def test_outputs_are_those_of_the_masked_network(converted, batch):
  masked, x, *_, (session, _), _ = converted
  (found,) = session.run(None, {"x": np.asarray(x[:batch])})
  np.testing.assert_allclose(found, masked(x[:batch]), rtol=0, atol=1e-5)
  assert np.ptp(found) > 0.1  # outputs near zero would agree as well


def test_the_file_holds_what_is_left_of_the_weights(converted):
  *_, small, dense, _, sizes = converted
  weights = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (small.variables, dense)]
  assert sizes[0] < 0.7 * sizes[1]
  for size, held in zip(sizes, weights, strict=True):
    assert held < size < held + 60_000  # the rest is the program


def test_the_batch_is_free_and_the_rest_is_not(converted):
  _, x, *_, (session, _), _ = converted
  (entry,) = session.get_inputs()
  assert entry.shape == ["batch", *x.shape[1:]]
