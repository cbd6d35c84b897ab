"""Draws the pictures of the README and the guides: ``python docs/pictures.py`` writes ``docs/*.png``."""

import contextlib
import io
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

import fisherprune_jax as fp

HERE = Path(__file__).parent
COLOURS = plt.get_cmap("tab10").colors
NEUTRAL = "0.82"


class Network(nn.Module):
  """A small residual network: what one sum ties is one group."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Logits."""
    x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
    y = nn.relu(nn.Conv(24, (3, 3), name="up")(x))
    x = x + nn.Conv(16, (3, 3), name="down")(y)
    x = nn.relu(nn.Conv(32, (3, 3), name="last")(x)).mean((1, 2))
    return nn.Dense(10, name="head")(x)


def draw_groups(path: Path) -> None:
  """Every kernel of a network as a rectangle, its input and output sides in the colours of their groups."""
  x = jnp.ones((1, 8, 8, 3))
  network = Network()
  variables = jax.eval_shape(network.init, jax.random.key(0), x)
  auto = fp.auto_mask(network.apply, variables, x)
  colours = {member: COLOURS[at] for at, group in enumerate(auto.groups) for member in group.members}
  layers = ["stem", "up", "down", "last", "head"]
  figure, axes = plt.subplots(figsize=(9, 3.1))
  for at, name in enumerate(layers):
    kernel = f"params/{name}/kernel"
    shape = variables["params"][name]["kernel"].shape
    rank = len(shape)
    width, height = 0.35 + shape[-2] / 50, 0.35 + shape[-1] / 50
    left, low = 1.9 * at - width / 2, -height / 2
    axes.add_patch(Rectangle((left, low), width, height, facecolor="0.95", edgecolor="0.5", linewidth=0.8))
    sides = [
      (rank - 2, (left - 0.12, low, 0.12, height)),
      (rank - 1, (left + width, low, 0.12, height)),
    ]
    for axis, (x0, y0, w, h) in sides:
      axes.add_patch(Rectangle((x0, y0), w, h, facecolor=colours.get((kernel, axis), NEUTRAL)))
      ends = "right" if axis == rank - 2 else "left"
      place = x0 - 0.03 if axis == rank - 2 else x0 + w + 0.03
      axes.text(place, low - 0.12, str(shape[axis]), ha=ends, va="top", fontsize=9, color="0.3")
    axes.text(1.9 * at, -1.05, name, ha="center", va="top", fontsize=11)
    if at:
      axes.add_patch(_arrow(1.9 * at - 1.25, 1.9 * at - 0.68))
  axes.add_patch(_arrow(0.95, 4.75, curve=-0.45))
  axes.text(2.85, 1.0, "+", ha="center", va="center", fontsize=15, color="0.4")
  handles = [
    Rectangle(
      (0, 0), 1, 1, color=COLOURS[at], label=f"{group.name}: {group.size} features, {len(group.members)} axes"
    )
    for at, group in enumerate(auto.groups)
  ]
  handles.append(Rectangle((0, 0), 1, 1, color=NEUTRAL, label="an argument, an output: stays"))
  figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=9)
  axes.set_xlim(-0.9, 8.5)
  axes.set_ylim(-1.3, 1.2)
  axes.set_aspect("equal")
  axes.axis("off")
  figure.tight_layout(rect=(0, 0.16, 1, 1))
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _arrow(start: float, end: float, curve: float = 0.0, size: float = 9) -> FancyArrowPatch:
  y = 0.55 if curve else 0
  style = f"arc3,rad={curve}"
  return FancyArrowPatch(
    (start, y * 0.1),
    (end, y * 0.1),
    arrowstyle="-|>",
    mutation_scale=size,
    color="0.6",
    connectionstyle=style,
  )


def draw_digits(path: Path) -> None:
  """The curve that the digits example draws."""
  with tempfile.TemporaryDirectory() as out:
    example = HERE.parent / "examples" / "showcase" / "digits_cnn" / "main.py"
    subprocess.run([sys.executable, str(example), "--flops-target", "0.1", "--out", out], check=True)
    shutil.copy(Path(out) / "curve.png", path)


