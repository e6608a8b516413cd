"""docs/command_line.md is what the commands' own help says."""

from __future__ import annotations

import pytest
from markdown_pages import DOCS


def test_the_page_is_made_from_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "hooks")
    from command_line_page import PAGE, render

    assert PAGE.read_text() == render(), "run python docs/hooks/command_line_page.py"
