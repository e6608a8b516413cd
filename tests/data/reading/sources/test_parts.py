"""Names with splits and slices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpref.data.reading.sources.parts import Part, Slice, is_pattern, parse_part, parse_source
from kvpref.errors import InputError


def never() -> int:
    raise AssertionError("counting was not needed")


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        ("[:1_000]", None, (0, 1000)),
        ("[5:]", None, (5, None)),
        ("[:]", None, (0, None)),
        ("[10%:20%]", 55, (6, 11)),
        ("[:-5]", 12, (0, 7)),
        ("[-5:-2]", 12, (7, 10)),
        ("[-50%:]", 10, (5, 10)),
        ("[90%:]", 5, (4, 5)),
    ],
)
def test_slices_mean_what_they_mean_to_datasets(
    text: str, number: int | None, expected: tuple[int, int | None]
) -> None:
    found = Slice.parse(text).bounds(never if number is None else lambda: number)
    assert found == expected
    if number is None or text == "[:-5]":
        return
    datasets = pytest.importorskip("datasets")
    (absolute,) = datasets.ReadInstruction.from_spec(f"train{text}").to_absolute({"train": number})
    assert found == (absolute.from_, absolute.to)


@pytest.mark.parametrize("text", ["[1]", "[]", "[:3", "[a:b]", "[1:2:3]", "[10:20%]", "[1.5:2]"])
@pytest.mark.parametrize("name", ["{}", "{}:", "{}:train", "owner/name:train", "owner/name"])
def test_other_slices_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "a.jsonl").touch()
    expected = rf"^cannot read the slice '{re.escape(text)}'; expected \[FROM:TO\]"
    with pytest.raises(InputError, match=expected):
        parse_source(name.format(tmp_path / "a.jsonl") + text)
    with pytest.raises(InputError, match=expected):
        parse_part(f"train{text}")


def test_a_pattern_may_end_in_brackets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    pattern = f"{tmp_path}/a.json[l]"
    assert parse_source(pattern) == (pattern, Part())
    assert parse_source(f"{pattern}[:2]") == (pattern, Part(None, Slice(None, 2)))


def test_names_end_where_what_exists_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.jsonl", "c.jsonl", "d[1:2]"):
        Path(name).touch()
    some = Slice(1, 2)
    assert parse_source("a:b.jsonl") == ("a:b.jsonl", Part())
    assert parse_source("c.jsonl[1:2]") == ("c.jsonl", Part(None, some))
    assert parse_source("c.jsonl:[1:2]") == ("c.jsonl", Part(None, some))
    assert parse_source("c.jsonl:train[1:2]") == ("c.jsonl", Part("train", some))
    assert parse_source("d[1:2]") == ("d[1:2]", Part())
    assert parse_source("owner/name:train_prefs[:1000]") == ("owner/name", Part("train_prefs", Slice(None, 1000)))
    assert parse_source("owner/name", "[:50%]") == ("owner/name", Part(None, Slice(None, 50, in_percent=True)))
    assert parse_source("s3://bucket/name") == ("s3://bucket/name", Part())
    assert parse_source("data/train-[0-9].parquet") == ("data/train-[0-9].parquet", Part())


def test_a_part_is_given_once() -> None:
    with pytest.raises(InputError, match="names its part itself, and the split is given as 'test' too"):
        parse_source("owner/name:train", "test")


def test_several_splits_are_several_sources() -> None:
    with pytest.raises(InputError, match="name each of them"):
        parse_part("train+test")


def test_patterns(tmp_path: Path) -> None:
    (tmp_path / "[a]").touch()
    assert not is_pattern(str(tmp_path / "[a]"))
    assert is_pattern(str(tmp_path / "[b]"))
    assert not is_pattern("owner/name")
