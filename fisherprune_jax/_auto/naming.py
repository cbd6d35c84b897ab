"""Readable names of groups: the module whose variable makes the features."""

from collections import Counter
from collections.abc import Sequence

HEADS, DEPTH, WIDTH = "heads", "depth", "width"


def unique_names(
  makers: Sequence[tuple[int, Sequence[tuple[int, int, int]]]],
  paths: Sequence[tuple[str, ...]],
  roles: Sequence[str] = (),
) -> list[str]:
  """A name for each group, after the module that makes it, with a role if a module makes several.

  Args:
    makers: for each group, the variable that makes it, and its places ``(variable, axis, part)``.
    paths: the path of every variable.
    roles: such as ``"heads"``, for each group.

  >>> paths = [("params", "Dense_0", "kernel"), ("params", "Dense_0", "bias")]
  >>> unique_names([(0, [(0, 1, 0), (1, 0, 0)])], paths)
  ['Dense_0']
  >>> unique_names([(0, [(0, 1, 0)]), (0, [(0, 2, 0)])], [("query", "kernel")], ["heads", "depth"])
  ['query.heads', 'query.depth']
  >>> unique_names([(0, [(0, 1, 0)]), (0, [(0, 1, 1)])], [("qkv", "kernel"), ("qkv", "bias")])
  ['qkv.width.0', 'qkv.width.1']
  """
  roles = roles or [WIDTH] * len(makers)
  bases = [_module(paths[maker], paths) for maker, _ in makers]
  own = ["/".join(_without_collection(paths[maker])) for maker, _ in makers]
  axes = [_axis(maker, places) for maker, places in makers]
  known = [*zip(bases, own, roles, axes, strict=True)]
  names = bases
  for longer in (
    [path if role == WIDTH else f"{base}.{role}" for base, path, role, _ in known],
    [path if role == WIDTH else f"{path}.{role}" for _, path, role, _ in known],
    [f"{base}.{role}.{part}" for base, _, role, (_, part) in known],
    [f"{base}.{role}.{axis}.{part}" for base, _, role, (axis, part) in known],
    [f"{path}.{role}.{axis}.{part}" for _, path, role, (axis, part) in known],
  ):
    count = Counter(names)
    names = [more if count[name] > 1 else name for name, more in zip(names, longer, strict=True)]
  seen: Counter[str] = Counter()
  for at, name in enumerate(names):  # keys may hold slashes, so two paths may read the same
    seen[name] += 1
    names[at] = name if seen[name] == 1 else f"{name}#{seen[name]}"
  return names


def block_names(variables: Sequence[Sequence[int]], paths: Sequence[tuple[str, ...]]) -> list[str]:
  """A name for each residual branch: the common path of its variables, and ``.block``.

  Equal names get the first module, too.

  Args:
    variables: the variables of each branch, the most telling first.
    paths: the path of every variable.

  >>> paths = [("params", "Layer_0", "Dense_0", "kernel"), ("params", "Layer_0", "Dense_1", "kernel")]
  >>> block_names([[0, 1]], paths), block_names([[0], [1]], paths)
  (['Layer_0.block'], ['Layer_0/Dense_0.block', 'Layer_0/Dense_1.block'])
  """
  short = _without_collections(paths)
  shared = [_common([short[at] for at in own]) for own in variables]
  names = ["/".join(path or short[own[0]][:1]) for own, path in zip(variables, shared, strict=True)]
  count = Counter(names)
  for at, (own, path) in enumerate(zip(variables, shared, strict=True)):
    if count[names[at]] > 1:
      names[at] = "/".join(short[own[0]][: len(path) + 1])
  count, seen = Counter(names), Counter[str]()
  for at, name in enumerate(names):
    if count[name] > 1:
      names[at] = f"{name}.{seen[name]}"
      seen[name] += 1
  return [f"{name}.block" for name in names]


def _without_collections(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
  """Paths without ``params``, ``batch_stats`` and other collections, if there are collections."""
  apart = all(len(path) > 1 for path in paths) and any(path[0] == "params" for path in paths)
  return [path[1:] for path in paths] if apart else list(paths)


def _common(own: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
  """The common path of variables, without the name of a single one."""
  first = own[0] if len(own) > 1 else own[0][:-1] or own[0]
  depth = next(
    (at for at in range(len(first)) if any(path[at : at + 1] != (first[at],) for path in own)), len(first)
  )
  return first[:depth]


def _axis(maker: int, places: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
  """The last axis and part of a group in the variable that makes it: outputs come after inputs."""
  return (
    max((axis, part) for at, axis, part in places if at == maker)
    if any(at == maker for at, _, _ in places)
    else (0, 0)
  )


def _without_collection(path: tuple[str, ...]) -> tuple[str, ...]:
  return path[1:] if path[0] == "params" and len(path) > 1 else path


def _module(path: tuple[str, ...], paths: Sequence[tuple[str, ...]]) -> str:
  """The path of a variable, without its own name if that belongs to a module."""
  parent = path[:-1]
  alone = all(len(other) == len(path) for other in paths if other[: len(parent)] == parent)
  short = _without_collection(path)
  return "/".join(short[:-1] if alone and len(short) > 1 else short)
