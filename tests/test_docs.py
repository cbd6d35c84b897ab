"""The documentation: its examples run, and its reference names what there is."""

import ast
import doctest
import functools
import importlib
import inspect
import re
import tempfile
from pathlib import Path

import jax
import pytest

import fisherprune_jax as fp

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted([*DOCS.glob("*.md"), DOCS / "api.rst"])
README = DOCS.parent / "README.md"
GOES_ON = "goes on from the [complete example](quickstart.md#complete-example)"
COLUMN = 88
WITHOUT_EXAMPLES = ("benchmarks", "index")
GUIDES = (
  "linen",
  "nnx",
  "equinox",
  "haiku",
  "keras",
  "distributed",
  "fsdp",
  "checkpoints",
  "saving",
  "onnx",
  "transformers",
  "budgets",
  "criteria",
  "batch-axes",
  "recipes",
)


def public_names():
  """What users may call, as dotted names."""
  for name in dir(fp):
    if not name.startswith("_") and not inspect.ismodule(getattr(fp, name)):
      yield f"fisherprune_jax.{name}"
  for name, value in vars(fp.nnx).items():
    if not name.startswith("_") and not inspect.ismodule(value):
      yield f"fisherprune_jax.nnx.{name}"
  for name in vars(fp.rules):
    if not name.startswith("_") and not hasattr(fp, name):
      yield f"fisherprune_jax.rules.{name}"


def documented_names():
  """What the reference page documents, as dotted names."""
  directives = re.findall(
    r"^\.\. auto(?:class|function):: ([\w.]+)", (DOCS / "api.rst").read_text(), re.MULTILINE
  )
  return [name.strip() for name in directives]


def text_of(page):
  """What a page says, with what it includes."""

  def included(match):
    path, start, end = match.groups()
    found = (page.parent / path).read_text()
    assert found.count(start) == found.count(end) == 1
    return found.split(start)[1].split(end)[0]

  pattern = r"^```\{include\} (.+)\n:start-after: (.+)\n:end-before: (.+)(?:\n:.+)*\n```$"
  return re.sub(pattern, included, page.read_text(), flags=re.MULTILINE)


def examples_of(page):
  """The text of a page, and before it that of the page whose example it says that it goes on from."""
  text = text_of(page)
  return text_of(DOCS / "quickstart.md") + text if GOES_ON in text else text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
  if page.stem == "onnx" and jax.__version_info__ >= (0, 12):
    pytest.skip("jax2onnx 0.17 works with JAX 0.10 and 0.11")
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  test = doctest.DocTestParser().get_doctest(examples_of(page), {}, page.name, str(page), 0)
  assert bool(test.examples) == (page.stem not in WITHOUT_EXAMPLES)
  assert doctest.DocTestRunner(optionflags=flags).run(test).failed == 0


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_code_fits_its_column(page):
  fenced = re.findall(r"^```[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
  prompted = re.findall(r"^(?:>>>|\.\.\.) .*$", page.read_text(), re.MULTILINE)
  lines = [*"".join(fenced).splitlines(), *prompted]
  assert lines or page.stem in WITHOUT_EXAMPLES
  assert [line for line in lines if len(line) > COLUMN] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_is_one_that_runs(page):
  blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
  for language, code in blocks:
    if language not in ("bash", "{toctree}") and not language.startswith("{include}"):
      assert code.startswith(">>> "), code
      assert code.endswith("\n\n"), "doctest would take the fence for output"


@functools.cache
def strings_of_the_library():
  """All strings in its source, as they are put together; ``...`` stands for a value."""
  found = []
  for path in Path(fp.__file__).parent.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      parts = node.values if isinstance(node, ast.JoinedStr) else [node]
      found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in parts))
  return "\n".join(found).replace("`", "")


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem in GUIDES], ids=lambda page: page.stem)
def test_the_errors_that_a_page_explains_are_those_of_the_library(page):
  tables = re.findall(r"^\| (?:message|you see) \|.*\n(?:\|.*\n)+", page.read_text(), re.MULTILINE)
  quoted = re.findall(r"^\| `(.+?)`", "\n".join(tables), re.MULTILINE)
  assert quoted
  for part in (part.strip(" ,") for message in quoted for part in message.split("...")):
    assert part.removeprefix("sub ") in strings_of_the_library()


