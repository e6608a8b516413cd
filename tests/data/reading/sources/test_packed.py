"""Packed files, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pyarrow
import pytest

from kvpref.data.reading.files import read_rows
from kvpref.data.reading.sources.packed import inner_suffix, read_bytes, read_lines
from kvpref.errors import InputError

LINES = [f'{{"prompt": "{random.Random(number).random()}"}}\n'.encode() for number in range(30_000)]


def pack(path: Path, content: bytes) -> bytes:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pyarrow.output_stream(path, compression="zstd") as file:
            file.write(content)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_lines_and_bytes_are_those_of_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl.{suffix}"
    pack(path, b"\xef\xbb\xbf" + b"".join(LINES))
    assert list(read_lines(path)) == LINES
    assert read_bytes(path) == b"".join(LINES)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_ends_too_early_is_named_with_the_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl.{suffix}"
    packed = pack(path, b"".join(LINES))
    path.write_bytes(packed[: len(packed) // 2])
    rows = []
    with pytest.raises(InputError) as caught:
        rows.extend(read_rows(path))
    found = str(caught.value)
    line = int(found.removeprefix(f"{path}:").partition(":")[0])
    assert 100 < line < 30_000
    assert "the packed file is damaged or ends too early" in found
    read = list(zip(range(line - 1), read_lines(path), strict=False))
    assert [row for _, row in read] == LINES[: line - 1]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_what_is_not_packed_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.json.{suffix}"
    path.write_bytes(b"".join(LINES))
    with pytest.raises(InputError, match=rf"rows\.json\.{suffix}:1: the packed file is damaged"):
        list(read_rows(path))


def test_suffixes() -> None:
    names = ("a.jsonl", "a.JSONL.GZ", "a.csv.zst", "a.bz2", "a.tar.xz", "gz")
    assert [inner_suffix(Path(name)) for name in names] == [".jsonl", ".jsonl", ".csv", ".bz2", ".xz", ""]
