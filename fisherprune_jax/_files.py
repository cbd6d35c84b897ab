"""Files that are written whole, or left as they were."""

import contextlib
import os
import secrets
from collections.abc import Iterator

PathLike = str | os.PathLike[str]
"""Whatever ``open`` takes."""


def target_of(path: PathLike) -> str:
  """What is replaced: a link stays one, and what it leads to is."""
  return os.path.realpath(os.fspath(path))


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[str]:
  """A new name in the same folder; what was written there takes the place of the file, or is gone."""
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
