"""docs/backends.md: it lists the backends there are, each with what it does while it must repeat itself."""

from __future__ import annotations

from markdown_pages import DOCS, names_in, section, tables

from kvpref.ops.attention.backends import backend_names

PAGE = DOCS / "backends.md"


def names(rows: list[dict[str, str]]) -> list[str]:
    return [name for row in rows for name in names_in(row["backend"])]


def test_every_backend_is_listed() -> None:
    assert names(next(tables(PAGE.read_text()))) == list(backend_names())


def test_determinism_is_told_of_every_backend() -> None:
    assert sorted(names(next(tables(section(PAGE, "Determinism"))))) == sorted(backend_names())
