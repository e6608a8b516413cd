"""Names of data in files of settings: found from any folder, with their splits and slices."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpref.cli.source_paths import absolute_source, absolute_sources, same_sources


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "loss.py", "data/b.jsonl"):
        Path(name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl[:10]", "a.jsonl:train[:10%]", "a.jsonl:[5:]", "data:test", "data/*.jsonl", "loss.py:function"],
)
def test_paths_become_absolute_and_the_rest_stays(here: Path, name: str) -> None:
    assert absolute_source(name) == f"{here}/{name}"


@pytest.mark.parametrize("name", ["owner/name", "owner/name:train[:10]", "no/*.jsonl", "missing.jsonl"])
def test_other_names_stay(name: str) -> None:
    assert absolute_source(name) == name


def test_lists(here: Path) -> None:
    assert absolute_sources(["a.jsonl", "owner/name"]) == [f"{here}/a.jsonl", "owner/name"]
    assert same_sources(["data/../a.jsonl[:3]"], "a.jsonl[:3]")
    assert not same_sources(["a.jsonl", "data"], ["data", "a.jsonl"])
    assert not same_sources("a.jsonl", "a.jsonl[:3]")
