"""Readable names of groups: the module whose variable makes the features."""

from collections import Counter
from collections.abc import Sequence


def unique_names(
  makers: Sequence[tuple[int, Sequence[tuple[int, int, int]]]], paths: Sequence[tuple[str, ...]]
) -> list[str]:
  """A name for each group, after the module that makes it; with the axis where one module makes several.

  Args:
    makers: of each group the position of the variable that makes it, and all places ``(variable, axis, part)``.
    paths: the path of every variable.

  >>> paths = [("params", "Dense_0", "kernel"), ("params", "Dense_0", "bias")]
  >>> unique_names([(0, [(0, 1, 0), (1, 0, 0)])], paths)
  ['Dense_0']
  >>> unique_names([(0, [(0, 1, 0)]), (0, [(0, 1, 1)])], [("qkv", "kernel"), ("qkv", "bias")])
  ['qkv.1.0', 'qkv.1.1']
  """
  bases = [_module(paths[maker], paths) for maker, _ in makers]
  axes = [_axis(maker, places) for maker, places in makers]
  names = bases
  for more in (
    [f"{base}.{axis}" for base, (axis, _) in zip(bases, axes, strict=True)],
    [f"{base}.{axis}.{part}" for base, (axis, part) in zip(bases, axes, strict=True)],
    [
      f"{'/'.join(_without_collection(paths[maker]))}.{axis}.{part}"
      for (maker, _), (axis, part) in zip(makers, axes, strict=True)
    ],
  ):
    count = Counter(names)
    names = [longer if count[name] > 1 else name for name, longer in zip(names, more, strict=True)]
  return names


def _axis(maker: int, places: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
  """The last axis of the variable that makes a group on which it lies: outputs come after inputs."""
  return (
    max((axis, part) for at, axis, part in places if at == maker)
    if any(at == maker for at, _, _ in places)
    else (0, 0)
  )


def _without_collection(path: tuple[str, ...]) -> tuple[str, ...]:
  return path[1:] if path[0] == "params" and len(path) > 1 else path


def _module(path: tuple[str, ...], paths: Sequence[tuple[str, ...]]) -> str:
  """The path of a variable without its own name, if that is one of a module's."""
  parent = path[:-1]
  alone = all(len(other) == len(path) for other in paths if other[: len(parent)] == parent)
  short = _without_collection(path)
  return "/".join(short[:-1] if alone and len(short) > 1 else short)
