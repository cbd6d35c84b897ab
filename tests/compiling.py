"""What JAX traces and compiles meanwhile, heard from JAX itself: the caches of its functions may be emptied at any time."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
  """The events of tracing and compiling while inside, in their order."""
  events: list[str] = []

  def listen(event: str, duration: float, **_: object) -> None:
    if "compile" in event or "trace" in event:
      events.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
  """Fails if anything is traced or compiled inside; what is new is heard."""
  with compiled() as events:
    yield
  assert not events, events
  with compiled() as events:
    jax.jit(lambda x: x + 1.5)(jnp.ones(7))
  assert events
