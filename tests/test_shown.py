"""What is printed, and what notebooks show."""

import html.parser

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope

import fisherprune_jax as fp
from fisherprune_jax._tables import Table, aligned, as_number

MODEL = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(16), nn.relu, nn.Dense(3)])
X = jnp.ones((4, 8))
VARIABLES = MODEL.init(jax.random.key(0), X)
PRUNER = fp.Pruner(MODEL.apply, VARIABLES, X, keep=0.3, start=2, stop=10, every=2)
SMALL = PRUNER.compact(VARIABLES, jax.tree.map(lambda m: m.at[::2].set(0), PRUNER.cost.masks))
OWN = fp.CostModel.from_functions(
  {"<m>": jnp.ones(3)},
  lambda m: 1e-4 * m["<m>"].sum(),
  lambda m: jax.tree.map(lambda x: 1e-4 * x, m),
  "seconds",
)


class Cells(html.parser.HTMLParser):
  """The text of every cell and paragraph."""

  def __init__(self, text):
    super().__init__()
    self.found, self.open = [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open:
      self.found.append(data)


EXPECTED = {
  "pruner": (
    PRUNER,
    ["layers_0", "features", "92.4%", "it reaches an output", "from step 2 to step 10, every 2 steps"],
  ),
  "masks of one's own": (
    fp.Pruner(
      lambda v, x: (x @ v["w"]) * v["masks"], {"w": jnp.ones((8, 6)), "masks": jnp.ones(6)}, X, keep=0.5
    ),
    ["mask", "6", "no stop: one-shot pruning"],
  ),
  "auto": (PRUNER.auto, ["layers_2", "99.8%", "it reaches an argument"]),
  "cost": (PRUNER.cost, ["1,680 FLOPs", "layers_0", "dot_general", "1,581 FLOPs", "Dense.__call__"]),
  "cost of one's own": (OWN, ["<m>", "0.0003 seconds", "0.0001"]),
  "small": (SMALL, ["params/layers_0/kernel", "8x16", "584", "34.8 %", "parameters"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_text_and_html_hold_the_same(name):
  shown, parts = EXPECTED[name]
  cells = "\n".join(Cells(shown._repr_html_()).found)
  for part in parts:
    assert part in str(shown)
    assert part in cells
  assert [word for word in str(shown).split() if word not in cells] == []
  assert "\n" not in repr(shown)
  assert " at 0x" not in repr(shown)


@pytest.mark.filterwarnings("ignore:The chararray class")  # treescope's, of the newest NumPy
@pytest.mark.parametrize("name", EXPECTED)
def test_the_viewer_of_the_ecosystem_shows_them(name):
  shown, _ = EXPECTED[name]
  assert "Rich HTML" in treescope.render_to_text(shown)
  assert "<" in treescope.render_to_html(shown)


def test_what_has_short_forms_has_them():
  assert repr(SMALL) == "Compact(584 of 1,680 FLOPs per example, 307 of 867 parameters)"
  assert repr(PRUNER.cost) == "CostModel(1,680 FLOPs per example, masks: 2, features: 48)"
  assert str(SMALL) == SMALL.report()


def test_many_source_lines_are_cut_short():
  def deep(v, x):
    for at in range(30):
      x = eval(f"{'(' * at}x + 1{')' * at}") * v["masks"]
    return x

  cost = fp.cost_model(deep, {"masks": jnp.ones(8)}, X)
  assert len(str(cost).splitlines()) < 40


def test_numbers_of_any_size_are_readable():
  assert [as_number(x) for x in (0.0, 3.0, 12345678.9, 99.96, 1.5e-7)] == [
    "0",
    "3",
    "12,345,679",
    "100",
    "1.5e-07",
  ]
  lines = aligned(Table(("a", "b", "why"), [("x", "10", "so"), ("long", "2", "because")], left=(0, 2)))
  assert lines == ["a      b  why", "x     10  so", "long   2  because"]
  assert np.all([line == line.rstrip() for line in lines])
