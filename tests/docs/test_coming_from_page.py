"""The files that docs/coming_from.md converts to are read by `kvpref train --config`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from markdown_pages import DOCS, code_blocks

from kvpref.cli.given_settings import from_file

CONVERTED = [text for text in code_blocks(DOCS / "coming_from.md", "yaml") if "model" in yaml.safe_load(text)]


def test_there_is_one_for_each_tool() -> None:
    assert len(CONVERTED) == 3


@pytest.mark.parametrize("text", CONVERTED)
def test_its_settings_exist(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert {"model", "data", "output", "loss", "learning_rate"} <= from_file(path).keys()