def draw_one_shot(path: Path) -> None:
  """The network of the one-shot example before and after ``pruner.one_shot``: widths, accuracy and FLOPs."""
  with contextlib.redirect_stdout(io.StringIO()):
    run = runpy.run_path(str(HERE.parent / "examples" / "quickstart_one_shot.py"))
  pruner = run["pruner"]
  images, labels = run["images"][run["unseen"]], run["labels"][run["unseen"]]

  def side(call: Callable[..., jax.Array], params: Any, cost: float) -> Side:
    hits = jnp.argmax(call({"params": params}, images), axis=-1) == labels
    widths = tuple(len(layer["bias"]) for _, layer in sorted(params.items()))
    return Side(widths, float(hits.mean()), cost, cost / pruner.cost.dense)

  pruned, masks = pruner.one_shot(run["params"], run["batches"])[2]
  small = pruner.compact(pruned, masks)
  before = side(run["model"].apply, run["params"], pruner.cost.dense)
  after = side(small, small.variables["params"], small.cost)
  _before_and_after(path, images[labels == 3][0, ..., 0], before, after, sum(map(len, run["batches"])))


class Side(NamedTuple):
  """A network as the picture shows it; ``share`` is of the dense FLOPs."""

  widths: tuple[int, ...]
  accuracy: float
  flops: float
  share: float


def _before_and_after(path: Path, image: jax.Array, before: Side, after: Side, examples: int) -> None:
  figure, axes = plt.subplots(figsize=(7.2, 3.8))
  _network(axes, 0, image, before, before, "0.45")
  _network(axes, 8.9, image, after, before, COLOURS[0])
  axes.text(2.9, 2.05, "Before", ha="center", fontsize=14, weight="bold", color="0.1")
  axes.text(11.8, 2.05, "After", ha="center", fontsize=14, weight="bold", color="0.1")
  axes.add_patch(_arrow(6.3, 8.6, size=22))
  axes.text(7.4, 0.25, "one_shot", ha="center", fontsize=13, family="monospace", color="0.1")
  notes = f"{examples:,} images\nno labels\nno training"
  axes.text(7.4, -0.25, notes, ha="center", va="top", fontsize=11, color="0.3")
  axes.set_xlim(-0.25, 14.95)
  axes.set_ylim(-3.45, 2.45)
  axes.axis("off")
  figure.subplots_adjust(0, 0, 1, 1)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _network(axes: Axes, left: float, image: jax.Array, side: Side, dense: Side, colour: Any) -> None:
  """An image, a bar as long as each layer is wide, and the weights between them; below accuracy and FLOPs."""
  axes.imshow(image, cmap="gray_r", extent=(left, left + 1.0, -0.36, 0.36), aspect="auto", zorder=3)
  axes.add_patch(Rectangle((left, -0.36), 1, 0.72, fill=False, edgecolor="0.5", linewidth=0.8, zorder=4))
  places = [left + 0.88, left + 2.1, left + 3.4, left + 4.7, left + 5.7]
  heights = [0.36, *(1.6 * width / max(dense.widths) for width in side.widths)]
  for x0, x1, h0, h1 in zip(places, places[1:], heights, heights[1:], strict=False):
    corners = [(x0 + 0.12, -h0), (x0 + 0.12, h0), (x1 - 0.12, h1), (x1 - 0.12, -h1)]
    axes.add_patch(Polygon(corners, facecolor=colour, alpha=0.2, edgecolor="none"))
  for x, height, width, full in zip(places[1:], heights[1:], side.widths, dense.widths, strict=True):
    axes.add_patch(Rectangle((x - 0.12, -height), 0.24, 2 * height, color=colour))
    ghost = 1.6 * full / max(dense.widths)
    if full > width:
      box = Rectangle((x - 0.12, -ghost), 0.24, 2 * ghost, fill=False, linestyle=":", edgecolor="0.55")
      axes.add_patch(box)
    axes.text(x, ghost + 0.1, str(width), ha="center", fontsize=12, color=colour, weight="bold")
  for x, kind, below in zip(places[1:], ("conv", "conv", "dense"), dense.widths, strict=False):
    axes.text(x, -1.6 * below / max(dense.widths) - 0.28, kind, ha="center", fontsize=10, color="0.35")
  right = f"{side.accuracy:.1%} correct"
  axes.text(left + 2.9, -2.42, right, ha="center", fontsize=14, weight="bold", color=colour)
  axes.add_patch(Rectangle((left, -2.95), 5.8, 0.22, color="0.9"))
  axes.add_patch(Rectangle((left, -2.95), 5.8 * side.share, 0.22, color=colour))
  axes.text(left, -3.3, f"{round(side.flops):,} FLOPs", fontsize=11, color="0.3")
  axes.text(left + 5.8, -3.3, f"{side.share:.0%}", ha="right", fontsize=11, color="0.3")


if __name__ == "__main__":
  draw_groups(HERE / "groups.png")
  if "--quick" not in sys.argv:
    draw_one_shot(HERE / "one-shot.png")
    draw_digits(HERE / "digits.png")
