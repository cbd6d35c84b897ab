"""The rules of the house: one file touches the internals of JAX, nothing imports upwards, what is private is hidden."""

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import fisherprune_jax as fp

ROOT = Path(fp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
COMPAT = ROOT / "_graph" / "compat.py"

STOREYS = [
  {"_errors", "_files", "_masks", "_tables", "_types"},
  {"_graph"},
  {"_cost", "_freezing"},
  {"_training"},
  {"_compaction"},
  {"_auto", "_html", "_latency", "_reconstruction"},
  {"_pruner"},
  {"linen", "nnx", "rules"},
  {"__init__", "__main__"},
]
"""Who may import whom: a room those on its own storey, and below."""
FACES = {"linen", "nnx", "rules"}

INTERNAL = ("jax._src", "jax.extend", "jax.interpreters", "jaxlib")
PUBLIC_OF_CORE = {"jax.core.Tracer"}
"""Of ``jax.core``, whose other names come and go."""
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}


def name_of(path: Path) -> str:
  return str(path.relative_to(ROOT))


def dotted(node: ast.expr) -> str:
  """``a.b.c`` of a chain of attributes of a name; empty for others."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def imports(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
  """All that is imported, in functions and for types too; and a name with what it is bound to."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        first = alias.name.partition(".")[0]
        yield (alias.name, alias.asname, alias.name) if alias.asname else (alias.name, first, first)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "imports are absolute"
      for alias in node.names:
        yield (name := f"{node.module}.{alias.name}"), alias.asname or alias.name, name


def is_private(name: str) -> bool:
  return name.startswith("_") and not name.endswith("__")


def is_internal(name: str) -> bool:
  """Whether a dotted name of somebody else's is none that they promise to keep."""
  if name.partition(".")[0] == fp.__name__:
    return False
  inside = any(name == module or name.startswith(f"{module}.") for module in INTERNAL)
  of_core = name.startswith("jax.core.") and name not in PUBLIC_OF_CORE
  return inside or of_core or any(map(is_private, name.split(".")))


def private_names(tree: ast.AST) -> Iterator[str]:
  """The private attributes that a module defines: its own names, those of its classes, what ``self`` is given."""
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      yield node.id
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node.value) == "self":
      yield node.attr


@functools.cache
def our_names() -> frozenset[str]:
  return frozenset(name for path in FILES for name in private_names(ast.parse(path.read_text())))


def internals(source: str) -> list[str]:
  """What a module touches of other people's internals, as far as its text shows it."""
  tree = ast.parse(source)
  found = [name for name, *_ in imports(tree) if is_internal(name)]
  known = {local: bound for _, local, bound in imports(tree)}
  allowed = OF_NAMED_TUPLES | our_names() | {*private_names(tree)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      first, _, rest = dotted(node).partition(".")
      if first in known and is_internal(f"{known[first]}.{rest}"):
        found.append(f"{known[first]}.{rest}")
      elif is_private(node.attr) and node.attr not in allowed:
        found.append(ast.unparse(node))
    if isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr", "setattr"):
      asked = node.args[1]
      if isinstance(asked, ast.Constant) and is_private(str(asked.value)):
        found.append(ast.unparse(node))
  return found


@pytest.mark.parametrize("path", [path for path in FILES if path != COMPAT], ids=name_of)
def test_one_file_touches_the_internals_of_jax(path):
  assert internals(path.read_text()) == []


@pytest.mark.parametrize(
  "source",
  [
    "import jax._src.core",
    "from jax._src import core",
    "from jax._src.core import Tracer",
    "from jax.extend import core",
    "from jax.extend.core import Primitive",
    "import jax.interpreters.mlir as mlir",
    "from jax import core\ncore.Jaxpr",
    "def f():\n  from jax.interpreters import ad",
    "import jax\njax._src.core",
    "import jax\njax.extend.core.Primitive",
    "import jax\njax.core.Jaxpr",
    "from jax import core as inside\ninside.Jaxpr",
    "import flax\nflax.core._private",
    "from optax import _src",
    "def f(module):\n  return module.scope._variables",
    "def f(scope):\n  return getattr(scope, '_variables')",
  ],
)
def test_touching_internals_is_seen(source):
  assert internals(source)


@pytest.mark.parametrize(
  "source",
  [
    "import jax\nisinstance(3, jax.core.Tracer)",
    "from fisherprune_jax._graph import sets\nsets.union",
    "class A:\n  def f(self):\n    self._mine = 1\n  def g(self, other):\n    return other._mine",
    "def f(state):\n  return state._replace(step=1)",
    "def f(a):\n  return a.__name__, getattr(a, '__wrapped__')",
  ],
)
def test_what_is_promised_may_be_used(source):
  assert internals(source) == []


def storey(module: str) -> int:
  """How high a module of ours lies, by its room."""
  room = module.split(".")[1] if "." in module else "__init__"
  return next((at for at, rooms in enumerate(STOREYS) if room in rooms), len(STOREYS) - 1)


def upwards(module: str, source: str) -> list[str]:
  """What a module imports from above itself."""
  ours = [name for name, *_ in imports(ast.parse(source)) if name.partition(".")[0] == fp.__name__]
  return [name for name in ours if storey(name) > storey(module)]


def module_of(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join((fp.__name__, *parts)) if parts != ("__init__",) else fp.__name__


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_upwards(path):
  assert upwards(module_of(path), path.read_text()) == []


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("fisherprune_jax._graph.model", "from fisherprune_jax._cost.cost import CostModel"),
    ("fisherprune_jax._graph.model", "def f():\n  from fisherprune_jax import rules"),
    ("fisherprune_jax._cost.cost", "import fisherprune_jax._compaction.compact"),
    ("fisherprune_jax._errors", "from fisherprune_jax._graph import compat"),
    ("fisherprune_jax._training.state", "import fisherprune_jax as fp"),
    ("fisherprune_jax.nnx", "from fisherprune_jax import compact"),
  ],
)
def test_an_import_upwards_is_seen(module, source):
  assert upwards(module, source)


def test_every_room_has_a_storey():
  rooms = {module_of(path).split(".")[1] for path in FILES if path.parent != ROOT}
  faces = {path.stem for path in FILES if path.parent == ROOT}
  assert rooms | faces == set().union(*STOREYS)


def test_nothing_private_is_among_the_public_names():
  modules = {name for name in dir(fp) if inspect.ismodule(getattr(fp, name)) and not name.startswith("_")}
  assert modules == FACES
