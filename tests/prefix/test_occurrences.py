"""How often tokens that run once occur in the sequences, counted over whole sequences."""

from __future__ import annotations

import pytest
from sample_groups import SCENARIOS

from kvpref.prefix.building import build_tree
from kvpref.prefix.chunks import build_chunks
from kvpref.prefix.levels import build_layout
from kvpref.prefix.occurrences import tree_occurrences


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_token_of_every_sequence_counts_once(scenario: str) -> None:
    groups = SCENARIOS[scenario]()
    sequences = [sequence for group in groups for sequence in group.sequences]
    tree = build_tree([sequence.input_ids for sequence in sequences])
    found = tree_occurrences(tree)
    assert found.owners == (0,)
    assert sum(found.lengths) == tree.num_unique_tokens
    total = sum(length * count for length, count in zip(found.lengths, found.counts[0], strict=True))
    assert total == sum(map(len, sequences))


@pytest.mark.parametrize("max_tokens", [1, 3, None])
def test_chunks_count_for_each_micro_batch(max_tokens: int | None) -> None:
    sequences = [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 9, 9), (7, 8)]
    tree = build_tree(sequences)
    layout = build_layout(tree, [[False] * len(sequence) for sequence in sequences])
    chunks = build_chunks(tree, layout, [0, 0, 1, 1], max_tokens=max_tokens).chunks
    totals = {0: 0, 1: 0}
    for chunk in (chunk for several in chunks.values() for chunk in several):
        assert sum(chunk.occurrences.lengths) == len(chunk)
        for owner, counts in zip(chunk.occurrences.owners, chunk.occurrences.counts, strict=True):
            totals[owner] += sum(n * count for n, count in zip(chunk.occurrences.lengths, counts, strict=True))
    assert totals == {0: 8, 1: 6}
