"""Docstrings of Python's standard library and of what JAX needs, and their functions."""

import ast
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGES = ("jax", "flax", "optax", "numpy", "scipy")  # on every machine that runs this library
LEFT_OUT = {"site-packages", "test", "tests", "testing", "idlelib"}  # folders
PARTS = {"held_out": 0.1, "validation": 0.05, "train": 0.85}  # shares of the modules
WORDS, LINES = 4, 12  # at least so many in a docstring; at most so many of a function


class Function(NamedTuple):
  """The first paragraph of a docstring, and the source of its function without it."""

  docstring: str
  code: str


def modules(share: float) -> list[tuple[str, Path]]:
  """A share of all modules by name, as ``numpy/linalg/_linalg.py``, and where they are."""
  paths = sysconfig.get_paths()
  roots = [(Path(paths["stdlib"]), "")] + [(Path(paths["purelib"]), name) for name in PACKAGES]
  found = [(path.relative_to(root), path) for root, name in roots for path in (root / name).rglob("*.py")]
  kept = sorted((name.as_posix(), path) for name, path in found if not LEFT_OUT & set(name.parts))
  return kept[:: max(1, round(1 / share))]


def functions(source: str) -> Iterator[Function]:
  """The documented functions and methods of a module that do something."""
  lines = source.splitlines()
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
      continue
    docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    if len(docstring.split()) >= WORDS:
      first, last = node.body[0].lineno - 1, node.body[0].end_lineno
      code = lines[node.lineno - 1 : first] + lines[last : node.end_lineno]
      yield Function(docstring, "\n".join(code[:LINES]))


def part_of(module: str) -> str:
  """The part that a module belongs to, whatever other modules there are."""
  place = zlib.crc32(module.encode()) / 2**32
  edges = np.cumsum(list(PARTS.values()))[:-1]
  return list(PARTS)[np.searchsorted(edges, place, side="right")]


def distinct(found: Iterable[Function], seen: set[str]) -> Iterator[Function]:
  """Those of which neither the docstring nor the source has been seen; marks them as seen."""
  for function in found:
    if not seen & set(function):
      seen |= set(function)
      yield function


def load(share: float = 1.0) -> dict[str, list[Function]]:
  """Functions for the final report, for validation and for training, split by module.

  What stands in several modules is in the first of these parts alone, so nothing that is reported was trained on.
  """
  found: dict[str, list[Function]] = {part: [] for part in PARTS}
  for name, path in modules(share):
    try:
      found[part_of(name)] += functions(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):  # templates, and files for other versions of Python
      continue
  seen: set[str] = set()
  found = {part: list(distinct(those, seen)) for part, those in found.items()}
  if least := [part for part, those in found.items() if len(those) < 10]:
    sys.exit(
      f"Fewer than 10 documented functions were found for {' and '.join(least)}; take a larger --share."
    )
  return found
