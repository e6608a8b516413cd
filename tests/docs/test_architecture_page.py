"""docs/architecture.md: its picture is that of the import contract, and every file and folder it names exists."""

from __future__ import annotations

import re

import pytest
from markdown_pages import DOCS, ROOT

PAGE = DOCS / "architecture.md"


def test_the_picture_is_drawn_from_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "hooks")
    from layer_picture import PICTURE, layers, render

    assert PICTURE.read_text() == render(), "run python docs/hooks/layer_picture.py"
    packages = {path.stem for path in (ROOT / "kvpref").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {name for names in layers() for name in names} == packages - {"__init__", "__main__", "__pycache__"}


def test_files_that_it_names_exist() -> None:
    named = [
        name
        for name in re.findall(r"`([^`\n]+)`", PAGE.read_text())
        if re.fullmatch(r"[\w./]+(\.py|/)|\w+/[\w./]+", name)
    ]
    assert len(named) > 40
    for name in named:
        assert (ROOT / name).exists() or any((ROOT / "kvpref").rglob(name.rstrip("/"))), name
