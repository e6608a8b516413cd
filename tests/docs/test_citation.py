"""CITATION.cff says what pyproject.toml and the package say."""

from __future__ import annotations

import tomllib

import yaml
from markdown_pages import ROOT

import kvpref


def test_it_agrees_with_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what its format requires
    assert cited["version"] == kvpref.__version__
    assert cited["license"] == project["license"]
    assert cited["title"].startswith(project["name"])
