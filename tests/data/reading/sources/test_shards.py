"""Files of a folder, by split; patterns; one kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpref.data.reading.sources.shards import find_splits, match_files, one_kind, pattern_folder
from kvpref.errors import InputError

KNOWN = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".parquet": "Parquet"}


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


LAYOUTS = {
    "no names of splits": {"b.jsonl": "train", "a/c.jsonl": "train"},
    "words": {"train.jsonl": "train", "my-dev-2.jsonl": "validation", "eval_1.jsonl": "test"},
    "folders": {"training/a.jsonl": "train", "valid/a.jsonl": "validation", "valid/b.jsonl": "validation"},
    "shards of a hub": {
        "data/train_prefs-00000-of-00002.parquet": "train_prefs",
        "data/train_prefs-00001-of-00002.parquet": "train_prefs",
        "data/test_sft-00000-of-00001.parquet": "test_sft",
    },
    "words inside words": {"contest.jsonl": "train", "trainer.jsonl": "train"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_are_those_that_datasets_finds(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    make(tmp_path, *layout)
    splits = find_splits(tmp_path, KNOWN)
    assert {str(path.relative_to(tmp_path)): split for split, paths in splits.items() for path in paths} == layout
    data_files = pytest.importorskip("datasets.data_files")
    patterns = data_files.get_data_patterns(str(tmp_path))
    theirs = data_files.DataFilesDict.from_patterns(patterns, base_path=str(tmp_path))
    assert {str(Path(path).relative_to(tmp_path)): str(split) for split in theirs for path in theirs[split]} == layout


def test_what_is_no_data_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.ndjson", ".cache/c.jsonl", "__old__/d.jsonl", "README.md", "notes.txt", "picture.png")
    assert [path.name for path in find_splits(tmp_path, KNOWN | {".md": "x"})["train"]] == ["a.ndjson", "b.jsonl"]


def test_files_of_no_clear_split_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "more.jsonl")
    with pytest.raises(
        InputError, match=r"train\.jsonl is named after a split and more\.jsonl is not; say which files"
    ):
        find_splits(tmp_path, KNOWN)


def test_packed_shards_are_not_lost_in_silence(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.jsonl.bz2")
    files = find_splits(tmp_path, KNOWN)["train"]
    with pytest.raises(InputError, match=r"b\.jsonl\.bz2: a packed file that is not read"):
        one_kind(files, KNOWN, str(tmp_path))


def test_kinds(tmp_path: Path) -> None:
    assert one_kind([Path("a.ndjson"), Path("b.jsonl.gz")], KNOWN, "x") == ".ndjson"
    with pytest.raises(InputError, match=r"JSON lines \(a\.jsonl\) and Parquet \(b\.parquet\)"):
        one_kind([Path("a.jsonl"), Path("b.parquet"), Path("c.jsonl")], KNOWN, "x")


def test_patterns(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.jsonl", "in/c.jsonl")
    assert [path.name for path in match_files(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in match_files(f"{tmp_path}/**/*.jsonl")] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert pattern_folder(f"{tmp_path}/i*/c.jsonl") == tmp_path
    assert pattern_folder("*.jsonl") == Path()
