"""The schema of a file's header: any other file is refused before it is used."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

MOST_IMPLIED = 10_000_000
"""The most positions that a file may imply, along axes of arrays without entries."""


DEEPEST = 100
"""The deepest nesting of a tree in a file."""


@dataclass(frozen=True)
class Kind:
  """A requirement on a JSON value, in words and as a predicate."""

  words: str
  holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
  """An optional entry of a dictionary."""

  schema: Any


@dataclass(frozen=True)
class ByName:
  """A dictionary with any names, and one schema for all values."""

  schema: Any


def _is_count(x: Any) -> bool:
  return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63


def _is_number(x: Any) -> bool:
  if isinstance(x, bool) or not isinstance(x, int | float):
    return False
  return 0 <= x <= float(np.finfo(np.float64).max)


def _is_dtype(x: Any) -> bool:
  try:
    return (
      isinstance(x, str)
      and jnp.dtype(x).name == x
      and not jnp.dtype(x).hasobject
      and jnp.dtype(x).itemsize > 0
    )
  except TypeError:
    return False


def _is_tree(spec: Any, depth: int = 0) -> bool:
  """Whether a value is an output of ``plain.to_json``."""
  if depth > DEEPEST:
    return False
  if spec is None or spec == "*":
    return True
  if not (isinstance(spec, dict) and len(spec) == 1):
    return False
  ((kind, children),) = spec.items()
  if kind not in ("dict", "list", "tuple") or not isinstance(children, list):
    return False
  if kind != "dict":
    return all(_is_tree(child, depth + 1) for child in children)
  if not all(isinstance(child, list) and len(child) == 2 for child in children):
    return False
  keys = [key for key, _ in children]
  alike = all(isinstance(key, str) for key in keys) or all(type(key) is int for key in keys)
  return alike and len({*keys}) == len(keys) and all(_is_tree(child, depth + 1) for _, child in children)


TEXT = Kind("a text", lambda x: isinstance(x, str))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
COUNT = Kind("a whole number of at least 0", _is_count)
NUMBER = Kind("a finite number of at least 0", _is_number)
DTYPE = Kind("the name of a type of arrays", _is_dtype)
TREE = Kind("a tree of dictionaries, lists and tuples", _is_tree)
ARRAYS = ByName((DTYPE, [COUNT]))
HEADER = {
  "version": COUNT,
  "arrays": ARRAYS,
  "jax": TEXT,
  "leaves": [
    {
      "array": TEXT,
      "original": [COUNT],
      "kept": ByName(TEXT),
      "mask": FLAG,
      "key": Kind("a text or nothing", lambda x: x is None or isinstance(x, str)),
    }
  ],
  "history_masks": [TEXT],
  "platforms": [TEXT],
  "takes": [TEXT],
  "variables": TREE,
  "arguments": TREE,
  "outputs": TREE,
  "cost": NUMBER,
  "dense": NUMBER,
  "widths": [(TEXT, COUNT, COUNT)],
  "report": [TEXT],
  "stays": [TEXT],
  "derivative": Maybe(Kind("all, variables or none", lambda x: x in ("all", "variables", "none"))),
}
"""The header: lists have any length, tuples a fixed one, dictionaries these entries."""


def misfits(value: Any, schema: Any = HEADER, where: str = "the header") -> Iterator[str]:
  """What is wrong with a value, in words.

  >>> list(misfits({"a": [1, -2]}, {"a": [COUNT], "b": TEXT}))
  ['the header/a/1 must be a whole number of at least 0, got -2', 'the header/b is missing']
  """
  if isinstance(schema, Kind):
    if not schema.holds(value):
      yield f"{where} must be {schema.words}, got {_short(value)}"
  elif isinstance(schema, dict | ByName):
    if not isinstance(value, dict):
      yield f"{where} must be a dictionary, got {_short(value)}"
      return
    inner = schema if isinstance(schema, dict) else dict.fromkeys(value, schema.schema)
    for name, part in inner.items():
      if name in value:
        yield from misfits(value[name], part.schema if isinstance(part, Maybe) else part, f"{where}/{name}")
      elif not isinstance(part, Maybe):
        yield f"{where}/{name} is missing"
  elif not isinstance(value, list) or (isinstance(schema, tuple) and len(value) != len(schema)):
    yield f"{where} must be a list{f' of {len(schema)}' if isinstance(schema, tuple) else ''}, got {_short(value)}"
  else:
    parts = schema if isinstance(schema, tuple) else schema * len(value)
    for at, (item, part) in enumerate(zip(value, parts, strict=True)):
      yield from misfits(item, part, f"{where}/{at}")


def contradictions(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
  """Where parts of a valid header contradict each other or the arrays."""
  leaves = header["leaves"]
  names = [name for line in leaves for name in (line["array"], *line["kept"].values())]
  if len({*names}) < len(names):
    yield "an array belongs to two variables"
  missing = [name for name in (*names, "program") if name not in arrays]
  if missing:
    yield f"the array {_short(missing[0])} is missing"
    return
  if count_leaves(header["variables"]) != len(leaves):
    yield f"the tree of variables must have {len(leaves)} leaves"
  if len({name for name, *_ in header["widths"]}) < len(header["widths"]):
    yield "two masks have one name"
  if arrays["program"].dtype != np.uint8 or arrays["program"].ndim != 1:
    yield "the program must be bytes"
  for line in leaves:
    yield from _of_leaf(line, arrays)
  implied = sum(
    n
    for line in leaves
    if not arrays[line["array"]].size
    for at, n in enumerate(line["original"])
    if str(at) not in line["kept"]
  )
  if implied > MOST_IMPLIED:
    yield f"arrays that hold nothing may have axes of {MOST_IMPLIED:,} entries in all, got {implied:,}"
  yield from _of_history(header["history_masks"], arrays.get("history"))


def _of_leaf(line: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
  """Where a variable contradicts its original shape and positions."""
  name, original = line["array"], line["original"]
  if max([*original, math.prod(original) >> 32]) >= 2**31:
    yield f"{_short(name)} must have axes below 2^31 and entries below 2^63, got the original shape {_short(original)}"
    return
  shape = arrays[name].shape
  if line["key"] is not None:  # key data have one more axis
    shape = shape[:-1]
  if len(shape) != len(original) or not {*line["kept"]} <= {str(at) for at in range(len(original))}:
    yield f"{_short(name)} must have the axes of its original shape {_short(original)}, got shape {shape}"
    return
  for at, (now, before) in enumerate(zip(shape, original, strict=True)):
    kept = arrays.get(line["kept"].get(str(at), ""))
    if kept is None:
      if now != before:
        yield f"axis {at} of {_short(name)} must have the {before} entries that it had, got {now}"
    elif kept.dtype != np.int32 or kept.ndim not in (1, 2) or kept.shape[-1:] != (now,):
      yield f"axis {at} of {_short(name)} must have {now} positions, got {kept.dtype}{list(kept.shape)}"
    elif kept.ndim == 2 and (at == 0 or kept.shape[0] != shape[0]):
      yield f"axis {at} of {_short(name)} must have positions for each of {shape[0]} layers, got {kept.shape[0]}"
    elif kept.size and not (-(kept.ndim - 1) <= kept.min() and kept.max() < before):
      yield f"positions along axis {at} of {_short(name)} must be below {before}, got {kept.min()} to {kept.max()}"


def _of_history(masks: list[str], rows: np.ndarray | None) -> Iterator[str]:
  if rows is None:
    return
  if rows.dtype != np.int32 or rows.ndim != 2 or rows.shape[1] != 3:
    yield f"the history must be rows of three numbers, got {rows.dtype}{list(rows.shape)}"
  elif rows.size and (rows.min() < 0 or rows[:, 1].max() >= len(masks)):
    yield f"the history must be of the {len(masks)} masks that it names, got {rows[:, 1].min()} to {rows[:, 1].max()}"


def count_leaves(spec: Any) -> int:
  if not isinstance(spec, dict):
    return int(spec is not None)
  ((kind, children),) = spec.items()
  return sum(count_leaves(child[1] if kind == "dict" else child) for child in children)


def _short(value: Any) -> str:
  """A value on one line of an error."""
  if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
    return "a number with too many digits"
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:60]}..."
