"""Blocks of ranges that begin alike: each pair of a query and a key once, in ranges that do not overlap."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvpref.prefix.blocks import Pair, block_pairs, nested_blocks

# Per run of keys: its rows, and after how many of them which number of queries branch off.
runs = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), max_size=6)), max_size=4
)


@given(runs)
def test_each_query_sees_the_beginning_of_its_run_once(given_runs: list[tuple[int, list[tuple[int, int]]]]) -> None:
    pairs: list[Pair] = []
    query = key = 0
    most = 0
    for num_rows, branches in given_runs:
        own = sorted((min(place, num_rows), num_queries) for place, num_queries in branches)
        most = max(most, len({place for place, _ in own}))
        for place, num_queries in own:
            pairs.append(Pair(query, num_queries, key, place))
            query += num_queries
        key += num_rows
    found: set[tuple[int, int]] = set()
    blocks = list(nested_blocks(pairs, (query, key), source=3))
    assert len(blocks) <= most.bit_length()
    for block in blocks:
        assert (block.source, block.shape, block.key_starts) == (3, "rectangle", None)
        assert (block.cu_seqlens_q[-1], block.cu_seqlens_k[-1]) == (query, key)
        assert all(before <= after for before, after in pairwise(block.cu_seqlens_k))
        row = 0
        for num_queries, num_keys, first in block_pairs(block):
            met = {(q, k) for q in range(row, row + num_queries) for k in range(first, first + num_keys)}
            assert not met & found
            found |= met
            row += num_queries
    expected = {
        (q, k)
        for pair in pairs
        for q in range(pair.query, pair.query + pair.num_queries)
        for k in range(pair.key, pair.key + pair.num_keys)
    }
    assert found == expected
