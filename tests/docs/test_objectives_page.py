"""docs/objectives.md names every loss, its unit and source, and every setting with its default."""

from __future__ import annotations

import re
from collections import defaultdict

from markdown_pages import DOCS, names_in, sections, tables

from kvpref.losses import LOSSES
from kvpref.losses.catalog import VARIES, describe_loss

PAGE = DOCS / "objectives.md"


def families() -> list[tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """Per family its table of losses and its table of settings."""
    found = []
    for text in sections(PAGE).values():
        by_header = {next(iter(table[0])): table for table in tables(text)}
        if "setting" in by_header:  # the others say what all families have in common
            found.append((by_header["loss"], by_header["setting"]))
    return found


def test_every_loss_has_its_unit_and_source() -> None:
    rows = [row for losses, _ in families() for row in losses]
    assert [name for row in rows for name in names_in(row["loss"])] == list(LOSSES)
    for row in rows:
        (name,) = names_in(row["loss"])
        unit = describe_loss(name, LOSSES[name]).unit
        assert row["mean over"] == ("what its parts are" if unit == VARIES else unit), name
        cited = re.findall(r"arXiv\s+(\d+\.\d+)", LOSSES[name].__doc__ or "")
        assert re.findall(r"\[(\d+\.\d+)\]", row.get("source", "")) == cited, name


def test_every_setting_has_its_default() -> None:
    listed: dict[str, dict[str, str]] = defaultdict(dict)
    for losses, settings in families():
        family = [name for row in losses for name in names_in(row["loss"])]
        for row in settings:
            (setting,) = names_in(row["setting"])
            for name in family if row["of"] == "all" else names_in(row["of"]):
                assert setting not in listed[name], f"{name} has {setting} twice"
                listed[name][setting] = row["default"]
    for name, target in LOSSES.items():
        expected = {
            setting.name: "required" if setting.required else str(setting.default)
            for setting in describe_loss(name, target).settings
        }
        assert listed[name] == expected, name
