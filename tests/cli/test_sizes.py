"""Memory sizes as users write them."""

from __future__ import annotations

import pytest

from kvpref.cli.sizes import parse_bytes, size_in_words
from kvpref.errors import InputError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 * GIB),
        ("80", 80 * GIB),
        ("0.5", GIB // 2),
        ("24 gb", 24 * 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("1024B", 1024),
        ("0", 0),
    ],
)
def test_a_bare_number_is_gib(text: str, expected: int) -> None:
    assert parse_bytes(text, "--x") == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "80 parsecs", "80 GiB GiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(InputError, match="--x: expected a size"):
        parse_bytes(text, "--x")


@pytest.mark.parametrize(("num_bytes", "words"), [(3 * 2**29, "1.5 GiB"), (2**29, "0.5 GiB"), (2**20, "1 MiB")])
def test_sizes_in_words(num_bytes: int, words: str) -> None:
    assert size_in_words(num_bytes) == words
