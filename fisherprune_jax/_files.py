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


def check_place(path: PathLike, what: str) -> None:
  """Raise if no file can be written, before any work is done; ``what`` needs it, for the error."""
  folder = os.path.dirname(target_of(path))
  if os.path.isdir(path):
    raise IsADirectoryError(
      f"{what} needs the path of a file, got the folder {os.fspath(path)!r}. Name a file in it."
    )
  if not os.path.isdir(folder):
    raise FileNotFoundError(
      f"{what} needs a folder that is there, got {folder!r}. Make it first: os.makedirs({folder!r})."
    )


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
