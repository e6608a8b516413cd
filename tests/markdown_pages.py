"""README.md and docs/ as tests read them: code blocks, sections, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
_FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of code.

    Attributes:
        page: Where it stands.
        line: Of its first fence, from 1.
        language: As the fence names it; empty if it does not.
        title: The file that it shows, where the fence has ``title="FILE"``.
        code: What it holds, without the indentation of the fence.
        not_run: The reason in a comment ``<!-- not run: REASON -->`` before it; None without one.
    """

    page: Path
    line: int
    language: str
    title: str | None
    code: str
    not_run: str | None


def pages() -> list[Path]:
    """Every page: README.md, CONTRIBUTING.md and those of docs/."""
    return [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("indent")) + 1
        code = dedent(match["code"]) if match["indent"] else match["code"]
        found.append(Block(page, line, match["language"], match["title"], code, match["reason"]))
    return found


def code_blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [block.code for block in blocks(path) if block.language == language]


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
