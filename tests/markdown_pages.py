"""README.md and docs/ as tests read them: code blocks, sections, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def code_blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def section(path: Path, title: str) -> str:
    """What stands under a heading of level 2, up to the next one."""
    _, found, rest = path.read_text().partition(f"\n## {title}\n")
    assert found, f"{path.name} has no section {title!r}"
    return rest.partition("\n## ")[0]


def sections(path: Path) -> dict[str, str]:
    """All sections of level 2, by title."""
    titles = re.findall(r"^## (.+)$", path.read_text(), flags=re.MULTILINE)
    return {title: section(path, title) for title in titles}


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Each table as its rows, cells by the heading of their column."""
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" |")] for line in block.splitlines()]
        yield [dict(zip(header, row, strict=False)) for row in rows]


def names_in(cell: str) -> list[str]:
    """What a cell sets in code type."""
    return re.findall(r"`([^`]+)`", cell)
