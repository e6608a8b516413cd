"""docs/api/: every public name is on one page, and its docstring says of its parameters what the signature says."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from typing import Any

import pytest
from markdown_pages import DOCS, ROOT

griffe = pytest.importorskip("griffe", reason="needs the extra kvpref[docs]")

PACKAGES = ("kvpref", "kvpref.data", "kvpref.losses", "kvpref.integrations.trl")
API = DOCS / "api"
LISTED = [
    (name, page) for page in sorted(API.glob("*.md")) for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
]


@pytest.fixture(scope="module")
def package() -> Any:
    found = griffe.load("kvpref", search_paths=[ROOT], allow_inspection=False)
    assert isinstance(found, griffe.Object)
    return found


def find(package: Any, name: str) -> Any:
    found = package[name.removeprefix("kvpref.")]
    return found.final_target if found.is_alias else found


def test_every_public_name_is_on_one_page(package: Any) -> None:
    pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
    # One thing may be public in two packages.
    public = {
        find(package, f"{name}.{item}").path for name in PACKAGES for item in importlib.import_module(name).__all__
    }
    counted = Counter(find(package, name).path for name, _ in LISTED)
    assert counted.keys() == public
    assert set(counted.values()) == {1}


def test_every_page_is_in_the_table_and_in_the_navigation() -> None:
    table, navigation = (API / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in sorted(API.glob("*.md")):
        assert page.name == "index.md" or f"]({page.name})" in table
        assert f"api/{page.name}" in navigation


@pytest.mark.parametrize("name", [name for name, _ in LISTED])
def test_docstrings_fit_signatures(package: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    found = find(package, name)
    assert found.docstring is not None or found.is_attribute, f"{found.path} has no docstring"
    for item in [found, *(member for member in found.members.values() if not member.is_alias and member.is_public)]:
        if item.docstring is None:
            continue
        sections = item.docstring.parse("google")
        documented = [
            entry.name.lstrip("*")
            for part in sections
            if part.kind is griffe.DocstringSectionKind.parameters
            for entry in part.value
        ]
        if item.is_function and documented:
            assert documented == [each.name for each in item.parameters if each.name not in ("self", "cls")], item.path
    assert not caplog.records  # what griffe cannot read
