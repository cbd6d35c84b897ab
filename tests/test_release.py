"""What is released says the same everywhere: one version, a short changelog, a citation and settings that parse."""

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml

import fisherprune_jax as fp

ROOT = Path(__file__).parent.parent
HIDDEN = [".readthedocs.yaml", *(str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.yml"))]


def releases():
  """The versions of the changelog, each with its lines."""
  _, *sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
  return {text.split()[0]: text.strip().splitlines() for text in sections}


def test_the_version_is_the_installed_one():
  assert metadata("fisherprune-jax")["Version"] == fp.__version__, "run `make install` after a new version"


def test_the_version_stands_in_one_place_of_the_package():
  assert not re.search(r"^version *=", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_changelog_begins_with_this_version():
  assert next(iter(releases())) == fp.__version__


@pytest.mark.parametrize("version", releases())
def test_a_release_is_short(version):
  lines = releases()[version]
  assert len(lines) <= 30
  headings = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
  assert headings
  assert set(headings) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed"}


def test_the_first_release_fixes_nothing():
  *_, first = releases().values()
  assert "### Fixed" not in first


def test_the_changelog_names_what_exists():
  for name in set(re.findall(r"`fp\.([\w.]+)`", (ROOT / "CHANGELOG.md").read_text())):
    value = fp
    for part in name.split("."):
      value = getattr(value, part)


def test_the_citation_is_complete():
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(cited)
  assert (cited["cff-version"], cited["version"]) == ("1.2.0", fp.__version__)
  assert cited["license"] == metadata("fisherprune-jax")["License-Expression"]
  assert cited["references"]
  assert all({"type", "title", "authors"} <= set(reference) for reference in cited["references"])


@pytest.mark.parametrize("path", HIDDEN)
def test_settings_parse(path):
  assert yaml.safe_load((ROOT / path).read_text())
