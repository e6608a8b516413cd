"""docs/trl.md lists what the code refuses or leaves unserved."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from markdown_pages import DOCS, ROOT, names_in, section, tables

import kvpref

PAGE = DOCS / "trl.md"


def test_every_refusal_is_listed_with_its_trainers() -> None:
    pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
    from kvpref.integrations import trl as kvpref_trl

    (table,) = [table for table in tables(section(PAGE, "TRL's trainers")) if "option" in table[0]]
    listed = {row["option"].strip("`"): row["trainers"] for row in table}
    every = {name for name in kvpref_trl.__all__ if name.endswith("Trainer")}
    expected = {refusal.name: refusal.trainers for refusal in kvpref_trl.REFUSALS}
    assert {name: every if cell == "all" else set(names_in(cell)) for name, cell in listed.items()} == expected
    for refusal in kvpref_trl.REFUSALS:
        (reason,) = [row["why"] for row in table if row["option"].strip("`") == refusal.name]
        assert refusal.reason.startswith(reason)


def test_every_replacement_is_listed() -> None:
    pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
    from kvpref.integrations import trl as kvpref_trl

    (table,) = [table for table in tables(section(PAGE, "TRL's trainers")) if "asked for" in table[0]]
    listed = {row["asked for"].strip("`"): row["instead"] for row in table}
    assert listed == {item.name: item.runs for item in kvpref_trl.REPLACEMENTS}


def reasons_in_code() -> set[str]:
    """What `UnservedError` is raised with, where it is a text of its own and not an argument's name."""
    found = set()
    for path in (ROOT / "kvpref").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UnservedError":
                found |= {item.value for item in node.args if isinstance(item, ast.Constant)}
    return found


def test_every_reason_for_an_unserved_call_is_listed() -> None:
    (table,) = [table for table in tables(section(PAGE, "`shared_prefix`")) if "reason" in table[0]]
    listed = {name for row in table if "the name of" not in row["reason"] for name in names_in(row["reason"])}
    assert len(listed) > 10
    assert listed == reasons_in_code()


def test_the_bars_are_the_defaults() -> None:
    text = section(PAGE, "`shared_prefix`")
    stated = {name: re.search(rf"`{name}` \(([\d%]+)\)", text) for name in ("min_saved", "min_saved_tokens")}
    parameters = inspect.signature(kvpref.shared_prefix).parameters
    defaults = {name: parameters[name].default for name in stated}
    found = {name: match[1] for name, match in stated.items() if match is not None}
    assert found == {
        "min_saved": f"{defaults['min_saved']:.0%}",
        "min_saved_tokens": str(defaults["min_saved_tokens"]),
    }


def test_every_family_with_images_is_listed() -> None:
    from kvpref.models.vision.splitting import SPLIT_FAMILIES

    (paragraph,) = re.findall(r"Pixel inputs can be split into images.*?\n\n", PAGE.read_text(), re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", paragraph)) == SPLIT_FAMILIES
