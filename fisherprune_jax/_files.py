"""Atomic writing of files."""

import contextlib
import os
import secrets
from collections.abc import Iterator

PathLike = str | os.PathLike[str]
"""A path for ``open``."""


def target_of(path: PathLike) -> str:
  """The file to replace: links are followed."""
  return os.path.realpath(os.fspath(path))


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[str]:
  """A temporary name in the same folder; the written file replaces the target, or is removed after an error."""
  target = target_of(path)
  folder, name = os.path.split(target)
  temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
  try:
    yield temporary
    os.replace(temporary, target)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise
