"""``python -m fisherprune_jax inspect FILE``: what it prints, counted by hand, and how it fails."""

import functools
import io
import runpy
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich import console

import fisherprune_jax as fp
from fisherprune_jax.__main__ import main
from fisherprune_jax._compaction import inspecting


def net(variables, x):
  h = jnp.tanh(x @ variables["w"] + variables["b"]) * variables["masks"]["layers[0]"]
  return h @ variables["v"], jnp.sort(h)


@functools.cache
def compacts():
  """A network, and one that was made of it: the second time three features are left of four."""
  variables = {"w": jnp.ones((3, 8)), "b": jnp.ones(8, jnp.bfloat16), "v": jnp.ones((8, 2))}
  masks = {"layers[0]": jnp.array([1.0, 0, 1, 0, 1, 0, 1, 0])}
  first = fp.compact(
    lambda v, x: net(v, x)[0], {**variables, "masks": masks}, jnp.ones((2, 3)), keep_masks=True
  )
  masks = {"layers[0]": jnp.array([1.0, 0, 1, 1])}
  second = fp.compact(first, {**first.variables, "masks": masks}, jnp.ones((2, 3)), keep_masks=True)
  return variables, second


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  where = tmp_path_factory.mktemp("saved") / "net"
  cost = fp.CostModel.from_functions(
    {"layers[0]": jnp.ones(8)}, lambda m: jnp.sum(m["layers[0]"]), lambda m: m
  )
  past = {"layers[0]": jnp.array([-1, 5, 9, 5, -1, 5, -1, 5])}
  compacts()[1].save(where, history=fp.fisher_prune(cost).init({})._replace(pruned_at=past))
  return where


def test_what_is_printed_of_a_network_that_was_compacted_twice(path, capsys):
  assert main(["inspect", str(path)]) == 0
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["layers[0]", "8", "3", "37.5", "%"] in lines
  assert ["w", "3x8", "3x3", "37.5", "%"] in lines
  assert ["v", "8x2", "3x2", "37.5", "%"] in lines
  numbers = 3 * 8 + 8 + 8 * 2, 3 * 3 + 3 + 3 * 2
  assert ["parameters", *map(str, numbers), "37.5", "%"] in lines
  size = 4 * numbers[0] - 2 * 8, 4 * numbers[1] - 2 * 3  # one is half as wide
  assert ["bytes", "of", "all", "parameters", *map(str, size), "37.5", "%"] in lines
  # A column of the first product, its bias, its tanh, its share of two sums; the first term of which is no sum.
  flops = [5 * n + n + n + 2 * (2 * n - 1) for n in (8, 3)]
  assert ["FLOPs", "per", "example", *map(str, flops)] in [line[:5] for line in lines]
  assert ["5", "layers[0]", "1", "3", "5", "7"] in lines
  assert ["9", "layers[0]", "2"] in lines
  assert "called with float32[batch,3]" in [" ".join(line) for line in lines]


def test_what_stays_is_said_with_its_reason(tmp_path, capsys):
  variables = {**compacts()[0], "masks": {"layers[0]": jnp.array([1.0, 0, 1, 0, 1, 0, 1, 0])}}
  small = fp.compact(net, variables, jnp.ones((2, 3)))
  small.save(tmp_path / "net")
  main(["inspect", str(tmp_path / "net")])
  shown = capsys.readouterr().out
  assert small.blockers
  assert all(line in shown for line in small.report().splitlines()[-3:])
  assert "step" not in shown


def test_a_terminal_gets_the_same_from_rich(path, capsys, monkeypatch):
  main(["inspect", str(path)])
  words = capsys.readouterr().out.split()
  out = io.StringIO()
  monkeypatch.setattr(
    console, "Console", functools.partial(console.Console, file=out, width=300, color_system=None)
  )
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  inspecting.show(path)
  assert [word for word in out.getvalue().split() if set(word) != {"─"}] == words


def test_bad_files_are_one_line_and_exit_code_1(tmp_path, capsys):
  (tmp_path / "other").write_bytes(np.ones(9).tobytes())
  for name in ("other", "nothing", ""):
    assert main(["inspect", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(tmp_path) in err


def test_the_command_says_how_it_is_called(capsys):
  with pytest.raises(SystemExit, match="2"):
    main([])
  assert "inspect" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("net", 0), ("nothing", 1)])
def test_the_module_exits_with_what_the_command_returns(path, name, code, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["fisherprune_jax", "inspect", str(path.parent / name)])
  with pytest.raises(SystemExit, match=str(code)):
    runpy.run_path(f"{fp.__path__[0]}/__main__.py", run_name="__main__")
