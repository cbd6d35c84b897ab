"""A file of arrays and a header: safetensors with a checksum, written atomically."""

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._compaction.schema import ARRAYS, misfits
from fisherprune_jax._files import PathLike, replacing
from fisherprune_jax._types import Array

FORMAT = "fisherprune_jax"
"""The key of the header in the metadata."""
VERSION = 1
"""Increases if older libraries cannot read the file."""
CHECKSUM = "sha256"
UNKNOWN = "0" * hashlib.sha256().digest_size * 2
"""The placeholder for the checksum while it is computed over the whole file."""
NEEDS = ("safetensors", "flatbuffers")
NATIVE = set(
  "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2".split()
)
"""Types that every version of safetensors can name; others are written as bytes."""


class Content(NamedTuple):
  """The content of a file.

  Attributes:
    header: JSON values; ``write`` adds "version" and "arrays".
    arrays: NumPy arrays by name.
  """

  header: dict[str, Any]
  arrays: dict[str, np.ndarray]


def check_installed() -> None:
  missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
  if missing:
    raise ImportError(
      f"A compact network is saved and loaded with {' and '.join(NEEDS)}, got no {' and no '.join(missing)}: "
      "pip install 'fisherprune-jax[save]'."
    )


def write(path: PathLike, content: Content) -> None:
  from safetensors.numpy import save

  arrays = {name: [array.dtype.name, array.shape] for name, array in content.arrays.items()}
  header = {**content.header, "version": VERSION, "arrays": arrays}
  metadata = {FORMAT: json.dumps(header), CHECKSUM: UNKNOWN}
  whole = bytearray(save({name: _written(array) for name, array in content.arrays.items()}, metadata))
  at = _place_of(whole, UNKNOWN)
  whole[at : at + len(UNKNOWN)] = _checksum(whole, at).encode()
  with replacing(path) as temporary, open(temporary, "xb") as file:
    file.write(whole)
    file.flush()
    os.fsync(file.fileno())


def read(path: PathLike) -> Content:
  """Read a file of ``write``; raises ``ValueError`` for another kind, a newer version, or a damaged file."""
  import safetensors

  with open(path, "rb") as file:
    whole = file.read()
  metadata = _metadata(whole)
  if metadata is None:
    raise ValueError(
      f"A file to load must be one that small.save wrote, got {os.fspath(path)!r}, which is not one or has lost its "
      f"beginning ({len(whole):,} bytes). Give another path, or save the network again."
    )
  header, claimed = metadata
  if header["version"] > VERSION:
    raise ValueError(
      f"A file to load must be of format version {VERSION} or older, got version {header['version']} in "
      f"{os.fspath(path)!r}. Install a newer fisherprune-jax."
    )
  at = _place_of(whole, claimed)
  if at < 0 or _checksum(whole, at) != claimed:
    raise ValueError(
      f"A file to load must be unchanged, got {os.fspath(path)!r}, which is cut short or changed: its checksum "
      "differs. Copy it again from where it came from, or save the network again."
    )
  try:
    refuse(path, misfits(header.get("arrays"), ARRAYS, "the header/arrays"))
    found = {name: tensor["data"] for name, tensor in safetensors.deserialize(whole)}
    return Content(header, {name: _read(found, name, *kind) for name, kind in header["arrays"].items()})
  except safetensors.SafetensorError as error:
    refuse(path, iter([str(error)]))
    raise


def refuse(path: PathLike, wrong: Iterator[str]) -> None:
  """Raise for the first of some faults of a file, if any."""
  if found := next(wrong, ""):
    raise ValueError(
      f"A file to load must hold what small.save writes, got {os.fspath(path)!r}, where {found}. It was changed by "
      "something else: save the network again."
    )


def on_host(name: str, leaf: Array) -> np.ndarray:
  """The values of an array, or the data of a random key."""
  if is_key(leaf):
    leaf = jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
    raise ValueError(
      f"Arrays to save must be at hand here, got {name} on devices of other processes too. Gather it first: "
      "jax.experimental.multihost_utils.process_allgather."
    )
  return np.asarray(leaf)


def is_key(leaf: Array) -> bool:
  return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _written(array: np.ndarray) -> np.ndarray:
  """An array that safetensors accepts."""
  array = np.array(array, order="C")
  return array if array.dtype.name in NATIVE else np.frombuffer(array.tobytes(), np.uint8)


def _read(found: dict[str, bytes], name: str, dtype: str, shape: Sequence[int]) -> np.ndarray:
  need, have = math.prod(shape) * jnp.dtype(dtype).itemsize, len(found.get(name, b""))
  if name not in found or need != have:
    raise ValueError(
      f"A file to load must hold {need:,} bytes for each {dtype}{list(shape)}, got {have:,} for {name!r}. Save the network again."
    )
  return np.frombuffer(found[name], jnp.dtype(dtype)).reshape(shape)


def _metadata(whole: bytes) -> tuple[dict[str, Any], str] | None:
  """The header and the claimed checksum; None without them."""
  end = 8 + int.from_bytes(whole[:8], "little")
  if len(whole) < 8 or end > len(whole):
    return None
  try:
    metadata = json.loads(whole[8:end])["__metadata__"]
    header, checksum = json.loads(metadata[FORMAT]), metadata[CHECKSUM]
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
  known = isinstance(header, dict) and isinstance(header.get("version"), int) and isinstance(checksum, str)
  return (header, checksum) if known and checksum.isascii() and len(checksum) == len(UNKNOWN) else None


def _place_of(whole: bytes | bytearray, checksum: str) -> int:
  """The position of the checksum; -1 if it is missing."""
  before = f'"{CHECKSUM}":"'
  at = whole.find(f'{before}{checksum}"'.encode())
  return at if at < 0 else at + len(before)


def _checksum(whole: bytes | bytearray, at: int) -> str:
  """The checksum of a file with the placeholder at ``at``."""
  view, digest = memoryview(whole), hashlib.sha256()
  for part in (view[:at], UNKNOWN.encode(), view[at + len(UNKNOWN) :]):
    digest.update(part)
  return digest.hexdigest()
