"""Which pairs go into one launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpref.ops.attention import get_backend, splitting
from kvpref.ops.attention.backends import efficient
from kvpref.ops.attention.splitting import CallLimits, PairRange, split_pairs

FLASH_ATTENTION = ("cuda_flash", "flash_attn", "flash_attn_3", "flash_attn_4", "xformers")
LIMITS = CallLimits(num_heads=32, row_bytes=0, pair_rows=0)


def key_of(lengths_q: list[int], lengths_k: list[int] | None = None) -> bytes:
    rows = [np.cumsum([0, *lengths]) for lengths in (lengths_q, lengths_k or lengths_q)]
    return np.stack(rows).astype(np.int32).tobytes()


def thread_blocks(lengths: list[int], ranges: tuple[PairRange, ...]) -> int:
    """Of all launches, per head, for one side."""
    return sum((stop - start) * max(-(-length // 128) for length in lengths[start:stop]) for start, stop in ranges)


lists_of_lengths = st.lists(st.sampled_from([0, 1, 3, 130, 5000, 70000]), min_size=1, max_size=40).filter(any)


@given(lists_of_lengths, st.data(), st.sampled_from([None, 1, 1000, 100_000]))
def test_every_pair_is_in_one_launch_and_starts_where_it_may(
    lengths_q: list[int], data: st.DataObject, max_start_row: int | None
) -> None:
    size = len(lengths_q)
    lengths_k = data.draw(st.lists(st.sampled_from([0, 2, 900]), min_size=size, max_size=size))
    pair_rows = data.draw(st.sampled_from([None, 0, 128]))
    limits = CallLimits(num_heads=32, row_bytes=16384, pair_rows=pair_rows, max_start_row=max_start_row)
    ranges = split_pairs(key_of(lengths_q, lengths_k), limits)
    assert [pair for start, stop in ranges for pair in range(start, stop)] == list(range(size))
    if max_start_row is not None:
        padding = pair_rows or 0
        for start, stop in ranges:
            rows_before_the_last = sum(lengths_q[start : stop - 1]) + padding * (stop - 1 - start)
            assert rows_before_the_last < max_start_row


def test_a_pair_that_starts_at_the_bound_begins_a_launch() -> None:
    """One row earlier it is still in: 2^31 / (32 heads x 128) rows is the first that does not fit in 32 bits."""
    limits = CallLimits(num_heads=1, row_bytes=0, pair_rows=0, max_start_row=2**31 // (32 * 128))
    assert limits.max_start_row == 524288
    assert split_pairs(key_of([524287, 5]), limits) == ((0, 2),)
    assert split_pairs(key_of([524288, 5]), limits) == ((0, 1), (1, 2))
    assert split_pairs(key_of([600000]), limits) == ((0, 1),), "a single pair starts at 0, however long"


def test_equal_lengths_stay_together() -> None:
    assert split_pairs(key_of([500] * 1000), LIMITS) == ((0, 1000),)


@pytest.mark.parametrize("place", [0, 1700, 4000])
def test_one_long_segment_beside_many_short_ones_goes_by_itself(place: int) -> None:
    lengths = [50] * 4000
    lengths.insert(place, 32768)
    ranges = split_pairs(key_of(lengths), LIMITS)
    assert (place, place + 1) in ranges
    assert len(ranges) <= 3
    needed = sum(-(-length // 128) for length in lengths)
    assert thread_blocks(lengths, ranges) == needed
    assert thread_blocks(lengths, ((0, len(lengths)),)) > 200 * needed


def test_long_key_ranges_count_as_long_queries_do() -> None:
    short, long = [20] * 3000, [20000] * 2
    ranges = split_pairs(key_of([10] * 3002, short + long), LIMITS)
    assert ranges == ((0, 3000), (3000, 3002))


def test_a_launch_that_saves_little_is_not_made() -> None:
    assert split_pairs(key_of([50, 1000, 50, 3000]), LIMITS) == ((0, 4),)


def wasted_bytes(lengths: list[int], start: int, stop: int, limits: CallLimits) -> int:
    own = lengths[start:stop]
    rows = len(own) * limits.pair_rows if limits.pair_rows is not None else len(own) * max(own) - sum(own)
    return rows * limits.row_bytes


@pytest.mark.parametrize("pair_rows", [None, 128], ids=["padded to the longest", "a tile for each pair"])
def test_padding_of_the_workspace_is_bounded(pair_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "MIN_EMPTY_BLOCKS", 10**9)  # the workspace alone
    lengths = [10] * 4096 + [5000]
    limits = CallLimits(num_heads=32, row_bytes=32 * 129 * 4, pair_rows=pair_rows)
    assert wasted_bytes(lengths, 0, len(lengths), limits) > 8 * splitting.MAX_WASTED_BYTES
    split_pairs.cache_clear()
    ranges = split_pairs(key_of(lengths), limits)
    split_pairs.cache_clear()
    for start, stop in ranges:
        useful = sum(lengths[start:stop]) * limits.row_bytes
        assert wasted_bytes(lengths, start, stop, limits) <= max(splitting.MAX_WASTED_BYTES, useful)
    assert len(ranges) <= (2 if pair_rows is None else 64)


def test_padding_may_be_as_much_as_what_is_useful() -> None:
    """A launch for each pair would save less than it costs."""
    limits = CallLimits(num_heads=1, row_bytes=2**20, pair_rows=128)
    assert split_pairs(key_of([128] * 16), limits) == ((0, 16),)
    assert len(split_pairs(key_of([127] * 16), limits)) > 1


def test_limits_of_the_backends() -> None:
    query = torch.empty(5, 32, 80, dtype=torch.bfloat16, device="meta")
    # fp32 sums in 96 columns and a row sum, a tile of rows more for each pair.
    expected = CallLimits(num_heads=32, row_bytes=32 * 97 * 4, pair_rows=128, max_start_row=2**31 // (32 * 96))
    assert {get_backend(name).call_limits(query) for name in FLASH_ATTENTION} == {expected}
    row_bytes = efficient.workspace_bytes(1, 32, 128, 80) // 128
    assert get_backend("efficient").call_limits(query) == CallLimits(num_heads=32, row_bytes=row_bytes)


def test_the_workspace_of_the_memory_efficient_backward() -> None:
    """Tiles of 64 x 64 up to head dim 64, 128 x 64 up to 96, 128 x 128 up to 128, 64 x 64 beyond, and counters."""
    assert efficient.workspace_bytes(1, 1, 1, 64) == (64 * 64 + 4) * 4
    assert efficient.workspace_bytes(3, 8, 65, 64) == 3 * 8 * 2 * (64 * 64 + 4) * 4
    assert efficient.workspace_bytes(1, 1, 129, 80) == 2 * 2 * (128 * 64 + 4) * 4
    assert efficient.workspace_bytes(1, 1, 128, 128) == (128 * 128 + 4) * 4
    assert efficient.workspace_bytes(1, 1, 128, 256) == 2 * 4 * (64 * 64 + 4) * 4
