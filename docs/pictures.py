"""Draws the pictures of the README and the guides: ``python docs/pictures.py`` writes ``docs/*.png``."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

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


def _arrow(start: float, end: float, curve: float = 0.0) -> FancyArrowPatch:
  y = 0.55 if curve else 0
  style = f"arc3,rad={curve}"
  return FancyArrowPatch(
    (start, y * 0.1), (end, y * 0.1), arrowstyle="-|>", mutation_scale=9, color="0.6", connectionstyle=style
  )


def draw_digits(path: Path) -> None:
  """The curve that the digits example draws."""
  with tempfile.TemporaryDirectory() as out:
    example = HERE.parent / "examples" / "digits_cnn.py"
    subprocess.run([sys.executable, str(example), "--flops-target", "0.1", "--out", out], check=True)
    shutil.copy(Path(out) / "curve.png", path)


if __name__ == "__main__":
  draw_groups(HERE / "groups.png")
  if "--quick" not in sys.argv:
    draw_digits(HERE / "digits.png")
