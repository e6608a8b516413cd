"""`kvpref data tree`."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line_in_process import fail, run

from kvpref.cli.data_tree import find_row
from kvpref.errors import InputError

IDS = [
    "a/x.jsonl:1 (airline-1)",
    "a/x.jsonl:2 (7)",
    "a/x.jsonl:7 (airline-2)",
    "a/x.jsonl:8 (twice)",
    "a/x.jsonl:9 (twice)",
]


def test_a_row_is_printed_and_drawn(
    pairs_file: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra kvpref[plot]")
    output = tmp_path / "tree.svg"
    run("data", "tree", pairs_file, "--tokenizer", tokenizer_dir, "--id", "3", "--output", output)
    lines = capsys.readouterr().out.splitlines()
    # 18 words of prompt, two of each response and its EOS.
    assert lines[0] == "pairs.jsonl:3: 2 responses"
    assert lines[1].startswith("42 tokens, 24 unique: data saving 1.75x; 2 passes; 6 tokens scored")
    assert lines[2] == "0 to 18; 0 scored; in 2 of 2 sequences"
    assert lines[3:5] == ["├─ 18 to 21; 3 scored: response 1, chosen", "└─ 18 to 21; 3 scored: response 2, rejected"]
    assert lines[5] == f"written: {output}"
    assert "pairs.jsonl:3: 2 responses" in output.read_text()


def test_an_unknown_row_is_refused(
    pairs_file: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tree.svg"
    error = fail(capsys, "data", "tree", pairs_file, "--tokenizer", tokenizer_dir, "--id", "x", "--output", output)
    assert "there is no such row; there are pairs.jsonl:1, pairs.jsonl:2" in error
    assert error.endswith("and 19 more")
    assert not output.exists()


def test_another_suffix_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    error = fail(capsys, "data", "tree", "org/data", "--tokenizer", "org/model", "--output", "tree.gif")
    assert error == "error: tree.gif: pictures end in one of .svg, .png, .pdf; rename the file"


@pytest.mark.parametrize(
    ("wanted", "index"),
    [("airline-2", 2), ("a/x.jsonl:2", 1), ("x.jsonl:8", 3), ("8", 3), ("7", 1)],
)
def test_rows_are_found_by_id_then_place_then_line(wanted: str, index: int) -> None:
    assert find_row(IDS, wanted) == index


def test_one_of_several_rows_must_be_named() -> None:
    with pytest.raises(InputError, match=r"there are 2 such rows; give one of their places: a/x.jsonl:8, a/x.jsonl:9"):
        find_row(IDS, "twice")
    with pytest.raises(InputError, match=r"no such row; there are airline-1, 7, airline-2, twice, twice$"):
        find_row(IDS, "airline")