def test_the_sidebar_lists_every_page_once():
  trees = re.findall(r"^```\{toctree\}\n(?::.+\n)+\n((?:\S+\n)+)```$", (DOCS / "index.md").read_text(), re.M)
  listed = "".join(trees).split()
  assert sorted([*listed, "index"]) == sorted(page.stem for page in PAGES)
  assert set(GUIDES) <= set(listed)


def anchors_of(page):
  """Of its headings, as GitHub and MyST make them."""
  headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_links_lead_to_pages_and_headings(page):
  for path, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]+))?\)", page.read_text()):
    target = page.parent / path if path else page
    assert target.exists(), path
    assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"


def blocks_of_the_readme():
  return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
  assert README.stat().st_size <= 6 * 1024
  assert len(blocks_of_the_readme()[0].splitlines()) <= 25


def test_the_readme_runs(capsys):
  trained, step = blocks_of_the_readme()
  names = {}
  exec(trained, names)
  x, y = names["x"], names["y"]
  assert names["small"].cost <= 0.25 * names["pruner"].cost.dense
  assert float(capsys.readouterr().out) > 0.95
  exec(step, names)
  params, opt_state = names["params"], names["opt_state"]
  for at in range(320):
    rows = slice(64 * at % 1280, 64 * at % 1280 + 64)
    params, opt_state = names["train_step"](params, opt_state, x[rows], y[rows])
  small = names["pruner"].compact(params, opt_state)
  assert small.cost <= 0.1 * names["pruner"].cost.dense
  logits = small(small.variables, names["unseen"])
  assert (logits.argmax(-1) == names["labels"]).mean() > 0.9


def test_the_reference_covers_every_public_name_once():
  documented = documented_names()
  assert len(documented) == len(set(documented))
  assert set(public_names()) - set(documented) == set()


@pytest.mark.parametrize("name", documented_names())
def test_the_reference_names_what_exists(name):
  module, _, attribute = name.rpartition(".")
  assert inspect.getdoc(getattr(importlib.import_module(module), attribute))


def test_the_members_that_the_reference_lists_exist():
  page = (DOCS / "api.rst").read_text()
  for name, members in re.findall(r"autoclass:: ([\w.]+).*\n   :members: (.*)\n", page):
    module, _, attribute = name.rpartition(".")
    for member in members.split(", "):
      assert hasattr(getattr(importlib.import_module(module), attribute), member), (name, member)


def test_the_page_on_the_inside_names_what_there_is():
  page = re.sub(r"^```.*?^```$", "", (DOCS / "design.md").read_text(), flags=re.MULTILINE | re.DOTALL)
  quoted = set(re.findall(r"`([^`\n]+)`", page))
  named = {name.rstrip("/") for name in quoted if re.fullmatch(r"[\w/]+(?:\.py|\.md|/)", name)}
  words = {word for name in quoted - named for word in re.findall(r"[A-Za-z_]\w{3,}", name)}
  assert len(named) > 30
  assert len(words) > 50
  paths = [path for top in ("fisherprune_jax", "tests", "docs") for path in (DOCS.parent / top).rglob("*")]
  files = [f"/{path.relative_to(DOCS.parent)}" for path in paths]
  assert {name for name in named if not any(file.endswith(f"/{name}") for file in files)} == set()
  source = "\n".join(path.read_text() for path in paths if path.suffix == ".py")
  assert {word for word in words if not re.search(rf"\b{word}\b", source)} == set()


def test_the_page_on_the_inside_lists_the_engine():
  table = (
    (DOCS / "design.md").read_text().split("| files | what they are about |\n|---|---|\n")[1].split("\n\n")[0]
  )
  listed = re.findall(r"`(\w+)/?`", "\n".join(row.split("|")[1] for row in table.splitlines()))
  there = [
    path.stem for path in (Path(fp.__file__).parent / "_graph").iterdir() if not path.stem.startswith("_")
  ]
  assert sorted(listed) == sorted(there)
