"""Networks that hold no masks, each with its groups written down by hand: what ``fp.auto_mask`` has to find in them.

A group is a set of variables' axes that must shrink together. By what was promised it is there if

(a) a variable produces it: some node has an operand that is computed of variables alone, with this axis, and the axis
    runs on into a result that depends on the arguments;
(b) a node that depends on the arguments sums over it;
(c) it reaches no argument and no output, and no primitive needs it whole in an operand. Whole in a result alone, as the
    places of a convolution are, it may be.

Where a group is a part of an axis (a concatenation, heads merged with depth), its member is that axis all the same. No
two sizes of a network are equal where they need not be, so that a size tells a group apart from others.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

EXAMPLES = 3
"""How many examples a batch has; no axis of a network is as long by accident."""
Member = tuple[str, int]
"""The path of a variable, and one of its axes."""


class Group(NamedTuple):
  """What has to be found: a size, its members, and how many layers its mask has rows for, if it is in a stack."""

  size: int
  members: frozenset[Member]
  layers: int | None = None


class Ids(NamedTuple):
  """An argument of integers below ``number``, of a shape without its examples."""

  number: int
  shape: tuple[int, ...]


def members(*texts: str) -> frozenset[Member]:
  """``"Conv_0/kernel 3, Conv_0/bias 0"`` as pairs; paths are those of parameters unless they say otherwise."""
  pairs = [part.split() for text in texts for part in text.split(", ")]
  full = [(path if path.startswith("batch_stats/") else f"params/{path}", int(axis)) for path, axis in pairs]
  assert len({*full}) == len(full), f"a member is written down twice in {texts}"
  return frozenset(full)


def group(size: int, *texts: str, layers: int | None = None) -> Group:
  """A group by its size and its members."""
  return Group(size, members(*texts), layers)


def norm(name: str) -> str:
  """The members of a layer norm with scale and bias."""
  return f"{name}/scale 0, {name}/bias 0"


def batch_norm(name: str) -> str:
  """The members of a batch norm: its statistics too."""
  return f"{norm(name)}, batch_stats/{name}/mean 0, batch_stats/{name}/var 0"


@dataclass(frozen=True)
class Unmasked:
  """A network without masks, its arguments, and its groups.

  Attributes:
    name: what it is called.
    apply: ``apply(variables, *args)``.
    init: ``init(*args)`` gives the shapes of the variables.
    shapes: of every argument, without the examples.
    groups: by a label that only the reader needs.
    skipped: some of the axes of which has to be said why they are no group.
    stay: members that stay as long as they are, because variables alone read all of them.
    differentiable: by reverse mode.
  """

  name: str
  apply: Callable[..., Any]
  init: Callable[..., Any]
  shapes: tuple[tuple[int, ...] | Ids, ...]
  groups: Mapping[str, Group]
  skipped: frozenset[Member] = frozenset()
  stay: frozenset[Member] = frozenset()
  differentiable: bool = True

  def variables(self, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Random variables: biases, scales and statistics too, so that nothing is zero or one by accident."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
      values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1)
      name = getattr(path[-1], "key", None)
      return jnp.asarray(np.abs(values) + 0.5 if name in ("var", "scale") else values, dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(self.init, *self.inputs(0, dtype)))

  def inputs(self, seed: int = 0, dtype: Any = jnp.float32, examples: int = EXAMPLES) -> tuple[Any, ...]:
    """Random arguments."""
    rng = np.random.default_rng(seed + 1)

    def draw(shape: Any) -> jax.Array:
      if isinstance(shape, Ids):
        return jnp.asarray(rng.integers(shape.number, size=(examples, *shape.shape)), jnp.int32)
      return jnp.asarray(rng.normal(size=(examples, *shape)), dtype)

    return tuple(map(draw, self.shapes))


UNMASKED: dict[str, Unmasked] = {}


def network(*shapes: Any, name: str = "", **known: Any) -> Any:
  """Adds a function of the arguments with Linen layers in it to the table."""

  def add(function: Callable[..., Any]) -> Callable[..., Any]:
    class Network(nn.Module):
      @nn.compact
      def __call__(self, *args: Any) -> Any:
        return function(*args)

    model = Network()
    init = lambda *args: model.init(jax.random.key(0), *args)
    _add(name or function.__name__, model.apply, init, shapes, **known)
    return function

  return add


def function(*shapes: Any, **known: Any) -> Any:
  """Adds ``f(*args, w=(3, 4), ..)`` to the table, whose keyword arguments say what its parameters are."""

  def add(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function).parameters.items()
    params = {key: p.default for key, p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
    init = lambda *args: {"params": {key: jnp.zeros(shape) for key, shape in params.items()}}
    apply = lambda variables, *args: function(*args, **variables["params"])
    _add(function.__name__, apply, init, shapes, **known)
    return function

  return add


def _add(name: str, *given: Any, skipped: str = "", stay: str = "", **known: Any) -> None:
  assert name not in UNMASKED
  said = {key: members(text) for key, text in (("skipped", skipped), ("stay", stay)) if text}
  UNMASKED[name] = Unmasked(name, *given, **known, **said)


class _Weight(nn.Module):
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param("w", nn.initializers.normal(), self.shape)


def weight(name: str, *shape: int) -> jax.Array:
  """A raw parameter ``name/w``."""
  return _Weight(shape, name=name)()


def dense(features: int, name: str, **options: Any) -> nn.Dense:
  return nn.Dense(features, name=name, **options)


def conv(features: int, name: str, kernel: Any = (3, 3), **options: Any) -> nn.Conv:
  return nn.Conv(features, kernel, name=name, **options)


def normed(x: jax.Array, name: str) -> jax.Array:
  """Batch norm in its form for inference."""
  return nn.BatchNorm(use_running_average=True, name=name)(x)


from tests import auto_models_attention as auto_models_attention  # noqa: E402  they add to the table
from tests import auto_models_data as auto_models_data  # noqa: E402
from tests import auto_models_images as auto_models_images  # noqa: E402
from tests import auto_models_layouts as auto_models_layouts  # noqa: E402
from tests import auto_models_more as auto_models_more  # noqa: E402
from tests import auto_models_ranking as auto_models_ranking  # noqa: E402
from tests import auto_models_recurrent as auto_models_recurrent  # noqa: E402
from tests import auto_models_tokens as auto_models_tokens  # noqa: E402
from tests import auto_models_transformers as auto_models_transformers  # noqa: E402
