"""Timing programs on this machine, and storing the times."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._files import PathLike, replacing, target_of

SHORTEST, LONGEST = 1e-12, 1e9
"""Seconds: the range of valid times."""
VISIT = 2e-3
"""Seconds of repeated runs per visit, far above the resolution of the clock."""
Run = Callable[[], Any]


def machine() -> str:
  """What times depend on beside the program: the device, its compiler, and for a CPU its cores."""
  (device,) = jnp.zeros(()).devices()  # the default device
  parts = [device.platform, device.device_kind, f"jax {jax.__version__}"]
  if device.platform == "cpu":
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts += [_processor(), f"{cores} cores", os.environ.get("XLA_FLAGS", "")]
  return ", ".join(filter(None, parts))


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
  return next(named, platform.processor() or platform.machine())


def medians(runs: Sequence[Run], repeats: int, visit: float = VISIT) -> np.ndarray:
  """The median seconds per call of some programs, which alternate in visits of ``visit`` seconds or one call."""
  first = [once(run, 1) for run in (*runs, *runs)][len(runs) :]  # the first call compiles
  counts = [max(1, int(visit / max(seconds, 1e-7))) for seconds in first]
  rounds = [[once(run, count) for run, count in zip(runs, counts, strict=True)] for _ in range(repeats)]
  return np.median(rounds, axis=0) if runs else np.zeros(0)


def once(run: Run, count: int) -> float:
  """The mean seconds per call of ``count`` calls in a row."""
  start = time.perf_counter()
  for _ in range(count):
    out = run()
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / count


class Memory:
  """Times by name, in a JSON file if there is a path: ``{machine: {name: seconds}}``.

  Raises:
    ValueError: for a file with other content.
    IsADirectoryError: for a folder.
  """

  def __init__(self, path: PathLike | None) -> None:
    self._path = None if path is None else Path(target_of(path))
    self._machine = machine()
    self.times: dict[str, float] = self._read().get(self._machine, {})

  def add(self, found: Mapping[str, float]) -> None:
    """Add times; the file is replaced by one that keeps what other processes added meanwhile."""
    self.times.update({name: max(seconds, SHORTEST) for name, seconds in found.items()})
    if self._path is None:
      return
    everything = self._read()
    everything.setdefault(self._machine, {}).update(self.times)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(self._path) as temporary:
      Path(temporary).write_text(json.dumps(everything, indent=1))

  def _read(self) -> dict[str, dict[str, float]]:
    if self._path is None or not self._path.exists():
      return {}
    if self._path.is_dir():
      raise IsADirectoryError(
        f"cache must be the path of a file, got the folder {self._path}. Name a file in it."
      )
    try:
      found = json.loads(self._path.read_text())
      _check(found)
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f"cache must be a JSON file that fp.measure_latency wrote, or a path that does not exist, got {self._path}: "
        f"{error}. Remove it, or name another."
      ) from error
    return found

  def check_place(self) -> None:
    """Raise if no file can be written; call it before timing."""
    if self._path is None:
      return
    folder = next(folder for folder in self._path.parents if folder.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
      raise OSError(
        f"cache must be a path where a file can be written, got {self._path}, where {folder} is no folder that may be "
        "written to. Name another."
      )


def _check(found: Any) -> None:
  parts: Iterable[Any] = found.values() if isinstance(found, dict) else [None]
  if not all(isinstance(part, dict) for part in parts):
    raise ValueError("it holds no times by machine")
  wrong = [(name, t) for part in parts for name, t in part.items() if not _is_time(t)]
  if wrong:
    raise ValueError(
      f"{wrong[0][0][:80]!r} must take from {SHORTEST:g} to {LONGEST:g} seconds, got {_short(wrong[0][1])}"
    )


def _is_time(t: Any) -> bool:
  return isinstance(t, float | int) and not isinstance(t, bool) and SHORTEST <= t <= LONGEST


def _short(value: Any) -> str:
  """A JSON value on one line of an error."""
  return "a huge number" if isinstance(value, int) and value.bit_length() > 99 else str(value)[:30]
