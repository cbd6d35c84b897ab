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
  seen: Counter[str] = Counter()
  for at, name in enumerate(names):  # keys may hold slashes: then two paths may be one text
    seen[name] += 1
    names[at] = name if seen[name] == 1 else f"{name}#{seen[name]}"
  return names


def block_names(variables: Sequence[Sequence[int]], paths: Sequence[tuple[str, ...]]) -> list[str]:
  """A name for each residual branch: what its variables' paths have in common, and ``.block``.

  Where that is the same for several, the module of the first of its variables is in it too.

  Args:
    variables: of each branch the positions of its variables, the most telling first.
    paths: the path of every variable.

  >>> paths = [("params", "Layer_0", "Dense_0", "kernel"), ("params", "Layer_0", "Dense_1", "kernel")]
  >>> block_names([[0, 1]], paths), block_names([[0], [1]], paths)
  (['Layer_0.block'], ['Layer_0/Dense_0.block', 'Layer_0/Dense_1.block'])
  """
  shared = [_common([paths[at] for at in own]) for own in variables]
  names = ["/".join(_without_collection(path)) or "model" for path in shared]
  count = Counter(names)
  for at, (own, path) in enumerate(zip(variables, shared, strict=True)):
    if count[names[at]] > 1:
      names[at] = "/".join(_without_collection(paths[own[0]][: len(path) + 1]))
  count, seen = Counter(names), Counter[str]()
  for at, name in enumerate(names):
    if count[name] > 1:
      names[at] = f"{name}.{seen[name]}"
      seen[name] += 1
  return [f"{name}.block" for name in names]


def _common(own: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
  """The path that variables have in common, without the name of a single one."""
  first = own[0] if len(own) > 1 else own[0][:-1] or own[0]
  depth = next(
    (at for at in range(len(first)) if any(path[at : at + 1] != (first[at],) for path in own)), len(first)
  )
  return first[:depth]


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
