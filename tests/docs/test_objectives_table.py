"""The table of all objectives in docs/objectives.md is the code's."""

from __future__ import annotations

from markdown_pages import DOCS, names_in, section, tables

from kvpref.losses import LOSSES
from kvpref.losses.catalog import describe_loss

PAGE, TITLE = DOCS / "objectives.md", "All of them"
GROUP_ROWS = "**"


def objectives() -> list[dict[str, str]]:
    table = next(tables(section(PAGE, TITLE)))
    return [row for row in table if not row["name"].startswith(GROUP_ROWS)]


def test_every_loss_is_listed_once_and_nothing_else() -> None:
    listed = [name for row in objectives() for name in names_in(row["name"])]
    assert sorted(listed) == sorted(LOSSES)
    assert all(row["what"] and row["data"] for row in objectives())


def test_which_losses_read_a_reference() -> None:
    for row in objectives():
        (name,) = names_in(row["name"])
        described = describe_loss(name, LOSSES[name])
        if row["reference"] == "by setting":
            assert isinstance(LOSSES[name].needs_reference, property), name
        else:
            assert {"yes": True, "no": False}[row["reference"]] == described.needs_reference, name
            assert described.needs_reference or not isinstance(LOSSES[name].needs_reference, property), name


def test_which_losses_couple_the_groups_of_a_micro_batch() -> None:
    (paragraph,) = [text for text in section(PAGE, TITLE).split("\n\n") if "couple" in text]
    coupling = {name for name, kind in LOSSES.items() if "couples" in (kind.__doc__ or "")}
    assert set(names_in(paragraph)) == coupling
