"""docs/formats.md: every row of its tables is the first of its file, loads, and becomes what the table says."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import pytest
from agent_templates import PLAIN, build_agent_tokenizer
from markdown_pages import DOCS, names_in, section, sections, tables

from kvpref.data import load_preferences
from kvpref.losses import make_loss
from kvpref.records.groups import Group

PAGE = DOCS / "formats.md"


class Line(NamedTuple):
    """One line of a table."""

    name: str
    row: dict[str, Any]
    file: str
    becomes: str
    loss: str


def _lines() -> list[Line]:
    found = []
    for title in sections(PAGE):
        for table in tables(section(PAGE, title)):
            for cells in table:
                (loss,) = names_in(cells["`--loss`"])
                (target,) = re.findall(r"\]\(\.\./(.*)\)", cells["file"])
                row = json.loads(cells["row"].strip("`"))
                found.append(Line(cells["name there"], row, target, cells["becomes"], loss))
    return found


LINES = _lines()


def _described(group: Group) -> str:
    def listed(numbers: tuple[float | None, ...]) -> str:
        return ", ".join(f"{number:g}" for number in numbers if number is not None)

    rated = "" if group.scores is None else f", score{'s' * (len(group) > 1)} {listed(group.scores)}"
    if group.labels is not None:
        return f"a pair{rated}"
    if group.ranks is not None:
        rated = f", ranks {listed(group.ranks)}"
    return f"{len(group)} response{'s' * (len(group) > 1)}{rated}" if rated else "a demonstration"


def test_all_files_are_in_the_tables() -> None:
    folder = DOCS.parent / "examples" / "formats"
    found = {path.relative_to(DOCS.parent).as_posix() for path in folder.rglob("*.json*")}
    assert {line.file for line in LINES} == found


@pytest.mark.parametrize("line", LINES, ids=[line.file for line in LINES])
def test_a_row_becomes_what_the_table_says(line: Line) -> None:
    text = (DOCS.parent / line.file).read_text()
    first = json.loads(text)[0] if line.file.endswith(".json") else json.loads(text.splitlines()[0])
    assert line.row == first
    row = dict(first)
    for own, given in re.findall(r"--column (\w+)=(\w+)", line.name):
        row[own] = row.pop(given)
    (group,) = load_preferences([row], build_agent_tokenizer(PLAIN))
    assert re.fullmatch(
        rf"{_described(group)}( of 2 turns| without prompt|; with the others of its prompt)?", line.becomes
    )
    # Before training a loss refuses groups of another form; what is left is what it trains on.
    assert len(make_loss(line.loss).select(group)) >= 1
